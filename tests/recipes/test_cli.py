"""The command line: every mistake gets one clear sentence, and what is on disk stays as it was."""

import dataclasses
import errno
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
import torch
from conftest import call
from safetensors.torch import save_file

import sample
import train
from tinyfm import generate
from tinyfm.common import device as machine
from tinyfm.common import files
from tinyfm.gpt import GPT
from tinyfm.recipes import gpt, registry, run_dir
from tinyfm.training import checkpoint
from tinyfm.training.trainer import Trainer

ROOT = Path(__file__).parents[2]


def contents(folder: Path) -> dict:
    """Every file of a folder with its bytes."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def fails(capsys):
    """Run a main() that must fail; return its message, without boxes and line breaks."""

    def run(module, *arguments) -> str:
        capsys.readouterr()
        status, err = call(module, *arguments), capsys.readouterr().err
        assert status in (1, 2) and "Traceback" not in err
        return re.sub(r"[\s│╭╮╰╯─]+", " ", err)

    return run


# ---- train.py -----------------------------------------------------------------------------------


def test_a_run_reports_itself(tmp_path, options, capsys):
    out = tmp_path / "run"
    assert call(train, *options, "--out", out, "--model.dropout", "0.1") == 0
    said = capsys.readouterr().out
    for line in (
        r"reference-txt-\w+: 0.0 MB of text", r"[\d,]+ parameters; ", r"step 4/4  loss",
        r"--- step 2 writes: ", r"val_bpb: \d.\d\d\d untrained, \d.\d\d\d reached; no usual value",
        r"s in all, at most .* GiB of memory; see ",
    ):  # fmt: skip
        assert re.search(line, said), line
    assert {path.name for path in out.iterdir()} == {
        "config.json", "metrics.jsonl", "loss.png", "samples", "latest", "step-000002",
        "step-000004",
    }  # fmt: skip
    record = files.read_json(out / "config.json")
    assert record["model"]["dropout"] == 0.1 and record["preset"] == "gpt"
    assert (out / "samples" / "step-000004.txt").read_text(encoding="utf-8").count("----") == 1

    assert call(train, *options, "--out", out, "--model.dropout", "0.1", "--resume") == 0
    assert "the run is complete:" in capsys.readouterr().out


def test_the_verdict_knows_a_preset_as_it_stands():
    preset = dataclasses.replace(registry.find_preset("gpt"), usual="1.5")
    run = dataclasses.replace(preset.run, out="elsewhere", resume=True)
    free = dataclasses.replace(run, train=dataclasses.replace(run.train, device="cpu"))
    other = dataclasses.replace(run, train=dataclasses.replace(run.train, steps=7))
    for each, end in ((run, "usual for this preset: 1.5"), (free, "preset: 1.5"),
                      (other, "the settings are not those of a preset")):  # fmt: skip
        line = run_dir.verdict(preset, each, {"val_bpb": 8.0}, {"val_loss": 2.0, "val_bpb": 3.0})
        assert line.startswith("val_bpb: 8.000 untrained, 3.000 reached; ") and line.endswith(end)


PUBLISHED = {"gpt2-124m": "124,439,808", "gpt2-1.5b": "1,557,611,200", "llama-1b": "1,235,814,400"}


@pytest.mark.parametrize("name", [*registry.all_presets()])
def test_dry_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(train, name, "--dry-run", "--train.steps", "7") == 0
    text = capsys.readouterr().out
    record, end = json.JSONDecoder().raw_decode(text)
    assert record["preset"] == name and record["train"]["steps"] == 7
    trained = r"(, [\d,]+ of them trained)?"
    costs, *first = text[end:].strip().splitlines()
    assert re.fullmatch(
        rf"[\d,]+ parameters{trained}; .* GiB .* TFLOP a step, .* FLOP in all", costs
    )
    assert ["autoencoder" in line or "clip" in line for line in first] == [True] * len(first)
    assert len(first) == (2 if name == "text2image" else 0)
    assert f"{PUBLISHED.get(name, '')} parameters" in text
    assert not [*tmp_path.iterdir()]


def test_help_lists_presets_and_options(capsys):
    assert call(train, "--help") == 0
    out = capsys.readouterr().out
    assert "gpt2-124m" in out and "--model.n-layer" in out and "updates" in out


WRONG = {
    "missing": (["--data.path", "nowhere.txt"], "no file matches 'nowhere.txt': give a text file"),
    "empty": (["--data.path", "empty.txt"], "no text in 'empty.txt': 1 found, 0 used; 1 skipped"),
    "short": (["--data.path", "short.txt"], "tokens, need > 32: use --model.context-length <="),
    "binary": (["--data.path", "binary.bin"], "skipped: binary, it has NUL bytes (binary.bin)"),
    "tokenizer": (["--data.tokenizer", "bites"], "--data.tokenizer 'bites' is no folder"),
    "vocabulary": (["--data.tokenizer", "sentencepiece", "--model.vocab-size", "90000"],
                   "vocab_size 90000 does not suit the text: use at most"),
    "small vocabulary": (["--model.vocab-size", "200"], "set --model.vocab-size 257"),
    "heads": (["--model.d-model", "33"], "d_model 33 is not divisible by n_head 2; use 32 or set"),
    "value": (["--train.steps", "-1"], "steps is -1; it must be at least 1"),
    "type": (["--train.steps", "many"], "Error parsing --train.steps: invalid literal"),
    "flag": (["--model.n-layr", "2"], "Unrecognized options: --model.n-layr"),
    "flag hint": (["--model.n-layr", "2"], "Perhaps you meant: --model.n-layer INT"),
    "choice": (["--optim.optimizer", "sgd"], "muon"),
    "cuda": (["--train.device", "cuda"], "device 'cuda' cannot be used ("),
    "folder": (["--out", "/proc/run"], "/proc/run"),
    "cache": (["--data.cache", "/proc/cache"], "/proc/cache"),
    "nothing": (["--out", "new", "--resume"], "there is no run new to resume; leave out --resume"),
    "other": (["--out", "other"], "other exists: continue it with --resume, choose another --out"),
    "no run": (["--out", "other", "--resume"], "cannot be read as JSON"),
}  # fmt: skip


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
    assert message in fails(train, *options, "--out", "run", *arguments)
    assert contents(tmp_path) == before and not Path("run").exists()


def test_a_folder_in_which_no_step_was_made_is_free(tmp_path):
    """As one that failed in its first step leaves behind."""
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "metrics.jsonl").touch()
    run_dir.check_directory(tmp_path, resume=False)
    (tmp_path / "metrics.jsonl").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="exists: continue it with --resume"):
        run_dir.check_directory(tmp_path, resume=False)


def test_an_unknown_preset(fails):
    said = fails(train, "gtp")
    assert "no preset 'gtp'" in said and "did you mean gpt?" in said
    assert all(name in said for name in registry.all_presets())
    assert "mean" not in fails(train, "zzz")


def test_bfloat16_where_it_is_emulated(tmp_path, options, monkeypatch, fails):
    monkeypatch.setattr(machine, "bfloat16_is_fast", lambda device: False)
    said = fails(train, *options, "--out", tmp_path / "run", "--train.dtype", "bfloat16")
    assert "this cpu only emulates bfloat16, slowly; use float32 or auto" in said


def test_shards_with_an_id_past_the_vocabulary(tmp_path, options, fails):
    arguments = [*options, "--data.cache", tmp_path / "cache", "--out", tmp_path / "run"]
    assert call(train, *arguments, "--train.steps", 1) == 0
    (shard,) = (tmp_path / "cache").glob("*/train-00000.bin")
    shard.write_bytes(b"\xff\xff" + shard.read_bytes()[2:])
    said = fails(train, *arguments, "--out", tmp_path / "again")
    assert "id 65535 at byte 0 is not below the tokenizer's vocabulary" in said


def test_a_full_disk_at_a_save(tmp_path, options, monkeypatch, fails):
    plain, saves = files.save_file, []

    def full(*arguments):
        saves.append(arguments)
        if len(saves) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(*arguments)

    monkeypatch.setattr(files, "save_file", full)
    said = fails(train, *options, "--out", tmp_path / "run")
    assert "step 4 could not be saved" in said and "No space left on device; make room" in said
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
        said = fails(train, *options, "--out", tmp_path / str(len(errors)))
        assert "2 GiB; try half the --train.micro-batch-size" in said and "long" not in said
        errors.pop(0)
    with pytest.raises(RuntimeError, match="a bug of ours"):  # those keep their traceback
        call(train, *options, "--out", tmp_path / "bug")


def test_nothing_but_nan(tmp_path, options, monkeypatch, fails):
    plain = Trainer.backward
    monkeypatch.setattr(
        Trainer, "backward", lambda self, step: plain(self, step) * (torch.nan if step > 1 else 1)
    )
    said = fails(train, *options, "--out", tmp_path / "run", "--train.patience", 2)
    assert "2 steps in a row were not finite, up to step 3" in said
    assert "--train.dtype float32" in said
    assert checkpoint.find(tmp_path / "run").name == "step-000002"


def test_interrupted_before_the_training(options, monkeypatch, capsys):
    interrupt = lambda run: signal.raise_signal(signal.SIGINT)  # noqa: E731
    monkeypatch.setattr(gpt.GPTRun, "open_data", interrupt)
    assert call(train, *options, "--out", "nowhere") == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_program(tmp_path, options, number):
    words = ["train.py", *options, "--train.steps", 100_000, "--train.eval-every", 0]
    process = processes.start([*words, "--out", tmp_path / "run"], tmp_path, ROOT, {})
    process.wait_for("step 3/", seconds=60)
    os.kill(process.running.pid, number)
    status, (out, err) = process.wait(60), process.said()
    assert status == 128 + number, err
    assert "Traceback" not in err
    step = int(re.search(r"stopped at step (\d+) and saved; continue with --resume", out)[1])
    assert 3 <= step < 100_000
    assert checkpoint.find(tmp_path / "run").name == f"step-{step:06d}"


# ---- train.py --resume --------------------------------------------------------------------------


@pytest.fixture
def run(tiny_run, tmp_path) -> Path:
    """A copy of the tiny run, to be spoiled."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


