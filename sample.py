"""Sample from a trained run:  python sample.py RUN [--prompt TEXT] [-n 4] [--seed 0] ...

  python sample.py runs/gpt --prompt "The with statement"      # continues the text as it is written
  python sample.py runs/gpt -n 4 --temperature 1 --top-p 0.9   # four texts from nothing
  python sample.py runs/gpt --prompt "def " --stop "\\n\\n"      # until an empty line
  python sample.py runs/gpt --shots 4 --examples reviews.csv --prompt "well made"   # which label?
  python sample.py runs/gpt --adapter runs/lora                # with another run's adapter
  python sample.py runs/chat --chat                            # talk to it
  python sample.py runs/reviews --prompt "well made"           # classes and their probabilities
  python sample.py runs/clip --image my.png --labels "digit seven, black chess queen"
  python sample.py runs/clip --prompt "white chess knight" -n 8 --out knights.png
  python sample.py runs/autoencoder --seed 1                   # pictures rebuilt and drawn
  python sample.py runs/ddpm -n 16 --sampler dpm++ --steps 20  # pictures from noise
  python sample.py runs/ddpm -n 4 --film                       # step by step
  python sample.py runs/text2image --prompt "serif bold italic latin capital letter q" --guidance 3
  python sample.py runs/text2image --prompt "sans italic latin small letter a" --init-image a.png
"""

import contextlib
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

if getattr(sys.flags, "safe_path", False):  # set by PYTHONSAFEPATH; Python 3.10 does not know it
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import tinyfm.common.startup as startup
from tinyfm import adapt, generate
from tinyfm.common import device as devices
from tinyfm.common.console import Output, console
from tinyfm.recipes import run_dir
from tinyfm.recipes.base import OpenRun, Run


@dataclass(frozen=True)
class Options:
    run: tyro.conf.Positional[str]  # run directory, or one checkpoint in it
    # GPT: text to continue, default: start a new one; CLIP: what to find; text2image: what to draw
    prompt: str | None = None
    # number of texts to write or images to find, default 1; of pictures to draw, default 8 or 16
    n: Annotated[int | None, tyro.conf.arg(aliases=["-n"])] = None
    stop: tuple[str, ...] = ()  # end a text before any of these strings; \n is a line end
    adapter: tuple[str, ...] = ()  # runs that adapted this one: use their changes
    chat: bool = False  # chat: talk, until Ctrl-D
    shots: int = 0  # GPT: classify --prompt after this number of --examples, if they fit
    examples: str = ""  # GPT: csv, tsv or jsonl file of text, label
    image: str = ""  # CLIP: image file to name; a classifier: image file to classify
    labels: str = ""  # CLIP: names to choose from, with commas; or a file with one name a line
    sampler: str = "dpm++"  # diffusion: ddpm, ddim or dpm++; for a flow also euler or heun
    steps: int = 20  # diffusion: steps from noise to picture
    film: bool = False  # diffusion: draw the first samples step by step
    guidance: float = 3.0  # text2image: how closely to follow the prompt; 1 = no guidance
    init_image: str = ""  # text2image: picture to change
    strength: float | None = None  # text2image: share of --init-image to redraw; default 0.6
    mask: str = ""  # text2image: picture that is white where --init-image is to be redrawn
    upscale: str = ""  # text2image: small picture to draw large
    sampling: tyro.conf.OmitArgPrefixes[generate.Sampling] = field(
        default_factory=generate.Sampling
    )
    raw: bool = False  # use the weights of the last step, even if averaged ones were kept
    device: str = "auto"  # cpu, cuda, mps, or auto
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16: half the memory, faster
    compile: bool = False  # GPT: takes seconds to start, then up to three times as fast on a CPU
    out: str = ""  # texts: also write them to this file; pictures: the PNG to draw
    overwrite: bool = False  # replace the file of --out even if sample.py did not draw it


# ---- the command --------------------------------------------------------------------------------

# For any family.
COMMON = {"run", "n", "adapter", "sampling", "raw", "device", "dtype", "out", "overwrite"}


def changed(part: object, default: object) -> list[str]:
    """The fields in which `part` differs from its default."""
    return [name for name, value in vars(part).items() if value != getattr(default, name)]


def check(options: Options, run: Run) -> None:
    """Raise ValueError for an option that does not apply to runs of this family."""
    given = changed(options, Options("")) + changed(options.sampling, generate.Sampling())
    for name in given:
        if name in COMMON or name in run.SAMPLE_OPTIONS:
            continue
        flags = [f"--{option.replace('_', '-')}" for option in sorted(run.SAMPLE_OPTIONS)]
        raise ValueError(
            f"--{name.replace('_', '-')} is not for a run of family {run.family}: "
            f"it takes {', '.join(flags)}"
        )


def check_out(options: Options) -> None:
    """Raise ValueError if --out has no folder, or is a file that sample.py did not draw."""
    out = Path(options.out)
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}; make it first")
    if options.out and out.exists() and not options.overwrite:
        from data.pictures import is_made_here  # loads Pillow, which texts do not need

        if not is_made_here(out):
            raise ValueError(f"--out {out} exists: choose another name, or add --overwrite")


def open_run(options: Options) -> OpenRun:
    """The run with its adapters, on the device and in the number format of the options."""
    if options.n is not None and options.n < 1:
        raise ValueError(f"-n is {options.n}; use at least 1")
    check_out(options)
    opened = run_dir.open_run(options.run, options.raw)
    check(options, opened.run)
    run_dir.add_adapters(opened, options.adapter)
    with contextlib.suppress(ValueError):  # a soft prompt cannot be merged
        adapt.merge(opened.model)
    device = devices.choose_device(options.device)
    dtype = devices.choose_dtype(options.dtype, device)
    opened.model.to(device, dtype)
    scores = ", ".join(f"{k} {v:.4g}" for k, v in opened.meta.items() if k != "step")
    print(
        f"{opened.folder}: step {opened.meta['step']}, {scores}; {opened.weights} weights, "
        f"{device}, {str(dtype).removeprefix('torch.')}",
        file=sys.stderr,
    )
    return opened


def main() -> int | str:
    with console(lasting=False) as out:
        return run_command(out)


def run_command(out: Output) -> int | str:
    try:
        options = tyro.cli(Options, description=__doc__)
        out.lasting = bool(options.out)  # then the file is written, even if nobody reads stdout
        opened = open_run(options)
        startup.loaded()
        opened.run.sample(opened, options)
        out.flush()
    except BrokenPipeError:  # as with `| head`: the reader closed the pipe; exit quietly
        pass
    except (ValueError, OSError, Warning) as error:  # a warning under python -W error
        return f"error: {error}"
    except (MemoryError, OverflowError):
        return "error: too little memory for that: use smaller numbers"
    except KeyboardInterrupt:
        return 130
    return 141 if out.reader_gone else 0  # 141: as a program that SIGPIPE ends


if __name__ == "__main__":
    sys.exit(main())
