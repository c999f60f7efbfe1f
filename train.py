"""Train a preset:  python train.py [PRESET] [--model.n-layer 6] [--train.steps 2000] ...

  python train.py                                   # a small GPT on the documentation at hand
  python train.py gpt --data.path my.txt            # on your own text: a file, folder or "glob"
  python train.py clip                              # pictures and captions; also autoencoder, ddpm
  python train.py text2image                        # trains its autoencoder and text tower first
  python train.py gpt --resume                      # continue a run that was stopped
  python train.py gpt2-124m --dry-run               # what would it cost?
  torchrun --standalone --nproc_per_node=8 train.py gpt2-124m --data.path corpus/
"""

import argparse
import dataclasses
import sys

import tyro

import tinyfm.common.startup as startup
from tinyfm.common.console import console
from tinyfm.recipes import launch, registry
from tinyfm.recipes.base import Preset, Run
from tinyfm.training import distributed


def describe(name: str) -> str:
    """The text above the options in --help."""
    family = registry.family_presets(name)
    lines = [f"  {key}: {preset.about}" for key, preset in family.items()]
    lines.append(f"  more with --help after the name: {', '.join(registry.family_names())}")
    return "\n".join([__doc__, "Presets:", *lines, "", f"Below: {name}"])


def read_arguments(argv: list[str]) -> tuple[str, Preset, Run]:
    """(preset's name, preset, run with the user's options)."""
    name = "gpt"
    if argv and not argv[0].startswith("-"):
        name, *argv = argv
    # These options decide which other options there are.
    deciding = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    deciding.add_argument("--task", default="")
    deciding.add_argument("--adapt", default="full")
    deciding.add_argument("--init-from", default="")
    preset = registry.get_preset(name, **vars(deciding.parse_known_args(argv)[0]))
    help_wanted = {"-h", "--help"} & {*argv}
    description = describe(name) if help_wanted else __doc__
    run = tyro.cli(type(preset.run), default=preset.run, args=argv, description=description)
    if not run.out:
        words = [name, run.task, "" if run.adapt == "full" else run.adapt]
        run = dataclasses.replace(run, out="runs/" + "-".join(filter(None, words)))
    return name, preset, run


def main() -> int | str:
    with console():
        return run_command()


def run_command() -> int | str:
    try:
        name, preset, run = read_arguments(sys.argv[1:])
        startup.loaded()
        world = distributed.start()
        plan = launch.resolve(name, preset, run, world)
        if not run.dry_run:
            return launch.train(plan, world)
        if world.first:
            print(launch.describe(plan))
        return 0
    except RuntimeError as error:
        if "allocate" not in str(error):  # the word in the messages of both CPU and GPU
            raise
        reason = str(error).splitlines()[0]
        return f"error: {reason}; try half the --train.micro-batch-size: same result, less memory"
    except (ValueError, OSError, FloatingPointError) as error:
        return f"error: {error}"
    except KeyboardInterrupt:  # before training, which saves first, or the second one
        return 130
    finally:
        distributed.stop()


if __name__ == "__main__":
    sys.exit(main())
