"""Faults that come from outside: kills, signals to one rank, untrusted and damaged files.

Kills and full disks in the middle of a save are in test_checkpoint.py, signals to a single process
in test_trainer.py, bad text in batches/test_text.py, bad pictures in batches/test_pairs.py.
"""

import copy
import json
import os
import pickle
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from conftest import ROOT, call, run_two_ranks, start_two_ranks

import sample
import train
from data import captioned, pictures
from data.report import Report
from tinyfm import generate, tokenizer
from tinyfm.batches import latents
from tinyfm.batches.text import TextConfig, TextData
from tinyfm.clip import CLIP, CLIPConfig
from tinyfm.common import files
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.hub import __main__ as hub
from tinyfm.hub import clip, diffusion, gpt
from tinyfm.recipes import registry, run_dir
from tinyfm.training import checkpoint
from tinyfm.training.log import read_metrics
from tinyfm.unet import UNet, UNetConfig


def metrics(run: Path) -> list[dict]:
    """The rows of metrics.jsonl, without the fields that depend on the clock."""
    clock = ("time", "tokens_per_s")
    rows = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in clock} for row in rows]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return files.load_tensors(checkpoint.find(run))


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- kills and signals --------------------------------------------------------------------------

# Runs train.py and kills it in its fourth step, once the checkpoint of the second is on disk.
KILLED = """
import os, signal, sys, time
import train
from tinyfm.batches.text import TextData
plain = TextData.batch
def batch(self, step, rows=slice(None)):
    while step == 3:
        if os.path.exists(os.path.join(sys.argv[-1], "latest")):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)
    return plain(self, step, rows)
TextData.batch = batch
train.main()
"""


def test_a_killed_run_resumes_bit_for_bit(tiny_run, options, tmp_path):
    out = tmp_path / "run"
    killed = processes.start(["-c", KILLED, *options, "--out", out], tmp_path, ROOT, {})
    assert killed.wait(100) == -signal.SIGKILL, killed.said()
    assert checkpoint.find(out).name == "step-000002"
    assert metrics(out)[-1]["step"] == 3  # this step is trained again
    assert call(train, *options, "--out", out, "--resume") == 0
    assert metrics(out) == metrics(tiny_run) and equal(weights(out), weights(tiny_run))


# Each process runs train.py three times: with a SIGTERM to rank 1 only, within its second step;
# with a SIGTERM to rank 0 only, while it shows samples after that step; and with a loss that is not
# a number on rank 1 only, in the third step. The last line is a hash of the final weights.
RANK = """
import hashlib, os, signal, sys
import train
from tinyfm.training import distributed
from tinyfm.batches.text import TextData
from tinyfm.recipes.gpt import GPTRun
from tinyfm.gpt import GPT
from tinyfm.training.trainer import Trainer
out, *options = sys.argv[1:]
rank = int(os.environ["RANK"])
now = 0  # the current step
models = []
distributed.stop = lambda: None
plain_batch = TextData.batch
plain_show = GPTRun.show
plain_loss = GPT.loss
plain_fit = Trainer.fit

def batch(self, step, rows=slice(None)):
    global now
    now = step
    if fault == "step" and rank == 1 and step == 1:
        signal.raise_signal(signal.SIGTERM)
    return plain_batch(self, step, rows)

def show(self, model, data, folder, step):
    if fault == "samples":
        signal.raise_signal(signal.SIGTERM)
    return plain_show(self, model, data, folder, step)

def loss(self, batch, generators=None):
    value, metrics = plain_loss(self, batch, generators)
    poisoned = fault == "nan" and rank == 1 and self.training and now == 2
    return value * float("nan" if poisoned else 1), metrics

def fit(self):
    models.append(self.model)
    return plain_fit(self)

TextData.batch = batch
GPTRun.show = show
GPT.loss = loss
Trainer.fit = fit
for fault in ("step", "samples", "nan"):
    sys.argv = ["train.py", *options, "--out", f"{out}/{fault}"]
    print("status:", train.main(), flush=True)
digest = hashlib.sha256()
for name, tensor in models[-1].state_dict().items():
    assert tensor.isfinite().all(), name
    digest.update(tensor.numpy().tobytes())
print("weights:", digest.hexdigest(), flush=True)
os._exit(0)  # gloo's threads sometimes abort an orderly exit, which is not tested here
"""


