"""See what a run has learnt:  python sample.py RUN [--prompt TEXT] [-n 4] [--seed 0] ...

python sample.py runs/gpt --prompt "The with statement"      # continues the text as it is written
python sample.py runs/gpt -n 4 --temperature 1 --top-p 0.9   # four texts from nothing
python sample.py runs/gpt --prompt "def " --stop "\\n\\n"      # until an empty line
python sample.py runs/gpt --shots 4 --examples reviews.csv --prompt "well made"   # which label?
python sample.py runs/gpt --adapter runs/lora                # as another run has adapted it
python sample.py runs/chat --chat                            # talk to it
python sample.py runs/reviews --prompt "well made"           # classes and their probabilities
python sample.py runs/clip --image my.png --labels "digit seven, black chess queen"
python sample.py runs/clip --prompt "white chess knight" -n 8 --out knights.png
python sample.py runs/autoencoder --seed 1                   # pictures rebuilt, drawn, and between
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

from tinyfm import adapt, generate
from tinyfm.common import device as machine
from tinyfm.recipes import registry, run_dir


@dataclass(frozen=True)
class Options:
    run: tyro.conf.Positional[str]  # run directory, or one checkpoint in it
    # GPT: text to continue, else a new one begins; CLIP: what to find; text2image: what to draw
    prompt: str | None = None
    # texts to write or images to find, else 1; pictures to draw, else 8 or 16
    n: Annotated[int | None, tyro.conf.arg(aliases=["-n"])] = None
    stop: tuple[str, ...] = ()  # end a text before any of these strings; \n is a line end
    adapter: tuple[str, ...] = ()  # runs with --init-from this one whose changes to put onto it
    chat: bool = False  # chat: talk, until Ctrl-D
    shots: int = 0  # GPT: guess the label of --prompt after so many of the
    examples: str = ""  # ... labelled ones in this csv, tsv or jsonl of text, label
    image: str = ""  # CLIP: an image file to name; a classifier: to tell the class of
    labels: str = ""  # CLIP: the names to choose from, with commas; or a file, a name a line
    sampler: str = "dpm++"  # diffusion: ddpm, ddim or dpm++; also euler or heun, if it is a flow
    steps: int = 20  # diffusion: steps from noise to picture
    film: bool = False  # diffusion: draw the first samples while they lose their noise
    guidance: float = 3.0  # text2image: how closely to follow the prompt; 1 = as the model is
    init_image: str = ""  # text2image: a picture to change, by as much as
    strength: float | None = None  # ... this, up to 1 = nothing is left of it; else 0.6
    mask: str = ""  # ... white where it is to be drawn anew; then the rest stays as it is
    upscale: str = ""  # text2image: a small picture to draw large
    sampling: tyro.conf.OmitArgPrefixes[generate.Sampling] = field(
        default_factory=generate.Sampling
    )
    raw: bool = False  # the weights of the last step, even if averaged ones were kept
    device: str = "auto"  # cpu, cuda, mps, or auto
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16: half the memory, faster
    compile: bool = False  # GPT: seconds to begin with, then up to three times as fast on a CPU
    out: str = ""  # also write texts to this file; the PNG that is drawn (sample.png, found.png)


# ---- the command --------------------------------------------------------------------------------

TAKES = {  # beside what all families take
    "gpt": {"prompt", "stop", "compile", "shots", "examples", *vars(generate.Sampling())},
    "chat": {"prompt", "chat", *vars(generate.Sampling())},
    "gpt-classify": {"prompt"},
    **{f"{trunk}-classify": {"image"} for trunk in ("clip", "autoencoder", "ddpm")},
    "clip": {"prompt", "image", "labels"},
    "autoencoder": {"seed"},
    "ddpm": {"seed", "sampler", "steps", "film"},
    "text2image": {
        "prompt",
        "seed",
        "sampler",
        "steps",
        "guidance",
        "init_image",
        "strength",
        "mask",
        "upscale",
    },
}


def check(options: Options, family: str) -> None:
    """Raise ValueError for an option that means nothing to a run of this family."""
    own, foreign = TAKES[family], set().union(*TAKES.values()) - TAKES[family]
    for part, plain in ((options, Options("")), (options.sampling, generate.Sampling())):
        given = [name for name, value in vars(part).items() if value != vars(plain)[name]]
        if strange := [name for name in given if name in foreign]:
            flags = [f"--{name.replace('_', '-')}" for name in [strange[0], *sorted(own)]]
            taken = f"it takes {', '.join(flags[1:])}"
            raise ValueError(f"{flags[0]} is not for a run of family {family}: {taken}")


def main() -> int | str:
    try:
        options = tyro.cli(Options, description=__doc__)
        if options.n is not None and options.n < 1:
            raise ValueError(f"-n is {options.n}; ask for at least 1")
        if not (folder := Path(options.out).parent).is_dir():
            raise ValueError(f"--out {options.out}: there is no folder {folder}; make it first")
        opened = run_dir.open_run(options.run, options.raw)
        check(options, opened.run.family)
        run_dir.add_adapters(opened, options.adapter)
        with contextlib.suppress(ValueError):  # a soft prompt, which stays what it is
            adapt.merge(opened.model)
        device = machine.choose_device(options.device)
        dtype = machine.choose_dtype(options.dtype, device)
        opened.model.to(device, dtype)
        scores = ", ".join(f"{k} {v:.4g}" for k, v in opened.meta.items() if k != "step")
        print(
            f"{opened.folder}: step {opened.meta['step']}, {scores}; {opened.weights} weights, "
            f"{device}, {str(dtype)[6:]}",
            file=sys.stderr,
        )
        registry.SAMPLERS[opened.run.family](opened, options)
        sys.stdout.flush()
    except BrokenPipeError:  # as of `| head`: who reads has enough, and Python shall not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as of a program that SIGPIPE ends
    except (ValueError, OSError) as error:
        return f"error: {error}"
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
