"""One program for one process or many: torchrun starts them, this file lets them agree.

Started by `python`, a run is a world of one rank and nothing here communicates. Started by
`torchrun`, each process has a rank; it reads its rows of every global batch, the gradients are
averaged (parallel.py), and small sums agree on the loss and on when to stop.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

TIMEOUT = timedelta(minutes=5)  # for which a rank waits for the others before it gives up


@dataclass(frozen=True)
class World:
    rank: int = 0  # of this process, 0 .. size - 1
    size: int = 1  # processes in all
    local_rank: int = 0  # on this machine: which GPU

    @property
    def first(self) -> bool:
        return self.rank == 0

    def rows(self, batch_size: int) -> range:
        """This rank's share of the global batch."""
        share = batch_size // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def share(self, items: Iterable, together: bool) -> Iterator[tuple[int, Any, bool]]:
        """(place, item, True) of this rank's items, dealt out in turn.

        together: all ranks take as many; one that lacks a last item takes another's, with False.
        """
        for place, item in enumerate(items):
            if place % self.size == self.rank:
                yield place, item, True
        if together and place % self.size < self.rank:
            yield place, item, False


def start() -> World:
    """Join the processes that torchrun started, or be the only one.

    Raises ValueError if there are more processes than GPUs on this machine, ConnectionError if they
    do not find each other.
    """
    if "RANK" not in os.environ:
        return World()
    world = World(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    gpus = torch.cuda.device_count()
    if gpus:
        if world.local_rank >= gpus:
            raise ValueError(f"a process needs a GPU: use --nproc_per_node={gpus} or less")
        torch.cuda.set_device(world.local_rank)
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"  # by where a tensor lies
    if not dist.is_initialized():
        try:
            meet(world, backend)
            total(torch.ones(1, device="cuda" if gpus else "cpu"))  # now, not in the first step
        except RuntimeError as error:
            raise ConnectionError(no_connection(world, error)) from error
    return world


def meet(world: World, backend: str) -> None:
    """Join the others, as torchrun's environment says.

    Started again after a failure, not through the addresses that dead ranks left in the store.
    """
    store, _, _ = next(rendezvous("env://", world.rank, world.size, timeout=TIMEOUT))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        backend, timeout=TIMEOUT, store=dist.PrefixStore(f"attempt-{attempt}", store),
        rank=world.rank, world_size=world.size,
    )  # fmt: skip


def no_connection(world: World, error: Exception) -> str:
    """Who could not reach the others, and what the cause usually is."""
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    reason = str(error).splitlines()[0]
    return (
        f"rank {world.rank} of {world.size}, on {socket.gethostname()}, cannot work with the "
        f"others through {where} ({reason}). Usual causes: another rank was not started or has "
        "died, see what it printed; --nnodes, --nproc_per_node or --rdzv-endpoint differ between "
        "machines; a firewall, or the wrong network: set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME "
        "to the one that joins them. NCCL_DEBUG=INFO says more"
    )


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def first_rank_first(world: World) -> Iterator[None]:
    """The first rank goes through alone, then the others, who find its work done."""
    if world.size > 1:  # of their own, as encoding a large text takes longer than any step
        group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    if not world.first:
        dist.barrier(group)
    yield
    if world.first and world.size > 1:
        dist.barrier(group)


def rank() -> int:
    """This process's rank; 0 when there is only one process."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def on_first_rank(work: Callable[[], None], group: dist.ProcessGroup | None = None) -> None:
    """Run `work` on rank 0 alone; every rank waits for it, and fails if it failed."""
    problem: Exception | None = None
    if rank() == 0:
        try:
            work()
        except Exception as error:
            problem = error
    if dist.is_available() and dist.is_initialized():
        message = [problem and repr(problem)]
        dist.broadcast_object_list(message, src=0, group=group)
        problem = problem or (message[0] and RuntimeError(f"rank 0: {message[0]}"))
    if problem:
        raise problem


def total(values: Tensor) -> Tensor:
    """Sum over ranks, on every rank."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


class Signals:
    """SIGTERM and Ctrl-C, noted while in the context, until the ranks agree to stop: at the same
    step, or one of them would wait for the other for ever."""

    def __init__(self):
        self.noted, self.agreed, self.since = 0, 0, 0.0  # had here, to stop for, time of the first

    def note(self, number: int, frame) -> None:
        if not self.noted:
            self.noted, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > 2:  # at once, it is torchrun that passes on a Ctrl-C
            signal.signal(number, self.previous[number])
            signal.raise_signal(number)

    def __enter__(self) -> Signals:
        self.previous = {n: signal.signal(n, self.note) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def total(self, sums: Tensor) -> Tensor:
        """Sums over ranks, and appended one number for `agree`."""
        return total(torch.cat((sums, sums.new_tensor([self.noted]))))

    def asked(self, together: bool) -> bool:
        """Whether a signal was noted: here, or, where ranks must act together, by any of them."""
        return bool(total(torch.tensor([self.noted])).item() if together else self.noted)

    def agree(self, asked: float) -> None:
        """Stop if `asked` is not 0: some rank has noted a signal."""
        if asked:
            self.agreed = self.noted or signal.SIGTERM


class Gather(torch.autograd.Function):
    """Rows (R, ...) of each rank -> rows (R * ranks, ...) on every rank, in order of rank."""

    @staticmethod
    def forward(ctx, rows):
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)  # each rank's loss may depend on everybody's rows
        return gradient.chunk(dist.get_world_size())[rank()]


def gather(rows: Tensor) -> Tensor:
    """All ranks' rows; the gradient of every rank's loss comes back to the rank they are from."""
    return Gather.apply(rows) if dist.is_available() and dist.is_initialized() else rows


def is_shard(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which each rank of a mesh holds some rows."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """The part that this rank holds, in the same memory: of a plain tensor, all of it."""
    return tensor.to_local() if is_shard(tensor) else tensor


def shard_group(shard: Tensor) -> dist.ProcessGroup:
    """The ranks among which it is shared out: the last dimension of its mesh."""
    return shard.device_mesh.get_group(shard.device_mesh.ndim - 1)
