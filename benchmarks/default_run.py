"""What the main job costs: `python train.py` as a whole process, and what of a step is waiting.

    python benchmarks/default_run.py [--options "--train.steps 50"]

Prints seconds and peak memory of the run (its own caches empty, so the text and its tokenizer are
made too), the share of a step that reading its batch takes, and the seconds of `train.py --help`.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def seconds_of(command: list[str], **options) -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, **options)
    return time.perf_counter() - begun


def main(options: list[str]) -> None:
    from benchmarks.nanogpt import header
    from tinyfm.batches.text import TextConfig, TextData

    header()
    quiet = {"stdout": subprocess.DEVNULL}
    helps = [seconds_of(["train.py", "--help"], **quiet) for _ in range(5)]
    print(f"train.py --help: {statistics.median(helps):.2f} s, median of {len(helps)}")
    with tempfile.TemporaryDirectory() as folder:
        out, cache = Path(folder, "run"), Path(folder, "cache")
        paths = ["--out", str(out), "--data.cache", str(cache)]
        seconds = seconds_of(["train.py", *paths, *options], **quiet)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # largest child
        rows = [json.loads(line) for line in (out / "metrics.jsonl").open(encoding="utf-8")]
        record = json.loads((out / "config.json").read_text(encoding="utf-8"))
        bpb = [row["val_bpb"] for row in rows if "val_bpb" in row]
        ends = f"{bpb[0]:.3f} to {bpb[-1]:.3f}"
        print(f"train.py: {seconds:.0f} s, {peak:.2f} GiB at most, bits per byte {ends}")
        model, train = record["model"], record["train"]
        config = TextConfig(**{**record["data"], "cache": str(cache)})
        data = TextData.prepare(
            config, model["vocab_size"], model["context_length"], train["batch_size"], 0
        )
        waits = []
        for step in range(200):
            begun = time.perf_counter()
            data.batch(step)
            waits.append(time.perf_counter() - begun)
    speed = statistics.median(row["tokens_per_s"] for row in rows if "tokens_per_s" in row)
    step = train["batch_size"] * model["context_length"] / speed
    wait = statistics.median(waits)
    print(f"{speed:.0f} tokens/s; of a step's {step * 1e3:.0f} ms, {wait / step:.2%} is data wait")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--options", default="", help="more options for train.py")
    main(parser.parse_args().options.split())
