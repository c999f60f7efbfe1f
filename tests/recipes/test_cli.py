"""train.py and sample.py: what they print and write, and a clear message for each mistake."""

import dataclasses
import errno
import importlib
import inspect
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from conftest import call
from PIL import Image
from safetensors.torch import save_file

import sample
import train
from data import pictures
from tinyfm import beam, generate, speculative, tokenizer
from tinyfm.common import device as machine
from tinyfm.common import files, folders
from tinyfm.evaluate import __main__ as evaluate
from tinyfm.gpt import GPT
from tinyfm.recipes import gpt, registry, run_dir, writing
from tinyfm.recipes.base import Preset
from tinyfm.training import checkpoint
from tinyfm.training.trainer import Trainer

ROOT = Path(__file__).parents[2]


def contents(folder: Path) -> dict:
    """The path of each file in a folder, with its bytes."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def fails(capsys):
    """A function that runs a main() which must fail, and returns its message on one line."""

    def run(module, *arguments) -> str:
        capsys.readouterr()
        status = call(module, *arguments)
        err = capsys.readouterr().err
        assert status in (1, 2)
        assert "Traceback" not in err
        return re.sub(r"[\s│╭╮╰╯─]+", " ", err)  # without the boxes of tyro

    return run


# ---- train.py -----------------------------------------------------------------------------------


def test_the_output_and_files_of_a_run(tmp_path, options, drawing, capsys):
    out = tmp_path / "run"
    assert call(train, *options, "--out", out, "--model.dropout", "0.1") == 0
    printed = capsys.readouterr().out
    for line in (
        r"reference-txt-\w+: 0.0 MB of text",
        r"[\d,]+ parameters; ",
        r"step 4/4  loss",
        r"--- step 2 writes:",
        r"val_bpb: \d.\d{3} untrained, \d.\d{3} reached; no usual value",
        r"s in all, at most .* (MB|GiB) of memory; in ",
        r"next: python sample.py \S+, or python -m tinyfm.evaluate ",
    ):
        assert re.search(line, printed), line
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.json",
        "metrics.jsonl",
        "loss.png",
        "samples",
        "latest",
        "step-000002",
        "step-000004",
    }
    record = files.read_json(out / "config.json")
    assert record["model"]["dropout"] == 0.1
    assert record["preset"] == "gpt"
    assert (out / "samples" / "step-000004.txt").read_text(encoding="utf-8").count("----") == 1

    for given in ([*options, "--model.dropout", "0.1"], []):  # all options again, or none
        assert call(train, "--resume", "--out", out, *given) == 0
        assert "the run is complete:" in capsys.readouterr().out
    for other, message in (
        (["clip"], "is a run of preset gpt"),
        (["--model.dropout", "0"], "was 0.1"),
    ):
        words = [*other, "--resume", "--out", out]
        assert call(train, *words) == 1
        assert message in capsys.readouterr().err


def test_the_verdict_has_the_usual_value_of_an_unchanged_preset():
    """Options such as the device may differ."""
    preset = dataclasses.replace(registry.find_preset("gpt"), usual="1.5")
    run = dataclasses.replace(preset.run, out="elsewhere", resume=True)
    other_device = dataclasses.replace(run, train=dataclasses.replace(run.train, device="cpu"))
    other_steps = dataclasses.replace(run, train=dataclasses.replace(run.train, steps=7))
    cases = [(run, "preset: 1.5"), (other_device, "preset: 1.5"), (other_steps, "not .* preset")]
    for each, ending in cases:
        line = run_dir.verdict(preset, each, {"val_bpb": 8.0}, {"val_loss": 2.0, "val_bpb": 3.0})
        assert re.fullmatch(rf"val_bpb: 8.000 untrained, 3.000 reached; .*{ending}", line)


def test_a_run_that_diverged_is_called_so():
    run = registry.find_preset("gpt").run
    before = {"val_loss": 5.5, "val_bpb": 3.0}
    for loss, diverged in ((2.0, False), (6.0, True)):
        line = run_dir.verdict(Preset("", run), run, before, {"val_loss": loss, "val_bpb": 4e9})
        assert ("worse than untrained, 5.5" in line) == diverged
        assert ("lower --optim.lr" in line) == diverged


PUBLISHED = {"gpt2-124m": "124,439,808", "gpt2-1.5b": "1,557,611,200", "llama-1b": "1,235,814,400"}


@pytest.mark.parametrize("name", [*registry.all_presets()])
def test_dry_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(train, name, "--dry-run", "--train.steps", "7") == 0
    text = capsys.readouterr().out
    lines = text[: text.index("\n{")].splitlines()
    record = json.loads(text[text.index("\n{") :])
    assert record["preset"] == name
    assert record["train"]["steps"] == 7
    costs, *parts = lines
    trained = r"(, [\d,]+ of them trained)?"
    time = r"[\d.,]+ (second|minute|hour|day|year)s?"
    assert re.fullmatch(rf"[\d,]+ parameters{trained}; .* (MB|GiB) .* FLOP, about {time}", costs)
    if name in PUBLISHED:
        assert costs.startswith(f"{PUBLISHED[name]} parameters")
    first = [f"{name}-{part}" for part in registry.find_preset(name).run.PARTS]  # trained first
    assert [part.split("runs/")[1] for part in parts] == first
    assert not list(tmp_path.iterdir())


def test_dry_run_as_json(capsys):
    assert call(train, "vae", "--dry-run", "--json") == 0  # also by its other name
    record = json.loads(capsys.readouterr().out)
    assert record["settings"]["preset"] == "autoencoder"
    assert record["costs"]["cost"]["parameters"] > 1e5 and record["costs"]["seconds"] > 0


def test_help_lists_presets_and_options(capsys):
    for family in registry.family_names():
        assert call(train, family, "--help") == 0
        text = capsys.readouterr().out
        for name in registry.family_presets(family):
            assert f"  {name}: " in text
        assert all(name in text for name in registry.family_names())
    assert call(train, "--help") == 0
    text = capsys.readouterr().out
    assert "--model.n-layer INT" in text and "number of blocks" in text
    assert "--train.steps INT" in text and "number of updates of the weights" in text
    for words in ("--init-from RUN", "--out FOLDER", "--data.path PATH", "--teacher RUN"):
        assert words in text
    assert "(default: '')" not in text


def test_help_of_sample_has_a_heading_for_each_family(capsys):
    assert call(sample, "--help") == 0
    text = capsys.readouterr().out
    headings = ("options", "GPT options", "sampling options", "CLIP options", "diffusion options")
    places = [text.index(f" {heading} ─") for heading in (*headings, "text2image options")]
    assert places == sorted(places)
    for word, heading in (("--stop TEXT ...", 1), ("--image FILE", 3), ("--mask FILE", 5)):
        assert text.index(word) > places[heading]
    assert "RUN " in text[: places[0]] and "--prompt TEXT" in text and "None" not in text


def test_all_options_of_sample_have_a_heading():
    line = sample.CommandLine("run")
    found = {*vars(line)} - {*sample.GROUPS}
    for name in sample.GROUPS:
        found |= {*vars(getattr(line, name))}
    assert found == {*vars(sample.Options("run"))}


@pytest.mark.parametrize("module", [train, sample])
def test_help_has_one_example_per_line(module, capsys):
    assert call(module, "--help") == 0
    text = capsys.readouterr().out
    examples = re.findall(rf"^ +python {module.__name__}.py.*", module.__doc__, re.MULTILINE)
    assert len(examples) >= 6
    assert max(map(len, examples)) <= 80
    for example in examples:
        assert f"\n{example}\n" in text


# The options, and a pattern of the value and the advice in the message.
WRONG = {
    "missing": (["--data.path", "nowhere.txt"], "'nowhere.txt': give a text file"),
    "empty": (["--data.path", "empty.txt"], "'empty.txt': 1 found, 0 used; 1 skipped"),
    "short": (["--data.path", "short.txt"], r"need > 32: use --model.context-length <= \d"),
    "binary": (["--data.path", "binary.bin"], r"binary, .*NUL bytes \(binary.bin\)"),
    "tokenizer": (["--data.tokenizer", "bites"], "--data.tokenizer 'bites' .*folder .*tokenizer"),
    "vocabulary": (
        ["--data.tokenizer", "sentencepiece", "--model.vocab-size", "90000"],
        r"vocab_size 90000 .*use at most \d",
    ),
    "small vocabulary": (["--model.vocab-size", "200"], "200: set --model.vocab-size 257"),
    "heads": (["--model.d-model", "33"], "d_model 33 .*n_head 2; use 32"),
    "value": (["--train.steps", "-1"], "steps is -1; .*at least 1"),
    "type": (["--train.steps", "many"], "--train.steps: .*'many'"),
    "flag": (["--model.n-layr", "2"], "--model.n-layr.*Perhaps you meant: --model.n-layer INT"),
    "choice": (["--optim.optimizer", "sgd"], "'sgd' for .*'--optim.optimizer'.*'muon', 'adamw'"),
    "cuda": (["--train.device", "cuda"], r"device 'cuda' .*try auto or cpu"),
    "folder": (["--out", "/proc/run"], r"No such file or directory: '/proc/run"),
    "cache": (["--data.cache", "/proc/cache"], r"No such file or directory: '/proc/cache"),
    "nothing": (["--out", "new", "--resume"], "no run new .*leave out --resume"),
    "other": (["--out", "other"], "other exists: .*--resume, .*another --out"),
    "no run": (["--out", "other", "--resume"], "other/config.json cannot be read"),
}


@pytest.mark.parametrize("name", [*WRONG])
def test_mistakes_of_training(name, tmp_path, options, monkeypatch, fails):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("empty.txt").write_text("", encoding="utf-8")
    Path("short.txt").write_text("to be or not to be", encoding="utf-8")
    Path("binary.bin").write_bytes(b"\0\1\2" * 999)
    Path("other").mkdir()
    Path("other/notes.txt").write_text("precious", encoding="utf-8")
    before = contents(tmp_path)
    arguments, message = WRONG[name]
    assert re.search(message, fails(train, *options, "--out", "run", *arguments))
    assert contents(tmp_path) == before
    assert not Path("run").exists()


def test_a_folder_without_any_step_may_be_used(tmp_path):
    """A run that fails in its first step leaves such a folder. Somebody's config.json is theirs."""
    config = tmp_path / "config.json"
    record = run_dir.to_record("gpt", registry.find_preset("gpt").run)
    files.write_json(config, record)
    (tmp_path / "metrics.jsonl").touch()
    run_dir.check_directory(tmp_path, resume=False)
    for path, text in ((config, '{"model_type": "llama"}'), (tmp_path / "metrics.jsonl", "{}")):
        files.write_json(config, record)
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"exists: .*--resume"):
            run_dir.check_directory(tmp_path, resume=False)


