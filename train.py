"""Train a preset:  python train.py [PRESET] [--model.n-layer 6] [--train.steps 2000] ...

python train.py                                   # a small GPT on the documentation at hand
python train.py gpt --data.path my.txt            # on your own text: a file, folder or "glob"
python train.py clip                              # pictures and captions; also autoencoder, ddpm
python train.py text2image                        # trains its autoencoder and text tower first
python train.py gpt --resume                      # go on where a run stopped
python train.py gpt2-124m --dry-run               # what would it cost?
torchrun --standalone --nproc_per_node=8 train.py gpt2-124m --data.path corpus/
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch
import tyro

from tinyfm.calc import estimate
from tinyfm.common import device, files
from tinyfm.recipes import base, launch, registry, run_dir
from tinyfm.recipes.base import Run
from tinyfm.training import distributed
from tinyfm.training.log import read_metrics
from tinyfm.training.trainer import Trainer


def read_arguments(argv: list[str]) -> tuple[str, base.Preset, Run]:
    name, argv = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("gpt", argv)
    kind = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # which options there are
    for option, usual in (("--task", ""), ("--adapt", "full"), ("--init-from", "")):
        kind.add_argument(option, default=usual)
    preset = registry.get_preset(name, **vars(kind.parse_known_args(argv)[0]))
    listed = "\n".join(f"  {key}: {value.about}" for key, value in registry.PRESETS.items())
    description = f"{__doc__}\nPresets:\n{listed}\n\nBelow: {name}"
    run = tyro.cli(type(preset.run), default=preset.run, args=argv, description=description)
    how = [word for word in (run.task, run.adapt) if word not in ("", "full")]
    usual = "-".join([f"runs/{name}", *how])
    return name, preset, dataclasses.replace(run, out=run.out or usual)


def train(
    name: str, preset: base.Preset, run: Run, world: distributed.World, again: str = "--resume"
) -> int:
    """Run it; returns the exit status: 0, or 128 + the signal that stopped it, then to be gone on
    with by `again`."""
    out, begun = Path(run.out), time.perf_counter()
    say = print if world.first else lambda line: None
    if not run.dry_run:
        run = dataclasses.replace(run, resume=run_dir.check_directory(out, run.resume))
    train_part = lambda *part: train(*part, world, "the same command")  # noqa: E731
    run, others = launch.prepare(run, preset.run, train_part, say)
    if run.dry_run:
        with torch.device("meta"):  # shapes without memory: any size fits
            costs = estimate.describe(run_dir.begin(run), run.optim, run.train)
        say(f"{json.dumps(run_dir.to_record(name, run), indent=2)}\n{costs}")
        return 0
    device.choose_dtype(run.train.dtype, device.choose_device(run.train.device))  # or refuse now
    with distributed.first_rank_first(world):
        data = run.open_data()
    run = run.fit(data)
    record = run_dir.to_record(name, run, data.fingerprint)
    torch.manual_seed(run.train.seed)
    model = launch.build(run, others, data)
    costs = estimate.describe(model, run.optim, run.train)
    trainer = Trainer(
        model, data, run.train, run.optim, out, world=world,
        write=lambda folder: run_dir.write_run_files(folder, record, run, data),
        score=lambda model: run.score(model, data),
        show=lambda model, folder, step: run.show(model, data, folder, step),
    )  # fmt: skip
    if run.resume:
        run_dir.check_same(files.read_json(out / "config.json"), record, out)
        folder, done = trainer.resume(), trainer.counters["step"] == run.train.steps
        say(f"{'the run is complete:' if done else 'going on from'} {folder}")
    elif world.first:
        out.mkdir(parents=True, exist_ok=True)
        files.write_json(out / "config.json", record)
    with trainer.call.whole():
        run.get_ready(trainer.model, data)
    say(f"{data.description}\n{costs}\n{device.describe_device(trainer.device)}, {trainer.dtype}")
    scores = trainer.fit()
    if trainer.signals.agreed:
        say(f"stopped at step {trainer.counters['step']} and saved; go on with {again}")
        return 128 + trainer.signals.agreed
    baseline = next((row for row in read_metrics(out / "metrics.jsonl") if not row["step"]), {})
    say(run_dir.verdict(preset, run, baseline, scores))
    gib = device.peak_memory_bytes(trainer.device) / 2**30
    say(f"{time.perf_counter() - begun:.0f} s in all, at most {gib:.2f} GiB of memory; see {out}")
    return 0


def main() -> int | str:
    try:
        name, preset, run = read_arguments(sys.argv[1:])
        return train(name, preset, run, distributed.start())
    except RuntimeError as error:
        if "allocate" not in str(error):  # what a GPU "tried to", and a CPU "can't"
            raise
        reason = str(error).splitlines()[0]
        return f"error: {reason}; try half the --train.micro-batch-size: same result, less memory"
    except (ValueError, OSError, FloatingPointError) as error:
        return f"error: {error}"
    except KeyboardInterrupt:  # before the training, which saves, or a second one
        return 130
    finally:
        distributed.stop()


if __name__ == "__main__":
    sys.exit(main())
