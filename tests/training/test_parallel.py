"""Several ranks: same result as one, with DDP and FSDP2; resume on any number; a rank may die."""

import json
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, call, run_two_ranks

import train
from tinyfm.adapt.embedder import Embedder, EmbedderConfig
from tinyfm.autoencoder import Autoencoder, AutoencoderConfig
from tinyfm.batches.text import TextData
from tinyfm.clip import CLIP, CLIPConfig
from tinyfm.codec import Codec, CodecConfig
from tinyfm.common import files
from tinyfm.ddpm import Diffusion, DiffusionConfig
from tinyfm.encoder import Encoder, EncoderConfig
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.musicgen import MusicGen, MusicGenConfig
from tinyfm.recipes import run_dir
from tinyfm.recipes.encoder import EncoderEmbedRun
from tinyfm.seq2seq import Seq2Seq, Seq2SeqConfig
from tinyfm.text2image import TextToImage, TextToImageConfig
from tinyfm.training import checkpoint, distributed
from tinyfm.training.distributed import is_shard, local
from tinyfm.training.log import Logbook
from tinyfm.training.muon import Muon
from tinyfm.training.optim import OptimConfig, build_optimizers
from tinyfm.training.trainer import TrainConfig, Trainer
from tinyfm.vision_gpt import VisionGPT, VisionGPTConfig
from tinyfm.vq import VQVAE, VQConfig
from tinyfm.xlnet import XLNet, XLNetConfig

GPT_TINY = GPTConfig(
    61, context_length=8, n_layer=2, n_head=2, d_model=16, tied=True, zero_init=False
)
ENCODER = EncoderConfig(61, context_length=8, n_layer=2, n_head=2, d_model=16, zero_init=False)
SEQ2SEQ = Seq2SeqConfig(61, context_length=8, n_layer=2, n_head=2, d_model=16, zero_init=False)
AUTOENCODER = AutoencoderConfig(
    image_size=8, channels=(4, 8), n_block=1, groups=2, latent_channels=2
)
CLIP_TINY = CLIPConfig(
    image_size=8,
    patch_size=4,
    image_layer=1,
    image_width=16,
    image_head=2,
    vocab_size=61,
    context_length=8,
    text_layer=1,
    text_width=16,
    text_head=2,
    embed_dim=8,
    memory=12,
)
DDPM = DiffusionConfig(
    image_size=8, channels=(8, 16), attend=(False, True), n_block=1, n_head=2, groups=4
)
LATENT = replace(DDPM, image_size=4, in_channels=2, d_context=16, clip=False)
VQ = VQConfig(image_size=8, channels=(4, 8), groups=2, latent_channels=2, n_code=61, dead_after=2)
CODEC = CodecConfig(
    width=4, ratios=(2, 2), latent_channels=2, n_code=61, n_book=2, n_lstm=1, dead_after=2,
    windows=(16,), sound_length=32,
)  # fmt: skip
MUSICGEN = MusicGenConfig(61, n_book=2, context_length=8, n_layer=2, n_head=2, d_model=16)
VISION = VisionGPTConfig(
    way="cross", n_latent=2, gate=0.5, image_size=8, patch_size=4, image_layer=1, image_head=2,
    image_width=16, gpt=replace(GPT_TINY, vocab_size=62),
)  # fmt: skip
FAMILIES = {
    "gpt": lambda: GPT(GPT_TINY),
    "encoder": lambda: Encoder(ENCODER),
    "electra": lambda: Encoder(replace(ENCODER, objective="electra")),
    "seq2seq": lambda: Seq2Seq(SEQ2SEQ),
    "xlnet": lambda: XLNet(XLNetConfig(61, 8, n_layer=2, n_head=2, d_model=16, segments=True)),
    "embedder": lambda: Embedder(
        Encoder(ENCODER),
        EmbedderConfig(widths=(4, 8)),
        EncoderEmbedRun.reader,
        EncoderEmbedRun.states,
    ),
    "clip": lambda: CLIP(CLIP_TINY),
    "autoencoder": lambda: Autoencoder(AUTOENCODER),
    "ddpm": lambda: Diffusion(DDPM),
    "vq": lambda: VQVAE(VQ),
    "codec": lambda: Codec(CODEC),
    "musicgen": lambda: MusicGen(MUSICGEN),
    "vision_gpt": lambda: VisionGPT(VISION),
    "text2image": lambda: TextToImage(TextToImageConfig(LATENT, AUTOENCODER, CLIP_TINY)),
}
TRAIN = TrainConfig(
    steps=4,
    batch_size=8,
    micro_batch_size=2,
    eval_every=2,
    log_every=1,
    keep=9,
    device="cpu",
    dtype="float32",
)
OPTIM = OptimConfig("adamw", lr=1e-3, warmup_steps=0, ema_half_life=2.0)


