"""Sample from a trained run:  python sample.py RUN [--prompt TEXT] [-n 4] ...

  python sample.py runs/gpt --prompt "The with statement"      # continue text
  python sample.py runs/gpt -n 4 --temperature 1 --top-p 0.9   # from nothing
  python sample.py runs/gpt --draft ngram                      # faster
  python sample.py runs/gpt --prompt "def " --stop "\\n\\n"      # to blank lines
  python sample.py runs/gpt --prompt "The with" --beams 4       # the likeliest
  python sample.py runs/gpt --shots 4 --examples a.csv --prompt "well made"
  python sample.py runs/gpt --adapter runs/lora                # adapted
  python sample.py runs/gpt --quantize int4                    # in fewer bits
  python sample.py runs/chat --chat                            # talk to it
  python sample.py runs/reviews --prompt "well made"           # which class?
  python sample.py runs/encoder --prompt "The [MASK] loop"     # fill the gap
  python sample.py runs/xlnet --prompt "The cat sat" --masks   # its streams
  python sample.py runs/seq2seq --prompt "foundation"          # say a word
  python sample.py runs/clip --image my.png --labels "digit seven, digit one"
  python sample.py runs/clip --prompt "white chess knight" -n 8 --out it.png
  python sample.py runs/autoencoder --seed 1                   # rebuild, draw
  python sample.py runs/ddpm -n 16 --sampler dpm++ --steps 20  # from noise
  python sample.py runs/ddpm -n 4 --film                       # step by step
  python sample.py runs/text2image --prompt "serif latin capital letter q"
  python sample.py runs/text2image --prompt "sans digit two" --init-image a.png
  python sample.py runs/vq -n 8 --out rebuilt.png              # and codes
  python sample.py runs/dalle --prompt "serif latin capital letter q"
  python sample.py runs/codec -n 4 --out rebuilt.wav           # and codes
  python sample.py runs/musicgen --out voice.wav               # from nothing
  python sample.py runs/vision-gpt --image my.png              # say what it is
  python sample.py runs/vision-gpt --image my.png --prompt "is it bold?"
  python sample.py runs/vision-gpt-two --image a.png b.png --texts serif

An option that is for one family stands under its name.
"""

import contextlib
import difflib
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

if getattr(sys.flags, "safe_path", False):  # set by PYTHONSAFEPATH; Python 3.10 does not know it
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import tinyfm.common.startup as startup
from tinyfm import adapt, generate, quantize
from tinyfm.common import device as devices
from tinyfm.common.config import (
    FilePath,
    FilePaths,
    GivenRun,
    MaybeFloat,
    MaybeInt,
    MaybeText,
    Name,
    Quantize,
    RunPath,
    RunPaths,
    Text,
    Texts,
)
from tinyfm.common.console import Output, console
from tinyfm.common.options import parse
from tinyfm.recipes import run_dir
from tinyfm.recipes.base import OpenRun, Run
from tinyfm.speculative import DRAFT_TOKENS

# ---- options ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Common:
    run: GivenRun  # folder of a run, or of one of its checkpoints
    # GPT: text to continue, or nothing for a new one; encoder, XLNet: text with [MASK]; seq2seq:
    # word to say, or line to translate; CLIP: what to find; text2image, dalle: what to draw;
    # vision-gpt: question about --image, or nothing for a caption; codec, musicgen: .wav file
    prompt: MaybeText = None
    # number of texts to write or pictures to find (default: 1), to draw (default: 8 or 16), or of
    # candidates for a [MASK] (default: 5)
    n: Annotated[MaybeInt, tyro.conf.arg(aliases=["-n"])] = None
    adapter: RunPaths = ()  # runs that adapted this one: use their changes
    raw: bool = False  # use the weights of the last step, even if averaged ones were kept
    device: Name = "auto"  # device to compute on: cpu, cuda, mps, or auto
    # number format of the weights; bfloat16 needs half the memory and is faster
    dtype: Literal["float32", "bfloat16"] = "float32"
    quantize: Quantize = "none"  # format of the matrices; int8 and int4 take less memory
    # file to write: texts also go there, and pictures become this PNG (default: sample.png or
    # found.png, with a number if there is one)
    out: FilePath = ""
    overwrite: bool = False  # replace the file of --out even if sample.py did not draw it


