"""The folder of a run: its config.json, which records the settings, and its checkpoints.

    runs/gpt/config.json          the settings, as plain values
    runs/gpt/metrics.jsonl        losses and scores by step
    runs/gpt/step-000300/         a checkpoint: weights, and all that is needed to sample from them

Here a run is compared with the one that its folder holds, and a trained run is opened.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import json
import math
import os
import shlex
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor, nn

from data.report import counted
from tinyfm import adapt, quantize
from tinyfm.common import files, folders, schema
from tinyfm.common.config import Quantize
from tinyfm.common.seeds import row_generators
from tinyfm.recipes import registry
from tinyfm.recipes.base import OpenRun, Preset, Run
from tinyfm.training import checkpoint
from tinyfm.training.distributed import World, on_first_rank
from tinyfm.training.log import METRICS, read_metrics, summary_score

# ---- the record of a run ------------------------------------------------------------------------


def to_record(preset: str, run: Run, fingerprint: str = "") -> dict[str, Any]:
    """All that is needed to rebuild a run, as plain values for config.json.

    fingerprint: a hash of the data, once they are prepared.
    """
    default = type(run)()
    values = dataclasses.asdict(run)
    facts = [name for name in run.FACTS if getattr(run, name) != getattr(default, name)]
    record = {"preset": preset, "family": run.family}
    for name in (*run.CONFIGS, *facts):
        record[name] = values[name]
    if fingerprint:
        record["data_fingerprint"] = fingerprint[:16]
    return json.loads(json.dumps(record))


class Record(TypedDict):
    """What every config.json of a run has; the other fields depend on the family."""

    family: str


def from_record(record: Any) -> Run:
    """The run that a config.json records.

    Raises ValueError for fields that are missing or do not fit, or an unknown family.
    """
    record = schema.check(record, Record, "config.json")
    run_type = registry.find_run_type(record["family"])
    kinds = schema.fields_of(run_type)
    values = {}
    for name in (*run_type.CONFIGS, *run_type.FACTS):
        if name in record:
            values[name] = schema.check(record[name], kinds[name], f"config.json: {name}")
        elif name in run_type.CONFIGS:
            raise ValueError(f"config.json: {name} is missing")
    return run_type(**values)


def read_run(path: Path) -> Run:
    """The run of a config.json file. Raises ValueError if it does not fit this version."""
    return read_settings(path)[1]


def read_settings(path: Path) -> tuple[str, Run]:
    """(name of the preset, run) of a config.json file. Raises ValueError as `read_run` does."""
    record = files.read_json(path)
    try:
        run = from_record(record)
        return str(record.get("preset", run.family)), run
    except files.MALFORMED as error:
        problem = f"{path} is not a run of this version: {error}"
        raise ValueError(f"{problem}; use the code that wrote it") from error


EVALUATION = "evaluation.json"  # what evaluate last measured, in the folder of the run


# ---- starting and resuming ----------------------------------------------------------------------


JOB = ".job"  # a file in the folder of a run that torchrun may restart: which job began it


def find_job() -> str:
    """What identifies a job of torchrun, the same for all its attempts; empty without torchrun."""
    job = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if job == "none":  # torchrun was given no id: on one machine its process is one
        job = f"{socket.gethostname()} {os.getppid()}"
    return job


def is_restarted(out: Path) -> bool:
    """Whether torchrun has restarted this job, and an earlier attempt of it began the run."""
    if not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        return False
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return (out / JOB).read_text(encoding="utf-8") == find_job()
    return False


def is_unused(out: Path) -> bool:
    """Whether a folder holds nothing, or what a run leaves that fails before its first step."""
    found = {path.name for path in out.iterdir() if path.lstat().st_size}
    found -= {folders.lock_inside(out).name, JOB}
    if found == {"config.json"}:
        with contextlib.suppress(ValueError):
            read_run(out / "config.json")
            return True
    return not found


def check_directory(out: Path, resume: bool) -> bool:
    """Whether to resume the run in `out`. Raises ValueError if it can neither start nor resume.

    After a restart by torchrun --max-restarts, a run that an earlier attempt of the same job began
    is resumed if there is a checkpoint, and starts again otherwise.
    """
    if is_restarted(out):
        saved = any(out.glob("step-*/manifest.json"))
        if not saved:
            (out / METRICS).unlink(missing_ok=True)  # written by the attempt that failed
        return saved
    if resume and not out.exists():
        raise ValueError(f"there is no run {out} to resume; leave out --resume to start it")
    if out.exists() and not resume and not is_unused(out):
        raise ValueError(f"{out} exists: continue it with --resume, or choose another --out")
    return resume


def check_free(out: Path) -> None:
    """Raise ValueError if another process is training the run in `out` at present."""
    with folders.hold(folders.lock_inside(out), out):
        pass


@contextlib.contextmanager
def own(out: Path, resume: bool, world: World) -> Iterator[None]:
    """Inside, no other process writes the run in `out`; every rank enters together.

    What killed processes left in it is cleaned up. Raises ValueError if another process is training
    this run, or has trained it since `check_directory`.
    """
    lock = contextlib.ExitStack()

    def take() -> None:
        out.mkdir(parents=True, exist_ok=True)
        lock.enter_context(folders.hold(folders.lock_inside(out), out))
        check_directory(out, resume)
        checkpoint.recover(out)
        if find_job():
            (out / JOB).write_text(find_job(), encoding="utf-8")

    try:
        with lock:
            on_first_rank(take)
            yield
    finally:
        if world.first:
            with contextlib.suppress(OSError):
                out.rmdir()  # which succeeds only for an empty folder


def find_changeable(config: Any, prefix: str = "") -> Iterator[str]:
    """Names, such as train.device, of the fields marked `may_change` (common/config.py)."""
    for field in dataclasses.fields(config):
        name = prefix + field.name
        value = getattr(config, field.name)
        if field.metadata.get("may_change"):
            yield name
        elif dataclasses.is_dataclass(value):
            yield from find_changeable(value, name + ".")


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def differences(old: dict[str, Any], new: dict[str, Any], run: Run) -> list[str]:
    """The options in which two records differ, in words; those that may change do not count.

    run: the run that `new` records.
    """
    old = flatten(old)
    new = flatten(new)
    compared = (old.keys() | new.keys()) - set(find_changeable(run))
    return [
        f"{key} was {old.get(key)} and is {new.get(key)}"
        for key in sorted(compared)
        if old.get(key) != new.get(key)
    ]


def option(key: str) -> str:
    """The option of train.py for a setting of a flat record, without its dashes."""
    return key.replace("_", "-")


def command(name: str, preset: Preset, run: Run) -> str:
    """The command that trains this run by plain settings."""
    usual, own = (flatten(to_record("", each)) for each in (preset.run, run))
    words = ["python", "train.py", name]
    for key, value in own.items():
        if value == usual.get(key):
            continue
        if isinstance(value, bool):
            above, _, field = option(key).rpartition(".")
            words.append(f"--{above}.{field if value else f'no-{field}'}")
            continue
        values = value if isinstance(value, list) else [value]
        words += [f"--{option(key)}", *map(str, values)]
    return shlex.join(words)


def split_version(record: dict[str, Any]) -> str:
    """The version of the code that split the data of a run: "2" of the fingerprint 2-8d969eef6eca.

    "" for a fingerprint without one, which an earlier version wrote.
    """
    version, dash, _ = record.get("data_fingerprint", "").partition("-")
    return version if dash else ""


def check_same(old: dict[str, Any], new: dict[str, Any], run: Run) -> None:
    """Raise ValueError with the differences, if a run is not the one that its folder holds."""
    if "data_fingerprint" in old and split_version(old) != split_version(new):
        raise ValueError(
            f"{run.out} cannot be resumed: the data of this run were split by an earlier version, "
            "where training had parts of the held-out data. Train it again with another --out. "
            "The run can still be opened, sampled and exported"
        )
    # An earlier version did not record the model's newer fields, whose defaults are what it did.
    model = flatten({"model": to_record("", type(run)())["model"]})
    old = model | flatten(old)
    different = differences(old, new, run)
    if same_data(old, new):  # found in another place
        different = [text for text in different if not text.startswith("data.path was ")]
    if not different:
        return
    advice = "Give the options it was started with, or another --out without --resume"
    if len(different) == 1 and different[0].startswith("train.steps was "):
        advice = (
            "The number of steps decides the learning rates from the start. To train further, "
            f"start a new run from this one: --init-from {run.out} --out ANOTHER"
        )
    raise ValueError(f"{run.out} is another run: {'; '.join(different[:5])}. {advice}")


def same_data(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether two records are of data of the same content."""
    return "data_fingerprint" in old and old["data_fingerprint"] == new.get("data_fingerprint")


