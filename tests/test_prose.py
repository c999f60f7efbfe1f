"""The prose: house rules hold, and the README's commands run as written."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import processes
import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("tinyfm/**/*.py"), *ROOT.glob("data/*.py")]
ALL = [*SOURCES, *ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/*.py")]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_every_text_file_is_opened_as_utf8(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        text = called in ("read_text", "write_text")
        if called == "open":
            inner = [n.value for a in node.args for n in ast.walk(a) if isinstance(n, ast.Constant)]
            binary = {"rb", "wb", "ab"} & {value for value in inner if isinstance(value, str)}
            text = not binary and getattr(getattr(node.func, "value", None), "id", "") != "os"
        if called == "write_text" and isinstance(node.func, ast.Name):
            text = False  # the house's own, of files.py
        if text:
            keywords = {k.arg for k in node.keywords}
            assert "encoding" in keywords, f"{name_of(path)}:{node.lineno}"


def imported(path: Path) -> set[str]:
    """Modules that a file imports at its top level."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize(
    ("family", "own"),
    [("gpt", ()), ("clip", ("vit",)), ("vit", ()), ("autoencoder", ()), ("unet", ()),
     ("ddpm", ("unet",)), ("text2image", ("clip", "autoencoder", "ddpm", "unet"))],
)  # fmt: skip
def test_a_family_can_be_lifted_out(family, own):
    """It imports torch, einops and numpy, and the other files of its lesson if it has more."""
    allowed = sys.stdlib_module_names | {"torch", "einops", "numpy"}
    found = imported(ROOT / f"tinyfm/{family}.py")
    house = {name for name in found if name.startswith("tinyfm.")}
    assert {".".join(name.split(".")[:2]) for name in house} <= {f"tinyfm.{file}" for file in own}
    assert {name.split(".")[0] for name in found - house} <= allowed
    assert not any("torch.distributed" in name for name in found)


def test_the_trainer_names_no_family():
    families = ("gpt", "clip", "ddpm", "autoencoder", "tokenizer", "presets", "data", "generate")
    assert not {f"tinyfm.{family}" for family in families} & imported(ROOT / "tinyfm/trainer.py")
    text = (ROOT / "tinyfm/trainer.py").read_text(encoding="utf-8").lower()
    assert not re.search(r"\bgpt\b|\bclip\.py|\bvae\b|\bddpm\b", text)


# ---- the README ---------------------------------------------------------------------------------


def readme_commands() -> list[str]:
    """The commands of the README's bash blocks, without those that install."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line.split("  #")[0] for block in blocks for line in block.splitlines()]
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


def test_every_readme_command_runs(tmp_path):
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

    def run_chain(chain: list[list[str]]) -> None:
        for words in chain:
            run(words)

    commands = [shlex.split(command) for command in readme_commands()]
    commands = [words + small(words) for words in commands if "pytest" not in words]  # this is it
    assert len(commands) > 8
    longest_first = sorted(chains(commands), key=len, reverse=True)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run_chain, longest_first))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        run(["python", "-c", block])
