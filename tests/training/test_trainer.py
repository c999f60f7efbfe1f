"""The training loop: it learns, and stopping, micro-batches and ranks do not change the result."""

import json
import math
import signal
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from conftest import call, run_two_ranks

import train
from tinyfm import generate
from tinyfm.batches.text import TextConfig, TextData
from tinyfm.common import device as machine
from tinyfm.common import files
from tinyfm.common.seeds import row_generators
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.training import checkpoint, distributed
from tinyfm.training.optim import OptimConfig
from tinyfm.training.trainer import TrainConfig, Trainer, is_spike

TINY = GPTConfig(257, context_length=16, n_layer=1, n_head=2, d_model=16, zero_init=False)
OPTIM = OptimConfig(warmup_steps=2)
TRAIN = TrainConfig(
    steps=10, batch_size=8, eval_every=5, log_every=1, device="cpu", dtype="float32"
)


@pytest.fixture(scope="module")
def data(text, tmp_path_factory):
    """40 windows of 16 bytes: an epoch has five steps of eight rows."""
    path = tmp_path_factory.mktemp("small") / "small.txt"
    path.write_text(text.read_text(encoding="utf-8")[:730], encoding="utf-8")
    config = TextConfig(str(path), "bytes", cache=str(path.parent / "cache"))
    return TextData.prepare(config, TINY.vocab_size, TINY.context_length, TRAIN.batch_size, seed=0)


class Wrapped:
    """Data with some methods replaced."""

    def __init__(self, data, **changes):
        self.data = data
        self.__dict__.update(changes)

    def __getattr__(self, name):
        return getattr(self.data, name)


def make(out, data, model=TINY, config=TRAIN, optim=OPTIM, seed=0, cls=GPT, **others) -> Trainer:
    torch.manual_seed(seed)
    return Trainer(cls(model), data, config, optim, Path(out), **others)