def find_data(run: Run, folder: Path) -> Run:
    """The run, with the path of its data as it is from here.

    A path such as my.txt was meant from the folder in which training was started. From elsewhere,
    it is looked for beside the run's folder and in the four folders above. `folder`: of the run.
    """
    path = getattr(run.data, "path", "")
    is_name = not {".", "/", os.sep} & {*path}  # docs and the like
    if is_name or "**" in path or Path(path).is_absolute() or glob.glob(path):
        return run
    for above in folder.resolve().parents[:5]:
        if glob.glob(str(above / path)):
            data = dataclasses.replace(run.data, path=str(above / path))
            return dataclasses.replace(run, data=data)
    return run


def is_preset(preset: Preset, run: Run) -> bool:
    """Whether a run has the settings of its preset; any seed does."""
    train = dataclasses.replace(run.train, seed=preset.run.train.seed)
    run = dataclasses.replace(run, train=train)
    return not differences(to_record("", preset.run), to_record("", run), run)


def verdict(preset: Preset, run: Run, baseline: dict, scores: dict) -> str:
    """One line: the score before training, after it, and the usual one.

    baseline, scores: the evaluations before and after training.
    """
    name = summary_score(scores)
    usual = "no usual value: the settings are not those of a preset"
    if preset.usual and is_preset(preset, run):
        usual = f"usual for this preset: {preset.usual}"
    start = f"{baseline[name]:.3f}" if name in baseline else "unknown"
    before = "before" if run.init_from else "untrained"
    line = f"{name}: {start} {before}, {scores[name]:.3f} reached; {usual}"
    if scores["val_loss"] > baseline.get("val_loss", math.inf):
        line += (
            f"\nthe validation loss is worse than {before}, {baseline['val_loss']:.4g}: "
            "training diverged; try a lower --optim.lr"
        )
    return line