def test_a_fault_on_one_rank_is_handled_by_both(options, tmp_path):
    (out, err), (second, second_err) = run_two_ranks(RANK, tmp_path, *options)
    ends = []
    for said in (out, second):
        lines = said.splitlines()
        ends.append([line for line in lines if line.startswith(("status: ", "weights: "))])
    assert ends[0] == ends[1], err + second_err
    assert ends[0][:-1] == ["status: 143", "status: 143", "status: 0"], out + err
    assert checkpoint.find(tmp_path / "step").name == "step-000002"
    assert checkpoint.find(tmp_path / "samples").name == "step-000003"
    assert out.count("skipped, no weight was changed") == 1
    assert [row["step"] for row in metrics(tmp_path / "nan") if "loss" in row] == [1, 2, 4]


# Runs train.py with rank 1 stopped: in a step after the checkpoint of step 2, or in the next save.
STOPPED = """
import os, signal, sys, time
from datetime import timedelta
from pathlib import Path
from torch.distributed.distributed_c10d import _set_pg_timeout
import train
from tinyfm.batches.text import TextData
from tinyfm.training import checkpoint
out, where, *options = sys.argv[1:]
plain_batch = TextData.batch
plain_write = checkpoint.write_state
saves = 0

def stop():
    while not Path(out, "latest").exists():
        time.sleep(0.01)
    _set_pg_timeout(timedelta(seconds=4))  # no earlier, so that a busy machine is not at fault
    if os.environ["RANK"] == "1":
        print("stopped", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)

def batch(self, step, rows=slice(None)):
    if where == "step" and step == 3:
        stop()
    return plain_batch(self, step, rows)

def write_state(*arguments):
    global saves
    saves += 1
    if where == "save" and saves == 2:
        stop()
    return plain_write(*arguments)

TextData.batch = batch
checkpoint.write_state = write_state
sys.argv = ["train.py", *options, "--train.steps", "8", "--out", out]
print("end:", train.main(), flush=True)
os._exit(1)  # gloo's threads sometimes abort an orderly exit, which is not tested here
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGSTOP")
@pytest.mark.parametrize("where", ["step", "save"])
def test_a_rank_that_is_stopped_ends_all_ranks(where, options, tmp_path):
    out = tmp_path / "run"
    more = ["--train.parallel", "ddp", "--train.device", "cpu"]
    ranks = start_two_ranks(STOPPED, tmp_path, out, where, *options, *more)
    try:
        assert ranks[0].wait(60) == 1, ranks[0].said()
        assert ranks[1].said()[0].endswith("stopped\n"), ranks[1].said()
        os.kill(ranks[1].running.pid, signal.SIGCONT)
        assert ranks[1].wait(60) == 1, ranks[1].said()
    finally:
        for rank in ranks:
            rank.running.kill()
    for number, rank in enumerate(ranks):
        said, _ = rank.said()
        assert f"end: error: rank {number} gets no answer from another rank" in said
        assert "continue with --resume" in said
    assert checkpoint.find(out).name == "step-000002"


# Each process runs train.py straight, then with a SIGTERM to both ranks while they write the
# sharded state of step 2, then resumes. The last lines are hashes of the final weights.
IN_SAVE = """
import hashlib, os, signal, sys
import train
from tinyfm.training import checkpoint, distributed
from tinyfm.training.trainer import Trainer
out, *options = sys.argv[1:]
distributed.stop = lambda: None
plain_write = checkpoint.write_state
plain_fit = Trainer.fit
models = []
terminate = False

def write_state(*arguments):
    if terminate:
        os.kill(os.getpid(), signal.SIGTERM)
    return plain_write(*arguments)

def fit(self):
    models.append(self.model)
    return plain_fit(self)

def digest(model):
    found = hashlib.sha256()
    for tensor in model.state_dict().values():
        found.update(distributed.local(tensor).numpy().tobytes())
    return found.hexdigest()

