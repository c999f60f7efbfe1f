"""See what a run has learnt:  python sample.py RUN [--prompt TEXT] [-n 4] [--seed 0] ...

python sample.py runs/gpt --prompt "The with statement"      # continues the text as it is written
python sample.py runs/gpt -n 4 --temperature 1 --top-p 0.9   # four texts from nothing
python sample.py runs/gpt --prompt "def " --stop "\\n\\n"      # until an empty line
python sample.py runs/clip --image my.png --labels "digit seven, black chess queen"
python sample.py runs/clip --prompt "white chess knight" -n 8 --out knights.png
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

from data import pictures
from tinyfm import compiled, files, generate, machine, presets, zero_shot


@dataclass(frozen=True)
class Options:
    run: tyro.conf.Positional[str]  # run directory, or one checkpoint in it
    prompt: str | None = None  # GPT: text to continue, else a new one begins; CLIP: what to find
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1  # texts to write, or images to find
    stop: tuple[str, ...] = ()  # end a text before any of these strings; \n is a line end
    image: str = ""  # CLIP: an image file to name
    labels: str = ""  # CLIP: the names to choose from, with commas; or a file, a name a line
    sampling: tyro.conf.OmitArgPrefixes[generate.Sampling] = field(
        default_factory=generate.Sampling
    )
    raw: bool = False  # the weights of the last step, even if averaged ones were kept
    device: str = "auto"  # cpu, cuda, mps, or auto
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16: half the memory, faster
    compile: bool = False  # GPT: seconds to begin with, then up to three times as fast on a CPU
    out: str = ""  # also write texts to this file; the PNG of images found (found.png)


# ---- GPT: continue a text -----------------------------------------------------------------------


def write_texts(opened: presets.OpenRun, options: Options) -> None:
    """Print n texts, the first one while it is written, each with its prompt."""
    if options.prompt == "":
        raise ValueError("the prompt is empty; give some text, or no --prompt to begin a new one")
    if options.compile:
        compiled.compile_decoding(opened.model)
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
    if options.out:
        Path(options.out).write_text("\n----\n".join(texts) + "\n", encoding="utf-8")


# ---- CLIP: name an image, find images -----------------------------------------------------------


def read_labels(labels: str) -> list[str]:
    """The names of a list with commas, or of a file with a name a line. Raises ValueError."""
    path = Path(labels)
    text = path.read_text(encoding="utf-8") if path.is_file() else labels.replace(",", "\n")
    names = [name.strip() for name in text.splitlines() if name.strip()]
    if not names:
        raise ValueError('there is no label: give names, --labels "digit seven, black chess queen"')
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"the labels have {twice[0]!r} more than once; name each class once")
    return names


def name_image(opened: presets.OpenRun, options: Options) -> None:
    """Print how probable each label is."""
    names, config = read_labels(options.labels), opened.model.config
    image = pictures.read(options.image, config.image_size, config.channels)
    x = zero_shot.embed_images(opened.model, image.transpose(2, 0, 1)[None])
    templates = files.read_json(opened.folder / opened.run.TEMPLATES)
    classes = zero_shot.class_vectors(opened.model, opened.tokenizer, names, templates)
    p = (opened.model.scale() * x @ classes.T).softmax(-1)[0]
    for value, i in zip(*(part.tolist() for part in p.sort(descending=True))):
        print(f"{value:7.2%}  {names[i]}")


def find_images(opened: presets.OpenRun, options: Options) -> None:
    """Draw the n images of the run's data set that fit the prompt best, with their scores."""
    splits = opened.run.open_data().splits.values()
    y = zero_shot.embed_texts(opened.model, opened.tokenizer, [options.prompt])
    x = torch.cat([zero_shot.embed_images(opened.model, split.images) for split in splits])
    best = (x @ y[0]).topk(min(options.n, len(x)))
    captions = [own[0] for split in splits for own in split.captions]
    images = np.concatenate([split.images for split in splits])[best.indices.cpu().numpy()]
    titles = [f"{s:.3f} {captions[i]}" for s, i in zip(*(part.tolist() for part in best))]
    out = options.out or "found.png"
    pictures.save_grid(images.transpose(0, 2, 3, 1), out, min(8, len(images)), titles)
    print("\n".join(titles), out, sep="\n")


def match(opened: presets.OpenRun, options: Options) -> None:
    if opened.model.config.loss == "simclr":
        raise ValueError("this run learnt from images alone: it knows no names or captions")
    if bool(options.image) == bool(options.prompt):
        raise ValueError("give --image FILE with --labels, or --prompt with what to find")
    with torch.inference_mode():
        name_image(opened, options) if options.image else find_images(opened, options)


SHOW = {"gpt": write_texts, "clip": match}


def main() -> int | str:
    try:
        options = tyro.cli(Options, description=__doc__)
        if options.n < 1:
            raise ValueError(f"-n is {options.n}; ask for at least 1")
        opened = presets.open_run(options.run, options.raw)
        device = machine.choose_device(options.device)
        dtype = machine.choose_dtype(options.dtype, device)
        opened.model.to(device, dtype)
        scores = ", ".join(f"{k} {v:.4g}" for k, v in opened.meta.items() if k != "step")
        print(
            f"{opened.folder}: step {opened.meta['step']}, {scores}; {opened.weights} weights, "
            f"{device}, {str(dtype)[6:]}",
            file=sys.stderr,
        )
        SHOW[opened.run.family](opened, options)
    except (ValueError, OSError) as error:
        return f"error: {error}"
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