def read_verdict(folder: Path) -> str:
    """The verdict on a run by the files in its folder; "" if it was not evaluated yet.

    Raises ValueError if config.json is none of a run.
    """
    name, run = read_settings(folder / "config.json")
    evaluations = [row for row in read_metrics(folder / METRICS) if "val_loss" in row]
    if not evaluations:
        return ""
    try:
        preset = registry.get_preset(name, run.task, run.adapt, run.init_from)
    except ValueError:  # of another version, or from outside
        preset = Preset("", run)
    untrained = next((row for row in evaluations if not row["step"]), {})
    return verdict(preset, run, untrained, evaluations[-1])


# ---- opening a trained run ----------------------------------------------------------------------


MOST_BLOCKS = 10_000  # built one by one, which takes time even without memory


def check_depth(config: Any, where: str = "--model") -> None:
    """Raise ValueError for a model with far more blocks than any has. config: of the model."""
    for name, value in vars(config).items():
        flag = f"{where}.{name.replace('_', '-')}"
        if dataclasses.is_dataclass(value):
            check_depth(value, flag)
        elif name.endswith(("_layer", "n_block")) and value > MOST_BLOCKS:
            raise ValueError(f"{flag} is {value}; use at most {MOST_BLOCKS}")


def build_start(run: Run, base: OpenRun | None = None) -> nn.Module:
    """The model as training starts: new or with its base's weights, and with its adapter."""
    check_depth(run.model)
    model = run.build_model()
    if base:
        files.load_model(run.trunk(model, base.run), base.model.state_dict())
    if run.init_from:
        adapt.apply(model, run.adapt, run.adapter)
    return model


def open_base(path: str) -> OpenRun:
    """A run to start from; its adapter, if it has one, is merged into its weights."""
    base = open_run(path)
    adapt.merge(base.model)
    return base


def open_same_base(run: Run) -> OpenRun:
    """The run that a run started from. Raises ValueError if it is gone, or its weights changed."""
    base = open_base(run.init_from)
    found = adapt.base_hash(base.model)
    if found != run.base_hash:
        raise ValueError(f"its weights now have the hash {found[:16]}, not {run.base_hash[:16]}")
    return base


def open_adapted_base(run: Run, folder: Path) -> OpenRun | None:
    """The base of a checkpoint that holds only an adapter; None for one that holds all weights."""
    if run.adapt == "full":
        return None
    try:
        return open_same_base(run)
    except ValueError as error:
        advice = f"restore that run, or open the right one with sample.py --adapter {folder}"
        raise ValueError(f"{folder} adapts {run.init_from}: {error}; {advice}") from error


def open_run(path: str, raw: bool = False) -> OpenRun:
    """Load the newest checkpoint of a run directory, or a checkpoint folder, on the CPU.

    With the averaged weights if there are any, unless raw. Raises ValueError if it is incomplete.
    """
    for _ in range(checkpoint.TRIES):
        folder = checkpoint.find(path)
        try:
            return open_checkpoint(folder, raw)
        except (ValueError, OSError):
            if folder.exists():
                raise  # otherwise the run has replaced this checkpoint meanwhile
    raise ValueError(f"{path} changes too fast to be read: try again later")


