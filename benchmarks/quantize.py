"""What 8 and 4 bits cost in quality and gain in bytes and speed, on a CPU.

    python benchmarks/quantize.py quality RUN [--record]
    python benchmarks/quantize.py speed [--tokens 64] [--repeats 2] [--record]

quality: bits per byte of the test text of a trained GPT, in float32 and in each quantised form, and
the difference with its interval of 95% over the documents.

speed: tokens per second of a GPT of 124M parameters (12 layers, width 768, SwiGLU, tied head;
random weights), one row and 8, greedy. bfloat16 and the quantised models compute with bfloat16
states, uncompiled and compiled (sample.py --compile). They take turns. The limit is the time to
read the bytes of a model once, measured in the same run by the sum of a large tensor. Peers, if
they are installed: transformers with torchao's int8, on the same weights, and llama.cpp (package
xllamacpp) with the GGUF files that `tinyfm.hub` writes. They are loaded and measured after all
others, one by one: once they are loaded, every model in the process is slower, in a trial by a
third and more.

--record writes the tables into README.md.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import timing
from tinyfm import quantize
from tinyfm.compiled import compile_decoding
from tinyfm.evaluate import likelihood
from tinyfm.evaluate.metrics import Measured, ratio_of_sums
from tinyfm.generate import Sampling, complete
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.hub import gguf
from tinyfm.recipes import run_dir
from tinyfm.tokenizer import ByteTokenizer

# ---- quality ------------------------------------------------------------------------------------

FORMS = {  # name -> (kind, group, by second order)
    "int8": ("int8", 32, False),
    "int4, groups of 32": ("int4", 32, False),
    "int4, groups of 64": ("int4", 64, False),
    "int4, groups of 32, second order": ("int4", 32, True),
    "int4, groups of 64, second order": ("int4", 64, True),
}


@torch.inference_mode()
def bits_by_document(model: GPT, data, rows: int) -> np.ndarray:
    split = data.split("test")
    nats = likelihood.score_targets(model, data.split_batches("test", rows))
    return np.add.reduceat(nats, split.starts) / math.log(2)


def compare(path: str) -> list[tuple[str, Measured, Measured | None, int]]:
    """(form, bits per byte, its difference from float32, bytes) of a run and its forms."""
    opened = run_dir.open_run(path)
    data = opened.run.open_data()
    rows = opened.run.train.batch_size
    size = data.split("test").bytes
    before = bits_by_document(opened.model, data, rows)
    plain = quantize.count_bytes(opened.model)
    found = [("float32", ratio_of_sums(before, size, "documents"), None, plain)]
    for form, (kind, group, second_order) in FORMS.items():
        model = copy.deepcopy(opened.model)
        calibrate = run_dir.calibration(opened, model, data) if second_order else None
        quantize.quantize(model, kind, calibrate, group)
        bits = bits_by_document(model, data, rows)
        more = ratio_of_sums(bits - before, size, "documents")
        bpb = ratio_of_sums(bits, size, "documents")
        found.append((form, bpb, more, quantize.count_bytes(model)))
    return found


def quality_table(found: list[tuple[str, Measured, Measured | None, int]]) -> str:
    lines = [
        "| weights | bits per byte of test | more than float32 (95%) | MB |",
        "|---|---|---|---|",
    ]
    for form, bpb, more, size in found:
        difference = f"{more:+.4f} ({more.low:+.4f} to {more.high:+.4f})" if more else ""
        lines.append(f"| {form} | {bpb:.4f} | {difference} | {size / 1e6:.2f} |")
    return "\n".join(lines) + f"\n\nIntervals over {found[0][1].about}.\n"


# ---- speed --------------------------------------------------------------------------------------

PROMPT_TOKENS = 32
ROWS = 8
SHAPE = GPTConfig(
    vocab_size=50_257, context_length=1024, n_layer=12, n_head=12, d_model=768, d_ff=2048,
    tied=True, zero_init=False,
)  # fmt: skip
Writer = Callable[[list[list[int]], int], object]  # prompts, number of tokens


def our_models(model: GPT) -> dict[str, GPT]:
    """The model in each format, and the same compiled. model: in float32."""
    found = {}
    for kind in ("float32", "bfloat16", "int8", "int4"):
        for compiled in (False, True):
            own = copy.deepcopy(model)
            if kind in quantize.KINDS:
                quantize.quantize(own, kind)
            own.to(torch.float32 if kind == "float32" else torch.bfloat16)
            quantize.pack(own)
            if compiled:
                compile_decoding(own)
            found[f"{kind}, compiled" if compiled else kind] = own
    return found


def torchao_writer(folder: Path) -> Writer:
    """transformers with the same weights in torchao's int8, states in bfloat16."""
    import transformers
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    quantize_(model, Int8WeightOnlyConfig())

    def write(rows: list[list[int]], n: int) -> None:
        tokens = torch.tensor(rows)
        options = {"do_sample": False, "max_new_tokens": n, "min_new_tokens": n, "pad_token_id": 0}
        with torch.inference_mode():
            model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)

    return write