CHANGES = {
    "model": (["--model.n-layer", "2"], "model.n_layer was 1 and is 2"),
    "optimizer": (["--optim.lr", "0.5"], "optim.lr was 0.012 and is 0.5"),
    "batch": (["--train.batch-size", "8"], "train.batch_size was 4 and is 8"),
    "tokenizer": (["--data.tokenizer", "bpe"], "data.tokenizer was bytes and is bpe"),
    "vocabulary": (["--model.vocab-size", "300"], "model.vocab_size was 257 and is 300"),
}


@pytest.mark.parametrize("name", [*CHANGES])
def test_another_run_is_not_resumed(name, run, options, fails):
    before, (arguments, message) = contents(run), CHANGES[name]
    said = fails(train, *options, *arguments, "--out", run, "--resume")
    assert f"{run} is another run: " in said and message in said
    assert contents(run) == before


def test_other_data_are_not_resumed(run, options, text, tmp_path, fails):
    """Of the same name; to the byte, text like the old."""
    changed = tmp_path / "changed.txt"
    changed.write_text(text.read_text(encoding="utf-8").replace("e", "i", 1), encoding="utf-8")
    record = files.read_json(run / "config.json")
    record["data"]["path"] = str(changed)
    files.write_json(run / "config.json", record)
    said = fails(train, *options, "--data.path", changed, "--out", run, "--resume")
    assert "data_fingerprint was" in said