class Random:
    """Random batches in the form that a model needs: a function of the step only."""

    unit, units_per_row = "rows", 1

    def __init__(self, model):
        self.example = model.example_batch(TRAIN.batch_size)
        self.example.pop("places", None)  # follow from the targets
        self.sees = isinstance(model, VisionGPT)
        if isinstance(model, TextToImage):  # images, so that both frozen parts are used
            del self.example["latents"]
            self.example["images"] = torch.zeros(TRAIN.batch_size, 1, 8, 8)

    def batch(self, step, part):
        g = torch.Generator().manual_seed(step)
        values = {}
        for name, zeros in self.example.items():
            if zeros.is_floating_point():
                values[name] = torch.randn(zeros.shape, generator=g)
            else:
                values[name] = torch.randint(61, zeros.shape, generator=g)
            if name == "tokens" and self.sees:  # a place for the picture
                values[name][:, 0] = VISION.image_id
            if name == "mask":  # rows that are filled up
                values[name] = torch.arange(8) <= values[name][:, :1] % 8
            if name == "targets":  # rows with more and with fewer of them
                values[name][values[next(iter(values))] > 20] = -100
        return {name: value[part] for name, value in values.items()}

    def val_batches(self, rows):
        return (self.batch(1000 + i, slice(rows)) for i in range(3))

    def metrics(self, loss):
        return {}


def score(model) -> dict[str, float]:
    """A score that needs all weights, and does not come from the loss."""
    return {"weights": float(sum(p.abs().double().sum() for p in model.parameters()))}


def show(model, folder, step) -> str:
    """A sample that the first rank makes alone."""
    assert not any(is_shard(tensor) for tensor in model.state_dict().values())
    with torch.no_grad():
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        return str(model.eval().loss(Random(model).batch(7, slice(2)), generators)[0].item())


def make(family: str, out: Path, **fields) -> Trainer:
    """A trainer for a tiny model of that family. `fields` replaces fields of TRAIN."""
    torch.manual_seed(0)
    model = FAMILIES[family]()
    config = replace(TRAIN, **fields)
    return Trainer(
        model,
        Random(model),
        config,
        OPTIM,
        Path(out),
        score=score,
        show=show,
        world=distributed.start(),
    )


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b)


def only_step(run: Path, to: Path, step: int) -> Path:
    """A run directory with one checkpoint, copied from another run."""
    name = f"step-{step:06d}"
    shutil.copytree(run / name, to / name)
    return to


# ---- two processes ------------------------------------------------------------------------------


def train_families(base: Path) -> None:
    """Each family with DDP and with FSDP2, and with activation checkpointing in one of the two."""
    for family in FAMILIES:
        for parallel in ("ddp", "fsdp"):
            twice = (family in ("gpt", "ddpm")) == (parallel == "fsdp")
            out = base / f"{family}-{parallel}"
            trainer = make(family, out, parallel=parallel, activation_checkpointing=twice)
            trainer.fit()
            if parallel == "fsdp":
                check_shares(trainer)
                alone = build_optimizers(FAMILIES[family](), OPTIM)
                assert shapes_by_group(trainer.optimizers) == shapes_by_group(alone), family
    make("gpt", base / "gpt-copies", parallel="fsdp", shard_size=1).fit()