def llama_writer(path: Path) -> Writer:
    """llama.cpp with a GGUF file; one row."""
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path = str(path)
    options.n_ctx = SHAPE.context_length
    options.cpuparams.n_threads = torch.get_num_threads()
    options.warmup = False
    server = xllamacpp.Server(options)

    def write(rows: list[list[int]], n: int) -> None:
        request = {"prompt": rows[0], "max_tokens": n, "temperature": 0.0, "ignore_eos": True}
        server.handle_completions(request | {"cache_prompt": False})

    return write


def find_peers(model: GPT, folder: Path) -> Iterator[tuple[str, Writer, int]]:
    """(name, how it writes, bytes of its weights) of the peers that run here, each loaded when its
    turn comes."""
    if importlib.util.find_spec("torchao"):
        model.save_pretrained(folder / "hf")
        int8 = copy.deepcopy(model)
        quantize.quantize(int8, "int8")
        write = torchao_writer(folder / "hf")
        yield "transformers, torchao int8", write, quantize.count_bytes(int8)
    if importlib.util.find_spec("xllamacpp"):
        for kind in quantize.KINDS:
            path = folder / f"{kind}.gguf"
            gguf.save(model, ByteTokenizer(), path, kind, kind)
            yield f"llama.cpp, {kind}", llama_writer(path), path.stat().st_size


def measure_speed(n: int, repeats: int, peers: bool) -> str:
    """A table: tokens per second of one row and of 8, and the share of the bytes' limit."""
    torch.manual_seed(0)
    model = GPT(SHAPE).eval()
    prompts = torch.randint(0, 256, (ROWS, PROMPT_TOKENS)).tolist()
    s = Sampling(max_new_tokens=n, temperature=0)
    large = torch.ones(1 << 27)
    sizes = {}
    works: dict[str, Callable[[], object]] = {"limit": large.sum}
    for name, own in our_models(model).items():
        sizes[name] = quantize.count_bytes(own)
        for rows in (1, ROWS):
            works[f"{name} {rows}"] = lambda own=own, rows=rows: complete(own, prompts[:rows], s)
    times = timing.by_turns(works, repeats)
    with TemporaryDirectory() as folder:
        for name, write, size in find_peers(model, Path(folder)) if peers else ():
            sizes[name] = size
            works = {}
            for rows in (1,) if name.startswith("llama.cpp") else (1, ROWS):
                works[f"{name} {rows}"] = lambda write=write, rows=rows: write(prompts[:rows], n)
            times |= timing.by_turns(works, repeats)
    return speed_table(times, sizes, large.nbytes / times["limit"], n)


def speed_table(times: dict[str, float], sizes: dict[str, int], rate: float, n: int) -> str:
    """times: seconds of "NAME ROWS". sizes: bytes of the weights. rate: bytes per second."""
    head = f"1 row, tokens/s | over bfloat16, compiled | of the limit | {ROWS} rows, tokens/s"
    lines = [f"| weights | MB | {head} |", "|---|---|---|---|---|---|"]
    usual = times["bfloat16, compiled 1"]
    for name, size in sizes.items():
        one = times[f"{name} 1"]
        many = times.get(f"{name} {ROWS}")
        cells = [f"{size / 1e6:.0f}", f"{n / one:.1f}", f"{usual / one:.2f}"]
        cells.append(f"{size / rate / (one / n):.0%}")
        cells.append(f"{ROWS * n / many:.1f}" if many else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    about = f"The memory is read at {rate / 1e9:.0f} GB/s. Prompts have {PROMPT_TOKENS} tokens"
    return "\n".join(lines) + f"\n\n{about}, and {n} follow.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("quality", "speed"))
    parser.add_argument("run", nargs="?", help="quality: the folder of a trained GPT")
    parser.add_argument("--tokens", type=int, default=64, help="speed: new tokens of each row")
    parser.add_argument("--repeats", type=int, default=2, help="speed: number of timed rounds")
    parser.add_argument("--no-peers", action="store_true", help="speed: leave out other libraries")
    parser.add_argument("--record", action="store_true", help="write the table into README.md")
    given = parser.parse_args()
    if (given.part == "quality") != bool(given.run):
        parser.error("quality needs a RUN, and speed takes none")
    if given.part == "quality":
        table = quality_table(compare(given.run))
    else:
        table = measure_speed(given.tokens, given.repeats, not given.no_peers)
    text = f"{timing.describe_machine()}\n\n{table}"
    print(text)
    if given.record:
        timing.record(f"quantize {given.part}", text)


if __name__ == "__main__":
    main()
