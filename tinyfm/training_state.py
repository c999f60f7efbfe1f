"""What a run needs beside its weights to go on bit for bit: optimizers and counters.

Kept by torch.distributed.checkpoint (DCP): every rank writes its part, and any number of ranks can
read it back. DCP's index is a pickle, and a pickle can run code when it is read: this is for going
on with runs of your own. What is shared of a run needs none of it.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from tinyfm.common.files import CheckpointError


def _dcp(
    verb: str, tree: dict[str, Any], folder: Path, group: dist.ProcessGroup | None = None
) -> None:
    """dcp.save or dcp.load; its error, which `except Exception` would miss, becomes its cause."""
    import torch.distributed.checkpoint as dcp  # here, as it is slow to import

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            getattr(dcp, verb)(tree, checkpoint_id=folder, process_group=group)
        except dcp.api.CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error


def collect(
    model: nn.Module, optimizers: Sequence[Optimizer], counters: dict[str, Any]
) -> dict[str, Any]:
    """What a run needs beside the weights to go on bit for bit; every rank calls this.

    counters: plain values and tensors by name, such as the step and random generators' states.
    """
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    states = {}
    for index, optimizer in enumerate(optimizers):
        fresh = not optimizer.state
        states[str(index)] = get_optimizer_state_dict(model, optimizer)
        if fresh:  # then DCP made a state, by a trial step: saving must not change the training
            optimizer.state.clear()
            states[str(index)]["state"] = {}
    return {"optimizers": states, "counters": counters}


def write(folder: Path, state: dict[str, Any], group: dist.ProcessGroup | None = None) -> None:
    """Write what `collect` returned; every rank of the group calls this, and writes its part."""
    _dcp("save", state, folder, group)


def restore(
    folder: str | Path,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    counters: dict[str, Any],
) -> None:
    """Fill optimizers and counters in place from state/, which must be of a run of your own.

    Call as `collect` was, on any number of ranks. DCP fills a template: `counters` has the
    names that were saved, and fresh optimizers take a trial step with lr 0 and zero gradients.
    Raises CheckpointError if the saved state is not of this model and these optimizers.
    """
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint import state_dict as dcp

    folder = Path(folder) / "state"
    states = {str(i): dcp.get_optimizer_state_dict(model, o) for i, o in enumerate(optimizers)}
    try:
        saved = FileSystemReader(folder).read_metadata().state_dict_metadata
        left = {name for name in saved if name.startswith("optimizers.") and ".state." in name}
        for index, template in states.items():
            for name, slots in list(template["state"].items()):
                names = {f"optimizers.{index}.state.{name}.{slot}" for slot in slots}
                if not names & left:  # this parameter never had a gradient, hence no state
                    del template["state"][name]
                left -= names
        if left:
            raise ValueError(f"{min(left)} is unexpected")
        _dcp("load", {"optimizers": states, "counters": counters}, folder)
        for state, optimizer in zip(states.values(), optimizers):
            options = dcp.StateDictOptions(strict=False)
            dcp.set_optimizer_state_dict(model, optimizer, state, options=options)
    except Exception as error:
        advice = "resume with the model, optimizers and counters it was saved with"
        raise CheckpointError(f"{folder} does not fit this run: {error}; {advice}") from error