def shapes_by_group(optimizers) -> list[list[torch.Size]]:
    """The shapes of the parameters. A checkpoint has its settings by group: groups must not depend
    on the number of ranks."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return [[p.shape for p in group["params"]] for group in groups]


def check_shares(trainer: Trainer) -> None:
    """All parameters are sharded but single numbers and codebooks. Frozen ones have no optimizer
    state."""
    for name, p in trainer.model.named_parameters():
        assert is_shard(p) == (p.ndim > 0 and "codebooks" not in name), name
        assert p.requires_grad == (name in trainer.ema.average)
    held = sum(local(p).nbytes for p in trainer.model.parameters())
    assert held < 0.6 * sum(p.nbytes for p in trainer.model.parameters())
    kept = {id(p) for optimizer in trainer.optimizers for p in optimizer.state}
    assert kept == {id(p) for p in trainer.model.parameters() if p.requires_grad}


def check_muon() -> None:
    """Sharded Muon gives the same update, bit for bit, also where nothing divides by two."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    g = torch.Generator().manual_seed(0)
    shapes = [(12, 7), (12, 7), (12, 7), (5, 9), (1, 6), (8, 8), (8, 8), (5, 2, 3, 3)]
    whole = [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in shapes]
    parts = []
    for p in whole:
        part = distribute_tensor(p.detach().clone(), mesh, [Shard(0)])
        parts.append(torch.nn.Parameter(part))
    optimizers = [Muon(params, lr=0.1, weight_decay=0.1) for params in (whole, parts)]
    for _ in range(3):
        for p, part in zip(whole, parts):
            p.grad = torch.randn(p.shape, generator=g)
            part.grad = distribute_tensor(p.grad.clone(), mesh, [Shard(0)])
        for optimizer in optimizers:
            optimizer.step()
    for p, part in zip(whole, parts):
        assert torch.equal(p, part.full_tensor()), (p - part.full_tensor()).abs().max()


def reshard(base: Path) -> None:
    """Checkpoints of one rank, of DDP and of FSDP2, each resumed with DDP and with FSDP2.

    Each is also saved again right after loading, to be compared with the original.
    """
    for source in ("one", "gpt-ddp", "gpt-fsdp"):
        for parallel in ("ddp", "fsdp"):
            out = base / f"{source}-on-{parallel}"
            if distributed.rank() == 0:
                only_step(base / source, out, 2)
            dist.barrier()
            trainer = make("gpt", out, parallel=parallel)
            trainer.resume()
            trainer.out = base / f"{source}-again-{parallel}"
            trainer.save()
            trainer.saver.wait()
            trainer.out = out
            trainer.fit()


def ranks(base: str) -> None:
    """Everything that each of the two processes does."""
    Logbook.draw = lambda self: None
    torch.set_num_threads(1)
    base = Path(base)
    distributed.start()
    train_families(base)
    check_muon()
    reshard(base)
    print("done", flush=True)
    dist.barrier()
    os._exit(0)  # gloo's threads sometimes abort an orderly exit, which is not tested here


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """A folder in which one rank has trained GPT ("one") and two ranks have run `ranks`."""
    base = tmp_path_factory.mktemp("ranks")
    make("gpt", base / "one").fit()
    script = "import sys; from test_parallel import ranks; ranks(sys.argv[1])"
    said = run_two_ranks(script, base)
    for out, _ in said:
        assert out.endswith("done\n") and "nothing to show" not in out, said
    return base