def rows(run) -> list[dict]:
    """The rows of metrics.jsonl, without the fields that depend on the clock."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    clock = ("time", "tokens_per_s", "mfu")
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def losses(run) -> list[float]:
    return [row["loss"] for row in rows(run) if "loss" in row]


def test_the_log_has_rates_speed_and_the_share_of_the_peak(tmp_path, data):
    trainer = make(tmp_path, data, peak_flops=1e9)
    speed = trainer.speed(steps=3, seconds=2.0)  # 24 rows of 16 tokens
    assert speed["tokens_per_s"] == 3 * 8 * 16 / 2
    assert speed["mfu"] == pytest.approx(12 * trainer.model.flops_per_row() / 1e9)
    trainer.fit()
    first = rows(tmp_path)[1]
    assert first["lr_factor"] == 0.5 and first["lr"] == 0.5 * OPTIM.lr  # two steps of warmup
    assert "mfu" not in make(tmp_path / "other", data).speed(3, 2.0)


# ---- learning -----------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_few_rows_are_memorised(tmp_path, data, optimizer):
    """The loss starts at ln 257 = 5.5 nats per token and falls below 0.05 in fifty steps.

    It could reach 0: every row starts with another token, from which all others follow.
    """
    few = data.batch(0, slice(4))
    few["tokens"][:, 0] = torch.arange(4)
    stub = Wrapped(data, batch=lambda step, part: few, val_batches=lambda n: iter([few]))
    model = replace(TINY, n_layer=2, d_model=64)
    config = replace(TRAIN, steps=50, batch_size=4, eval_every=0)
    trainer = make(tmp_path, stub, model, config, replace(OPTIM, optimizer=optimizer, lr=1e-2))
    scores = trainer.fit()
    assert rows(tmp_path)[0]["val_loss"] == pytest.approx(math.log(257), abs=0.2)
    assert scores["val_loss"] < 0.05


class Bounded(GPT):
    """A model whose norm gains must not exceed 1."""

    @torch.no_grad()
    def after_step(self) -> None:
        self.norm.weight.clamp_(max=1.0)


def test_parameters_stay_in_their_bounds(tmp_path, data):
    """They are put back after each step, before the moving average reads them."""
    optim = replace(OPTIM, lr=0.1, ema_half_life=2)
    free = make(tmp_path / "free", data, optim=optim)
    free.fit()
    assert free.model.norm.weight.max() > 1.05
    bound = make(tmp_path / "bound", data, optim=optim, cls=Bounded)
    bound.fit()
    assert bound.model.norm.weight.max() == 1
    assert bound.model.norm.weight.min() < 0.95
    assert bound.ema.average["norm.weight"].max() <= 1


# ---- stop and resume ----------------------------------------------------------------------------


def show(model, folder, step) -> str:
    """Samples, and also draws from the global random generator: training must not be affected."""
    torch.rand(3)
    return str(generate.complete(model, [[1, 2]], generate.Sampling(max_new_tokens=3)))


def stopping(data, place: str, number: int, at: int):
    """(data, show) that raise a signal once, at one place of the loop."""
    evaluations = []

    def batch(step, part):
        if place == "step" and step == at and part.start == 0:  # in the first micro-batch
            signal.raise_signal(number)
        return data.batch(step, part)

    def val_batches(n):
        evaluations.append(n)
        for i, batch in enumerate(data.val_batches(n)):
            if place == "evaluation" and len(evaluations) == at and i == 0:
                signal.raise_signal(number)
            yield batch

    def shown(model, folder, step):
        if place == "samples" and step == at:
            signal.raise_signal(number)
        return show(model, folder, step)

    return Wrapped(data, batch=batch, val_batches=val_batches), shown


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize(
    ("place", "at", "stopped_at", "number", "dtype"),
    [
        ("step", 6, 7, signal.SIGTERM, "float32"),
        ("step", 6, 7, signal.SIGINT, "bfloat16"),
        ("step", 9, 10, signal.SIGTERM, "float32"),  # the last step, before its evaluation
        ("evaluation", 1, 0, signal.SIGTERM, "float32"),
        ("evaluation", 2, 5, signal.SIGINT, "float32"),
        ("samples", 5, 6, signal.SIGTERM, "float32"),
    ],
)
def test_a_stopped_run_resumes_bit_for_bit(
    tmp_path, data, monkeypatch, place, at, stopped_at, number, dtype
):
    """With dropout, averaged weights, unequal micro-batches and two optimizers, over two epochs."""
    monkeypatch.setattr(machine, "bfloat16_is_fast", lambda device: True)
    model = replace(TINY, dropout=0.1)
    optim = replace(OPTIM, ema_half_life=3)
    config = replace(TRAIN, micro_batch_size=3, dtype=dtype)
    straight = make(tmp_path / "a", data, model, config, optim, show=show)
    scores = straight.fit()

    stub, shown = stopping(data, place, number, at)
    first = make(tmp_path / "b", stub, model, config, optim, show=shown)
    first.fit()
    assert (first.signals.agreed, first.counters["step"]) == (number, stopped_at)
    resumed = make(tmp_path / "b", data, model, config, optim, seed=1, show=show)
    assert resumed.resume().name == f"step-{stopped_at:06d}"
    assert resumed.fit() == scores

    assert same(resumed.model.state_dict(), straight.model.state_dict())
    assert same(resumed.ema.average, straight.ema.average)
    for ours, theirs in zip(resumed.optimizers, straight.optimizers):
        assert same(ours.state_dict()["state"], theirs.state_dict()["state"])
    assert resumed.counters == straight.counters
    assert rows(tmp_path / "b") == rows(tmp_path / "a")
    assert len(losses(tmp_path / "a")) == 10


def test_the_log_is_on_the_disk_before_the_checkpoint(tmp_path, data, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "fsync", lambda path: synced.append(path.name))
    monkeypatch.setattr(checkpoint, "fsync", lambda path: synced.append(path.name))
    make(tmp_path, data).fit()
    assert synced.index("metrics.jsonl") < synced.index("model.safetensors")


def test_resuming_a_complete_run_changes_nothing(tmp_path, data):
    scores = make(tmp_path, data).fit()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    logged = rows(tmp_path)
    again = make(tmp_path, data)
    again.resume()
    assert again.fit() == scores and rows(tmp_path) == logged
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}


def test_a_second_signal_kills_unless_it_follows_at_once(monkeypatch):
    now = [100.0]
    survived = False
    monkeypatch.setattr(distributed.time, "monotonic", lambda: now[0])
    with pytest.raises(KeyboardInterrupt), distributed.Signals() as signals:
        signal.raise_signal(signal.SIGINT)
        now[0] += 0.1
        signal.raise_signal(signal.SIGINT)  # the same Ctrl-C again, passed on by torchrun
        survived = signals.received == signal.SIGINT and not signals.agreed
        now[0] += 10
        signal.raise_signal(signal.SIGINT)
    assert survived
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ---- micro-batches ------------------------------------------------------------------------------


def masked(data):
    """Training rows with 0, 1, 2, ... targets, so that they have unequal weights."""

    def batch(step, part):
        counts = torch.arange(TRAIN.batch_size)[part] % TRAIN.batch_size
        mask = torch.arange(TINY.context_length) < counts[:, None]
        return {**data.batch(step, part), "mask": mask}

    return Wrapped(data, batch=batch)


class Noisy(GPT):
    """A GPT with random noise on the loss of every row, as a diffusion model has."""

    def loss(self, batch, generators):
        loss, _ = super().loss(batch)
        return loss + torch.cat([torch.rand(1, generator=g) for g in generators]).mean(), {}


@pytest.mark.parametrize(
    ("weigh", "cls"),
    [(Wrapped, GPT), (Wrapped, Noisy), (masked, GPT)],
    ids=["equal", "noisy", "masked"],
)
def test_micro_batches_give_the_update_of_the_whole_batch(tmp_path, data, weigh, cls):
    """Row 0 of the masked batch has no target: alone in a micro-batch it has no mean loss."""
    optim = replace(OPTIM, optimizer="adamw", lr=1e-3)
    results = []
    for size in (0, 1, 3):
        config = replace(TRAIN, steps=3, micro_batch_size=size, eval_every=0)
        trainer = make(tmp_path / str(size), weigh(data), config=config, optim=optim, cls=cls)
        trainer.fit()
        weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        results.append((losses(trainer.out), weights))
    for loss, weights in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        torch.testing.assert_close(weights, results[0][1], rtol=1e-5, atol=1e-5)


def test_random_streams_belong_to_rows(data):
    def draws(part):
        return [torch.rand(1, generator=g).item() for g in row_generators(3, 5, part)]

    assert draws(range(4, 8)) == draws(range(8))[4:]
    assert len(set(draws(range(100)))) == 100
    others = [row_generators(seed, step, range(1))[0] for seed, step in ((4, 5), (3, 6), (3, -1))]
    assert draws(range(1))[0] not in [torch.rand(1, generator=g).item() for g in others]


# ---- losses that are not finite, and spikes -----------------------------------------------------


class Poisoned(GPT):
    """A GPT whose loss is multiplied by batch["factor"], if the batch has one."""

    def loss(self, batch, generators=None):
        loss, metrics = super().loss(batch, generators)
        return loss * batch.get("factor", 1.0), metrics


def poison(data, steps, factor=math.nan):
    """Data whose batches of the given steps multiply the loss by `factor`."""

    def batch(step, part):
        extra = {"factor": torch.tensor(factor)} if step in steps else {}
        return {**data.batch(step, part), **extra}

    return Wrapped(data, batch=batch)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, data, capsys, factor):
    optim = replace(OPTIM, ema_half_life=3)
    trainer = make(tmp_path, poison(data, {1, 2, 4}, factor), optim=optim, cls=Poisoned)
    trainer.update(0)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    average = {k: v.clone() for k, v in trainer.ema.average.items()}
    loss, norm = trainer.update(1)
    assert not math.isfinite(loss) and not math.isfinite(norm)
    assert same(trainer.model.state_dict(), before) and same(trainer.ema.average, average)
    assert math.isfinite(trainer.update(3)[0])
    assert not same(trainer.model.state_dict(), before)

    trainer.train = replace(trainer.train, patience=3)
    assert math.isfinite(trainer.fit()["val_loss"])
    assert capsys.readouterr().out.count("skipped, no weight was changed") == 3


def test_a_spike_is_far_above_the_steps_before():
    flat = [(2.0, 1.0)] * 64
    assert not is_spike(flat[:63], (1e9, 1.0), 6)  # too few steps to compare with
    assert not is_spike(flat, (1e9, 1e9), 0)  # 0 turns the check off
    # The deviation of a flat curve counts as 1% of its mean.
    assert not is_spike(flat, (2.1, 1.05), 6)
    assert is_spike(flat, (2.2, 1.0), 6)
    assert is_spike(flat, (2.0, 1.1), 6)
    # Losses of mean 2.5 and deviation 0.5: the limit is 5.5.
    wavy = [(2.0 + i % 2, 1.0) for i in range(64)]
    assert not is_spike(wavy, (5.4, 1.0), 6)
    assert is_spike(wavy, (5.6, 1.0), 6)
    assert not is_spike(wavy, (-1e9, 0.0), 6)


def test_a_spike_is_skipped_also_after_a_resume(tmp_path, data, capsys, monkeypatch):
    """A resumed run remembers the steps before it stopped, and compares with them."""
    monkeypatch.setattr("tinyfm.training.trainer.WINDOW", 8)
    config = replace(TRAIN, spike_sigmas=6, eval_every=6)
    stub = poison(data, {6}, 1e9)
    straight = make(tmp_path / "a", stub, config=config, cls=Poisoned)
    straight.fit()
    assert capsys.readouterr().out.count("skipped, no weight was changed") == 1
    first = make(tmp_path / "b", stub, config=replace(config, steps=6), cls=Poisoned)
    first.fit()
    resumed = make(tmp_path / "b", stub, config=config, cls=Poisoned)
    resumed.resume()
    before = {k: v.clone() for k, v in resumed.model.state_dict().items()}
    assert resumed.update(6)[0] > 1e6 and same(resumed.model.state_dict(), before)
    assert resumed.counters["recent"][-1][0] > 1e6 and len(resumed.counters["recent"]) == 7
    assert resumed.update(7)[0] < 10 and not same(resumed.model.state_dict(), before)


def test_many_bad_steps_end_the_run_and_keep_its_checkpoints(tmp_path, data):
    config = replace(TRAIN, patience=4, eval_every=2)
    trainer = make(tmp_path, poison(data, range(5, 99)), config=config, cls=Poisoned)
    with pytest.raises(FloatingPointError, match=r"steps in a row.*: 4.*before.*--optim.lr"):
        trainer.fit()
    assert math.isfinite(rows(tmp_path)[-1].get("val_loss", 0))
    resumed = make(tmp_path, data, cls=Poisoned)
    resumed.resume()
    assert all(p.isfinite().all() for p in resumed.model.parameters())


def test_weights_that_are_not_finite_are_not_saved(tmp_path, data):
    config = replace(TRAIN, eval_every=1)
    optim = replace(OPTIM, optimizer="adamw", lr=1e38)
    with pytest.raises(FloatingPointError, match="validation loss is nan at step"):
        make(tmp_path, data, config=config, optim=optim).fit()
    assert not [*tmp_path.glob("step-*")]


# ---- evaluation and checkpoints -----------------------------------------------------------------


def test_evaluating_and_sampling_do_not_affect_training(tmp_path, data):
    modes = []

    class Watched(GPT):
        def loss(self, batch, generators=None):
            modes.append(self.training)
            return super().loss(batch, generators)

    model = replace(TINY, dropout=0.2)
    results = []
    for every, shown in ((0, None), (1, show)):
        config = replace(TRAIN, steps=6, eval_every=every)
        trainer = make(tmp_path / str(every), data, model, config, cls=Watched, show=shown)
        trainer.fit()
        assert modes.count(True) == 6 and trainer.model.training
        results.append((losses(trainer.out), trainer.model.state_dict()))
        modes.clear()
    assert same(results[0], results[1])


def test_the_validation_loss_is_that_of_the_averaged_weights(tmp_path, data):
    trainer = make(tmp_path, data, optim=replace(OPTIM, ema_half_life=5))
    scores = trainer.fit()
    total = weight = 0
    other = GPT(TINY).eval()
    files.load_model(other, files.load_tensors(checkpoint.find(tmp_path), "ema"))
    with torch.no_grad():
        for batch in data.val_batches(8):
            loss, metrics = other.loss(batch)
            total += loss * metrics["weight"]
            weight += metrics["weight"]
    assert scores["val_loss"] == pytest.approx(float(total / weight), rel=1e-6)
    assert not same(other.state_dict(), trainer.model.state_dict())


def test_a_tied_head_is_averaged_once(tmp_path, data):
    """The checkpoint must not hold the unaveraged weights under the head's name."""
    model = replace(TINY, tied=True)
    trainer = make(tmp_path, data, model, optim=replace(OPTIM, ema_half_life=5))
    trainer.fit()
    other = GPT(model)
    files.load_model(other, files.load_tensors(checkpoint.find(tmp_path), "ema"))
    assert same(dict(other.named_parameters()), trainer.ema.average)