def test_free_options_may_change(run, options):
    free = ["--train.micro-batch-size", 1, "--train.log-every", 2, "--train.keep", 5]
    assert call(train, *options, *free, "--out", run, "--resume") == 0


def test_a_damaged_checkpoint_names_the_one_before(run, options, fails):
    path = run / "step-000004" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    said = fails(train, *options, "--out", run, "--resume")
    assert "step-000004 is damaged: model.safetensors is truncated or altered" in said
    assert f"then --resume continues from {run}/step-000002" in said


# ---- sample.py ----------------------------------------------------------------------------------


def expected(run: Path, prompt: str, n: int, stops=(), **settings) -> list[str]:
    opened = run_dir.open_run(str(run))
    texts = [prompt] * n
    sampling = generate.Sampling(**settings)
    for parts in generate.stream_text(opened.model, opened.tokenizer, texts[:], sampling, stops):
        texts = [text + part for text, part in zip(texts, parts)]
    return texts


def test_a_sample_is_what_the_model_generates(tiny_run, tmp_path, capsys):
    path = tmp_path / "texts.txt"
    arguments = ["--prompt", "The with", "-n", 3, "--max-new-tokens", 20, "--seed", 7]
    assert call(sample, tiny_run, *arguments, "--out", path) == 0
    said = capsys.readouterr()
    texts = expected(tiny_run, "The with", 3, max_new_tokens=20, seed=7)
    assert len(set(texts)) == 3 and all(text.startswith("The with") for text in texts)
    assert said.out == "\n----\n".join(texts) + "\n"
    assert path.read_text(encoding="utf-8") == said.out
    assert re.search(r"step-000004: step 4, val_loss .*, val_bpb .*; model weights, cpu, float32",
                     said.err)  # fmt: skip

    opened = run_dir.open_run(str(tiny_run))  # and the text is that of the tokens, no less
    rows = opened.model.generate(
        [opened.tokenizer.encode("The with")],
        generate.Sampling(max_new_tokens=20, seed=7, stop_tokens=(opened.tokenizer.eot,)),
    )
    assert "The with" + opened.tokenizer.decode(rows[0]) == texts[0]


