"""The commands of the README and of the rooms' pages run as written, and their links hold.

A page marks its blocks: commands of a bash block run here, in one folder with those of all pages.
A sh block shows commands that need something which is not there, such as your own pictures, a
cluster, or half an hour; they do not run here.
"""

import importlib.machinery
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, takewhile
from pathlib import Path

import processes
import pytest
from conftest import ROOT, write_captioned_pictures

ROOM_PAGES = sorted(ROOT.glob("tinyfm/*/README.md"))
PAGES = [ROOT / "README.md", ROOT / "data" / "README.md", *ROOM_PAGES]
LINKED = [*PAGES, ROOT / "benchmarks" / "README.md", ROOT / "CHANGELOG.md"]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(language: str) -> list[str]:
    """The code blocks of that language, of all pages in their order."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def documented_commands() -> list[str]:
    """The commands of all bash blocks, without those that install."""
    lines = [line.split(" #")[0] for block in blocks("bash") for line in block.splitlines()]
    commands = [command.strip() for line in lines for command in line.split("&&")]
    return [command for command in commands if command.startswith(("python ", "torchrun "))]


# A tiny autoencoder, trained first, so that text2image does not train its parts for minutes.
FIRST = "python train.py autoencoder --out runs/first"
# Of sixteen: each split needs one. Eight of the commands would draw all again.
FONTS = ("serif", "serif bold", "serif bold italic", "mono bold italic")
SMALL = {
    "gpt": "--model.n-layer 1 --model.n-head 2 --model.d-model 32 --model.context-length 64 "
    "--data.val-fraction 0.01",
    "encoder": "--model.n-layer 1 --model.n-head 2 --model.d-model 32 --data.path my.txt "
    "--data.tokenizer bytes --model.vocab-size 258 --data.val-fraction 0.01",
    "xlnet": "--model.n-layer 1 --model.n-head 2 --model.d-model 32 --model.context-length 32 "
    "--data.path my.txt --data.tokenizer bytes --model.vocab-size 258 --data.val-fraction 0.01",
    "seq2seq": "--model.n-layer 1 --model.n-head 2 --model.d-model 32 --data.path pairs.tsv "
    "--data.tokenizer letters",
    "clip": "--model.image-layer 1 --model.image-width 32 --model.text-layer 1 "
    "--model.text-width 32 --data.path letters",
    "autoencoder": "--model.channels 2 2 2 --model.groups 1 --data.val-images 8 "
    "--data.path letters",
    "vq": "--model.channels 8 8 16 --model.groups 4 --data.val-images 8",
    "dalle": "--vq runs/vq --model.n-layer 1 --model.n-head 2 --model.d-model 32 "
    "--data.val-images 8 --train.no-compile",
    "vision-gpt": "--data.path pictures --data.tokenizer bytes --model.image-size 8 "
    "--model.patch-size 4 --model.channels 3 --train.batch-size 16",
    "ddpm": "--model.channels 8 16 --model.attend False True --model.n-head 2 --model.groups 4 "
    "--data.val-images 8 --data.path letters",
    "text2image": "--autoencoder runs/first --clip runs/clip "
    "--data.no-cache-latents --model.diffusion.channels 8 16 --model.diffusion.groups 4 "
    "--model.diffusion.n-head 2 --data.val-images 8",
}


def small(words: list[str], cache: Path) -> list[str]:
    """Options that make a command train for two steps on a tiny model, and on little data.

    cache: a folder for a GPT's prepared text.

    The batch is not as small: an evaluation reads the whole validation split, a batch at a time.
    """
    if "tinyfm.serve" in words:
        return ["--port", "0"]
    if "compare" in words:
        return ["--methods", "head", "--labels", "30", "--steps", "2", "--seeds", "1"]
    if {"runs/ddpm", "runs/text2image"} & {*words} and "tinyfm.evaluate" in words:
        return ["--judge-steps", "2", "--samples", "20", "--guidance", "1"]
    if "train.py" not in words or {"--dry-run", "--help"} & {*words}:
        return []
    after = words[words.index("train.py") + 1 :] or ["gpt"]
    family = after[0] if after[0] in SMALL else "gpt"
    if "--init-from" in words:  # the base is small
        return ["--train.steps", "2", "--train.batch-size", "64"]
    data = f"--data.cache {shlex.quote(str(cache))}" if family == "gpt" else ""
    if "stdlib" in words:
        data += " --data.tokenizer bytes --model.vocab-size 257"
    if "--teacher" in words:  # the default text would be tokenized once more, by its tokenizer
        data += " --data.path my.txt"
    return shlex.split(f"--train.steps 2 --train.batch-size 64 {SMALL[family]} {data}")


def runs_of(words: list[str]) -> set[str]:
    """The run directories and prepared texts that a command reads or writes."""
    named = {word for word in words if word.startswith(("runs/", "data/cache/"))}
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
    prepare = shlex.split("python data/prepare.py my.txt --out data/cache/mine")
    train = shlex.split("python train.py gpt --data.path data/cache/mine --out runs/corpus")
    assert chains([prepare, b, train]) == [[b], [prepare, train]]


@pytest.mark.long
def test_every_documented_command_runs(tmp_path, shared_cache):
    """In a copy, as a user would; what trains does so for two steps on a tiny model, and letters
    are drawn in four fonts. Two at a time, each with one thread."""
    for name in ("train.py", "sample.py", "tinyfm", "data", "benchmarks"):
        source = ROOT / name
        skip = shutil.ignore_patterns("cache", "__pycache__")
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name, **({"ignore": skip} if source.is_dir() else {}))
    glyphs = tmp_path / "data" / "glyphs.py"
    code = glyphs.read_text(encoding="utf-8")
    few = f"FILES = {{style: FILES[style] for style in {FONTS}}}\n"
    assert code.count("\nSTYLED = ") == 1  # the fonts stand before it
    glyphs.write_text(code.replace("\nSTYLED = ", f"\n{few}STYLED = "), encoding="utf-8")
    library = sorted(Path(os.__file__).parent.glob("*.py"))[:40]  # enough text for the vocabulary
    text = "".join(path.read_text(encoding="utf-8") for path in library)
    (tmp_path / "my.txt").write_text(text, encoding="utf-8")
    words = sorted({*re.findall(r"\b[a-z]{4,10}\b", text)})
    rows = [f"{word}\t{word[::-1]}" for word in words]
    (tmp_path / "pairs.tsv").write_text("\n".join(["source\ttarget", *rows]), encoding="utf-8")
    (tmp_path / "pictures").mkdir()
    write_captioned_pictures(tmp_path / "pictures")
    scripts, outputs = Path(sys.executable).parent, tmp_path / "outputs"
    outputs.mkdir()
    environment = {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

    def run(words: list[str]) -> None:
        if "--workers" in words:  # a copy cannot be the parent of child processes
            command, where = [sys.executable, *words[1:]], {**os.environ, **environment}
            subprocess.run(command, cwd=tmp_path, env=where, check=True)
            return
        after = ["-c", processes.TORCHRUN, *words[1:]] if words[0] == "torchrun" else words[1:]
        process = processes.start(after, outputs, tmp_path, environment)
        if "tinyfm.serve" in words:  # it would serve for ever
            process.wait_for("serving at", 300)
            process.running.terminate()
        status, (out, err) = process.wait(300), process.said()
        assert status == 0, f"{shlex.join(words)}\n{out[-2000:]}\n{err[-2000:]}"
        assert out.strip(), f"{shlex.join(words)} says nothing"
        assert "nothing to show" not in out, f"{shlex.join(words)}\n{out}"
        for option, name in pairwise(words):  # what it is told to write is there
            if option in ("--out", "--picture"):
                assert (tmp_path / name).exists(), f"{shlex.join(words)} wrote no {name}"

    def run_chain(chain: list[list[str]]) -> None:
        for words in chain:
            run(words)

    commands = [shlex.split(command) for command in [FIRST, *documented_commands()]]
    commands = [words for words in commands if "pytest" not in words]  # this is it
    commands = [words + small(words, shared_cache) for words in commands]
    assert len(commands) > 40
    longest_first = sorted(chains(commands), key=len, reverse=True)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run_chain, longest_first))
    _, *examples = blocks("python")  # the first is a file, which test_new_family.py uses
    for block in examples:
        run(["python", "-c", block])


def test_the_long_check_knows_the_commands_and_a_wrong_score():
    """.ci/long, which runs README.md at full size before a release."""
    loader = importlib.machinery.SourceFileLoader("long", str(ROOT / ".ci" / "long"))
    long = importlib.util.module_from_spec(importlib.util.spec_from_loader("long", loader))
    loader.exec_module(long)
    lines = long.commands()
    assert lines[0].endswith("&& python train.py") and "python train.py text2image" in lines
    assert not any("pytest" in line for line in lines)
    line = "val_bpb: 3.590 untrained, {} reached; usual for this preset: 1.65 to 1.66, as seeds"
    assert not long.score_problem(line.format("1.655"))
    assert "1.855" in long.score_problem(line.format("1.855"))
    assert not long.score_problem("val_bpb: 3.590 untrained, 1.855 reached; no usual value")


# ---- files that pages name ----------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^()\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def tree_paths() -> list[str]:
    """The files and folders in the README's tree. A line starts with names, perhaps several."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"## Read it\n.*?```\n(.*?)```", text, re.DOTALL)[1]
    paths, folder = [], ""
    for line in tree.splitlines():
        names = list(takewhile(lambda word: word.endswith((".py", "/")), line.split()))
        if line.startswith(" "):
            paths += [folder + name for name in names]
        else:
            paths += names
            folder = names[-1]
        paths += [word for word in line.split() if word.endswith(".md")]
    return paths


