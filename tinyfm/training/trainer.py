"""The training loop, for any model and any data.

It asks of a model `loss(batch, generators) -> (loss, metrics)`, of data `batch(step, rows)`,
`val_batches(rows)`, `metrics(val_loss)`, and knows no family. One step is

    for each micro-batch of this rank's rows:  backward of loss * weight
    add up losses and weights over micro-batches and ranks
    gradients / total weight, clipped;  optimizers step;  moving average follows

so that the update is that of the whole batch, however it was cut, also where rows weigh unequally.
Everything random in step s comes from (seed, s) and a row's place in the batch, or, for dropout,
its rank's: nothing random is saved, and a run that was stopped goes on as if it had not been.

A step whose loss or gradient is not finite, or a spike, is skipped; after several in a row the run
ends, and keeps its last checkpoint. SIGTERM and Ctrl-C end the step or evaluation, save, and leave.
A checkpoint is copied and then written while training goes on; the next one waits for it, and so
does the end.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tinyfm.common import device as machine
from tinyfm.common import files
from tinyfm.common.seeds import mix, row_generators
from tinyfm.training import checkpoint, distributed, parallel
from tinyfm.training.checkpoint import Saver, copy_to_cpu
from tinyfm.training.log import Logbook, summary_writer
from tinyfm.training.optim import (
    EMA,
    OptimConfig,
    build_optimizers,
    lr_factor,
    scale_and_clip,
    set_lr,
)
from tinyfm.training.parallel import Parallel


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000  # updates
    batch_size: int = 32  # rows in an update, over all processes
    micro_batch_size: int = 0  # rows in a forward pass: less memory, same update; 0 = all
    seed: int = 0  # of the weights, the order of the data and all else that is random
    eval_every: int = 250  # steps between evaluations, samples and checkpoints; 0 = only at the end
    log_every: int = 10  # steps between lines in metrics.jsonl
    keep: int = 2  # latest checkpoints to keep, beside the best
    device: str = "auto"  # cpu, cuda, mps, or auto
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the matrix products
    compile: bool = False  # torch.compile; falls back to eager if that fails
    parallel: Literal["ddp", "fsdp"] = "ddp"  # each process has the whole model, or a share of it
    shard_size: int = 0  # fsdp: neighbours that share one copy of the model; 0 = all processes
    activation_checkpointing: bool = False  # compute blocks twice: less memory, a third more time
    tensorboard: bool = False  # also log for TensorBoard
    patience: int = 5  # skipped steps in a row that end the run
    spike_sigmas: float = 0.0  # skip steps that many deviations above the last ones; 0 = none

    def __post_init__(self):
        for name in ("steps", "batch_size", "log_every", "keep", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("micro_batch_size", "eval_every", "seed", "shard_size", "spike_sigmas"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or above")


def weighted(loss: Tensor, metrics: dict[str, Any], rows: int) -> tuple[Tensor, Tensor]:
    """(loss * weight, weight) of a micro-batch: what adds up, as means do not."""
    weight = torch.as_tensor(metrics.get("weight", rows), device=loss.device, dtype=torch.float32)
    return loss * weight, weight


class Trainer:
    """Trains `model` on `data` into the run directory `out`.

    write(folder) adds files to a checkpoint: the config, a tokenizer.
    score(model) gives numbers beside the validation loss, at each evaluation.
    show(model, folder, step) writes samples to a folder and returns a line to print.

    A model whose loss compares the rows of a batch says `whole_batch`. It gets all rows of a rank
    at once, cuts them itself as its `rows_at_once` says, and calls its `gather` for the others'.
    """

    def __init__(self, model: nn.Module, data, train: TrainConfig, optim: OptimConfig, out: Path,
                 write: Callable[[Path], None] | None = None,
                 score: Callable[[nn.Module], dict[str, float]] | None = None,
                 show: Callable[[nn.Module, Path, int], str] | None = None,
                 world: distributed.World = distributed.World()):  # noqa: B008  # fmt: skip
        self.data, self.train, self.optim, self.out = data, train, optim, out
        self.write, self.score, self.show, self.world = write, score, show, world
        if train.batch_size % world.size:
            raise ValueError(
                f"batch_size {train.batch_size} is not divisible by the {world.size} processes; "
                f"use {max(1, round(train.batch_size / world.size)) * world.size}"
            )
        if train.tensorboard:
            summary_writer()  # now, rather than when the run directory is made
        self.device = machine.choose_device(train.device)
        self.dtype = machine.choose_dtype(train.dtype, self.device)
        machine.keep_freed_memory()
        self.model = model
        self.rows_at_once = train.micro_batch_size or train.batch_size // world.size
        self.whole_batch = getattr(model, "whole_batch", False)
        if self.whole_batch:
            model.rows_at_once, model.rank = train.micro_batch_size, world.rank
            model.gather = distributed.gather
        if train.activation_checkpointing:
            parallel.checkpoint_activations(model)
        share = (self.dtype, train.shard_size) if train.parallel == "fsdp" else ()
        self.call = Parallel(model, world, self.device, train.compile, share)
        self.optimizers = build_optimizers(model, optim)
        self.ema = EMA(model, optim.ema_half_life) if optim.ema_half_life else None
        self.saver = Saver()
        # Plain numbers, saved with a checkpoint.
        self.counters = {"step": 0, "best_step": 0, "best_loss": math.inf}
        self.guard = Guard(train.patience, train.spike_sigmas, self.counters)
        self.scores: dict[str, float] = {}  # of this step; empty if it was not evaluated
        self.signals = distributed.Signals()

    # ---- one step --------------------------------------------------------------------------------

    def micro_batches(self) -> list[range]:
        """This rank's rows of the global batch, cut as micro_batch_size says."""
        rows = self.world.rows(self.train.batch_size)
        size = len(rows) if self.whole_batch else self.rows_at_once
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
            with self.call.exchanging(last=rows is micro_batches[-1]):
                with self.autocast():
                    generators = row_generators(self.train.seed, step, rows)
                    loss, metrics = self.call(batch, generators)
                loss, weight = weighted(loss, metrics, len(rows))
                loss.backward()
            sums += torch.stack((loss.detach(), weight))
        return sums

    def update(self, step: int) -> tuple[float, float]:
        """One step; returns (loss, gradient norm). Changes no weight if the guard refuses them."""
        torch.manual_seed(mix(self.train.seed, step, -1 - self.world.rank))  # for dropout
        set_lr(self.optimizers, lr_factor(step, self.train.steps, self.optim))
        total, weight, asked = self.signals.total(self.backward(step))
        # DDP has averaged over ranks what is to be summed, hence world.size.
        norm = scale_and_clip(self.model, self.world.size / weight, self.optim.clip)
        loss, norm, asked = torch.stack((total / weight, norm, asked)).tolist()
        self.signals.agree(asked)
        if self.guard.passes(loss, norm):
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
        """Mean loss over the validation split, shared out over ranks; other scores beside it.

        A signal to stop ends it early: then there is nothing to report. Raises FloatingPointError
        if the loss is not finite.
        """
        self.model.eval()
        sums, scores, together = torch.zeros(2, device=self.device), {}, self.call.sharded
        rows = self.train.batch_size if self.whole_batch else self.rows_at_once
        with self.averaged(), self.autocast():
            for i, batch, counts in self.world.share(self.data.val_batches(rows), together):
                if self.signals.asked(together):
                    break
                n, at = len(next(iter(batch.values()))), i * rows
                generators = row_generators(self.train.seed, -1, range(at, at + n))
                loss, metrics = self.call.loss(self.load(batch), generators)
                sums += counts * torch.stack(weighted(loss, metrics, n))
            if self.score and not self.signals.asked(together):
                with self.call.whole():
                    scores = self.score(self.model)
        self.model.train()
        total, weight, asked = self.signals.total(sums).tolist()
        self.signals.agree(asked)
        if asked:
            return {}
        loss = total / weight
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the validation loss is {loss} at step {self.counters['step']}; {self.advice()}"
            )
        return {"val_loss": loss, **self.data.metrics(loss), **scores}

    # ---- checkpoints -----------------------------------------------------------------------------

    def save(self) -> None:
        """Copy what a checkpoint of this step holds, and begin to write it; remove those that are
        neither late nor best. Raises CheckpointError if the one before has failed."""
        self.saver.wait()
        step, loss = self.counters["step"], self.scores.get("val_loss", math.inf)
        if loss < self.counters["best_loss"]:
            self.counters |= {"best_loss": loss, "best_step": step}
        tensors = {"model": parallel.gather(parallel.state(self.model), self.world.first)}
        if self.ema:  # and what has no average: buffers, and what is frozen
            tensors["ema"] = tensors["model"] | parallel.gather(self.ema.average, self.world.first)
        state = checkpoint.collect_state(self.model, self.optimizers, self.counters)
        state, meta, best = copy_to_cpu(state), {**self.scores}, self.counters["best_step"]

        def write(group) -> None:
            checkpoint.save(self.out, step, tensors, state, meta, self.write, group)
            if self.world.first:
                checkpoint.prune(self.out, self.train.keep, best)

        self.saver.start(write)

    def resume(self) -> Path:
        """Go on from the newest checkpoint. Raises CheckpointError if it cannot be trusted."""
        folder = checkpoint.find(self.out)
        parallel.load(self.model, files.load_tensors(folder))
        if self.ema:
            self.ema.load(parallel.cut(files.load_tensors(folder, "ema"), self.ema.average))
        checkpoint.restore_state(folder, self.model, self.optimizers, self.counters)
        self.scores = files.read_json(folder / "meta.json")
        del self.scores["step"]
        return folder

    # ---- the run ---------------------------------------------------------------------------------

    def due(self) -> bool:
        """Whether this step is one to evaluate: the first, every so often, the last."""
        step, every = self.counters["step"], self.train.eval_every
        return step in (0, self.train.steps) or (every > 0 and step % every == 0)

    def fit(self) -> dict[str, float]:
        """Train to the last step, or until a signal; returns the last evaluation's numbers.

        Raises FloatingPointError after `patience` skipped steps in a row.
        """
        start, train = self.counters["step"], self.train
        log = Logbook(self.out, train.steps, start, self.world.first, train.tensorboard)
        with contextlib.closing(log), self.signals, contextlib.closing(self.saver):
            if self.due() and not self.scores:  # a new run, or one that was stopped evaluating
                self.report(log)
            clock, since = time.perf_counter(), start
            while self.counters["step"] < train.steps and not self.signals.agreed:
                loss, norm = self.update(self.counters["step"])
                if self.guard.skipped:
                    self.guard.tell(self.counters["step"], loss, norm, log.say, self.advice())
                step = self.counters["step"] = self.counters["step"] + 1
                log.bar.update()
                if (step % train.log_every == 0 or step == train.steps) and math.isfinite(loss):
                    speed = self.speed(step - since, time.perf_counter() - clock)
                    lr = lr_factor(step - 1, train.steps, self.optim)
                    log.add({"step": step, "loss": loss, "lr": lr, "grad_norm": norm, **speed})
                    clock, since = time.perf_counter(), step
                if self.due() or self.signals.agreed:
                    self.report(log)
                    clock, since = time.perf_counter(), step
        return self.scores

    def report(self, log: Logbook) -> None:
        """Evaluate, save, draw the curve, show samples."""
        step, self.scores = self.counters["step"], self.evaluate()
        if self.scores:
            log.add({"step": step, **self.scores})
            if step == 0:  # nothing is learnt yet: nothing to keep or to show
                return
        self.save()
        show = self.show and not self.signals.asked(self.call.sharded)
        with self.averaged(), self.call.whole() if show else contextlib.nullcontext():
            try:
                log.draw()
                if show and self.world.first:
                    log.say(self.show(self.model, self.out / "samples", step))
            except Exception as error:  # a picture is not worth a run
                log.say(f"step {step}: nothing to show, {type(error).__name__}: {error}")
        self.model.train()

    def advice(self) -> str:
        return (
            f"the checkpoints in {self.out} are from before. Try a lower --optim.lr, "
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


# FOLDED: merge this into the module's docstring
# Steps that would spoil a run: skipped, and, if they do not end, the end of it.
#
# A step whose loss or gradient norm is not finite changes no weight; nor does a spike, far above the
# steps before it, if one asks for that. Several in a row are no accident any more. All ranks decide
# alike, as the numbers that they decide by are sums over ranks.


WINDOW = 128  # steps that a new one is compared with


def is_spike(recent: list[tuple[float, float]], new: tuple[float, float], sigmas: float) -> bool:
    """Whether a step's loss or gradient norm is far above those of the steps before it: by more
    than `sigmas` standard deviations (6 in OLMo 2, arXiv 2501.00656), each at least 1% of the mean.

    None is, before half a window of steps was made.
    """
    if not sigmas or len(recent) < WINDOW // 2:
        return False
    limits = []
    for values in zip(*recent):
        mean = statistics.fmean(values)
        limits.append(mean + sigmas * max(statistics.pstdev(values, mean), abs(mean) / 100))
    return any(value > limit for value, limit in zip(new, limits))


class Guard:
    """Says which steps to make. What it has seen is in `counters`, and so in each checkpoint."""

    def __init__(self, patience: int, sigmas: float, counters: dict):
        self.patience, self.sigmas, self.counters = patience, sigmas, counters
        self.skipped = 0  # in a row
        if sigmas:
            counters["recent"] = []  # (loss, gradient norm) of the last steps

    def passes(self, loss: float, norm: float) -> bool:
        """Whether to make a step of this loss and gradient norm."""
        fine = math.isfinite(loss) and math.isfinite(norm)
        if fine and self.sigmas:
            recent = self.counters["recent"]
            fine = not is_spike(recent, (loss, norm), self.sigmas)
            # With the spikes: what stays on a new level is soon none.
            self.counters["recent"] = [*recent, (loss, norm)][-WINDOW:]
        self.skipped = 0 if fine else self.skipped + 1
        return fine

    def tell(
        self, step: int, loss: float, norm: float, say: Callable[[str], None], advice: str
    ) -> None:
        """Say that this step was skipped. Raises FloatingPointError if patience is at its end."""
        say(f"step {step}: loss {loss}, gradient norm {norm}: skipped, no weight was changed")
        if self.skipped == self.patience:
            what = "spikes" if math.isfinite(loss) and math.isfinite(norm) else "not finite"
            raise FloatingPointError(
                f"{self.skipped} steps in a row were {what}, to step {step}; {advice}"
            )
