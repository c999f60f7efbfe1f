"""See what a run has learnt:  python sample.py RUN [--prompt TEXT] [-n 4] [--seed 0] ...

python sample.py runs/gpt --prompt "The with statement"      # continues the text as it is written
python sample.py runs/gpt -n 4 --temperature 1 --top-p 0.9   # four texts from nothing
python sample.py runs/gpt --prompt "def " --stop "\\n\\n"      # until an empty line
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tinyfm import compiled, generate, machine, presets


@dataclass(frozen=True)
class Options:
    run: tyro.conf.Positional[str]  # run directory, or one checkpoint in it
    prompt: str | None = None  # text to continue; without it a new text begins
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1  # texts to write
    stop: tuple[str, ...] = ()  # end a text before any of these strings; \n is a line end
    sampling: tyro.conf.OmitArgPrefixes[generate.Sampling] = field(
        default_factory=generate.Sampling
    )
    raw: bool = False  # the weights of the last step, even if averaged ones were kept
    device: str = "auto"  # cpu, cuda, mps, or auto
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16: half the memory, faster
    compile: bool = False  # seconds to begin with, then up to three times as fast on a CPU
    out: str = ""  # also write the texts to this file


def write_texts(opened: presets.OpenRun, options: Options) -> list[str]:
    """Print n texts, the first one while it is written; return them, each with its prompt."""
    if options.n < 1:
        raise ValueError(f"-n is {options.n}; ask for at least 1 text")
    if options.prompt == "":
        raise ValueError("the prompt is empty; give some text, or no --prompt to begin a new one")
    stops = [stop.replace("\\n", "\n") for stop in options.stop]
    prompt = options.prompt or ""
    prompts = texts = [prompt] * options.n
    print(prompt, end="", flush=True)
    for parts in generate.stream_text(
        opened.model, opened.tokenizer, prompts, options.sampling, stops
    ):
        texts = [text + part for text, part in zip(texts, parts)]
        print(parts[0], end="", flush=True)
    print()
    for text in texts[1:]:
        print(f"----\n{text}")
    return texts


def main() -> int | str:
    try:
        options = tyro.cli(Options, description=__doc__)
        opened = presets.open_run(options.run, options.raw)
        device = machine.choose_device(options.device)
        dtype = machine.choose_dtype(options.dtype, device)
        opened.model.to(device, dtype)
        if options.compile:
            compiled.compile_decoding(opened.model)
        scores = ", ".join(f"{k} {v:.4g}" for k, v in opened.meta.items() if k != "step")
        print(
            f"{opened.folder}: step {opened.meta['step']}, {scores}; {opened.weights} weights, "
            f"{device}, {str(dtype)[6:]}",
            file=sys.stderr,
        )
        texts = write_texts(opened, options)
        if options.out:
            Path(options.out).write_text("\n----\n".join(texts) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        return f"error: {error}"
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
