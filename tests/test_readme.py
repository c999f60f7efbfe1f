"""The commands of the README and of the rooms' pages run as written."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import processes
from conftest import ROOT

PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("*/README.md")),
    *sorted(ROOT.glob("tinyfm/*/README.md")),
]


def blocks(language: str) -> list[str]:
    """The code blocks of that language, of all pages in their order."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def documented_commands() -> list[str]:
    """The commands of all bash blocks, without those that install."""
    lines = [line.split("  #")[0] for block in blocks("bash") for line in block.splitlines()]
    commands = [command.strip() for line in lines for command in line.split("&&")]
    return [command for command in commands if command.startswith(("python ", "torchrun "))]


SMALL = {
    "gpt": "--model.n-layer 1 --model.n-head 2 --model.d-model 32 --model.context-length 64 "
    "--data.val-fraction 0.01",
    "clip": "--model.image-layer 1 --model.image-width 32 --model.text-layer 1 "
    "--model.text-width 32",
    "autoencoder": "--model.channels 8 16 --model.groups 4 --data.val-images 8 --data.path letters",
    "ddpm": "--model.channels 8 16 --model.attend False True --model.n-head 2 --model.groups 4 "
    "--data.val-images 8 --data.path letters",
    "text2image": "--autoencoder runs/autoencoder --clip runs/clip "
    "--data.no-cache-latents --model.diffusion.channels 8 16 --model.diffusion.groups 4 "
    "--model.diffusion.n-head 2 --data.val-images 8",
}


def small(words: list[str]) -> list[str]:
    """Options that make a command which trains do so for two steps on a tiny model. The batch is
    not as small, as an evaluation reads all there is in pieces of a batch. Of the pictures clip
    draws all, the others the letters; the library's source is read as bytes."""
    if "compare" in words:
        return ["--methods", "head", "--labels", "30", "--steps", "2", "--seeds", "1"]
    if "train.py" not in words or {"--dry-run", "--help"} & {*words}:
        return []
    after = words[words.index("train.py") + 1 :] or ["gpt"]
    family = after[0] if after[0] in SMALL else "gpt"
    if "--init-from" in words:  # the base is small
        return ["--train.steps", "2", "--train.batch-size", "64"]
    plain = "--data.tokenizer bytes --model.vocab-size 257" if "stdlib" in words else ""
    return shlex.split(f"--train.steps 2 --train.batch-size 64 {SMALL[family]} {plain}")


def runs_of(words: list[str]) -> set[str]:
    """The run directories that a command reads or writes."""
    named = {word for word in words if word.startswith("runs/")}
    if "train.py" in words and "--out" not in words:
        after = words[words.index("train.py") + 1 :]
        named.add(f"runs/{after[0] if after and after[0][0] != '-' else 'gpt'}")
    return named


def chains(commands: list[list[str]]) -> list[list[list[str]]]:
    """The commands in groups which share no run, each in order: groups may run side by side."""
    groups = []  # of (runs, commands)
    for words in commands:
        runs = runs_of(words)
        met = [group for group in groups if group[0] & runs]
        groups = [group for group in groups if group not in met]
        before = [earlier for _, own in met for earlier in own]
        groups.append((runs.union(*(names for names, _ in met)), [*before, words]))
    return [own for _, own in groups]


def test_commands_that_share_a_run_keep_their_order():
    a, b, c, d, e = (shlex.split(line) for line in (
        "python train.py", "python train.py clip", "python sample.py runs/gpt -n 2",
        "python train.py --out runs/two", "python x.py runs/two runs/gpt",
    ))  # fmt: skip
    assert chains([a, b, c, d]) == [[b], [a, c], [d]]
    assert chains([a, b, c, d, e]) == [[b], [a, c, d, e]]


def test_every_documented_command_runs(tmp_path):
    """In a copy, as a user would; what trains does so for two steps on a tiny model. Two at a
    time, each with one thread."""
    for name in ("train.py", "sample.py", "tinyfm", "data", "benchmarks"):
        source = ROOT / name
        skip = shutil.ignore_patterns("cache", "__pycache__")
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name, **({"ignore": skip} if source.is_dir() else {}))
    library = sorted(Path(os.__file__).parent.glob("*.py"))[:60]  # enough text for the vocabulary
    text = "".join(path.read_text(encoding="utf-8") for path in library)
    (tmp_path / "my.txt").write_text(text, encoding="utf-8")
    scripts, outputs = Path(sys.executable).parent, tmp_path / "outputs"
    outputs.mkdir()
    environment = {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    torchrun = "import sys; from torch.distributed.run import main; main(sys.argv[1:])"

    def run(words: list[str]) -> None:
        if "--workers" in words:  # a copy cannot be the parent of processes of its own
            command, where = [sys.executable, *words[1:]], {**os.environ, **environment}
            subprocess.run(command, cwd=tmp_path, env=where, check=True)
            return
        after = ["-c", torchrun, *words[1:]] if words[0] == "torchrun" else words[1:]
        process = processes.start(after, outputs, tmp_path, environment)
        status, (out, err) = process.wait(300), process.said()
        assert status == 0, f"{shlex.join(words)}\n{out[-2000:]}\n{err[-2000:]}"
        assert out.strip(), f"{shlex.join(words)} says nothing"
        for option, name in pairwise(words):  # what it is told to write is there
            if option in ("--out", "--picture"):
                assert (tmp_path / name).exists(), f"{shlex.join(words)} wrote no {name}"

    def run_chain(chain: list[list[str]]) -> None:
        for words in chain:
            run(words)

    commands = [shlex.split(command) for command in documented_commands()]
    commands = [words + small(words) for words in commands if "pytest" not in words]  # this is it
    assert len(commands) > 40
    longest_first = sorted(chains(commands), key=len, reverse=True)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run_chain, longest_first))
    for block in blocks("python"):
        run(["python", "-c", block])