@dataclass(frozen=True)
class ForGPT:
    """Further options for a GPT."""

    stop: Texts = ()  # end a text before any of these strings; \n is a line end
    chat: bool = False  # talk with a run of --task chat, until Ctrl-D
    shots: int = 0  # classify --prompt after this number of --examples, if they fit
    examples: FilePath = ""  # table (.csv, .tsv or .jsonl) with the columns text and label
    compile: bool = False  # write up to three times as fast on a CPU, after seconds to start
    # smaller run that proposes tokens, for the model to check several at once; or ngram, which
    # proposes what followed the last tokens earlier in the text: the same text, sooner
    draft: RunPath = ""
    draft_tokens: int = DRAFT_TOKENS  # tokens that --draft proposes at a time


@dataclass(frozen=True)
class ForBeams:
    """Search for the likeliest text, in place of drawing one: GPT and seq2seq."""

    beams: int = 1  # texts that are kept at each step; 1 = no search
    length_penalty: float = 1.0  # preference for long texts: 0 = none, 1 = by the mean of ln p


@dataclass(frozen=True)
class ForXLNet:
    """Options for an XLNet."""

    masks: bool = False  # draw what the tokens of --prompt may look at, in the order of --seed


@dataclass(frozen=True)
class ForPictures:
    """Options for a CLIP, a classifier of pictures, a VQ-VAE, or a GPT that sees."""

    image: FilePaths = ()  # picture to name, to classify, to rebuild, or pictures to write about
    texts: Texts = ()  # texts of the pictures before the last, as examples (a GPT that sees)
    # names for a CLIP to choose from, with commas between them; or a file with one name a line
    labels: Text = ""


@dataclass(frozen=True)
class ForDiffusion:
    """Options for ddpm and text2image."""

    sampler: Name = "dpm++"  # way from noise to picture: ddpm, ddim, dpm++; of a flow: euler, heun
    steps: int = 20  # number of steps from noise to picture
    film: bool = False  # draw the first samples step by step (ddpm)


@dataclass(frozen=True)
class ForTextToImage:
    """Options for text2image; --guidance for dalle too."""

    # how closely to follow the prompt; 1 = no guidance (default: 3, dalle 2)
    guidance: MaybeFloat = None
    init_image: FilePath = ""  # picture to change
    strength: MaybeFloat = None  # share of --init-image to redraw (default: 0.6, or 1 with --mask)
    mask: FilePath = ""  # picture that is white where --init-image is to be redrawn
    upscale: FilePath = ""  # small picture to draw large


@dataclass(frozen=True)
class Options(ForTextToImage, ForDiffusion, ForPictures, ForXLNet, ForBeams, ForGPT, Common):
    """All options in one."""

    sampling: generate.Sampling = field(default_factory=generate.Sampling)


@dataclass(frozen=True)
class CommandLine(Common):
    """The options under the headings of --help."""

    gpt: Annotated[ForGPT, tyro.conf.arg(name="GPT"), tyro.conf.OmitArgPrefixes] = ForGPT()

    # How to draw the tokens of a text. --seed is for pictures too.
    sampling: Annotated[generate.Sampling, tyro.conf.OmitArgPrefixes] = field(
        default_factory=generate.Sampling
    )

    beam_search: Annotated[ForBeams, tyro.conf.OmitArgPrefixes] = ForBeams()

    xlnet: Annotated[ForXLNet, tyro.conf.arg(name="XLNet"), tyro.conf.OmitArgPrefixes] = ForXLNet()
    clip: Annotated[ForPictures, tyro.conf.arg(name="CLIP"), tyro.conf.OmitArgPrefixes] = (
        ForPictures()
    )
    diffusion: Annotated[ForDiffusion, tyro.conf.OmitArgPrefixes] = ForDiffusion()
    text2image: Annotated[ForTextToImage, tyro.conf.OmitArgPrefixes] = ForTextToImage()