checkpoint.write_state = write_state
Trainer.fit = fit
for name, *more in (("straight",), ("stopped",), ("stopped", "--resume")):
    terminate = (name, *more) == ("stopped",)
    sys.argv = ["train.py", *options, "--out", f"{out}/{name}", *more]
    print("status:", train.main(), flush=True)
print("equal:", digest(models[0]) == digest(models[2]) != digest(models[1]), flush=True)
os._exit(0)  # gloo's threads sometimes abort an orderly exit, which is not tested here
"""


def test_a_signal_in_a_sharded_save_loses_nothing(options, tmp_path):
    more = ["--train.parallel", "fsdp", "--train.device", "cpu", "--train.steps", "6"]
    for out, err in run_two_ranks(IN_SAVE, tmp_path, *options, *more):
        lines = [line for line in out.splitlines() if line.startswith(("status: ", "equal: "))]
        assert lines == ["status: 0", "status: 143", "status: 0", "equal: True"], out + err
    assert metrics(tmp_path / "stopped")[-1] == metrics(tmp_path / "straight")[-1]
    assert not [*(tmp_path / "stopped").glob(".tmp-*")]


# Runs train.py three times with ranks that differ: in an option, in the data, in the code.
UNLIKE = """
import os, sys
import train
from tinyfm.training import distributed
from tinyfm.batches.text import TextData
distributed.stop = lambda: None
out, *options = sys.argv[1:]
second = os.environ["RANK"] == "1"
plain_init = TextData.__init__
plain_software = distributed.software

def init(self, *arguments):
    plain_init(self, *arguments)
    self.fingerprint += " other" * (fault == "data" and second)

def software():
    return plain_software() | {"code of tinyfm": f"version {fault == 'code' and second}"}

TextData.__init__ = init
distributed.software = software
for fault in ("option", "data", "code"):
    more = ["--optim.lr", "0.5"] if fault == "option" and second else []
    sys.argv = ["train.py", *options, *more, "--out", f"{out}/{fault}"]
    print(train.main(), flush=True)
os._exit(0)  # gloo's threads sometimes abort an orderly exit, which is not tested here
"""


def test_ranks_that_differ_do_not_train(options, tmp_path):
    expected = ["optim.lr is 0.5, not 0.012", "fingerprint of the data is", "version True, not"]
    for out, err in run_two_ranks(UNLIKE, tmp_path / "runs", *options):
        lines = [line for line in out.splitlines() if line.startswith("error: ")]
        assert len(lines) == 3, out + err
        for line, part in zip(lines, expected):
            assert "rank 1 differs from rank 0: " in line and part in line
    assert not [*(tmp_path / "runs").rglob("*.json")]


# ---- reproducibility ----------------------------------------------------------------------------


def test_a_seed_determines_the_run(tiny_run, options, tmp_path):
    """The same seed gives the same run, bit for bit; another seed gives another run."""
    for name, seed in (("again", 0), ("other", 1)):
        assert call(train, *options, "--train.seed", seed, "--out", tmp_path / name) == 0
    assert metrics(tmp_path / "again") == metrics(tiny_run)
    assert equal(weights(tmp_path / "again"), weights(tiny_run))
    for ours, theirs in zip(metrics(tmp_path / "other"), metrics(tiny_run)):
        assert ours["step"] == theirs["step"]
        assert all(ours[key] != theirs[key] for key in ("loss", "val_loss") if key in ours)


def test_threads_change_nothing_but_rounding():
    """Two threads add in another order than one; losses and gradients agree to 1e-5."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(257, context_length=64, n_layer=1, n_head=2, d_model=128))
    batch = {"tokens": torch.randint(257, (32, 65))}
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        try:
            model.zero_grad()
            loss, _ = model.loss(batch)
            loss.backward()
        finally:
            torch.set_num_threads(threads)
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


# ---- untrusted files ----------------------------------------------------------------------------


