"""Is this version as fast as another one?  python benchmarks/checkouts.py OTHER run|models

OTHER is a folder with another version of the repository, such as one made by
`git worktree add OTHER COMMIT`. Both run by turns, in processes of their own: "run" is the
default run, shortened; "models" is generation with GPT-2's smallest shape, and training and sampling with the U-Net of the
`ddpm` preset, on random weights. The medians are printed with their ratio; --record also writes the
table into benchmarks/README.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from timing import describe_machine

ROOT = Path(__file__).resolve().parents[1]
CODE = """
import json, time
import torch
from tinyfm.ddpm import Diffusion, DiffusionConfig
from tinyfm.generate import Sampling
from tinyfm.gpt import GPT, GPTConfig

def seconds(work, repeats):
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]

torch.manual_seed(0)
gpt = GPT(GPTConfig(50257, context_length=256, n_layer=12, n_head=12, d_model=768)).eval()
diffusion = Diffusion(DiffusionConfig(patch_size=2, n_block=1))
images = torch.rand(32, 1, 32, 32)
optimizer = torch.optim.AdamW(diffusion.parameters())

def generate():
    gpt.generate([[1, 2, 3]], Sampling(max_new_tokens=32))

def train():
    generators = [torch.Generator().manual_seed(i) for i in range(len(images))]
    diffusion.train().loss({"images": images, "step": 0}, generators)[0].backward()
    optimizer.step()
    optimizer.zero_grad()

def sample():
    generators = [torch.Generator().manual_seed(i) for i in range(16)]
    diffusion.eval().sample(16, 20, "dpm++", generators=generators)

print(json.dumps({
    "generation, tokens/s": 32 / seconds(generate, 3),
    "U-Net training, images/s": 32 / seconds(train, 9),
    "U-Net sampling, images/s": 16 / seconds(sample, 3),
}))
"""


def measure_models(checkout: Path) -> dict[str, float]:
    """{what: units a second} of generation and the U-Net, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout)


def measure_run(checkout: Path) -> dict[str, float]:
    """The default run, 120 steps of it: {what: tokens a second}."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--train.steps", "120", "--train.eval-every", "0"]
        subprocess.run(
            [sys.executable, "train.py", *options, "--out", folder],
            cwd=checkout,
            stdout=subprocess.DEVNULL,
            check=True,
        )
        lines = Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    speeds = [row["tokens_per_s"] for row in map(json.loads, lines) if "tokens_per_s" in row]
    return {"default run, tokens/s": statistics.median(speeds)}


MEASURES = {"run": measure_run, "models": measure_models}


def commit(checkout: Path) -> str:
    words = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def table(other: Path, what: str, rounds: int) -> str:
    """Run both by turns; the medians and their ratio as Markdown."""
    found = {other: [], ROOT: []}
    for i in range(rounds):
        for checkout in (other, ROOT) if i % 2 == 0 else (ROOT, other):
            found[checkout].append(MEASURES[what](checkout))
    lines = [
        f"{describe_machine()}; {rounds} rounds by turns, medians",
        "",
        f"| what | commit {commit(other)} | commit {commit(ROOT)} | ratio |",
        "|---|---|---|---|",
    ]
    for name in found[ROOT][0]:
        before, after = (statistics.median(row[name] for row in found[c]) for c in (other, ROOT))
        lines.append(f"| {name} | {before:,.1f} | {after:,.1f} | {after / before:.3f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", type=Path, help="a folder with another version")
    parser.add_argument("what", choices=MEASURES, help="the default run, or models by themselves")
    parser.add_argument("--rounds", type=int, default=6, help="measurements of each (default 6)")
    parser.add_argument("--record", action="store_true", help="write into benchmarks/README.md")
    options = parser.parse_args()
    text = table(options.other.resolve(), options.what, options.rounds)
    print(text)
    if options.record:
        page = ROOT / "benchmarks/README.md"
        content = page.read_text(encoding="utf-8")
        mark = f"<!-- checkouts {options.what} -->\n"
        start = content.index(mark) + len(mark)
        end = content.index("<!-- end -->", start)
        page.write_text(content[:start] + text + content[end:], encoding="utf-8")


if __name__ == "__main__":
    main()
