"""How fast a GPT-2 of 124M parameters writes on a CPU, beside transformers and the memory's limit.

    python benchmarks/generation.py [--tokens 128] [--repeats 3]

One token of one row needs every weight once, so the time to read the weights bounds the speed:
what is measured is the share of that limit that is reached, and what more rows cost. Both libraries
hold the same random weights, ours also compiled (sample.py --compile), run in this process by turns
on the same prompts, greedily, and the tokens are compared. The limit is measured in the same run:
the sum over a tensor of the weights' size. Medians of the repeats. transformers must be installed
(tests/requirements.txt).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tinyfm.compiled import compile_decoding
from tinyfm.generate import Sampling, complete
from tinyfm.gpt import GPT, GPTConfig

GPT2_124M = GPTConfig(
    vocab_size=50257, context_length=1024, n_layer=12, n_head=12, d_model=768, mlp="gelu",
    norm="layernorm", norm_eps=1e-5, qk_norm=False, position="learned", bias=True, tied=True,
    zero_init=False,
)  # fmt: skip
PROMPT_TOKENS = 32


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def by_turns(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each; one round to warm up, then all of them in every round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeats + 1):
        for name, run in runs.items():
            elapsed = seconds(run)
            if i:
                times[name].append(elapsed)
    return {name: statistics.median(elapsed) for name, elapsed in times.items()}


def agreement(a: list[list[int]], b: list[list[int]]) -> str:
    """Tokens of all rows that are the same before the first of their row that is not."""
    same = sum(
        next((i for i, (x, y) in enumerate(zip(r, s)) if x != y), len(r)) for r, s in zip(a, b)
    )
    return f"{same} of {sum(map(len, a))}"


def measure(folder: str, dtype: torch.dtype, n: int, repeats: int) -> None:
    ours = GPT.from_pretrained(folder, dtype=dtype).eval()
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).eval()
    weights = torch.ones(sum(p.numel() for p in ours.parameters()), dtype=dtype)
    prompts = torch.randint(0, GPT2_124M.vocab_size, (8, PROMPT_TOKENS))
    rows, s = prompts.tolist(), Sampling(max_new_tokens=n, temperature=0)
    compiled = GPT.from_pretrained(folder, dtype=dtype).eval()
    compile_decoding(compiled)

    def reference(tokens: torch.Tensor) -> list[list[int]]:
        out = theirs.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=n,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return out[:, PROMPT_TOKENS:].tolist()

    took = by_turns(
        {
            "limit": lambda: [weights.sum() for _ in range(8)],
            "transformers, 1 row": lambda: reference(prompts[:1]),
            "tinyfm, 1 row": lambda: complete(ours, rows[:1], s),
            "compiled, 1 row": lambda: complete(compiled, rows[:1], s),
            "transformers, 8 rows": lambda: reference(prompts),
            "tinyfm, 8 rows": lambda: complete(ours, rows, s),
            "compiled, 8 rows": lambda: complete(compiled, rows, s),
        },
        repeats,
    )
    report(dtype, weights.numel() * weights.element_size() / 1e9, took, n)
    for label, model in (("tinyfm", ours), ("compiled", compiled)):
        same = agreement(complete(model, rows, s), reference(prompts))
        print(f"  {label}: {same} tokens as transformers', to the first difference of a row")


def report(dtype: torch.dtype, gigabytes: float, took: dict[str, float], n: int) -> None:
    limit = took.pop("limit") / 8
    print(f"\n{dtype}: weights are read at {gigabytes / limit:.0f} GB/s, in {limit * 1e3:.1f} ms")
    print(f"  {'':22}{'tokens/s':>10}{'ms a step':>11}{'of the limit':>14}")
    for label, elapsed in took.items():
        tokens = n * (8 if "8 rows" in label else 1)
        print(f"  {label:22}{tokens / elapsed:10.1f}{1e3 * elapsed / n:11.1f}", end="")
        print(f"{limit * n / elapsed:14.0%}")
    for label in ("tinyfm", "compiled"):
        one, eight = took[f"{label}, 1 row"], took[f"{label}, 8 rows"]
        print(f"  {label} over transformers: {took['transformers, 1 row'] / one:.2f}x with 1 row, "
              f"{took['transformers, 8 rows'] / eight:.2f}x with 8; "
              f"8 rows over 1 row {8 * one / eight:.1f}x")  # fmt: skip


def processor() -> str:
    """What Linux calls the processor, or what Python does elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of each row")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds; medians are shown")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    print(f"{date.today()}, {processor()}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, transformers {transformers.__version__}")  # fmt: skip
    print(f"GPT-2 124M, random weights, {PROMPT_TOKENS} + {args.tokens} tokens, greedy")
    with TemporaryDirectory() as folder:
        GPT(GPT2_124M).save_pretrained(folder, overwrite=True)
        for dtype in (torch.float32, torch.bfloat16):
            measure(folder, dtype, args.tokens, args.repeats)


if __name__ == "__main__":
    main()
