"""Export a run to the layout of the library that loads its family:  python -m tinyfm.hub RUN FOLDER

The models know how (`save_pretrained`); each family's tables of names are in this folder.
"""

import argparse
import sys
from collections.abc import Sequence

from tinyfm import adapt
from tinyfm.adapt import peft
from tinyfm.recipes.run_dir import open_run


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tinyfm.hub", description="Export a run.")
    parser.add_argument("run", help="a run directory, such as runs/gpt")
    parser.add_argument("folder", help="where to write the Hugging Face layout")
    parser.add_argument("--overwrite", action="store_true", help="replace the model in the folder")
    parser.add_argument("--adapter", action="store_true", help="a LoRA alone, in peft's layout")
    options = parser.parse_args(arguments)
    try:
        run = open_run(options.run)
        if options.adapter:
            peft.save_adapter(run.model, options.folder, run.run.init_from)
            print(f"{options.folder} holds what {run.folder} changes in {run.run.init_from}")
            return
        adapt.merge(run.model)
        tokenizer = {"tokenizer": run.tokenizer} if run.tokenizer else {}
        run.model.save_pretrained(options.folder, **tokenizer, overwrite=options.overwrite)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{options.folder} holds the {run.weights} weights of {run.folder}")


if __name__ == "__main__":
    main()
