"""Export a run to the layout of the library that loads its family.

    python -m tinyfm.hub runs/gpt exported
    python -m tinyfm.hub runs/poems adapter --adapter

The first command writes a whole model, with any adapter merged; the second writes a LoRA alone.
"""

import argparse
import sys
from collections.abc import Sequence

from tinyfm import adapt
from tinyfm.adapt import peft
from tinyfm.recipes.run_dir import open_run


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with these arguments, by default those of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tinyfm.hub",
        description="Export a run to the layout that other libraries load.",
    )
    parser.add_argument("run", help="a run directory, such as runs/gpt")
    parser.add_argument("folder", help="the folder to write, in the Hugging Face layout")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a model or adapter in the folder"
    )
    parser.add_argument(
        "--adapter", action="store_true", help="write only the run's LoRA, in peft's layout"
    )
    options = parser.parse_args(arguments)
    try:
        opened = open_run(options.run)
        if options.adapter:
            base = opened.run.init_from
            peft.save_adapter(opened.model, options.folder, base, overwrite=options.overwrite)
            print(f"wrote the LoRA of {opened.folder}, for the base {base}, to {options.folder}")
            return
        adapt.merge(opened.model)
        tokenizer = {"tokenizer": opened.tokenizer} if opened.tokenizer else {}
        opened.model.save_pretrained(options.folder, **tokenizer, overwrite=options.overwrite)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"wrote the {opened.weights} weights of {opened.folder} to {options.folder}")


if __name__ == "__main__":
    main()
