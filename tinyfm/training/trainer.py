"""The training loop, for any model and any data.

The model offers `loss(batch, generators) -> (loss, metrics)`. The data offer `batch(step, rows)`,
`val_batches(rows)`, `metrics(val_loss)`, and the unit in which they are counted. The trainer knows
nothing else about either. One step is

    for each micro-batch of this rank's rows:  backward pass of loss * weight
    sum the losses and weights over micro-batches and ranks
    divide the gradients by the total weight, clip them;  optimizer step;  moving average

The update is therefore that of the whole batch, however the batch was cut, and also where rows
have unequal weights.

Everything random in step s is computed from (seed, s) and a row's place in the batch, or, for
dropout, from (seed, s) and the rank. So no random state has to be saved, and a run that was stopped
and resumed gives the same result, bit for bit, as one that was not stopped.

The loop protects a run in four ways:

- A step whose loss or gradient norm is not finite, or is a spike, is skipped: it changes no
  weight. After several skipped steps in a row the run ends with an error and keeps its last
  checkpoint. All ranks decide alike, because the numbers that decide are sums over ranks.
- SIGTERM, SIGHUP and Ctrl-C end the current step or evaluation; the trainer saves and returns.
- A checkpoint is copied in memory and written in the background while training continues. The
  next checkpoint waits until it is written, and so does the end of the run.
- A validation loss that is not finite ends the run before a checkpoint is saved.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tinyfm.common import device as machine
from tinyfm.common import files
from tinyfm.common.config import Name, may_change
from tinyfm.common.schema import LARGEST
from tinyfm.common.seeds import mix, row_generators
from tinyfm.training import checkpoint, distributed, parallel
from tinyfm.training.checkpoint import Saver, copy_to_cpu
from tinyfm.training.log import METRICS, Logbook, summary_writer
from tinyfm.training.optim import (
    EMA,
    OptimConfig,
    build_optimizers,
    lr_factor,
    scale_and_clip,
    set_lr,
)
from tinyfm.training.parallel import Parallel

MOST_ROWS = 1 << 20  # of a batch: no published model was trained with more


# A field made by `may_change` may have another value when the run is resumed.
@dataclass(frozen=True)
class TrainConfig:
    """Settings of the training loop."""

    steps: int = 1000  # number of updates of the weights
    batch_size: int = 32  # rows per update, over all processes
    # rows per forward pass: fewer need less memory and give the same update; 0 = all
    micro_batch_size: int = may_change(0)
    seed: int = 0  # seed of the initial weights, the order of the data and all other randomness
    # steps between evaluations, each with samples and a checkpoint; 0 = only at the end
    eval_every: int = may_change(250)
    log_every: int = may_change(10)  # steps between lines in metrics.jsonl
    keep: int = may_change(2)  # number of latest checkpoints to keep, in addition to the best one
    device: Name = may_change("auto")  # device to train on: cpu, cuda, mps, or auto
    # number format of the matrix products; auto = bfloat16 where the hardware supports it
    dtype: Literal["auto", "float32", "bfloat16"] = may_change("auto")
    compile: bool = may_change(False)  # use torch.compile; continue without it if that fails
    # ddp: every process holds the whole model; fsdp: every process holds a part of it
    parallel: Literal["ddp", "fsdp"] = may_change("ddp")
    # number of processes that share one copy of the model, with fsdp; 0 = all
    shard_size: int = may_change(0)
    # compute each block again in the backward pass: less memory, about a third more time
    activation_checkpointing: bool = may_change(False)
    tensorboard: bool = may_change(False)  # write logs for TensorBoard too
    patience: int = may_change(5)  # number of skipped steps in a row that ends the run
    # skip a step whose loss or gradient norm is this many standard deviations above the mean of
    # the steps before it; 0 = never
    spike_sigmas: float = 0.0

    def __post_init__(self):
        for name in ("steps", "batch_size", "log_every", "keep", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("micro_batch_size", "eval_every", "seed", "shard_size", "spike_sigmas"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or above")
        if self.batch_size > MOST_ROWS:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at most {MOST_ROWS}")
        for name, value in vars(self).items():
            if isinstance(value, int) and value > LARGEST:
                raise ValueError(f"{name} is {value}; it must be at most {LARGEST}")


# ---- skipping bad steps --------------------------------------------------------------------------

WINDOW = 128  # number of steps that a new step is compared with


def is_spike(recent: list[tuple[float, float]], new: tuple[float, float], sigmas: float) -> bool:
    """Whether a step's loss or gradient norm is far above those of the steps before it.

    recent: (loss, gradient norm) of the steps before; new: of this step. "Far above" means above
    mean + `sigmas` standard deviations (6 in OLMo 2, arXiv 2501.00656). The deviation counts as at
    least 1% of the mean, so that a flat curve does not make every small change a spike. Until
    half a window of steps is known, no step is a spike. sigmas = 0 turns the check off.
    """
    if not sigmas or len(recent) < WINDOW // 2:
        return False
    limits = []
    for values in zip(*recent):  # the losses, then the gradient norms
        mean = statistics.fmean(values)
        deviation = max(statistics.pstdev(values, mean), abs(mean) / 100)
        limits.append(mean + sigmas * deviation)
    return any(value > limit for value, limit in zip(new, limits))


class Guard:
    """Decides which steps are skipped.

    It keeps its memory of recent steps in `counters`, which every checkpoint saves: a resumed run
    recognises a spike just as the original run would have.
    """

    def __init__(self, patience: int, sigmas: float, counters: dict):
        self.patience = patience
        self.sigmas = sigmas
        self.counters = counters
        self.skipped = 0  # number of skipped steps in a row, up to the last step
        if sigmas:
            counters["recent"] = []  # (loss, gradient norm) of up to WINDOW last steps

    def passes(self, loss: float, norm: float) -> bool:
        """Whether to carry out a step with this loss and gradient norm."""
        fine = math.isfinite(loss) and math.isfinite(norm)
        if fine and self.sigmas:
            recent = self.counters["recent"]
            fine = not is_spike(recent, (loss, norm), self.sigmas)
            # Spikes are remembered too. If the loss stays at a new level, that level soon becomes
            # the normal one, and training continues.
            self.counters["recent"] = [*recent, (loss, norm)][-WINDOW:]
        self.skipped = 0 if fine else self.skipped + 1
        return fine

    def report(
        self, step: int, loss: float, norm: float, say: Callable[[str], None], advice: str
    ) -> None:
        """Say that this step was skipped.

        Raises FloatingPointError if it was the last of `patience` skipped steps in a row.
        """
        say(f"step {step}: loss {loss}, gradient norm {norm}: skipped, no weight was changed")
        if self.skipped == self.patience:
            finite = math.isfinite(loss) and math.isfinite(norm)
            problem = "spikes" if finite else "no finite loss or gradient"
            raise FloatingPointError(
                f"steps in a row with {problem}: {self.skipped}, up to step {step}; {advice}"
            )


# ---- the trainer ---------------------------------------------------------------------------------


def weighted(loss: Tensor, metrics: dict[str, Any], rows: int) -> tuple[Tensor, Tensor]:
    """(loss * weight, weight) of a micro-batch.

    Means of parts do not add up to the mean of the whole, but weighted sums and weights do. The
    weight is metrics["weight"], for example a count of tokens, or else the number of rows. It is a
    float32 tensor on the device of the loss.
    """
    weight = torch.as_tensor(metrics.get("weight", rows), device=loss.device, dtype=torch.float32)
    return loss * weight, weight


class Trainer:
    """Trains `model` on `data` into the run directory `out`.

    write(folder) adds files to a checkpoint, such as the config and a tokenizer.
    score(model) returns further numbers for each evaluation, reported with the validation loss.
    show(model, folder, step) writes samples to a folder and returns a line to print.
    world: the processes that train together; default: this process alone.
    usual: the lowest and the highest final score of earlier runs, for loss.png.
    peak_flops: FLOP/s that the device can reach, if they are known.

    A model whose loss compares the rows of a batch with each other sets `whole_batch`. It gets all
    rows of its rank in one call and cuts them itself, `rows_at_once` rows at a time. It calls its
    `gather` for the rows of the other ranks. The trainer sets both, and the model's `rank`.

    A model whose loss in training is not that of validation names it in `loss_name`: "loss_...".

    A model that changes its parameters itself after a step, while their gradients are still there,
    has a method `after_step`: it puts them back in range, or moves codes that nothing uses.

    Raises ValueError if the batch does not divide by the number of processes, or if the device,
    the dtype or TensorBoard is not available.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        train: TrainConfig,
        optim: OptimConfig,
        out: Path,
        write: Callable[[Path], None] | None = None,
        score: Callable[[nn.Module], dict[str, float]] | None = None,
        show: Callable[[nn.Module, Path, int], str] | None = None,
        world: distributed.World | None = None,
        usual: Sequence[float] = (),
        peak_flops: float | None = None,
    ):
        self.model = model
        self.data = data
        self.train = train
        self.optim = optim
        self.out = out
        self.write = write
        self.score = score
        self.show = show
        self.world = world or distributed.World()
        self.usual = usual
        self.peak_flops = peak_flops

        # Refuse impossible settings before anything is created.
        processes = self.world.size
        if train.batch_size % processes:
            raise ValueError(
                f"batch_size {train.batch_size} is not divisible by the {processes} processes; "
                f"use {max(1, round(train.batch_size / processes)) * processes}"
            )
        if train.tensorboard:
            summary_writer()
        self.device = machine.choose_device(train.device)
        self.dtype = machine.choose_dtype(train.dtype, self.device)
        machine.keep_freed_memory()

        # The model, on all ranks.
        self.rows_at_once = train.micro_batch_size or train.batch_size // processes
        self.whole_batch = getattr(model, "whole_batch", False)
        if self.whole_batch:
            model.rows_at_once = train.micro_batch_size
            model.rank = self.world.rank
            model.gather = distributed.gather
        if train.activation_checkpointing:
            parallel.checkpoint_activations(model)
        self.call = Parallel(
            model,
            self.world,
            self.device,
            train.compile,
            fsdp=train.parallel == "fsdp",
            dtype=self.dtype,
            shard_size=train.shard_size,
        )

        # The state that training changes.
        self.optimizers = build_optimizers(model, optim)
        self.ema = EMA(model, optim.ema_half_life) if optim.ema_half_life else None
        self.counters = {"step": 0, "best_step": 0, "best_loss": math.inf}  # saved in checkpoints
        self.guard = Guard(train.patience, train.spike_sigmas, self.counters)
        self.scores: dict[str, float] = {}  # evaluation of the current step; empty if there is none
        self.saver = Saver()
        self.signals = distributed.Signals()

    # ---- one step --------------------------------------------------------------------------------

    def micro_batches(self) -> list[range]:
        """This rank's rows of the global batch, cut as micro_batch_size says."""
        rows = self.world.rows(self.train.batch_size)
        size = len(rows) if self.whole_batch else self.rows_at_once
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    def autocast(self) -> torch.autocast:
        """Inside, matrix products are computed in the run's dtype."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def load(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch on the training device."""
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def backward(self, step: int) -> Tensor:
        """Add up the gradients of loss * weight over this rank's rows, micro-batch by micro-batch.

        For each: `load` its rows of the data's batch of this step; inside `autocast`, `call` the
        model's loss with one random generator per row; weigh it; `backward`. Both passes lie inside
        `call.exchanging`, which has to know the last micro-batch.

        Returns a tensor of two, without a graph: the sums of loss * weight and of weight.
        """
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
        """One step; returns (loss, gradient norm). No weight changes if the guard refuses them."""
        torch.manual_seed(mix(self.train.seed, step, -1 - self.world.rank))  # for dropout
        set_lr(self.optimizers, lr_factor(step, self.train.steps, self.optim))

        # Gradients, and three numbers on which the ranks have to agree: the total loss, the total
        # weight, and whether a signal to stop has reached any rank. `signals.total` appends this
        # rank's signal to the two sums and adds up all three over the ranks, in one small message.
        # So it costs nothing extra to learn that another rank has a signal.
        sums = self.backward(step)
        total, weight, signalled = self.signals.total(sums)

        # Divide by the total weight and clip. DDP and FSDP2 have averaged the gradients over the
        # ranks; world.size turns that average into the sum that is needed here.
        norm = scale_and_clip(self.model, self.world.size / weight, self.optim.clip)

        # Read all numbers back at once: each read waits for the device.
        loss, norm, signalled = torch.stack((total / weight, norm, signalled)).tolist()
        self.signals.agree(signalled)  # from here on every rank knows of the signal

        if self.guard.passes(loss, norm):
            for optimizer in self.optimizers:
                optimizer.step()
            if hasattr(self.model, "after_step"):
                self.model.after_step()
            if self.ema:
                self.ema.update(self.model, step)
        for parameter in self.model.parameters():
            parameter.grad = None
        return loss, norm

    # ---- evaluation ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model has its averaged weights, if the run keeps an average."""
        if self.ema:
            self.ema.swap(self.model)
        try:
            yield
        finally:
            if self.ema:
                self.ema.swap(self.model)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean loss over the validation split, with the scores of the data and of `score`.

        The ranks divide the batches among them. A signal to stop ends the evaluation early; the
        result is then empty. Raises FloatingPointError if the loss is not finite.
        """
        self.model.eval()
        sums = torch.zeros(2, device=self.device)
        scores = {}
        together = self.call.sharded  # then each forward pass needs all ranks
        size = self.train.batch_size if self.whole_batch else self.rows_at_once
        with self.averaged(), self.autocast():
            for i, batch, counts in self.world.share(self.data.val_batches(size), together):
                if self.signals.pending(together):
                    break
                n = len(next(iter(batch.values())))
                rows = range(i * size, i * size + n)
                generators = row_generators(self.train.seed, -1, rows)
                loss, metrics = self.call.loss(self.load(batch), generators)
                sums += counts * torch.stack(weighted(loss, metrics, n))
            if self.score and not self.signals.pending(together):
                with self.call.whole():
                    scores = self.score(self.model)
        self.model.train()

        # As in `update`, the sum over ranks also says whether a signal has reached any rank.
        total, weight, signalled = self.signals.total(sums).tolist()
        self.signals.agree(signalled)
        if signalled:
            return {}
        loss = total / weight
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the validation loss is {loss} at step {self.counters['step']}; {self.advice()}"
            )
        return {"val_loss": loss, **self.data.metrics(loss), **scores}

    # ---- checkpoints -----------------------------------------------------------------------------

    def save(self) -> None:
        """Copy everything that a checkpoint of this step holds, and write it in the background.

        Afterwards remove the checkpoints that are neither among the latest nor the best. Raises
        CheckpointError if the save before this one failed.
        """
        self.saver.wait()
        step = self.counters["step"]
        loss = self.scores.get("val_loss", math.inf)
        if loss < self.counters["best_loss"]:
            self.counters["best_loss"] = loss
            self.counters["best_step"] = step
        best = self.counters["best_step"]

        # Copies, because training changes the originals while the checkpoint is written.
        weights = parallel.state_dict(self.model)
        tensors = {"model": parallel.copy_whole(weights, self.world.first)}
        if self.ema:  # what has no average, buffers and frozen parameters, is taken from the model
            average = parallel.copy_whole(self.ema.average, self.world.first)
            tensors["ema"] = tensors["model"] | average
        state = checkpoint.collect_state(self.model, self.optimizers, self.counters)
        state = copy_to_cpu(state)
        meta = dict(self.scores)

        def write(group) -> None:
            if self.world.first and (self.out / METRICS).is_file():
                files.fsync(self.out / METRICS)  # what led to a checkpoint lasts as long as it does
            checkpoint.save(self.out, step, tensors, state, meta, self.write, group)
            if self.world.first:
                checkpoint.prune(self.out, self.train.keep, best)

        self.saver.start(write)

    def resume(self) -> Path:
        """Load the newest checkpoint of the run directory, and return its folder.

        Raises CheckpointError if there is none, or if it is damaged or of another run.
        """
        folder = checkpoint.find(self.out)
        parallel.load_model(self.model, files.load_tensors(folder))
        if self.ema:
            averages = files.load_tensors(folder, "ema")
            self.ema.load(parallel.distribute(averages, self.ema.average))
        checkpoint.restore_state(folder, self.model, self.optimizers, self.counters)
        self.scores = checkpoint.read_meta(folder)
        step = self.scores.pop("step")
        if self.counters["step"] != step:
            raise files.CheckpointError(
                f"{folder}: the training state is of step {self.counters['step']}, meta.json of "
                f"step {step}; resume from another checkpoint"
            )
        return folder

    # ---- the run ---------------------------------------------------------------------------------

    def due(self) -> bool:
        """Whether to evaluate at the current step: the first, the last, every eval_every-th."""
        step = self.counters["step"]
        every = self.train.eval_every
        return step in (0, self.train.steps) or (every > 0 and step % every == 0)

    def fit(self, until: int | None = None) -> dict[str, float]:
        """Train to the last step, or until a signal; returns the numbers of the last evaluation.

        until: a step to pause at, from which another call continues.
        Raises FloatingPointError after `patience` skipped steps in a row, or for a validation loss
        that is not finite, and CheckpointError if a checkpoint cannot be saved.
        """
        start = self.counters["step"]
        steps = self.train.steps
        end = steps if until is None else min(until, steps)
        board = self.train.tensorboard
        log = Logbook(self.out, steps, start, self.world.first, board, self.usual)
        with contextlib.closing(log), self.signals, self.saver:
            # A new run, or one that was stopped before it had evaluated its last step.
            if self.due() and not self.scores:
                self.report(log)
            clock = time.perf_counter()  # start of the steps whose speed is logged next
            since = start
            while self.counters["step"] < end and not self.signals.agreed:
                # One step.
                loss, norm = self.update(self.counters["step"])
                if self.guard.skipped:
                    self.guard.report(self.counters["step"], loss, norm, log.say, self.advice())
                self.counters["step"] += 1
                step = self.counters["step"]
                log.bar.update()

                # A line in metrics.jsonl.
                log_now = step % self.train.log_every == 0 or step == steps
                if log_now and math.isfinite(loss):
                    speed = self.speed(step - since, time.perf_counter() - clock)
                    factor = lr_factor(step - 1, steps, self.optim)
                    rates = {"lr": factor * self.optim.lr, "lr_factor": factor}
                    name = getattr(self.model, "loss_name", "loss")
                    log.add({"step": step, name: loss, **rates, "grad_norm": norm, **speed})
                    clock = time.perf_counter()
                    since = step

                # Evaluation, checkpoint, samples.
                if self.due() or self.signals.agreed:
                    self.report(log)
                    clock = time.perf_counter()
                    since = step
        return self.scores

    def report(self, log: Logbook) -> None:
        """Evaluate, save a checkpoint, draw the loss curve, show samples."""
        step = self.counters["step"]
        self.scores = self.evaluate()
        if self.scores:
            log.add({"step": step, **self.scores})
            if step == 0:  # an untrained model is not worth a checkpoint or samples
                return
        self.save()
        show = self.show and not self.signals.pending(self.call.sharded)
        all_weights = self.call.whole() if show else contextlib.nullcontext()
        with self.averaged(), all_weights:
            try:
                log.draw()
                if show and self.world.first:
                    log.say(self.show(self.model, self.out / "samples", step))
            except Exception as error:  # a picture that fails is no reason to end a run
                log.say(f"step {step}: nothing to show, {type(error).__name__}: {error}")
        self.model.train()

    def advice(self) -> str:
        """What to do after a loss that is not finite."""
        return (
            f"the checkpoints in {self.out} were saved before that. Try a lower --optim.lr, "
            "--train.dtype float32, or look for broken rows in the data"
        )

    def speed(self, steps: int, seconds: float) -> dict[str, float]:
        """Throughput in the data's unit, and the share of the device's peak where it is known.

        The share (model FLOPs utilisation, "mfu") counts the FLOPs that the model needs, without
        those that are computed twice to save memory (PaLM, arXiv 2204.02311, appendix B).
        """
        rows = steps * self.train.batch_size / seconds
        result = {f"{self.data.unit}_per_s": rows * self.data.units_per_row}
        if self.peak_flops and hasattr(self.model, "flops_per_row"):
            peak = self.peak_flops * self.world.size
            result["mfu"] = rows * self.model.flops_per_row() / peak
        return result