def test_the_latest_and_the_best_are_kept(tmp_path, data, monkeypatch):
    losses_by_step = {0: 5.0, 1: 4.0, 2: 1.0, 3: 2.0, 4: 3.0, 5: 2.0, 6: 3.0}

    def evaluate(self):
        if self.signals.agreed:
            return {}
        return {"val_loss": losses_by_step[self.counters["step"]]}

    def folders():
        return sorted(path.name for path in tmp_path.glob("step-*"))

    config = replace(TRAIN, steps=6, eval_every=1, keep=1)
    stub, _ = stopping(data, "step", signal.SIGTERM, 3)
    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    make(tmp_path, stub, config=config).fit()
    assert folders() == ["step-000002", "step-000004"]
    trainer = make(tmp_path, data, config=config)
    trainer.resume()
    trainer.fit()
    assert folders() == ["step-000002", "step-000006"]
    assert trainer.counters == {"step": 6, "best_step": 2, "best_loss": 1.0}


def test_samples_that_fail_do_not_stop_the_run(tmp_path, data, capsys):
    def broken(model, folder, step):
        raise OSError("no room for pictures")

    trainer = make(tmp_path, data, optim=replace(OPTIM, ema_half_life=3), show=broken)
    trainer.fit()
    assert trainer.counters["step"] == 10 and trainer.model.training
    assert capsys.readouterr().out.count("no room for pictures") == 2