def test_the_tree_of_the_readme_exists():
    paths = tree_paths()
    assert {"train.py", "tinyfm/unet.py", "tinyfm/calc/", "tinyfm/calc/README.md"} <= {*paths}
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", ROOM_PAGES, ids=name_of)
def test_the_page_of_a_room_lists_its_files(page):
    text = page.read_text(encoding="utf-8")
    for path in page.parent.glob("*.py"):
        if path.name != "__init__.py":
            assert f"]({path.name})" in text, path.name


# ---- figures ------------------------------------------------------------------------------------

NUMBER = r"(\d[\d,]*(?:\.\d+)?)"


def result_rows() -> dict[str, tuple[str, str]]:
    """{preset: (result, time)} of README's table of results."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| .* \| (.*) \| (.*) \|$", text, re.MULTILINE)
    return {name: (result, time) for name, result, time in rows}


BLOCKS = {  # of other presets: results NAME
    "encoder": "encoder films", "seq2seq": "seq2seq words", "dalle": "letters",
    "vision-gpt": "vision",
}  # fmt: skip


def recorded(name: str) -> list[float]:
    """All numbers that the page of recorded results has of a preset; of shares, percents too."""
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    mark = BLOCKS.get(name, f"results {name}")
    block = re.search(rf"<!-- {mark} -->\n(.*?)<!-- end -->", page, re.DOTALL)
    numbers = [float(n.replace(",", "")) for n in re.findall(NUMBER, block[1] if block else "")]
    return numbers + [100 * n for n in numbers if n <= 1]


def unrecorded(text: str, numbers: list[float]) -> list[str]:
    """The numbers of a text that are not one of these numbers, rounded as the text has it."""
    missing = []
    for written in re.findall(rf"(?<!below ){NUMBER}", text):
        digits = len(written.partition(".")[2])
        value = float(written.replace(",", ""))
        if all(abs(value - n) > 0.5001 * 10**-digits for n in numbers):
            missing.append(written)
    return missing


def test_the_figures_of_the_readme_are_recorded():
    rows = result_rows()
    assert {"gpt", "clip", "ddpm", "text2image", "vision-gpt", "levels"} <= rows.keys()
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for name, (result, time) in rows.items():
        assert unrecorded(result, recorded(name)) == [], name
        assert time in page or unrecorded(time, recorded(name)) == [], name
    assert unrecorded("names 42% of 3,854", recorded("clip")) == ["42"]


def test_every_benchmark_has_its_block():
    """benchmarks/all.sh runs each script, and the page has a block for what it prints."""
    printed = subprocess.run(
        [ROOT / "benchmarks" / "all.sh", "--list"], capture_output=True, text=True, check=True
    ).stdout
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    names = re.findall(r"^(?:\+ )?([a-z0-9_ ]+?)(?:: | is left out)", printed, re.MULTILINE)
    assert [name for name in names if f"<!-- {name} -->\n" not in page] == []
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    by_hand = {"timing", "results", "checkouts"}  # a helper; two that need runs or checkouts
    commands = {"suites"}  # of python -m tinyfm.evaluate, and no script
    assert scripts - by_hand | commands == {name.split()[0] for name in names}
