"""Export a run to the layout of the library that loads its family.

    python -m tinyfm.hub runs/gpt exported
    python -m tinyfm.hub runs/poems adapter --adapter --base-name exported
    python -m tinyfm.hub runs/gpt --gguf gpt.gguf --quantize int4

The first command writes a whole model, with any adapter merged; the second writes a LoRA alone.
Both add a model card, README.md, with what the run's record says (recipes/card.py). The third
writes one file for llama.cpp.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from tinyfm import adapt
from tinyfm.adapt import chat, peft
from tinyfm.adapt.heads import Classifier
from tinyfm.common.console import run_command
from tinyfm.hub import card as hub_card
from tinyfm.hub import classifier, clip, gguf, stable_diffusion
from tinyfm.recipes import card
from tinyfm.recipes.base import OpenRun
from tinyfm.recipes.run_dir import open_run


def export_adapter(opened: OpenRun, options: argparse.Namespace) -> str:
    """Write the LoRA of a run; return a line that says so, and how to open it."""
    base = options.base_name or opened.run.init_from
    peft.save_adapter(opened.model, options.folder, base, overwrite=options.overwrite)
    line = f"wrote the LoRA of {opened.folder}, for the base {base}, to {options.folder}"
    if options.base_name:
        return line
    return (
        f"{line}\npeft looks for the base under that name: export it (python -m tinyfm.hub {base} "
        "BASE) and give --base-name BASE to have it opened by AutoPeftModel"
    )


def how_to_open(opened: OpenRun, folder: str) -> str:
    """A line: how other libraries open the exported model of a run, by their plain calls."""
    if (Path(folder) / "model_index.json").is_file():
        return f'\ndiffusers opens it by DiffusionPipeline.from_pretrained("{folder}")'
    match opened.run.family:
        case "gpt" | "chat" | "dpo" | "grpo":
            return f'\ntransformers opens it by pipeline("text-generation", "{folder}")'
        case "encoder":
            return how_to_open_encoder(opened.model, folder)
        case "xlnet":
            return f'\ntransformers opens it by XLNetLMHeadModel.from_pretrained("{folder}")'
        case "clip":
            call = f'pipeline("zero-shot-image-classification", "{folder}")'
            return f"\ntransformers opens it by {call}"
        case "seq2seq":
            call = f'AutoModelForSeq2SeqLM.from_pretrained("{folder}")'
            return f"\ntransformers opens it by {call}"
        case "autoencoder":
            return f'\ndiffusers opens it by AutoencoderKL.from_pretrained("{folder}")'
        case "vq":
            return f'\ndiffusers opens it by VQModel.from_pretrained("{folder}")'
        case "text2image":
            beyond = stable_diffusion.beyond_stable_diffusion(opened.model, opened.tokenizer)
            return (
                f"\ndiffusers has no pipeline with {', '.join(beyond)}; it opens the parts, such "
                f'as AutoencoderKL.from_pretrained("{folder}", subfolder="vae"), and '
                f'TextToImage.from_pretrained("{folder}") here opens the whole'
            )
    return ""


def how_to_open_encoder(model: nn.Module, folder: str) -> str:
    """The same for an encoder; an ELECTRA has two folders."""
    if model.config.objective == "electra":
        return (
            f'\ntransformers opens it by ElectraForPreTraining.from_pretrained("{folder}"), and '
            f'its generator by pipeline("fill-mask", "{folder}/generator")'
        )
    return f'\ntransformers opens it by pipeline("fill-mask", "{folder}")'


def merge_adapter(opened: OpenRun) -> None:
    """Make the run's adapter part of its weights. Raises ValueError for a soft prompt."""
    if opened.run.adapt == "prompt":
        raise ValueError(
            f"{opened.folder} adapts its base by a soft prompt, which no other library has; "
            f"export the base, {opened.run.init_from}, or train with --adapt lora"
        )
    adapt.merge(opened.model)