def test_a_failed_compilation_is_reported_and_training_continues(
    tmp_path, data, monkeypatch, capsys
):
    def compile(module):
        def call(*args):
            raise RuntimeError("no C++ compiler\nlong story")

        return call

    monkeypatch.setattr(torch, "compile", compile)
    make(tmp_path / "a", data).fit()
    capsys.readouterr()
    make(tmp_path / "b", data, config=replace(TRAIN, compile=True)).fit()
    out = capsys.readouterr().out
    assert out.count("torch.compile fails here (RuntimeError: no C++ compiler)") == 1
    assert "long story" not in out and rows(tmp_path / "a") == rows(tmp_path / "b")


def test_a_compiled_model_is_used(tmp_path, data, monkeypatch):
    calls = []

    def compile(module):
        def call(*args):
            calls.append(module)
            return module(*args)

        return call

    monkeypatch.setattr(torch, "compile", compile)
    make(tmp_path, data, config=replace(TRAIN, compile=True)).fit()
    assert len(calls) == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"batch_size": -2}, "batch_size is -2"),
        ({"micro_batch_size": -1}, "micro_batch_size is -1"),
        ({"patience": 0}, "patience is 0"),
    ],
)
def test_bad_configs(change, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**change)


def test_what_decides_the_result_may_not_change_on_resume():
    fixed = [f.name for f in fields(TrainConfig) if not f.metadata.get("may_change")]
    assert fixed == ["steps", "batch_size", "seed", "spike_sigmas"]