GROUPS = ("gpt", "beam_search", "xlnet", "clip", "diffusion", "text2image")


def read_options() -> Options:
    values = dict(vars(parse(CommandLine, __doc__, "python sample.py")))
    for name in GROUPS:
        values |= vars(values.pop(name))
    return Options(**values)


# ---- the command --------------------------------------------------------------------------------

MOST_SAMPLES = 1 << 16  # more would only fill the memory
TOO_MUCH = "error: too little memory for that: use smaller numbers"
# For any family.
COMMON = {"run", "adapter", "sampling", "raw", "device", "dtype", "quantize"}


def changed(part: object, default: object) -> list[str]:
    """The fields in which `part` differs from its default."""
    return [name for name, value in vars(part).items() if value != getattr(default, name)]


def flag(name: str) -> str:
    """An option as it is typed."""
    return "-n" if name == "n" else f"--{name.replace('_', '-')}"


def check(options: Options, run: Run) -> None:
    """Raise ValueError for an option that does nothing for this family, or beside the others."""
    form, used = run.sample_form(options)
    given = changed(options, Options("")) + changed(options.sampling, generate.Sampling())
    for name in given:
        needed = "out" if name == "overwrite" else name
        if name in COMMON or needed in used:
            continue
        if needed in run.SAMPLE_OPTIONS:
            raise ValueError(f"{flag(name)} does nothing {form}: leave it out")
        flags = [flag(option) for option in sorted(run.SAMPLE_OPTIONS)]
        raise ValueError(
            f"{flag(name)} is not for a run of family {run.family}: it takes {', '.join(flags)}"
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
    if options.n is not None and not 1 <= options.n <= MOST_SAMPLES:
        raise ValueError(f"-n is {options.n}; use 1 to {MOST_SAMPLES}")
    check_out(options)
    opened = run_dir.open_run(options.run, options.raw)
    check(options, opened.run)
    run_dir.add_adapters(opened, options.adapter)
    with contextlib.suppress(ValueError):  # a soft prompt cannot be merged
        adapt.merge(opened.model)
    device = devices.choose_device(options.device)
    dtype = devices.choose_dtype(options.dtype, device)
    run_dir.quantize_run(opened, opened.model, options.quantize)
    opened.model.to(device, dtype)
    quantize.pack(opened.model)
    if options.draft not in ("", "ngram"):
        if difflib.get_close_matches(options.draft, ["ngram"]) and not Path(options.draft).exists():
            raise ValueError(f"--draft {options.draft} is no run: did you mean --draft ngram?")
        draft = run_dir.open_base(options.draft)
        draft.model.to(device, dtype)
        opened = replace(opened, draft=draft)
    numbers = str(dtype).removeprefix("torch.")
    if options.quantize != "none":
        numbers = f"{options.quantize} and {numbers}"
    scores = ", ".join(f"{k} {v:.4g}" for k, v in opened.meta.items() if k != "step")
    print(
        f"{opened.folder}: step {opened.meta['step']}, {scores}; {opened.weights} weights, "
        f"{device}, {numbers}",
        file=sys.stderr,
    )
    return opened


def main() -> int | str:
    with console(lasting=False) as out:
        return run_command(out)


def run_command(out: Output) -> int | str:
    try:
        options = read_options()
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
        return TOO_MUCH
    except RuntimeError as error:
        if "allocate" not in str(error):  # the word in torch's messages about memory
            raise
        return TOO_MUCH
    except KeyboardInterrupt:
        return 130
    return 141 if out.reader_gone else 0  # 141: as a program that SIGPIPE ends


if __name__ == "__main__":
    sys.exit(main())