def test_a_run_that_another_process_is_training(run, options, fails):
    """Neither a new run nor --resume touches it."""
    before = contents(run)
    with folders.hold(folders.lock_inside(run), run):
        assert f"{run} exists" in fails(train, *options, "--out", run)
        message = fails(train, *options, "--out", run, "--resume")
        assert f"{run} is being written by process {os.getpid()}: wait" in message
    assert contents(run) == before


def test_an_unknown_preset(fails):
    message = fails(train, "gtp")
    assert "no preset 'gtp'" in message and "did you mean gpt?" in message
    for name in registry.all_presets():
        assert name in message
    assert "did you mean" not in fails(train, "zzz")  # nothing is similar


def test_bfloat16_where_it_is_emulated(tmp_path, options, monkeypatch, fails):
    monkeypatch.setattr(machine, "bfloat16_is_fast", lambda device: False)
    message = fails(train, *options, "--out", tmp_path / "run", "--train.dtype", "bfloat16")
    assert "emulates bfloat16" in message and "use float32 or auto" in message


def test_shards_with_an_id_past_the_vocabulary(tmp_path, options, fails):
    arguments = [*options, "--data.cache", tmp_path / "cache", "--out", tmp_path / "run"]
    assert call(train, *arguments, "--train.steps", 1) == 0
    (shard,) = (tmp_path / "cache").glob("*/train-00000.bin")
    shard.write_bytes(b"\xff\xff" + shard.read_bytes()[2:])
    message = fails(train, *arguments, "--out", tmp_path / "again")
    assert "id 65535 at byte 0" in message and "vocabulary" in message


