"""One program for one process or many: torchrun starts the processes, this file lets them agree.

Started by `python`, a run consists of a single rank, and nothing here communicates. Started by
`torchrun`, every process is one rank: it reads its own rows of every global batch, the gradients
are averaged over the ranks (parallel.py), and small sums over the ranks let them agree on the loss
and on when to stop.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

TIMEOUT = timedelta(minutes=5)  # how long a rank waits for the others before it gives up


@dataclass(frozen=True)
class World:
    """The processes that train together, and the place of this one among them."""

    rank: int = 0  # number of this process, 0 .. size - 1
    size: int = 1  # number of processes
    local_rank: int = 0  # number of this process on its machine; it uses the GPU of that number

    @property
    def first(self) -> bool:
        return self.rank == 0

    def rows(self, batch_size: int) -> range:
        """This rank's rows of a global batch, whose size is divisible by the number of ranks."""
        share = batch_size // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def share(self, items: Iterable, together: bool) -> Iterator[tuple[int, Any, bool]]:
        """Deal out items to the ranks in turn; yields (place, item, counts) for this rank's.

        together: every rank has to take the same number of items, because all ranks work on each.
        If the last round does not reach every rank, the ranks left out take the last item again,
        with counts = False, so that its result is not counted twice.
        """
        place = -1
        for place, item in enumerate(items):
            if place % self.size == self.rank:
                yield place, item, True
        if together and place >= 0 and place % self.size < self.rank:
            yield place, item, False


# ---- one or many ---------------------------------------------------------------------------------


def joined() -> bool:
    """Whether this process has joined others; False in a run started by plain `python`."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's rank; 0 if there is only one process."""
    return dist.get_rank() if joined() else 0


def total(values: Tensor) -> Tensor:
    """Sum over ranks, in place, the same on every rank."""
    if joined():
        dist.all_reduce(values)
    return values


def on_first_rank(work: Callable[[], Any], group: dist.ProcessGroup | None = None) -> Any:
    """Run `work` on rank 0 only. Every rank waits for it, and returns its result.

    If it failed, rank 0 raises its error, and the others a ValueError with the message.
    """
    problem: Exception | None = None
    result = None
    if rank() == 0:
        try:
            result = work()
        except Exception as error:
            problem = error
    if joined():
        message = [str(problem) or repr(problem) if problem else None, result]
        dist.broadcast_object_list(message, src=0, group=group)
        if message[0] and not problem:
            problem = ValueError(f"rank 0: {message[0]}")
        result = message[1]
    if problem:
        raise problem
    return result


