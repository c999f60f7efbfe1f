"""Is this version as fast as another one?  python benchmarks/checkouts.py OTHER run|models

OTHER is a folder with another version of the repository, such as one made by
`git worktree add OTHER COMMIT`. "run" times the default run, shortened, in processes by turns.
"models" loads both versions into one process and calls them by turns: generation with GPT-2's
smallest shape, training and sampling with the U-Net of the `ddpm` preset, on random weights. The
medians are printed with their ratio; --record also writes the table into benchmarks/README.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from timing import describe_machine, record, seconds_of

ROOT = Path(__file__).resolve().parents[1]
Found = dict[str, dict[Path, list[float]]]  # what -> version -> units a second


# ---- the models ---------------------------------------------------------------------------------


def load_works(checkout: Path) -> dict[str, tuple[int, Callable[[], object]]]:
    """{what: (units, a call that processes them)} with the code of one version."""
    for name in [*sys.modules]:  # forget the other version's modules; its objects live on
        if name.split(".")[0] in ("tinyfm", "data"):
            del sys.modules[name]
    sys.path.insert(0, str(checkout))
    from tinyfm.ddpm import Diffusion, DiffusionConfig
    from tinyfm.generate import Sampling, complete
    from tinyfm.gpt import GPT, GPTConfig

    sys.path.pop(0)
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(50257, context_length=256, n_layer=12, n_head=12, d_model=768)).eval()
    diffusion = Diffusion(DiffusionConfig(patch_size=2, n_block=1))
    images = torch.rand(32, 1, 32, 32)

    def generators(n: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(i) for i in range(n)]

    def generate() -> None:
        complete(gpt, [[1, 2, 3]], Sampling(max_new_tokens=32))

    def train() -> None:
        batch = {"images": images, "step": 0}
        diffusion.train().loss(batch, generators(len(images)))[0].backward()
        diffusion.zero_grad()

    def sample() -> None:
        diffusion.eval().sample(16, 20, "dpm++", generators=generators(16))

    return {
        "generation, tokens/s": (32, generate),
        "U-Net training, images/s": (32, train),
        "U-Net sampling, images/s": (16, sample),
    }


def measure_models(other: Path, rounds: int) -> Found:
    works = {checkout: load_works(checkout) for checkout in (other, ROOT)}
    found = {}
    for what in works[ROOT]:
        speeds = {other: [], ROOT: []}
        for i in range(rounds + 1):
            for checkout in (other, ROOT) if i % 2 == 0 else (ROOT, other):
                units, work = works[checkout][what]
                speeds[checkout].append(units / seconds_of(work))
        found[what] = {checkout: values[1:] for checkout, values in speeds.items()}  # warmed up
    return found


# ---- the default run ----------------------------------------------------------------------------


def run_speed(checkout: Path) -> float:
    """Tokens a second of the default run, 120 steps of it."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--train.steps", "120", "--train.eval-every", "0"]
        subprocess.run(
            [sys.executable, "train.py", *options, "--out", folder],
            cwd=checkout,
            stdout=subprocess.DEVNULL,
            check=True,
        )
        lines = Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return statistics.median(
        row["tokens_per_s"] for row in map(json.loads, lines) if "tokens_per_s" in row
    )


def measure_run(other: Path, rounds: int) -> Found:
    speeds = {other: [], ROOT: []}
    for i in range(rounds):
        for checkout in (other, ROOT) if i % 2 == 0 else (ROOT, other):
            speeds[checkout].append(run_speed(checkout))
    return {"default run, tokens/s": speeds}


# ---- the command --------------------------------------------------------------------------------

MEASURES = {"run": measure_run, "models": measure_models}


def commit(checkout: Path) -> str:
    words = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def table(other: Path, what: str, rounds: int) -> str:
    """The medians of both versions and their ratio, as Markdown."""
    lines = [
        f"{describe_machine()}; {rounds} rounds by turns, medians",
        "",
        f"| what | commit {commit(other)} | commit {commit(ROOT)} | ratio |",
        "|---|---|---|---|",
    ]
    for name, speeds in MEASURES[what](other, rounds).items():
        before = statistics.median(speeds[other])
        after = statistics.median(speeds[ROOT])
        lines.append(f"| {name} | {before:,.1f} | {after:,.1f} | {after / before:.3f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", type=Path, help="a folder with another version")
    parser.add_argument("what", choices=MEASURES, help="the default run, or models by themselves")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each (default 3)")
    parser.add_argument("--record", action="store_true", help="write into benchmarks/README.md")
    options = parser.parse_args()
    text = table(options.other.resolve(), options.what, options.rounds)
    print(text)
    if options.record:
        record(f"checkouts {options.what}", text)


if __name__ == "__main__":
    main()