def test_a_full_disk_at_a_save(tmp_path, options, monkeypatch, fails):
    save_file = files.save_file
    saves = []

    def full(*arguments):
        saves.append(arguments)
        if len(saves) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(*arguments)

    monkeypatch.setattr(files, "save_file", full)
    message = fails(train, *options, "--out", tmp_path / "run")
    assert "step 4 could not be saved" in message
    assert "No space left on device; make room" in message
    assert checkpoint.find(tmp_path / "run").name == "step-000002"


def test_out_of_memory(tmp_path, options, monkeypatch, fails):
    errors = [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nlong"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 2 GiB\nlong"),
        RuntimeError("a bug of ours"),
    ]

    def loss(self, batch, generators=None):
        raise errors[0]

    monkeypatch.setattr(GPT, "loss", loss)
    while len(errors) > 1:
        message = fails(train, *options, "--out", tmp_path / str(len(errors)))
        assert "2 GiB; try half the --train.micro-batch-size" in message
        assert "long" not in message  # only the first line of the error is shown
        errors.pop(0)
    with pytest.raises(RuntimeError, match="a bug of ours"):  # other errors keep their traceback
        call(train, *options, "--out", tmp_path / "bug")


def test_steps_that_are_not_finite(tmp_path, options, monkeypatch, fails):
    backward = Trainer.backward

    def nan_after_step_1(self, step):
        loss = backward(self, step)
        return loss * torch.nan if step > 1 else loss

    monkeypatch.setattr(Trainer, "backward", nan_after_step_1)
    message = fails(train, *options, "--out", tmp_path / "run", "--train.patience", 2)
    assert "steps in a row" in message and ": 2, up" in message and "up to step 3" in message
    assert "--train.dtype float32" in message
    assert checkpoint.find(tmp_path / "run").name == "step-000002"