def software() -> dict[str, str]:
    """The code and the libraries that the numbers of a run depend on: {name: version}."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for path in sorted([*root.glob("*.py"), *root.glob("tinyfm/**/*.py"), *root.glob("data/*.py")]):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    versions = {"code of tinyfm": digest.hexdigest()[:12], "Python": platform.python_version()}
    for name in ("torch", "numpy", "sentencepiece", "pillow"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def check_alike(facts: dict[str, Any], world: World) -> None:
    """Raise ValueError on every rank, with what differs, unless all ranks have the same facts.

    Ranks that differ train on without an error: each computes gradients of another loss.
    """
    if not joined():
        return
    everyone: list[dict[str, Any]] = [{}] * world.size
    dist.all_gather_object(everyone, facts)
    first = everyone[0]
    for number, own in enumerate(everyone):
        different = [name for name in {**first, **own} if first.get(name) != own.get(name)]
        if different:
            shown = [f"{name} is {own.get(name)}, not {first.get(name)}" for name in different[:3]]
            raise ValueError(
                f"rank {number} differs from rank 0: {'; '.join(shown)}. Start all ranks with the "
                "same options, data, code and libraries"
            )


@contextlib.contextmanager
def first_rank_first(world: World) -> Iterator[None]:
    """The first rank runs the block alone; then the others run it, and find its work done."""
    if world.size == 1:
        yield
        return
    # A group with a long timeout: encoding a large text takes longer than any training step.
    group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    if world.first:
        yield
        dist.barrier(group)
    else:
        dist.barrier(group)
        yield


# ---- start and stop ------------------------------------------------------------------------------


def meet(world: World, backend: str) -> None:
    """Join the other ranks, at the address in torchrun's environment.

    torchrun restarts all ranks if one dies. Each attempt uses another prefix in the shared store,
    so that it does not find the addresses of ranks that no longer run.
    """
    store, _, _ = next(rendezvous("env://", world.rank, world.size, timeout=TIMEOUT))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        backend,
        timeout=TIMEOUT,
        store=dist.PrefixStore(f"attempt-{attempt}", store),
        rank=world.rank,
        world_size=world.size,
    )


def no_connection(world: World, error: Exception) -> str:
    """An error message for a rank that could not reach the others, with the usual causes."""
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    reason = str(error).splitlines()[0]
    return (
        f"rank {world.rank} of {world.size}, on {socket.gethostname()}, cannot reach the others "
        f"at {where} ({reason}). Usual causes: another rank was not started or has died (see its "
        "output); --nnodes, --nproc_per_node or --rdzv-endpoint differ between machines; a "
        "firewall, or the wrong network (set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the "
        "network that connects the machines). Set NCCL_DEBUG=INFO to see more"
    )


def is_lost(error: BaseException) -> bool:
    """Whether an error of a run says that another rank no longer answers."""
    own_kind = dist.is_available() and isinstance(error, dist.DistError)
    return joined() and (own_kind or "gloo" in str(error))


def lost(world_rank: int, error: Exception) -> str:
    """An error message for a rank that the others have left, with the usual causes."""
    reason = str(error).splitlines()[0]
    return (
        f"rank {world_rank} gets no answer from another rank ({reason}). That one has died (see "
        f"its output), or it was stopped for longer than {TIMEOUT.seconds // 60} minutes. The last "
        "checkpoint is whole: continue with --resume"
    )


def start() -> World:
    """Join the processes that torchrun started; without torchrun, a World of one process.

    Raises ValueError if there are more processes than GPUs on this machine, and ConnectionError if
    the processes do not reach each other.
    """
    if "RANK" not in os.environ:
        return World()
    world = World(
        rank=int(os.environ["RANK"]),
        size=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
    )
    gpus = torch.cuda.device_count()
    if gpus:
        if world.local_rank >= gpus:
            raise ValueError(
                f"process {world.local_rank} of this machine has no GPU: there are {gpus}; "
                f"use --nproc_per_node={gpus} or less"
            )
        torch.cuda.set_device(world.local_rank)
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"  # chosen by the device of each tensor
    if not dist.is_initialized():
        try:
            meet(world, backend)
            # A first sum, so that a broken network shows here and not in the first step.
            total(torch.ones(1, device="cuda" if gpus else "cpu"))
        except RuntimeError as error:
            raise ConnectionError(no_connection(world, error)) from error
    return world


def stop() -> None:
    """Leave the other processes, if there are any."""
    if joined():
        dist.destroy_process_group()


# ---- signals -------------------------------------------------------------------------------------


# Signals that stop a run in order: from a scheduler, Ctrl-C, and a terminal that is closed.
STOPPING = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
)


class Signals:
    """Records the signals to stop, so that a run stops between two steps, and all ranks together.

    Inside the context a signal ends nothing by itself: the handler only records it. The signal may
    reach one rank only, or reach the ranks in different steps. A rank that stopped alone would
    leave the others waiting for it for ever. The ranks therefore agree, once per step:

        every step sums its loss over the ranks anyway; `total` appends one number to that sum:
        the signal this rank has received, or 0
        every rank reads the same sum; if the appended number is not 0, some rank has a signal
        `agree` sets `agreed`, at the same step on every rank, and the loop ends there

    A second signal, more than two seconds after the first, has its usual effect.
    """

    def __init__(self):
        self.received = 0  # the first signal that this process got; 0 = none
        self.received_at = 0.0  # its time, in seconds
        self.agreed = 0  # the signal that all ranks stop for; 0 = none

    def receive(self, number: int, frame) -> None:
        """The signal handler."""
        if not self.received:
            self.received = number
            self.received_at = time.monotonic()
        # Within two seconds it is the same Ctrl-C again, passed on by torchrun.
        elif time.monotonic() - self.received_at > 2:
            signal.signal(number, self.previous[number])
            signal.raise_signal(number)

    def __enter__(self) -> Signals:
        self.previous = {}
        for number in STOPPING:
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                self.previous[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def total(self, sums: Tensor) -> Tensor:
        """The sums over ranks of `sums` (n,), with one number appended (n + 1,), for `agree`."""
        return total(torch.cat((sums, sums.new_tensor([self.received]))))

    def agree(self, signalled: float) -> None:
        """Decide to stop if `signalled`, the last number of `total`, is not 0."""
        if signalled:
            self.agreed = self.received or signal.SIGTERM

    def pending(self, together: bool) -> bool:
        """Whether a signal has been received: by this rank, or, if `together`, by any rank.

        together: all ranks call this at the same point, and have to act alike.
        """
        if not together:
            return bool(self.received)
        return bool(total(torch.tensor([self.received])).item())


# ---- tensors of several ranks --------------------------------------------------------------------


class Gather(torch.autograd.Function):
    """Rows (R, ...) of each rank -> rows (R * ranks, ...) on every rank, in order of rank."""

    @staticmethod
    def forward(ctx, rows):
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        """Gradient (R * ranks, ...) of the result on this rank -> that of its rows (R, ...)."""
        # Every rank's loss may depend on the rows of every rank: first sum over the ranks, ...
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        # ... then keep the gradient of this rank's rows.
        return gradient.chunk(dist.get_world_size())[rank()]


def gather(rows: Tensor) -> Tensor:
    """The rows of all ranks. Gradients flow back to the rank that each row came from."""
    return Gather.apply(rows) if joined() else rows


def kept_whole(module: nn.Module) -> set[nn.Parameter]:
    """The parameters that sharding leaves whole on every rank: single numbers, which cannot be cut,
    and those below the names that a model has in `unsharded`."""
    names = {name for inner in module.modules() for name in getattr(inner, "unsharded", ())}
    return {
        p
        for name, p in module.named_parameters()
        if p.ndim == 0 or not names.isdisjoint(name.split("."))
    }


def is_shard(tensor: Tensor) -> bool:
    """Whether it is a DTensor: a tensor of which each rank holds some rows."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """The part that this rank holds, in the same memory; a plain tensor is returned unchanged."""
    return tensor.to_local() if is_shard(tensor) else tensor


def shard_group(shard: Tensor) -> dist.ProcessGroup:
    """The ranks that hold the parts of one copy of a DTensor: the last dimension of its mesh."""
    return shard.device_mesh.get_group(shard.device_mesh.ndim - 1)