def losses(run: Path) -> list[dict]:
    """The rows of metrics.jsonl, without the fields that depend on the clock."""
    clock = ("time", "rows_per_s")
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Equal up to rounding: losses, norms, scores, and the weights and averages at the end."""
    a = losses(ours)
    b = losses(theirs)[-len(a) :]  # `ours` may have been resumed, and then has the last rows only
    assert [row["step"] for row in a] == [row["step"] for row in b]
    for mine, other in zip(a, b):
        assert mine == pytest.approx(other, rel=2e-5)
    for name in ("model", "ema"):
        mine = files.load_tensors(ours / "step-000004", name)
        other = files.load_tensors(theirs / "step-000004", name)
        assert mine.keys() == other.keys()
        for key, tensor in mine.items():
            if key.endswith("k.bias"):  # its gradient is 0 but for rounding errors
                continue
            torch.testing.assert_close(tensor, other[key], rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_train_as_one(two, tmp_path, family):
    one = make(family, tmp_path)
    one.fit()
    kinds = ("ddp", "fsdp", "copies") if family == "gpt" else ("ddp", "fsdp")
    for parallel in kinds:
        assert_same_run(two / f"{family}-{parallel}", tmp_path)


def everything(folder: Path) -> dict:
    """All tensors of a checkpoint by name, put together from their shards."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    described = FileSystemReader(folder / "state").read_metadata().state_dict_metadata
    tree = {}
    for name, about in described.items():
        if hasattr(about, "size"):  # a tensor
            tree[name] = torch.empty(about.size, dtype=about.properties.dtype)
    load(tree, checkpoint_id=folder / "state")
    return {**tree, **files.load_tensors(folder), "ema": files.load_tensors(folder, "ema")}


@pytest.mark.parametrize("source", ["one", "gpt-ddp", "gpt-fsdp"])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_any_number_of_ranks_resumes_a_checkpoint_of_any_number(two, tmp_path, source):
    """One rank resumes here, two in `reshard`. Loading and saving again changes no bit."""
    resumed = make("gpt", only_step(two / source, tmp_path / "run", 2))
    resumed.resume()
    resumed.fit()
    assert_same_run(tmp_path / "run", two / "one")
    saved = two / source / "step-000002"
    before = everything(saved)
    assert len(before) > 40
    for parallel in ("ddp", "fsdp"):
        assert_same_run(two / f"{source}-on-{parallel}", two / "one")
        again = checkpoint.find(two / f"{source}-again-{parallel}")
        assert same(before, everything(again))


# ---- saving in the background -------------------------------------------------------------------


def test_training_continues_while_a_checkpoint_is_written(tmp_path):
    """The checkpoint holds the weights of its step, although training has changed them since."""
    held = threading.Event()
    wrote = []

    def slow(folder):
        wrote.append(trainer.counters["step"])
        held.wait(20)

    trainer = make("gpt", tmp_path / "slow", eval_every=0)
    trainer.write = slow
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.save()
    for step in range(2):
        trainer.update(step)
    assert not checkpoint_names(tmp_path / "slow")
    held.set()
    trainer.saver.wait()
    saved = files.load_tensors(checkpoint.find(tmp_path / "slow"))
    assert wrote == [0] and same(saved, before)
    assert not same(saved, dict(trainer.model.named_parameters()))


def checkpoint_names(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("step-*"))


def test_an_error_in_the_background_is_raised(tmp_path):
    def broken(folder):
        raise OSError("no room")

    trainer = make("gpt", tmp_path)
    trainer.write = broken
    with pytest.raises(files.CheckpointError, match=r"step 2 could not be saved .*no room"):
        trainer.fit()  # raised when the save of step 4 starts
    assert trainer.counters["step"] == 4 and not checkpoint_names(tmp_path)
    trainer.save()
    with pytest.raises(files.CheckpointError, match="step 4 could not be saved"):
        trainer.saver.wait()
    trainer.saver.wait()  # raised once only


def test_a_stopped_run_waits_for_its_last_save(tmp_path):
    trainer = make("gpt", tmp_path)
    trainer.write = lambda folder: time.sleep(0.3)
    plain = trainer.data.batch

    def batch(step, part):
        if step == 1:
            signal.raise_signal(signal.SIGTERM)
        return plain(step, part)

    trainer.data.batch = batch
    trainer.fit()
    assert trainer.signals.agreed == signal.SIGTERM
    assert checkpoint.find(tmp_path).name == "step-000002"


KILLED = """
import os, signal, sys
from pathlib import Path
from test_parallel import Logbook, make
Logbook.draw = lambda self: None
trainer = make("gpt", Path(sys.argv[1]))
def write(folder):
    if folder.name.endswith("4"):
        os.kill(os.getpid(), signal.SIGKILL)
trainer.write = write
trainer.fit()
"""