def test_interrupted_before_training(options, monkeypatch, capsys):
    def interrupt(run):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(gpt.GPTRun, "open_data", interrupt)
    assert call(train, *options, "--out", "nowhere") == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_program(tmp_path, options, number):
    words = ["train.py", *options, "--train.steps", 100_000, "--train.eval-every", 0]
    process = processes.start([*words, "--out", tmp_path / "run"], tmp_path, ROOT, {})
    process.wait_for("step 3/", seconds=60)
    os.kill(process.running.pid, number)
    status = process.wait(60)
    out, err = process.said()
    assert status == 128 + number, err
    assert "Traceback" not in err
    step = int(re.search(r"stopped at step (\d+) .*--resume", out)[1])
    assert 3 <= step < 100_000
    assert checkpoint.find(tmp_path / "run").name == f"step-{step:06d}"


# ---- train.py --resume --------------------------------------------------------------------------


@pytest.fixture
def run(tiny_run, tmp_path) -> Path:
    """A copy of the tiny run, which a test may change."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


CHANGES = {
    "model": (["--model.n-layer", "2"], "model.n_layer was 1 and is 2"),
    "optimizer": (["--optim.lr", "0.5"], "optim.lr was 0.012 and is 0.5"),
    "batch": (["--train.batch-size", "8"], "train.batch_size was 4 and is 8"),
    "tokenizer": (["--data.tokenizer", "bpe"], "data.tokenizer was bytes and is bpe"),
    "vocabulary": (["--model.vocab-size", "300"], "model.vocab_size was 257 and is 300"),
}


@pytest.mark.parametrize("name", [*CHANGES])
def test_changed_settings_are_not_resumed(name, run, options, fails):
    before = contents(run)
    arguments, change = CHANGES[name]
    message = fails(train, *options, *arguments, "--out", run, "--resume")
    assert str(run) in message and change in message
    assert contents(run) == before


def test_changed_data_are_not_resumed(run, options, text, tmp_path, fails):
    """Text of the same length that differs in one letter."""
    changed = tmp_path / "changed.txt"
    changed.write_text(text.read_text(encoding="utf-8").replace("e", "i", 1), encoding="utf-8")
    record = files.read_json(run / "config.json")
    record["data"]["path"] = str(changed)
    files.write_json(run / "config.json", record)
    message = fails(train, *options, "--data.path", changed, "--out", run, "--resume")
    assert "data_fingerprint was" in message


def test_more_steps_are_a_new_run(run, options, fails):
    message = fails(train, *options, "--train.steps", 8, "--out", run, "--resume")
    assert "train.steps was 4 and is 8" in message and f"--init-from {run} --out" in message


def test_a_run_finds_its_data_from_another_folder(options, text, tmp_path, monkeypatch, fails):
    """Its config has a path as it was typed; the data may also be given by another path."""
    home = tmp_path / "home"
    elsewhere = tmp_path / "elsewhere"
    for folder in (home, elsewhere):
        folder.mkdir()
    shutil.copy(text, home / "my.txt")
    monkeypatch.chdir(home)
    assert call(train, *options, "--data.path", "my.txt", "--out", "runs/mine") == 0
    monkeypatch.chdir(elsewhere)
    out = home / "runs" / "mine"
    assert run_dir.open_run(str(out)).run.data.path == str(home / "my.txt")
    assert call(train, "--resume", "--out", out) == 0
    (home / "my.txt").rename(elsewhere / "moved.txt")
    assert "my.txt" in fails(train, "--resume", "--out", out)
    assert call(train, "--resume", "--out", out, "--data.path", "moved.txt") == 0
    monkeypatch.setattr(evaluate, "rebuild_start", lambda opened: ("untrained", opened.model))
    assert "my.txt" in fails(evaluate, out)
    assert call(evaluate, out, "--data-path", "moved.txt") == 0


def test_options_that_may_change_on_resume(run, options, capsys):
    may_change = ["--train.micro-batch-size", 1, "--train.log-every", 2, "--train.keep", 5]
    assert call(train, *options, *may_change, "--out", run, "--resume") == 0
    assert "the run is complete" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_named_with_the_one_before(run, options, fails):
    path = run / "step-000004" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    message = fails(train, *options, "--out", run, "--resume")
    assert re.search("step-000004 is damaged: model.safetensors ", message)
    assert re.search(f"--resume .*{re.escape(str(run))}/step-000002", message)


# ---- sample.py ----------------------------------------------------------------------------------


def expected(run: Path, prompt: str, n: int, **settings) -> list[str]:
    """The prompt with n continuations by the model of a run."""
    opened = run_dir.open_run(str(run))
    prompts = [prompt] * n
    sampling = generate.Sampling(**settings)
    steps = generate.stream_text(opened.model, opened.tokenizer, prompts, sampling, ())
    return ["".join(parts) for parts in zip(prompts, *steps)]


def test_a_draft_changes_no_greedy_text(tiny_run, capsys, fails):
    arguments = ["--prompt", "The with with", "-n", 2, "--max-new-tokens", 40, "--temperature", 0]
    assert call(sample, tiny_run, *arguments) == 0
    plain = capsys.readouterr().out
    for draft in ("ngram", tiny_run):
        assert call(sample, tiny_run, *arguments, "--draft", draft, "--draft-tokens", 3) == 0
        printed = capsys.readouterr()
        assert printed.out == plain
        assert re.search(r"80 tokens in \d+ passes; \d+ of \d+ proposed", printed.err)

    # Drafts that do not fit.
    words = ["--prompt", "a", "--max-new-tokens", 5, "--draft"]
    message = fails(sample, tiny_run, *words, "ngram", "--compile")
    assert "--compile is for one token at a time, --draft for several" in message
    assert "no run directory nowhere" in fails(sample, tiny_run, *words, "nowhere")
    assert "did you mean --draft ngram" in fails(sample, tiny_run, *words, "n-grams")
    assert "add it" in fails(sample, tiny_run, "--draft-tokens", 3)
    assert "draft tokens is 0" in fails(sample, tiny_run, *words, "ngram", "--draft-tokens", 0)
    opened = run_dir.open_run(str(tiny_run))
    other = tokenizer.train("bpe", iter(["abc abc " * 20]), 260)
    drafted = dataclasses.replace(opened, draft=dataclasses.replace(opened, tokenizer=other))
    with pytest.raises(ValueError, match=rf"another tokenizer .* --data.tokenizer {tiny_run}"):
        writing.drafted(drafted, sample.Options("", draft="it"), speculative.Counts())
    classifier = dataclasses.replace(opened, model=torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="is a run of family gpt: a draft is a smaller run"):
        writing.drafted(dataclasses.replace(opened, draft=classifier), sample.Options(""), None)


def test_beams_write_the_likeliest_text(tiny_run, tmp_path, capsys, fails):
    path = tmp_path / "text.txt"
    words = ["--prompt", "The with", "--beams", 3, "--max-new-tokens", 12]
    assert call(sample, tiny_run, *words, "--length-penalty", 0.5, "--out", path) == 0
    printed = capsys.readouterr().out
    opened = run_dir.open_run(str(tiny_run))
    own = opened.tokenizer
    beams = beam.Beams(3, 0.5, max_new_tokens=12, stop_tokens=(own.eot,))
    never = own.without_token(opened.model.config.vocab_size)
    (found,) = beam.complete(opened.model, [own.encode("The with")], beams, never)
    assert printed == path.read_text(encoding="utf-8") == f"The with{own.decode(found)}\n"

    assert "--temperature draws a text" in fails(sample, tiny_run, *words, "--temperature", 0)
    assert "leave out -n 2" in fails(sample, tiny_run, *words, "-n", 2)
    assert "does not know --stop" in fails(sample, tiny_run, *words, "--stop", "x")
    assert "1000000 beams" in fails(sample, tiny_run, "--prompt", "a", "--beams", 1000000)
    assert "beams is 0; use 1 " in fails(sample, tiny_run, "--prompt", "a", "--beams", 0)
    message = fails(sample, tiny_run, "--prompt", "a", "--length-penalty", 2)
    assert "--length-penalty is for a search: add --beams" in message


@pytest.mark.parametrize(
    ("family", "given", "message"),
    [
        ("gpt", {"examples": "a.csv", "out": "b"}, "--out does nothing with --shots"),
        ("dpo", {"shots": 2, "n": 3}, "-n does nothing with --shots"),
        ("gpt", {"beams": 2, "draft_tokens": 9}, "--draft-tokens does nothing with --beams"),
        ("chat", {"chat": True, "prompt": "a"}, "--prompt does nothing with --chat"),
        ("chat", {"out": "a"}, "--out is not for a run of family chat"),
        ("reward", {"n": 2}, "-n is not for a run of family reward: it takes --prompt"),
        ("gpt-classify", {"out": "a"}, "--out is not for a run of family gpt-classify"),
        ("clip-classify", {"image": "a", "n": 2}, "-n is not for a run of family clip-classify"),
        ("encoder", {"overwrite": True}, "--overwrite is not for a run of family encoder"),
        ("xlnet", {"out": "a"}, "--out does nothing without --masks"),
        ("xlnet", {"overwrite": True}, "--overwrite does nothing without --masks"),
        ("xlnet", {"masks": True, "n": 2}, "-n does nothing with --masks"),
        ("clip", {"image": "a", "out": "b"}, "--out does nothing with --image"),
        ("gpt", {"beams": 2, "out": "a", "overwrite": True}, ""),
        ("xlnet", {"masks": True, "out": "a"}, ""),
        ("encoder", {"prompt": "[MASK]", "n": 2}, ""),
        ("seq2seq", {"n": 2, "out": "a"}, ""),
        ("clip", {"prompt": "a", "n": 2, "out": "b"}, ""),
        ("ddpm", {"film": True, "n": 2, "out": "a"}, ""),
        ("text2image", {"prompt": "a", "n": 2, "out": "b"}, ""),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(family, given, message):
    run = registry.find_run_type(family)()
    try:
        sample.check(sample.Options("run", **given), run)
    except ValueError as error:
        assert message and message in str(error)
    else:
        assert not message


def test_options_that_a_family_reads_are_its_own():
    for recipe in registry.RECIPES:
        for run_type in importlib.import_module(recipe).RUNS:
            source = inspect.getsource(run_type.sample)
            if "options.n " in source:
                assert "n" in run_type.SAMPLE_OPTIONS, run_type.family
            if "options.out" in source or "save_sheet" in source:
                assert "out" in run_type.SAMPLE_OPTIONS, run_type.family


def test_a_sample_is_what_the_model_generates(tiny_run, tmp_path, capsys):
    path = tmp_path / "texts.txt"
    arguments = ["--prompt", "The with", "-n", 3, "--max-new-tokens", 20, "--seed", 7]
    assert call(sample, tiny_run, *arguments, "--out", path) == 0
    printed = capsys.readouterr()
    texts = expected(tiny_run, "The with", 3, max_new_tokens=20, seed=7)
    assert len(set(texts)) == 3
    assert all(text.startswith("The with") for text in texts)
    assert printed.out == "\n----\n".join(texts) + "\n"
    assert path.read_text(encoding="utf-8") == printed.out
    assert re.search(r"step-000004: step 4, val_loss \d.*, val_bpb \d", printed.err)
    assert "model weights, cpu, float32" in printed.err

    # The text is that of all tokens: none is held back.
    opened = run_dir.open_run(str(tiny_run))
    rows = opened.model.generate(
        [opened.tokenizer.encode("The with")],
        generate.Sampling(max_new_tokens=20, seed=7, stop_tokens=(opened.tokenizer.eot,)),
    )
    assert "The with" + opened.tokenizer.decode(rows[0]) == texts[0]


def test_the_first_text_is_shown_while_it_is_generated(tiny_run, monkeypatch):
    opened = run_dir.open_run(str(tiny_run))
    stream_text = generate.stream_text
    events = []

    def recorded(*arguments):
        for parts in stream_text(*arguments):
            events.append("step")
            yield parts

    monkeypatch.setattr(generate, "stream_text", recorded)
    monkeypatch.setattr("builtins.print", lambda *text, **more: events.append("print"))
    sampling = generate.Sampling(max_new_tokens=4, temperature=1.0)
    writing.write_texts(opened, sample.Options("", prompt="a", sampling=sampling))
    # The prompt, four tokens and the end of the text, the line end.
    assert events == ["print", *["step", "print"] * 5, "print"]


def test_seeds_and_checkpoints(tiny_run, capsys):
    def text(*arguments):
        assert call(sample, *arguments, "--max-new-tokens", 20) == 0
        return capsys.readouterr().out

    assert text(tiny_run) == text(tiny_run / "step-000004") == text(tiny_run, "--seed", 0)
    assert text(tiny_run) != text(tiny_run, "--seed", 1)
    assert text(tiny_run, "--temperature", 0) != text(tiny_run / "step-000002", "--temperature", 0)


def test_stop_strings(tiny_run, capsys):
    whole = expected(tiny_run, "a", 1, max_new_tokens=60)[0]
    stop = whole[30:32]
    assert call(sample, tiny_run, "--prompt", "a", "--max-new-tokens", 60, "--stop", stop) == 0
    assert capsys.readouterr().out == whole[: whole.index(stop, 1)] + "\n"  # from 1: after "a"


def test_stop_strings_with_line_ends_and_accents(tiny_run, monkeypatch, capsys):
    given = []

    def stream_text(*arguments):
        given.append(arguments[4])
        return []

    monkeypatch.setattr(generate, "stream_text", stream_text)
    assert call(sample, tiny_run, "--stop", "\\n\\n", "é") == 0
    assert given == [["\n\n", "é"]]


def test_raw_weights(tmp_path, options, capsys):
    average = ["--optim.ema-half-life", 5, "--train.eval-every", 0]
    assert call(train, *options, *average, "--out", tmp_path / "run") == 0
    for words, kind in (([], "ema"), (["--raw"], "model")):
        capsys.readouterr()
        assert call(sample, tmp_path / "run", *words, "--temperature", 0) == 0
        assert f"; {kind} weights" in capsys.readouterr().err
    averaged = run_dir.open_run(str(tmp_path / "run")).model
    raw = run_dir.open_run(str(tmp_path / "run"), True).model
    assert not torch.equal(averaged.head.weight, raw.head.weight)


def reseal(folder: Path) -> None:
    """Write a manifest that fits the changed files, as an attacker could."""
    files.write_json(folder / checkpoint.MANIFEST, checkpoint.make_manifest(folder))


class Bomb:
    """Its pickle runs a command when it is read."""

    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_mistakes_of_sampling(run, tmp_path, monkeypatch, fails):
    monkeypatch.chdir(tmp_path)
    assert "prompt is empty: give text" in fails(sample, run, "--prompt", "")
    assert "-n is 0; use 1 to " in fails(sample, run, "-n", 0)
    assert "temperature is -1.0; " in fails(sample, run, "--temperature", "-1")
    assert "top_p is 2.0" in fails(sample, run, "--top-p", 2)
    assert "device 'nonsense' cannot be used" in fails(sample, run, "--device", "nonsense")
    assert "Perhaps you meant: --temperature" in fails(sample, run, "--temprature", 1)
    assert "no run directory nowhere" in fails(sample, "nowhere")
    assert f"give one of them, such as {run}" in fails(sample, tmp_path)
    assert "holds no complete checkpoint" in fails(sample, run / "samples")
    assert "texts.txt" in fails(sample, run, "--max-new-tokens", 1, "--out", "missing/texts.txt")
    monkeypatch.setattr(machine, "bfloat16_is_fast", lambda device: False)
    assert "emulates bfloat16" in fails(sample, run, "--dtype", "bfloat16")


def test_foreign_checkpoints_are_refused(run, tmp_path, monkeypatch, fails):
    monkeypatch.chdir(tmp_path)
    Path("model.pt").write_bytes(pickle.dumps(Bomb()))
    assert "no run directory model.pt" in fails(sample, "model.pt")
    folder = run / "step-000004"
    weights = folder / "model.safetensors"
    weights.write_bytes(pickle.dumps(Bomb()))
    reseal(folder)
    assert "a pickle (torch.save) is never opened" in fails(sample, run)
    assert not Path("exploded").exists()
    save_file({"somebody.elses": torch.ones(3)}, weights)
    reseal(folder)
    assert "somebody.elses is unexpected" in fails(sample, run)
    for record, message in (
        ({"family": "cat"}, "family 'cat'.*gpt"),
        ([], "config.json is not a run of this version"),
        ({"family": "gpt", "model": {"n_wings": 2}}, "config.json: .*n_wings"),
        ({"family": "gpt"}, "config.json: model is missing"),
    ):
        files.write_json(folder / "config.json", record)
        reseal(folder)
        assert re.search(message, fails(sample, run))


def test_a_padded_vocabulary(tmp_path, options, capsys):
    """Of 400 ids, 257 have a token. The model draws only these, however bad it is."""
    more = ["--model.vocab-size", 400, "--train.steps", 1, "--out", tmp_path / "run"]
    assert call(train, *options, *more) == 0
    assert call(sample, tmp_path / "run", "--temperature", 50, "--max-new-tokens", 60) == 0
    tokens = tokenizer.ByteTokenizer()
    assert tokens.without_token(257) == [] and tokens.without_token(259) == [257, 258]


def test_out_replaces_no_file_of_others(tiny_run, tmp_path, fails):
    path = tmp_path / "mine.txt"
    path.write_text("precious", encoding="utf-8")
    words = [tiny_run, "--max-new-tokens", 1, "--out", path]
    assert "mine.txt exists: choose another name, or add --overwrite" in fails(sample, *words)
    assert path.read_text(encoding="utf-8") == "precious"
    assert call(sample, *words, "--overwrite") == 0
    drawn = tmp_path / "drawn.png"
    pictures.save(np.zeros((4, 4, 1), np.uint8), drawn)
    options = sample.Options("run", out=str(drawn))
    sample.check_out(options)  # sample.py made it
    Image.new("L", (4, 4)).save(drawn)
    with pytest.raises(ValueError, match="exists"):
        sample.check_out(options)


def test_numbers_beyond_their_range(tiny_run, tmp_path, options, fails):
    assert "seed is 1000000000000000000" in fails(sample, tiny_run, "--seed", 10**18)
    for n in (10**9, 10**30):
        assert f"-n is {n}; use 1 to 65536" in fails(sample, tiny_run, "-n", n)
    for name in ("seed", "steps", "batch-size"):
        words = [f"--train.{name}", 10**30, "--out", tmp_path / "run"]
        assert f"{name.replace('-', '_')} is 1000" in fails(train, *options, *words)
    out = ["--out", tmp_path / "run"]
    for dry in ([], ["--dry-run"]):  # where the first would spin, and the second too
        words = [*options, *out, *dry]
        message = fails(train, *words, "--train.batch-size", 10**15)
        assert f"batch_size is {10**15}; it must be at most 1048576" in message
        message = fails(train, *words, "--model.n-layer", 10**15)
        assert f"--model.n-layer is {10**15}; use at most 10000" in message
    message = fails(train, *options, *out, "--model.d-ff", 10**15)
    assert "too little memory for the weights" in message
    # More rows at once than a batch has are all its rows.
    more = ["--train.micro-batch-size", 10**15, "--train.steps", 1]
    assert call(train, *options, *out, *more) == 0


def test_a_warning_that_is_an_error(tiny_run, fails):
    """As with python -W error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        message = fails(sample, tiny_run, "--prompt", "a" * 40, "--max-new-tokens", 1)
    assert "past 32 tokens the model sees only the latest" in message