def check_sizes(run: Run, tensors: dict[str, Tensor], base: OpenRun | None, folder: Path) -> None:
    """Raise ValueError unless the config fits the weights, before memory for a model is taken."""
    weights = base.model.state_dict() if base else {}
    try:
        if base:
            model = files.build_shapes(run.build_model, len(weights) + len(tensors))
            files.check_fits(run.trunk(model, base.run), weights)
        model = files.build_shapes(lambda: build_start(run), len(weights) + len(tensors))
        files.check_fits(model, tensors)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def open_checkpoint(folder: Path, raw: bool = False) -> OpenRun:
    """`open_run` of one checkpoint, which is verified already."""
    run = read_run(folder / "config.json")
    # The checkpoint itself holds its parts and its tokenizer.
    changes = dict.fromkeys(run.PARTS, str(folder))
    if run.init_from and hasattr(run.data, "tokenizer"):
        changes["data"] = dataclasses.replace(run.data, tokenizer=str(folder))
    run = find_data(dataclasses.replace(run, **changes), folder)
    averaged = (folder / "ema.safetensors").exists() and not raw
    weights = "ema" if averaged else "model"
    tensors = files.load_tensors(folder, weights)
    base = open_adapted_base(run, folder)
    check_sizes(run, tensors, base, folder)
    model = build_start(run, base)
    files.load_model(model, tensors)
    meta = checkpoint.read_meta(folder)
    return OpenRun(run, model.eval(), run.read_tokenizer(folder), folder, meta, weights)


def is_data_of(opened: OpenRun, data: Any) -> bool:
    """Whether these data, prepared today, are those that the run was trained on."""
    found = files.read_json(opened.folder / "config.json").get("data_fingerprint")
    return found == data.fingerprint[:16]


def add_adapters(opened: OpenRun, paths: Sequence[str]) -> None:
    """Add the adapters of other runs to an open run; several LoRAs add up.

    Raises ValueError for a run that is no adapter, or that was trained from another base.
    """
    for i, path in enumerate(paths):
        folder = checkpoint.find(path)
        run = read_run(folder / "config.json")
        if run.adapt == "full" or run.base_family != opened.run.family or run.has_heads:
            raise ValueError(f"{path} is no adapter for a run of family {opened.run.family}")
        tensors = files.load_tensors(folder)
        name = f"adapter{i}"
        try:
            adapt.load_adapter(opened.model, tensors, run.adapt, run.adapter, name, run.base_hash)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


# ---- fewer bits ----------------------------------------------------------------------------------

CALIBRATION_ROWS = 64  # rows of the training data for which int4-gptq rounds


def calibration(opened: OpenRun, model: nn.Module, data: Any) -> Callable[[], None]:
    """A function that runs a model of this run on the first rows of its training data."""
    run = opened.run
    run.use_others(model, data, lambda: open_same_base(run), open_run)
    run.get_ready(model, data)
    n = min(CALIBRATION_ROWS, run.train.batch_size)
    device = next(model.parameters()).device

    def calibrate() -> None:
        for step in range(CALIBRATION_ROWS // n):
            batch = data.batch(step, slice(0, n))
            generators = row_generators(run.train.seed, step, range(n))
            model.loss({k: v.to(device) for k, v in batch.items()}, generators)

    return calibrate


def quantize_run(opened: OpenRun, model: nn.Module, how: Quantize, data: Any = None) -> None:
    """Quantise the model of a run, in place, as --quantize says; "none" changes nothing.

    Its adapters are merged first, but for a soft prompt, which stays as it is. data: those of the
    run, if they are open already. Raises ValueError as quantize.quantize does, and for int4-gptq if
    the data cannot be opened.
    """
    if how == "none":
        return
    with contextlib.suppress(ValueError):  # a soft prompt cannot be merged
        adapt.merge(model)
    calibrate = None
    if how == "int4-gptq":
        try:
            calibrate = calibration(opened, model, data or opened.run.open_data())
        except ValueError as error:
            advice = "int4-gptq reads the training data of the run; int4 does without"
            raise ValueError(f"{error}. {advice}") from error
    eight = quantize.quantize(model, how.removesuffix("-gptq"), calibrate)
    if eight:
        print(
            f"{counted(len(eight), 'layers')} in 8 bits, such as {eight[0]}: int4 has groups of "
            f"{quantize.GROUP} inputs, which do not divide the width",
            file=sys.stderr,
        )