def test_a_kill_during_a_save_leaves_the_checkpoint_before(tmp_path):
    words = ["-c", KILLED, tmp_path / "run"]
    killed = processes.start(words, tmp_path, ROOT / "tests", {"PYTHONPATH": str(ROOT)})
    assert killed.wait(60) == -signal.SIGKILL, killed.said()
    assert checkpoint.find(tmp_path / "run").name == "step-000002"
    resumed = make("gpt", tmp_path / "run")
    resumed.resume()
    resumed.fit()
    straight = make("gpt", tmp_path / "straight")
    straight.fit()
    assert same(resumed.model.state_dict(), straight.model.state_dict())
    assert checkpoint_names(tmp_path / "run") == ["step-000002", "step-000004"]
    assert not [*(tmp_path / "run").glob(".tmp-*")]


# ---- a rank that dies ---------------------------------------------------------------------------

# The launcher inside torchrun. Its ranks are forked, so that they have all modules loaded.
JOB = """
import sys
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from test_parallel import dying_rank

config = LaunchConfig(1, 1, 2, run_id="job", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
                      max_restarts=1, monitor_interval=0.05, start_method="fork")
elastic_launch(config, dying_rank)(*sys.argv[1:])
"""


def dying_rank(out: str, *options: str) -> None:
    """train.py, with rank 1 killed once, in step 3, after the checkpoint of step 2 is written."""
    plain = TextData.batch

    def batch(self, step, part):
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first and step == 3 and os.environ["RANK"] == "1":
            while not Path(out, "latest").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, step, part)

    TextData.batch = batch
    Logbook.draw = lambda self: None
    status = call(train, *options, "--out", out)
    print(f"rank {os.environ['RANK']} ends with {status}", flush=True)
    os._exit(0)  # gloo's threads sometimes abort an orderly exit, which is not tested here


def test_a_job_whose_rank_dies_is_restarted_and_resumes(tmp_path, options):
    """All ranks start again and resume without --resume. No step is lost or logged twice."""
    more = ["--train.parallel", "fsdp", "--train.device", "cpu"]
    job = ["-c", JOB, tmp_path / "run", *options, *more]
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    ran = processes.start(job, tmp_path, ROOT, {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"})
    for rank in range(2):
        ran.wait_for(f"rank {rank} ends with 0", 60)
    ran.running.kill()  # the launcher would wait for the ranks' return values
    assert "resumed from" in ran.said()[0] and "step-000002" in ran.said()[0]
    assert [row["step"] for row in losses(tmp_path / "run")] == [0, 1, 2, 2, 3, 4, 4]
    assert checkpoint.find(tmp_path / "run").name == "step-000004"


def test_a_restarted_run_resumes_or_starts_over(tmp_path, monkeypatch):
    """But only in a folder that an earlier attempt of the same job began."""
    out = tmp_path / "run"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 1")
    with pytest.raises(FloatingPointError), run_dir.own(out, False, distributed.World()):
        (out / "metrics.jsonl").write_text("{}", encoding="utf-8")
        raise FloatingPointError
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 2")
    with pytest.raises(ValueError, match="--resume"):
        run_dir.check_directory(out, resume=False)
    assert (out / "metrics.jsonl").exists()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 1")
    assert not run_dir.check_directory(out, resume=False)
    assert not (out / "metrics.jsonl").exists()
    checkpoint.save(out, 1, {"model": {}})
    assert run_dir.check_directory(out, resume=False)


def test_a_rank_that_reaches_no_others_says_so(monkeypatch):
    numbers = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_PORT": 1}
    for name, value in {**numbers, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=1))
    with pytest.raises(ConnectionError, match=r"rank 1 of 2, on .* 127\.0\.0\.1:1 ") as error:
        distributed.start()
    for cause in ("another rank", "--rdzv-endpoint", "GLOO_SOCKET_IFNAME"):
        assert cause in str(error.value)