def test_the_first_text_is_shown_as_it_is_written(tiny_run, monkeypatch):
    opened = run_dir.open_run(str(tiny_run))
    plain, shown = generate.stream_text, []

    def steps(*arguments):
        for parts in plain(*arguments):
            shown.append("step")
            yield parts

    monkeypatch.setattr(generate, "stream_text", steps)
    monkeypatch.setattr("builtins.print", lambda *text, **more: shown.append("print"))
    sampling = generate.Sampling(max_new_tokens=4, temperature=1.0)
    gpt.write_texts(opened, sample.Options("", prompt="a", sampling=sampling))
    assert shown == ["print", *["step", "print"] * 5, "print"]


def test_seeds_and_places(tiny_run, capsys):
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
    assert capsys.readouterr().out == whole[: whole.index(stop, 1)] + "\n"


def test_stop_strings_may_be_line_ends_and_any_letters(tiny_run, monkeypatch, capsys):
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
    outputs = []
    for more, kind in (([], "ema"), (["--raw"], "model")):
        capsys.readouterr()
        assert call(sample, tmp_path / "run", *more, "--temperature", 0) == 0
        said = capsys.readouterr()
        assert f"; {kind} weights" in said.err
        outputs.append(run_dir.open_run(str(tmp_path / "run"), bool(more)).model.state_dict())
    assert not torch.equal(outputs[0]["head.weight"], outputs[1]["head.weight"])


def reseal(folder: Path) -> None:
    """A manifest that fits, as a forger would write."""
    files.write_json(folder / checkpoint.MANIFEST, checkpoint.make_manifest(folder))


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_mistakes_of_sampling(run, tmp_path, monkeypatch, fails):
    monkeypatch.chdir(tmp_path)
    assert "the prompt is empty: give text" in fails(sample, run, "--prompt", "")
    assert "-n is 0; use at least 1" in fails(sample, run, "-n", 0)
    assert "temperature is -1.0; it must be 0" in fails(sample, run, "--temperature", "-1")
    assert "top_p is 2.0" in fails(sample, run, "--top-p", 2)
    assert "device 'nonsense' cannot be used" in fails(sample, run, "--device", "nonsense")
    assert "Perhaps you meant: --temperature" in fails(sample, run, "--temprature", 1)
    assert "there is no run directory nowhere" in fails(sample, "nowhere")
    assert "holds no complete checkpoint" in fails(sample, tmp_path)
    assert "texts.txt" in fails(sample, run, "--max-new-tokens", 1, "--out", "missing/texts.txt")
    monkeypatch.setattr(machine, "bfloat16_is_fast", lambda device: False)
    assert "only emulates bfloat16" in fails(sample, run, "--dtype", "bfloat16")


def test_what_is_no_checkpoint_of_ours(run, tmp_path, monkeypatch, fails):
    monkeypatch.chdir(tmp_path)
    Path("model.pt").write_bytes(pickle.dumps(Bomb()))
    assert "there is no run directory model.pt" in fails(sample, "model.pt")
    folder = run / "step-000004"
    weights = folder / "model.safetensors"
    weights.write_bytes(pickle.dumps(Bomb()))
    reseal(folder)
    assert "a pickle (torch.save) is never opened here" in fails(sample, run)
    assert not Path("exploded").exists()
    save_file({"somebody.elses": torch.ones(3)}, weights)
    reseal(folder)
    assert "weights do not fit the model: somebody.elses is unexpected" in fails(sample, run)
    for record, message in (
        ({"family": "cat"}, "the run is of family 'cat', which is none of gpt"),
        ([], "config.json is not of this version"),
        ({"family": "gpt", "model": {"n_wings": 2}}, "n_wings"),
        ({"family": "gpt"}, "model"),
    ):
        files.write_json(folder / "config.json", record)
        reseal(folder)
        assert message in fails(sample, run)


def test_interrupted_while_it_writes(tiny_run, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "stream_text", interrupt)
    assert call(sample, tiny_run) == 130


def test_who_reads_may_have_enough(tiny_run):
    program = [sys.executable, str(ROOT / "sample.py"), str(tiny_run), "--max-new-tokens", "5"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(program, text=True, encoding="utf-8", **streams) as process:
        process.stdout.close()
        assert process.wait(60) == 141
        said = process.stderr.read()
    assert "weights, cpu" in said and "rror" not in said


def test_the_programs_start_as_programs(tiny_run):
    """Another test that pays for a process: arguments, exit status and streams are the system's.
    It need not load what only saving needs, and takes long to load."""
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(ROOT / "sample.py"), str(tiny_run), "--max-new-tokens", "5"],
        capture_output=True, text=True, encoding="utf-8", timeout=60, check=True,
        env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"},
    )  # fmt: skip
    assert "tinyfm.training.checkpoint" in done.stderr
    assert "torch.distributed.checkpoint" not in done.stderr
    assert done.stdout == expected(tiny_run, "", 1, max_new_tokens=5)[0] + "\n"
    assert time.perf_counter() - begun < 60