@pytest.mark.parametrize("program", ["sample.py", "train.py"])
def test_a_program_with_a_safe_path(tmp_path, program):
    """PYTHONSAFEPATH takes the folder of the program off the module path."""
    done = subprocess.run(
        [sys.executable, ROOT / program, "nowhere"],
        capture_output=True,
        timeout=60,
        env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": ""},
        cwd=tmp_path,
    )
    assert done.returncode == 1 and b"error: there is no " in done.stderr


def test_too_little_memory_to_sample(tiny_run, monkeypatch, fails):
    def run_out(*arguments):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: 2 TiB")

    monkeypatch.setattr(generate, "stream_text", run_out)
    assert "too little memory for that: use smaller numbers" in fails(sample, tiny_run)


def test_interrupted_while_it_generates(tiny_run, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "stream_text", interrupt)
    assert call(sample, tiny_run) == 130


def test_a_reader_may_close_the_pipe(tiny_run):
    """As `head` does: the exit status is that of SIGPIPE, without an error message."""
    program = [sys.executable, str(ROOT / "sample.py"), str(tiny_run), "--max-new-tokens", "5"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(program, text=True, encoding="utf-8", **streams) as process:
        process.stdout.close()
        assert process.wait(60) == 141
        err = process.stderr.read()
    assert "weights, cpu" in err
    assert "rror" not in err


def test_sample_py_as_a_program(tiny_run):
    """In a real process, with the arguments, exit status and streams of the system.

    Sampling does not load torch.distributed.checkpoint, which is slow to load and only for saving.
    """
    done = subprocess.run(
        [sys.executable, str(ROOT / "sample.py"), str(tiny_run), "--max-new-tokens", "5"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
        check=True,
        env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"},
    )
    assert "tinyfm.training.checkpoint" in done.stderr
    assert "torch.distributed.checkpoint" not in done.stderr
    assert done.stdout == expected(tiny_run, "", 1, max_new_tokens=5)[0] + "\n"