class Bomb:
    """An object whose pickle makes a folder when it is read."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture
def bomb(tmp_path):
    """A pickle that makes a folder when it is read. After the test, the folder must not exist."""
    marker = tmp_path / "exploded"
    payload = pickle.dumps(Bomb(marker))
    pickle.loads(payload)  # the bomb works
    marker.rmdir()
    yield payload
    assert not marker.exists()


SMALL = GPTConfig(280, context_length=8, n_layer=1, n_head=2, d_model=8)


@pytest.fixture(scope="module")
def published(text, tmp_path_factory):
    """A GPT with its tokenizer, in the published layout."""
    folder = tmp_path_factory.mktemp("published") / "gpt"
    words = [text.read_text(encoding="utf-8")]
    GPT(SMALL).save_pretrained(folder, tokenizer=tokenizer.train("bpe", words, 280))
    return folder


def open_published(folder: Path) -> None:
    GPT.from_pretrained(folder)
    tokenizer.load(folder)


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "model.safetensors.index.json",
    ],
)
def test_a_pickle_in_a_published_folder(published, tmp_path, bomb, name):
    folder = Path(shutil.copytree(published, tmp_path / "gpt"))
    open_published(folder)
    if "index" in name:
        (folder / "model.safetensors").unlink()
    if name == "tokenizer.model":  # is read where there is no tokenizer.json
        (folder / "tokenizer.json").unlink()
    (folder / name).write_bytes(bomb)
    with pytest.raises(ValueError, match="gpt"):
        open_published(folder)


def test_a_pickle_in_prepared_text(text, tmp_path, bomb):
    config = TextConfig(str(text), "bytes", cache=str(tmp_path / "cache"))
    TextData.prepare(config, 257, 16, 2, seed=0)
    (folder,) = (tmp_path / "cache").iterdir()
    for name in ("manifest.json", "train-00000.bin"):
        path = folder / name
        whole = path.read_bytes()
        path.write_bytes(bomb)
        with pytest.raises(ValueError, match="delete the folder"):
            TextData.prepare(config, 257, 16, 2, seed=0)
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "pairs.csv", "pairs.jsonl", "text.txt"])
def test_a_pickle_with_the_name_of_another_format(tmp_path, bomb, name):
    path = tmp_path / name
    path.write_bytes(bomb)
    with pytest.raises(ValueError, match=name):
        if path.suffix in (".png", ".jpg"):
            pictures.read(path, 8, 1)
        elif path.suffix == ".txt":
            config = TextConfig(str(path), "bytes", cache=str(tmp_path / "cache"))
            TextData.prepare(config, 257, 16, 2, seed=0)
        else:
            captioned.pairs(path, Report())


def test_a_pickle_in_the_state_of_a_shared_run(tiny_run, tmp_path, bomb, capsys):
    """The training state is for resuming your own runs; sampling and exporting never read it."""
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    folder = checkpoint.find(run)
    for path in (folder / "state").rglob("*"):
        path.write_bytes(bomb)
    (folder / "state" / ".metadata").write_bytes(bomb)
    # A forger would make the manifest fit.
    files.write_json(folder / checkpoint.MANIFEST, checkpoint.make_manifest(folder))
    assert call(sample, run, "--max-new-tokens", 2) == 0
    hub.main([str(run), str(tmp_path / "exported")])
    assert (tmp_path / "exported" / "config.json").exists()


# ---- damage -------------------------------------------------------------------------------------


def damaged_latents(path: Path) -> dict[str, bytes]:
    """Contents of .npy files that are truncated, of another type or shape, or malformed."""
    np.save(path, np.zeros((4, 2, 3, 3), np.float16))
    whole = path.read_bytes()
    objects = np.array([Bomb(path.parent / "exploded")] * 4, dtype=object)
    few = np.zeros((3, 2, 3, 3), np.float16)
    doubles = np.zeros((4, 2, 3, 3))
    others = {"objects": objects, "rows": few, "type": doubles}
    damaged = {f"cut at {end}": whole[:end] for end in (0, 5, 60, 128, len(whole) - 1)}
    for name, array in others.items():
        np.save(path, array, allow_pickle=True)
        damaged[name] = path.read_bytes()
    damaged["zip"] = b"PK\3\4" + whole
    damaged["header"] = whole[:10] + b"{[" + whole[12:]
    return damaged


def test_damaged_latents_are_refused_by_name(tmp_path, bomb):
    path = tmp_path / "latents-0.npy"
    damaged = damaged_latents(path)
    for content in [*damaged.values(), bomb]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"latents-0\.npy cannot be read: .*; delete it"):
            latents.open_latents(path, 4, np.float16)
    np.save(path, np.ones((4, 2, 3, 3), np.float16))
    assert latents.open_latents(path, 4, np.float16).min() == 1


def places(tree, before=()):
    """The path (keys and indices) to every value of nested tables and lists."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in pairs:
        yield (*before, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*before, key))