# ---- two ranks ----------------------------------------------------------------------------------

# Each process runs train.py three times: a complete run, counting how often gradients are
# exchanged; a run in which only rank 1 gets a signal, during its evaluation; and a run whose batch
# size does not divide by the number of ranks.
RANK = """
import os, signal, sys
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
import train
from tinyfm.training import distributed
from tinyfm.batches.text import TextData
out, *options = sys.argv[1:]
rank = int(os.environ["RANK"])
distributed.stop = lambda: None

def run(*more):
    sys.argv = ["train.py", *options, *more]
    print("status:", train.main(), flush=True)

exchanges = []
def exchange(state, bucket):
    exchanges.append(bucket)
    return allreduce_hook(state, bucket)
class Counted(DistributedDataParallel):
    def __init__(self, module):
        super().__init__(module)
        self.register_comm_hook(None, exchange)
torch.nn.parallel.DistributedDataParallel = Counted
run("--out", out)
print("exchanges:", len(exchanges))
torch.nn.parallel.DistributedDataParallel = DistributedDataParallel

plain, calls = TextData.val_batches, []
def val_batches(self, n):
    calls.append(n)
    for i, batch in enumerate(plain(self, n)):
        if rank == 1 and len(calls) == 2 and i == 3:
            signal.raise_signal(signal.SIGINT)
        yield batch
TextData.val_batches = val_batches
run("--out", out + "-stopped")
run("--out", out + "-uneven", "--train.batch-size", "3")
torch.distributed.barrier()
sys.stdout.flush()
os._exit(0)  # gloo's threads sometimes abort an orderly exit, which is not tested here
"""