def export_gguf(opened: OpenRun, options: argparse.Namespace) -> str:
    """Write a GPT as one file for llama.cpp; return a line that says so."""
    if opened.run.base_family != "gpt" or opened.run.has_heads:
        raise ValueError(
            f"--gguf is for a GPT that writes; a run of family {opened.run.family} has no such file"
        )
    merge_adapter(opened)
    if opened.run.task == "chat":
        opened.tokenizer.chat_template = chat.JINJA
    name = opened.folder.resolve().parent.name
    arguments = (opened.tokenizer, options.gguf, name, options.quantize, options.overwrite)
    gguf.save(opened.model, *arguments)
    size = Path(options.gguf).stat().st_size / 1e6
    return (
        f"wrote the {opened.weights} weights of {opened.folder} to {options.gguf}, {size:.1f} MB\n"
        f"llama.cpp opens it by llama-completion -m {options.gguf} -p TEXT"
    )


def export_model(opened: OpenRun, options: argparse.Namespace) -> str:
    """Write the whole model of a run; return lines that say so, and what opens it."""
    model = opened.model
    merge_adapter(opened)
    line = f"wrote the {opened.weights} weights of {opened.folder} to {options.folder}"
    tokenizer = opened.tokenizer
    if tokenizer:
        tokenizer = tokenizer.without_template()
    if opened.run.family == "encoder":
        tokenizer = tokenizer.for_encoder(model.config.vocab_size - 1)  # as batches/masked.py
    if opened.run.task == "chat":
        tokenizer.chat_template = chat.JINJA
    if isinstance(model, Classifier):
        task = classifier.save(model, options.folder, tokenizer, options.overwrite)
        call = f'pipeline("{task}", "{options.folder}", trust_remote_code=True)'
        return f"{line}, with the code of the classifier; transformers opens it by {call}"
    if not hasattr(model, "save_pretrained"):
        raise ValueError(
            f"a run of family {opened.run.family} has no published layout; those that have: gpt, "
            "chat, encoder, seq2seq, xlnet, clip, autoencoder, vq, ddpm, text2image, and "
            "classifiers of texts"
        )
    if opened.run.family == "clip":
        clip.check_expressible(model.config)
        model = clip.in_rgb(model)
    words = {"tokenizer": tokenizer} if tokenizer else {}
    model.save_pretrained(options.folder, **words, overwrite=options.overwrite)
    return line + how_to_open(opened, options.folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with these arguments, by default those of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tinyfm.hub",
        description="Export a run to the layout that other libraries load. A CLIP must have been "
        "trained with --model.stem patch, a denoiser (ddpm) with --model.patch-size 1.",
    )
    parser.add_argument("run", metavar="RUN", help="a run directory, such as runs/gpt")
    parser.add_argument("folder", metavar="FOLDER", nargs="?", help="the folder to write")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a model or adapter in the folder"
    )
    parser.add_argument(
        "--gguf", metavar="FILE", help="write a GPT as one file for llama.cpp, and no folder"
    )
    parser.add_argument(
        "--quantize",
        choices=gguf.FILE_TYPES,
        default="none",
        help="with --gguf: write the matrices in 8 or 4 bits, Q8_0 or Q4_0",
    )
    parser.add_argument(
        "--adapter", action="store_true", help="write only the run's LoRA, in peft's layout"
    )
    parser.add_argument(
        "--base-name",
        default="",
        metavar="NAME",
        help="what others call the adapter's base: a folder, or a name on the Hugging Face hub",
    )
    parser.add_argument(
        "--watts",
        type=float,
        default=card.WATTS,
        metavar="W",
        help="power that the computer drew in training, for the card's energy; default: "
        "%(default)g, an assumption",
    )
    options = parser.parse_args(arguments)
    if options.base_name and not options.adapter:
        parser.error("--base-name is for an adapter: add --adapter")
    if bool(options.gguf) == bool(options.folder) or (options.gguf and options.adapter):
        parser.error("name the folder to write, or the file for llama.cpp with --gguf FILE")
    if options.quantize != "none" and not options.gguf:
        parser.error(f"--quantize {options.quantize} is for a GGUF file: add --gguf FILE")
    try:
        opened = open_run(options.run)
        if options.gguf:
            print(export_gguf(opened, options))
            return
        base = ""
        if options.adapter:
            base = options.base_name or opened.run.init_from
        described = card.describe(opened, Path(options.folder).name, base, options.watts)
        export = export_adapter if options.adapter else export_model
        print(export(opened, options))
        if not hub_card.write(described, options.folder):
            print(f"{options.folder}/README.md is kept: it is no card that this command wrote")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    sys.exit(run_command(main, lasting=True))
