"""What sample.py does with a run, one function a family: text, names, pictures.

`options` are sample.py's. All errors of a user are ValueErrors.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tinyfm import compiled, draw, find, generate, records

# ---- GPT: continue a text -----------------------------------------------------------------------


def write_texts(opened: records.OpenRun, options) -> None:
    """Print n texts, the first one while it is written, each with its prompt."""
    if options.prompt == "":
        raise ValueError("the prompt is empty; give some text, or no --prompt to begin a new one")
    if options.compile:
        compiled.compile_decoding(opened.model)
    stops = [stop.replace("\\n", "\n") for stop in options.stop]
    prompt = options.prompt or ""
    prompts = texts = [prompt] * (options.n or 1)
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


# ---- CLIP, autoencoder, diffusion: find.py and draw.py do the work ------------------------------


def match(opened: records.OpenRun, options) -> None:
    """Name an image, or find images for a prompt."""
    out = options.out or "found.png"
    find.match(opened, options.image, options.labels, options.prompt, options.n or 1, out)


def write_png(sheet: draw.Sheet, options) -> None:
    out = options.out or "sample.png"
    sheet.save(out)
    print(sheet.about, out, sep="\n")


def walk(opened: records.OpenRun, options) -> None:
    """n held-out pictures, what the model makes of them, and what lies between their codes."""
    val, seed = opened.run.open_data().val, options.sampling.seed
    chosen = np.random.default_rng(seed).permutation(len(val.labels))[: options.n or 8]
    write_png(draw.latent_space(opened.model, val.batch(chosen)["images"], seed), options)


def denoise(opened: records.OpenRun, options) -> None:
    """n pictures, or the film of how the first of them came about."""
    make, seed = draw.film if options.film else draw.samples, options.sampling.seed
    write_png(make(opened.model, options.n or 16, options.sampler, options.steps, seed), options)


def illustrate(opened: records.OpenRun, options) -> None:
    """n pictures of what the prompt says, made of a picture if one is given."""
    if not (options.prompt or "").strip():
        raise ValueError('say what to draw: --prompt "sans bold latin small letter a"')
    given = draw.read_given(opened.run.model, options.init_image, options.mask, options.upscale)
    if options.init_image:
        whole = 1.0 if options.mask else 0.6  # of a masked part nothing need be left
        given["strength"] = whole if options.strength is None else options.strength
    elif options.strength is not None:
        raise ValueError("--strength says how much to change of --init-image, which lacks")
    opened.model.tokenizer = opened.tokenizer
    find.tell_cut(opened.tokenizer, [options.prompt], opened.run.model.clip.context_length)
    prompts = [options.prompt] * (options.n or 8)
    how = {"sampler": options.sampler, "guidance": options.guidance, **given}
    sheet = draw.prompted(opened.model, prompts, options.steps, options.sampling.seed, **how)
    write_png(sheet._replace(titles=()), options)  # the prompt of all


FAMILIES = {"gpt": write_texts, "clip": match, "autoencoder": walk, "ddpm": denoise,
        "text2image": illustrate}  # fmt: skip
