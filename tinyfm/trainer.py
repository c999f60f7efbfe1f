"""The training loop, for any model and any data.

It asks of a model `loss(batch, generators) -> (loss, metrics)`, of data `batch(step, rows)`,
`val_batches(rows)`, `metrics(val_loss)`, and knows no family. One step is

    for each micro-batch of this rank's rows:  backward of loss * weight
    add up losses and weights over micro-batches and ranks
    gradients / total weight, clipped;  optimizers step;  moving average follows

so that the update is that of the whole batch, however it was cut, also where rows weigh unequally.
Everything random in step s comes from (seed, s) and a row's place in the batch: nothing random is
saved, and a run that was stopped goes on as if it had not been.

A step whose loss or gradient is not finite is skipped; after several in a row the run ends, and
keeps its last checkpoint. SIGTERM and Ctrl-C end the step, save, and leave.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tinyfm import checkpoint, distributed, machine
from tinyfm.logbook import Logbook
from tinyfm.optim import EMA, OptimConfig, build_optimizers, lr_factor, scale_and_clip, set_lr


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000  # updates
    batch_size: int = 32  # rows in an update, over all processes
    micro_batch_size: int = 0  # rows in a forward pass: less memory, same update; 0 = all
    seed: int = 0  # of the weights, the order of the data and all else that is random
    eval_every: int = 250  # steps between evaluations, with samples and a checkpoint; 0 = at the end
    log_every: int = 10  # steps between lines in metrics.jsonl
    keep: int = 2  # latest checkpoints to keep, beside the best
    device: str = "auto"  # cpu, cuda, mps, or auto
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the matrix products
    compile: bool = False  # torch.compile; falls back to eager if that fails
    tensorboard: bool = False  # also log for TensorBoard
    patience: int = 5  # non-finite steps in a row that end the run

    def __post_init__(self):
        for name in ("steps", "batch_size", "log_every", "keep", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("micro_batch_size", "eval_every", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or above")


def row_generators(seed: int, step: int, rows: range) -> list[torch.Generator]:
    """A random stream for each row of a batch, whichever rank or micro-batch has the row."""
    mix = ((seed + 1) * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9) % 2**63
    return [torch.Generator().manual_seed((mix + row * 0x94D049BB133111EB) % 2**63) for row in rows]


class Compiled:
    """torch.compile, or the module as it is if the first call shows that compiling fails here."""

    def __init__(self, module: nn.Module):
        self.module, self.tried = module, False
        self.call, self.no_sync = torch.compile(module), getattr(module, "no_sync", None)

    def __call__(self, *args) -> Any:
        try:
            result = self.call(*args)
        except Exception as error:
            if self.tried:
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"torch.compile does not work here ({reason}); going on without it", flush=True)
            self.call = self.module
            result = self.module(*args)
        self.tried = True
        return result


class Trainer:
    """Trains `model` on `data` into the run directory `out`.

    config is what config.json will say. write(folder) adds files to a checkpoint (a tokenizer's);
    show(model, folder, step) writes samples to a folder and returns a line to print.
    """

    def __init__(self, model: nn.Module, data, train: TrainConfig, optim: OptimConfig, out: Path,
                 write: Callable[[Path], None] | None = None,
                 show: Callable[[nn.Module, Path, int], str] | None = None,
                 world: distributed.World = distributed.World()):  # noqa: B008  # fmt: skip
        self.data, self.train, self.optim, self.out = data, train, optim, out
        self.write, self.show, self.world = write, show, world
        if train.batch_size % world.size:
            raise ValueError(
                f"batch_size {train.batch_size} is not divisible by the {world.size} processes"
            )
        self.device = machine.choose_device(train.device)
        self.dtype = machine.choose_dtype(train.dtype, self.device)
        machine.keep_freed_memory()
        self.model = model.to(self.device)
        self.optimizers = build_optimizers(model, optim)
        self.ema = EMA(model, optim.ema_half_life) if optim.ema_half_life else None
        self.call = distributed.parallel(model, world)
        if train.compile:
            self.call = Compiled(self.call)
        # Plain numbers, saved with a checkpoint.
        self.counters = {"step": 0, "best_step": 0, "best_loss": math.inf, "baseline": math.inf}
        self.skipped = 0  # non-finite steps in a row
        self.signal = 0  # the signal that asked to stop

    # ---- one step --------------------------------------------------------------------------------

    def micro_batches(self) -> list[range]:
        """This rank's rows of the global batch, cut as micro_batch_size says."""
        rows = self.world.rows(self.train.batch_size)
        size = self.train.micro_batch_size or len(rows)
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def load(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def backward(self, step: int) -> Tensor:
        """Gradients of this rank's rows, times their weight; (sum of loss * weight, weight)."""
        sums = torch.zeros(2, device=self.device)
        micro_batches = self.micro_batches()
        for rows in micro_batches:
            batch = self.load(self.data.batch(step, slice(rows.start, rows.stop)))
            last = rows is micro_batches[-1]  # only then do the ranks exchange gradients
            with contextlib.nullcontext() if last or self.world.size == 1 else self.call.no_sync():
                with self.autocast():
                    generators = row_generators(self.train.seed, step, rows)
                    loss, metrics = self.call(batch, generators)
                weight = torch.as_tensor(metrics.get("weight", len(rows)), device=self.device)
                (loss * weight).backward()
            sums += torch.stack((loss.detach() * weight, weight.float()))
        return sums

    def update(self, step: int) -> tuple[float, float]:
        """One step; returns (loss, gradient norm). Changes no weight if either is not finite."""
        torch.manual_seed((self.train.seed * 1_000_003 + step) * self.world.size + self.world.rank)
        set_lr(self.optimizers, lr_factor(step, self.train.steps, self.optim))
        sums = torch.cat((self.backward(step), torch.tensor([self.signal], device=self.device)))
        total, weight, signals = distributed.total(sums)
        # DDP has averaged over ranks what is to be summed, hence world.size.
        norm = scale_and_clip(self.model, self.world.size / weight, self.optim.clip)
        loss, norm, signals = torch.stack((total / weight, norm, signals)).tolist()
        if signals:  # whichever rank was asked to stop, all stop at this step
            self.signal = self.signal or signal.SIGTERM
        if math.isfinite(loss) and math.isfinite(norm):
            for optimizer in self.optimizers:
                optimizer.step()
            if self.ema:
                self.ema.update(self.model, step)
        for parameter in self.model.parameters():
            parameter.grad = None
        return loss, norm

    # ---- evaluation ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model has its averaged weights, if an average is kept."""
        if self.ema:
            self.ema.swap(self.model)
        try:
            yield
        finally:
            if self.ema:
                self.ema.swap(self.model)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean loss over the validation split, shared out over ranks, and what data makes of it.

        A signal to stop ends it early: then there is nothing to report.
        """
        self.model.eval()
        sums, size = torch.zeros(2, device=self.device), self.train.micro_batch_size
        rows = size or self.train.batch_size // self.world.size
        with self.averaged(), self.autocast():
            for i, batch in enumerate(self.data.val_batches(rows)):
                if self.signal:
                    break
                if i % self.world.size == self.world.rank:
                    n = len(next(iter(batch.values())))
                    generators = row_generators(self.train.seed, -1, range(i * rows, i * rows + n))
                    loss, metrics = self.model.loss(self.load(batch), generators)
                    weight = torch.as_tensor(metrics.get("weight", n), device=self.device)
                    sums += torch.stack((loss * weight, weight.float()))
        self.model.train()
        total, weight = distributed.total(sums).tolist()
        if self.signal or not weight:
            return {}
        return {"val_loss": total / weight, **self.data.metrics(total / weight)}

    # ---- checkpoints -----------------------------------------------------------------------------

    def save(self, scores: dict[str, float]) -> None:
        """Write a checkpoint of this step; remove those that are neither late nor best."""
        step = self.counters["step"]
        if scores.get("val_loss", math.inf) < self.counters["best_loss"]:
            self.counters |= {"best_loss": scores["val_loss"], "best_step": step}
        tensors = {"model": self.model.state_dict()}
        if self.ema:
            tensors["ema"] = {**tensors["model"], **self.ema.average}
        state = checkpoint.training_state(self.model, self.optimizers, self.counters)
        checkpoint.save(self.out, step, tensors, state, scores, self.write)
        if self.world.first:
            checkpoint.prune(self.out, self.train.keep, self.counters["best_step"])

    def resume(self) -> Path:
        """Go on from the newest checkpoint. Raises CheckpointError if it cannot be trusted."""
        folder = checkpoint.find(self.out)
        checkpoint.load_model(self.model, checkpoint.load_tensors(folder))
        if self.ema:
            self.ema.load(checkpoint.load_tensors(folder, "ema"))
        checkpoint.load_state(folder, self.model, self.optimizers, self.counters)
        return folder

    # ---- the run ---------------------------------------------------------------------------------

    def fit(self) -> dict[str, float]:
        """Train to the last step, or until a signal; returns the last evaluation's numbers.

        Raises FloatingPointError after `patience` non-finite steps in a row.
        """
        start, train = self.counters["step"], self.train
        log = Logbook(self.out, train.steps, start, self.world.first, train.tensorboard)
        scores: dict[str, float] = {}
        with self.caught_signals():
            if start == 0:
                scores = self.evaluate()
                self.counters["baseline"] = scores.get("val_loss", math.inf)
                log.add({"step": 0, **scores})
            clock, since = time.perf_counter(), start
            while self.counters["step"] < train.steps and not self.signal:
                loss, norm = self.update(self.counters["step"])
                self.count_skips(loss, norm, log)
                step = self.counters["step"] = self.counters["step"] + 1
                log.bar.update()
                due = train.eval_every and step % train.eval_every == 0
                if (step % train.log_every == 0 or step == train.steps) and math.isfinite(loss):
                    speed = self.speed(step - since, time.perf_counter() - clock)
                    lr = lr_factor(step - 1, train.steps, self.optim)
                    log.add({"step": step, "loss": loss, "lr": lr, "grad_norm": norm, **speed})
                    clock, since = time.perf_counter(), step
                if due or step == train.steps or self.signal:
                    scores = self.report(log)
                    clock, since = time.perf_counter(), step
        log.close()
        return scores

    def report(self, log: Logbook) -> dict[str, float]:
        """Evaluate, save, draw the curve, show samples."""
        step, scores = self.counters["step"], self.evaluate()
        if scores:
            log.add({"step": step, **scores})
        self.save(scores)
        log.draw()
        if self.show and self.world.first and not self.signal:
            with self.averaged():
                log.say(self.show(self.model, self.out / "samples", step))
            self.model.train()
        return scores

    def count_skips(self, loss: float, norm: float, log: Logbook) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            self.skipped = 0
            return
        self.skipped += 1
        step = self.counters["step"]
        log.say(f"step {step}: loss {loss}, gradient norm {norm}: skipped, no weight was changed")
        if self.skipped == self.train.patience:
            log.close()
            raise FloatingPointError(
                f"{self.skipped} steps in a row were not finite, the last was step {step}; the "
                f"checkpoints in {self.out} are from before. Try a lower --optim.lr, "
                "--train.dtype float32, or look for broken rows in the data"
            )

    def speed(self, steps: int, seconds: float) -> dict[str, float]:
        """Throughput in the data's own unit; share of the device's peak where that is known."""
        rows = steps * self.train.batch_size / seconds
        result = {f"{self.data.unit}_per_s": rows * self.data.units_per_row}
        peak = machine.peak_flops(self.device, self.dtype)
        if peak and hasattr(self.model, "flops_per_row"):
            result["mfu"] = rows * self.model.flops_per_row() / (peak * self.world.size)
        return result

    @contextlib.contextmanager
    def caught_signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C set a flag that steps and evaluation read; a second one kills."""

        def note(number, frame):
            self.signal = number
            signal.signal(number, previous[number])

        previous = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
        for number in previous:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
