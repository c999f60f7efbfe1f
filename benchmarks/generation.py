"""Compare the speed of generation by a GPT-2 of 124M parameters with transformers, on a CPU.

    python benchmarks/generation.py [--tokens 128] [--repeats 3]

One token of one row needs every weight once, so the time to read all weights from memory is a
lower bound. Printed are the share of this limit that is reached, and the cost of more rows. Both
libraries have the same random weights. transformers runs as its `generate` does by default, not
compiled; ours runs so too ("tinyfm"), and compiled ("compiled": sample.py --compile). The ratio of
like with like is that of "tinyfm". All take turns in this process, on the same prompts, with greedy
decoding, and the tokens are compared. The limit is measured in the same run: the time to sum a
tensor as large as the weights. Times are medians. transformers must be installed
(tests/requirements.txt).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from timing import by_turns, describe_machine

from tinyfm.compiled import compile_decoding
from tinyfm.generate import Sampling, complete
from tinyfm.gpt import GPT
from tinyfm.recipes import registry

PROMPT_TOKENS = 32
ROWS = 8  # prompts; the first one is also measured alone
SUMS = 8  # sums over the weights in one measurement of the limit


def common_tokens(ours: list[list[int]], theirs: list[list[int]]) -> str:
    """How many tokens of all rows are equal, each row up to its first difference."""
    equal = 0
    for our_row, their_row in zip(ours, theirs):
        for a, b in zip(our_row, their_row):
            if a != b:
                break
            equal += 1
    return f"{equal} of {sum(map(len, ours))}"


def compare(folder: str, dtype: torch.dtype, n: int, repeats: int) -> None:
    """Time the generation of n tokens by the model in `folder`."""
    ours = GPT.from_pretrained(folder, dtype=dtype).eval()
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).eval()
    weights = torch.ones(sum(p.numel() for p in ours.parameters()), dtype=dtype)
    prompts = torch.randint(0, ours.config.vocab_size, (ROWS, PROMPT_TOKENS))
    rows = prompts.tolist()
    sampling = Sampling(max_new_tokens=n, temperature=0)
    compiled = GPT.from_pretrained(folder, dtype=dtype).eval()
    compile_decoding(compiled)

    def peer(tokens: torch.Tensor) -> list[list[int]]:
        out = theirs.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=n,
            eos_token_id=None,
            pad_token_id=0,
        )
        return out[:, PROMPT_TOKENS:].tolist()

    works = {
        "limit": lambda: [weights.sum() for _ in range(SUMS)],
        "transformers, 1 row": lambda: peer(prompts[:1]),
        "tinyfm, 1 row": lambda: complete(ours, rows[:1], sampling),
        "compiled, 1 row": lambda: complete(compiled, rows[:1], sampling),
        f"transformers, {ROWS} rows": lambda: peer(prompts),
        f"tinyfm, {ROWS} rows": lambda: complete(ours, rows, sampling),
        f"compiled, {ROWS} rows": lambda: complete(compiled, rows, sampling),
    }
    times = by_turns(works, repeats)
    limit = times.pop("limit") / SUMS
    print_times(dtype, weights.nbytes / 1e9, limit, times, n)
    for label, model in (("tinyfm", ours), ("compiled", compiled)):
        equal = common_tokens(complete(model, rows, sampling), peer(prompts))
        print(f"  {label}: {equal} tokens as transformers', to the first difference of a row")


def print_times(
    dtype: torch.dtype, gigabytes: float, limit: float, times: dict[str, float], n: int
) -> None:
    """Print a table. limit: seconds to read all weights; times: seconds for n tokens a row."""
    print(f"\n{dtype}: weights are read at {gigabytes / limit:.0f} GB/s, in {limit * 1e3:.1f} ms")
    print(f"  {'':22}{'tokens/s':>10}{'ms a step':>11}{'of the limit':>14}")
    for label, elapsed in times.items():
        rows = ROWS if label.endswith("rows") else 1
        speed = n * rows / elapsed
        print(f"  {label:22}{speed:10.1f}{1e3 * elapsed / n:11.1f}{limit * n / elapsed:14.0%}")
    for label in ("tinyfm", "compiled"):
        one = times[f"{label}, 1 row"]
        many = times[f"{label}, {ROWS} rows"]
        print(
            f"  {label} over transformers, not compiled: "
            f"{times['transformers, 1 row'] / one:.2f}x with 1 row, "
            f"{times[f'transformers, {ROWS} rows'] / many:.2f}x with {ROWS}; "
            f"{ROWS} rows over 1 row {ROWS * one / many:.1f}x"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of each row")
    parser.add_argument("--repeats", type=int, default=3, help="number of timed rounds")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    print(f"{describe_machine()}, transformers {transformers.__version__}")
    print(f"GPT-2 124M, random weights, {PROMPT_TOKENS} + {options.tokens} tokens, greedy")
    model = GPT(registry.find_preset("gpt2-124m").run.model)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder, overwrite=True)
        for dtype in (torch.float32, torch.bfloat16):
            compare(folder, dtype, options.tokens, options.repeats)


if __name__ == "__main__":
    main()
