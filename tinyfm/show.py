"""What sample.py does with a run, one function a family: text, names, pictures.

`options` are sample.py's. All errors of a user are ValueErrors.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from data import labelled, pictures
from data.report import Report
from tinyfm import compiled, find, generate, records
from tinyfm.adapt import chat
from tinyfm.adapt.soft_prompt import prompt_ids
from tinyfm.batches import labelled as tasks
from tinyfm.common import sheets
from tinyfm.evaluate import likelihood

# ---- GPT: continue a text -----------------------------------------------------------------------


def write_texts(opened: records.OpenRun, options) -> None:
    """Print n texts, the first one while it is written, each with its prompt."""
    if options.prompt == "":
        raise ValueError("the prompt is empty; give some text, or no --prompt to begin a new one")
    if options.shots or options.examples:
        guess(opened, options)
        return
    if options.compile:
        compiled.compile_decoding(opened.model)
    stops = [stop.replace("\\n", "\n") for stop in options.stop]
    prompt = options.prompt or ""
    prompts = texts = [prompt] * (options.n or 1)
    print(prompt, end="", flush=True)
    front = prompt_ids(opened.model)
    for parts in generate.stream_text(
        opened.model, opened.tokenizer, prompts, options.sampling, stops, front
    ):
        texts = [text + part for text, part in zip(texts, parts)]
        print(parts[0], end="", flush=True)
    print()
    for text in texts[1:]:
        print(f"----\n{text}")
    if options.out:
        Path(options.out).write_text("\n----\n".join(texts) + "\n", encoding="utf-8")


def print_shares(shares: dict[str, float]) -> None:
    """Names and their probabilities, the likeliest first."""
    for name, share in sorted(shares.items(), key=lambda pair: -pair[1]):
        print(f"{share:.4f}  {name}")


def guess(opened: records.OpenRun, options) -> None:
    """The label of the prompt, after some labelled examples in the context: nothing is trained."""
    if not options.examples or not options.prompt:
        lacks = "--examples FILE" if not options.examples else "--prompt TEXT"
        raise ValueError(f"to guess a label of --prompt, as in --examples: {lacks} is not given")
    rows = labelled.text_rows(options.examples, Report(), "", labelled.LABEL_COLUMNS)
    names = np.array([row.labels for row in rows])
    order = np.random.default_rng(options.sampling.seed).permutation(len(rows))
    chosen = tasks.stratified(names, order)[: options.shots]
    shown, labels = [(rows[i].source, rows[i].labels[0]) for i in chosen], sorted(set(names[:, 0]))
    (found,) = likelihood.classify(
        opened.model, opened.tokenizer, shown, [options.prompt], labels, calibrate=True
    )
    if found.dropped:
        print(f"{found.dropped} of {len(shown)} examples do not fit into the context")
    print_shares(found.probabilities)


def talk(opened: records.OpenRun, options) -> None:
    """Answer the prompt; or what is typed, until the end of input."""
    if options.chat:
        chat.chat(opened.model, opened.tokenizer, input, sampling=options.sampling)
        return
    if not (options.prompt or "").strip():
        raise ValueError("say something: --prompt TEXT, or --chat to talk")
    messages = [{"role": "user", "content": options.prompt}]
    for part in chat.reply(opened.model, opened.tokenizer, messages, options.sampling):
        print(part, end="", flush=True)
    print()


@torch.inference_mode()
def classify(opened: records.OpenRun, options) -> None:
    """The classes of the prompt, or of an image, and how probable each is."""
    run, model, reads_text = opened.run, opened.model, opened.tokenizer is not None
    given = options.prompt if reads_text else options.image
    if not (given or "").strip():
        flag = "--prompt TEXT" if reads_text else "--image FILE"
        raise ValueError(f"give what to tell the class of: {flag}")
    device = next(model.parameters()).device
    if reads_text:
        ids = opened.tokenizer.encode(given)[: run.model.context_length]
        tokens = torch.tensor([ids], device=device)
        batch = {"tokens": tokens, "mask": torch.ones_like(tokens, dtype=torch.bool)}
    else:
        image = pictures.read(given, run.model.image_size, run.channels).transpose(2, 0, 1)[None]
        batch = {"images": torch.tensor(image, device=device) / 127.5 - 1}
    for question, found in model.predict(batch).items():
        if len(run.classes) > 1:
            print(f"{question}:")
        print_shares(dict(zip(run.classes[question], found[0].tolist())))


# ---- CLIP, autoencoder, diffusion: find.py and draw.py do the work ------------------------------


def match(opened: records.OpenRun, options) -> None:
    """Name an image, or find images for a prompt."""
    out = options.out or "found.png"
    find.match(opened, options.image, options.labels, options.prompt, options.n or 1, out)


def write_png(sheet: sheets.Sheet, options) -> None:
    out = options.out or "sample.png"
    sheet.save(out)
    print(sheet.about, out, sep="\n")


def walk(opened: records.OpenRun, options) -> None:
    """n held-out pictures, what the model makes of them, and what lies between their codes."""
    val, seed = opened.run.open_data().val, options.sampling.seed
    chosen = np.random.default_rng(seed).permutation(len(val.labels))[: options.n or 8]
    write_png(sheets.latent_space(opened.model, val.batch(chosen)["images"], seed), options)


def denoise(opened: records.OpenRun, options) -> None:
    """n pictures, or the film of how the first of them came about."""
    make, seed = sheets.film if options.film else sheets.samples, options.sampling.seed
    write_png(make(opened.model, options.n or 16, options.sampler, options.steps, seed), options)


def illustrate(opened: records.OpenRun, options) -> None:
    """n pictures of what the prompt says, made of a picture if one is given."""
    if not (options.prompt or "").strip():
        raise ValueError('say what to draw: --prompt "sans bold latin small letter a"')
    given = sheets.read_given(opened.run.model, options.init_image, options.mask, options.upscale)
    if options.init_image:
        whole = 1.0 if options.mask else 0.6  # of a masked part nothing need be left
        given["strength"] = whole if options.strength is None else options.strength
    elif options.strength is not None:
        raise ValueError("--strength says how much to change of --init-image, which lacks")
    opened.model.tokenizer = opened.tokenizer
    find.tell_cut(opened.tokenizer, [options.prompt], opened.run.model.clip.context_length)
    prompts = [options.prompt] * (options.n or 8)
    how = {"sampler": options.sampler, "guidance": options.guidance, **given}
    sheet = sheets.prompted(opened.model, prompts, options.steps, options.sampling.seed, **how)
    write_png(sheet._replace(titles=()), options)  # the prompt of all


FAMILIES = {
    "gpt": write_texts, "chat": talk, "clip": match, "autoencoder": walk, "ddpm": denoise,
    "text2image": illustrate,
    **{f"{trunk}-classify": classify for trunk in ("gpt", "clip", "autoencoder", "ddpm")},
}  # fmt: skip
