"""Train a preset:  python train.py [PRESET] [--train.steps 2000] ...

  python train.py                                # a small GPT on documentation
  python train.py gpt --data.path my.txt         # your text: file or folder
  python train.py clip                           # pictures and their names
  python train.py text2image-small               # draw letters, in minutes
  python train.py --resume --out runs/mine       # continue a run
  python train.py gpt2-124m --dry-run            # what would it cost?
  torchrun --standalone --nproc_per_node=8 train.py gpt2-124m --data.path my/

An option changes a setting of the preset.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

if getattr(sys.flags, "safe_path", False):  # set by PYTHONSAFEPATH; Python 3.10 does not know it
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import tinyfm.common.startup as startup
from tinyfm.common.console import console
from tinyfm.common.options import parse
from tinyfm.recipes import launch, registry, run_dir
from tinyfm.recipes.base import Preset, Run
from tinyfm.training import distributed


def describe(name: str) -> str:
    """The text above the options in --help."""
    family = registry.family_presets(name)
    lines = [f"  {key}: {preset.about}" for key, preset in family.items()]
    others = ", ".join(registry.family_names())
    return "\n\n".join([
        __doc__.strip(),
        "Presets of this family:\n" + "\n".join(lines),
        f"For those of another, write --help after its name: {others}.",
        f"The defaults below are those of {name}.",
    ])  # fmt: skip


def find_settings(name: str, argv: list[str]) -> tuple[str, Preset, Run]:
    """(preset's name, preset, the run before the user's options), by the options that decide which
    other options there are.

    name: of a preset, or empty. Raises ValueError for an unknown one.
    """
    deciding = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    deciding.add_argument("--task", default="")
    deciding.add_argument("--adapt", default="full")
    deciding.add_argument("--init-from", "--init_from", default="")
    deciding.add_argument("--out", default="")
    deciding.add_argument("--resume", action="store_true")
    given, _ = deciding.parse_known_args(argv)
    words = [name or "gpt", given.task, "" if given.adapt == "full" else given.adapt]
    out = given.out or "runs/" + "-".join(filter(None, words))
    saved = Path(out) / "config.json"
    if given.resume and saved.exists():  # the run's own settings
        saved_name, run = run_dir.read_settings(saved)
        if name not in ("", saved_name):
            raise ValueError(f"{out} is a run of preset {saved_name}: leave out {name}")
        preset = registry.get_preset(saved_name, run.task, run.adapt, run.init_from)
        return saved_name, preset, dataclasses.replace(run, out=out)
    preset = registry.get_preset(name or "gpt", given.task, given.adapt, given.init_from)
    start = dataclasses.replace(preset.run, out=out)
    if given.init_from:
        start = launch.start_from(start, given.init_from)
    return name or "gpt", preset, start


def read_arguments(argv: list[str]) -> tuple[str, Preset, Run]:
    """(preset's name, preset, run with the user's options)."""
    name = ""
    if argv and not argv[0].startswith("-"):
        name, *argv = argv
        name = registry.ALIASES.get(name, name)
    name, preset, start = find_settings(name, argv)
    run = parse(type(start), describe(name), f"python train.py {name}", argv, start)
    return name, preset, run


def main() -> int | str:
    with console():
        return run_command()


def run_command() -> int | str:
    try:
        name, preset, run = read_arguments(sys.argv[1:])
        startup.loaded()
        world = distributed.start()
        plan = launch.resolve(name, preset, run, world, started=startup.STARTED)
        if not run.dry_run:
            return launch.train(plan, world)
        if world.first:
            print(launch.describe(plan))
        return 0
    except RuntimeError as error:
        if distributed.is_lost(error):
            return f"error: {distributed.lost(distributed.rank(), error)}"
        if "allocate" not in str(error):  # the word in the messages of both CPU and GPU
            raise
        reason = str(error).splitlines()[0]
        return f"error: {reason}; try half the --train.micro-batch-size: same result, less memory"
    except MemoryError:
        return "error: too little memory; try a smaller --train.batch-size"
    except (ValueError, OSError, FloatingPointError, Warning) as error:
        return f"error: {error}"
    except KeyboardInterrupt:  # before training, which saves first, or the second one
        return 130
    finally:
        distributed.stop()


if __name__ == "__main__":
    sys.exit(main())