ODD = (None, True, -1, 0, 0.5, 1e308, 10**30, "x", "", [], {}, [1, 2], {"a": 1}, [[]])


def altered(record: dict, rng: random.Random) -> dict:
    """The record with one value replaced by an odd one, one removed, or one added."""
    record = copy.deepcopy(record)
    *path, last = rng.choice(list(places(record)))
    table = record
    for key in path:
        table = table[key]
    kind = rng.randrange(8)
    if kind == 0:
        del table[last]
    elif kind == 1 and isinstance(table, dict):
        table["stray"] = rng.choice(ODD)
    else:
        table[last] = rng.choice(ODD)
    return record


def test_a_thousand_altered_configs_of_runs():
    """An invalid record raises a ValueError."""
    rng = random.Random(0)
    refused = 0
    names = ("gpt", "clip", "autoencoder", "ddpm", "text2image")
    records = [run_dir.to_record(name, registry.find_preset(name).run) for name in names]
    for i in range(1000):
        record = altered(records[i % 5], rng)
        try:
            run_dir.from_record(record)
        except ValueError:
            refused += 1
    assert 500 < refused < 1000


HUGE = (10**9, 10**6, 2**53, 10**15, 0, -1, 1e308, 0.5)


def test_altered_runs_open_and_sample_or_are_refused_by_name(tiny_run, tmp_path):
    """Through opening, building and sampling, also for numbers that ask for all memory."""
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    folder = checkpoint.find(run)
    originals = {name: files.read_json(folder / name) for name in ("config.json", "meta.json")}
    sizes = list(originals["config.json"]["model"])
    rng = random.Random(0)
    refused = 0
    for i in range(150):
        name = "meta.json" if i % 5 == 0 else "config.json"
        record = copy.deepcopy(originals[name])
        if i % 2 and name == "config.json":
            record["model"][rng.choice(sizes)] = rng.choice(HUGE)
        else:
            record = altered(record, rng)
        (folder / name).write_text(json.dumps(record), encoding="utf-8")
        files.write_json(folder / checkpoint.MANIFEST, checkpoint.make_manifest(folder))
        try:
            opened = run_dir.open_run(str(run))
            opened.model.generate([[1]], generate.Sampling(max_new_tokens=2))
        except ValueError as error:
            assert name in str(error) or "logits are not finite" in str(error)
            refused += 1
        files.write_json(folder / name, originals[name])
    assert 75 < refused < 150


TINY_UNET = UNetConfig(image_size=8, channels=(8, 16), groups=4, n_head=2, attend=(False, True))
READERS = {  # a model to publish, and the function that reads its config
    "gpt": (lambda: GPT(SMALL), lambda folder: gpt.read_config(GPTConfig, folder)),
    "clip": (
        lambda: CLIP(CLIPConfig(stem="patch", image_size=8, patch_size=4, vocab_size=280)),
        lambda folder: clip.read_config(CLIPConfig, folder),
    ),
    "unet": (
        lambda: UNet(TINY_UNET),
        lambda folder: diffusion.read(
            folder / "config.json", diffusion.UNETS, diffusion.read_unet, UNetConfig
        ),
    ),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("ignore:without a tokenizer")
def test_hundreds_of_altered_published_configs(tmp_path, name):
    build, read = READERS[name]
    build().save_pretrained(tmp_path)
    read(tmp_path)
    path = tmp_path / "config.json"
    rng = random.Random(0)
    refused = 0
    config = files.read_json(path)
    for i in range(200):
        text = json.dumps(altered(config, rng))
        if i % 2:  # every second time, also change one character anywhere
            cut = rng.randrange(len(text))
            text = text[:cut] + chr(rng.randrange(32, 126)) + text[cut + 1 :]
        path.write_text(text, encoding="utf-8")
        try:
            read(tmp_path)
        except ValueError as error:
            assert str(tmp_path) in str(error)
            refused += 1
    assert 50 < refused < 200