def test_two_ranks_give_the_update_of_one_and_stop_together(tmp_path, options):
    """Two ranks with two micro-batches each give the update of the whole batch, up to rounding.

    With AdamW only: Muon computes in bfloat16, where a rounding error of a gradient grows to 0.1%.
    """
    exact = ["--train.device", "cpu", "--train.dtype", "float32", "--optim.optimizer", "adamw"]
    options = [*options, *exact, "--optim.lr", "1e-3", "--optim.warmup-steps", "0"]
    ranks = run_two_ranks(RANK, tmp_path / "two", *options, "--train.micro-batch-size", "1")
    uneven = "status: error: batch_size 3 is not divisible by the 2 processes; use 4"
    for (out, err), number in zip(ranks, (signal.SIGTERM, signal.SIGINT)):
        said = [line for line in out.splitlines() if line.startswith(("status", "exchanges"))]
        stopped = f"status: {128 + number}"
        # One exchange of gradients per step, although a step has two micro-batches.
        assert said == ["status: 0", "exchanges: 4", stopped, uneven], out + err
    assert "stopped at step 2 and saved" in ranks[0][0]
    assert ranks[1][0].count("\n") == 4  # the second rank is silent
    assert checkpoint.find(tmp_path / "two-stopped").name == "step-000002"

    assert call(train, *options, "--out", tmp_path / "one") == 0
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(one) == 7 and [r["step"] for r in one] == [r["step"] for r in two]
    for ours, theirs in zip(one, two):
        assert ours == pytest.approx(theirs, rel=1e-6)
    first, second = (files.load_tensors(tmp_path / name / "step-000004") for name in ("one", "two"))
    for name, weight in first.items():
        torch.testing.assert_close(weight, second[name], rtol=0, atol=1e-5)
