"""The one description of a network from which memory, time and cost are computed.

A network comes from one of two sources, and each has a class:

- systems.System is a published model, counted from closed forms (ledgers.py);
- MeasuredModule, below, is a module of this repository, measured by running it (trace.py).

The calculators read only the fields and methods of Network, so they treat both alike. The single
exception is memory.activation_bytes: a measured module knows its activations as bytes, a
published one as a ledger.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tinyfm.calc.ledgers import Stack


class Network:
    """The interface. A row of the data is `row` units: tokens of a text, or 1 image."""

    name: str
    parameters: int  # a tied table counts once
    non_embedding: int  # without the tables of tokens and positions and an untied head
    matrices: int  # parameters that Muon updates
    largest_block: int  # parameters that FSDP2 gathers at a time; all, if no block repeats
    frozen: dict[str, int]  # parameters that are not trained, by part; other parts are missing
    average: int  # bytes of a moving average of the weights; 0 = none is kept
    stacks: tuple[Stack, ...]  # its blocks
    shape: dict  # sizes such as "heads", "layers" and "window", where they are known
    unit: str  # of the data: "token", "image", "pair", ...
    row: int  # units in a row
    logits: int  # numbers that the head puts out for a row
    published: str  # number of parameters according to its authors, as text
    trained: int  # units it is trained on; 0 = not known
    note: str  # what is right, where sources disagree

    @property
    def active(self) -> int:
        """Parameters that a token passes."""
        return self.parameters

    @property
    def learnt(self) -> int:
        """Parameters that are trained."""
        return self.parameters - sum(self.frozen.values())

    def parameters_by_part(self) -> dict[str, int]:
        raise NotImplementedError

    def flops_by_part(self) -> dict[str, tuple[float, float]]:
        """(forward, backward) FLOPs of a row, 2 a multiply-add, for each part that has any."""
        raise NotImplementedError

    def flops_per_row(self) -> int:
        """FLOPs of a row, forward and backward."""
        raise NotImplementedError


@dataclass(frozen=True)
class MeasuredModule(Network):
    """A module of this repository, as estimate.measured finds it."""

    name: str
    parts: dict[str, int]  # parameters of its top-level submodules
    frozen: dict[str, int]
    parameters: int
    non_embedding: int
    matrices: int
    largest_block: int
    flops: dict[str, tuple[float, float]]  # of a row, by submodule: forward, backward
    average: int
    # Bytes of a step beyond weights, gradients and all averages: fixed_bytes, and row_bytes for
    # each row of a micro-batch, its logits included. The update itself takes update_bytes, so
    # the peak is never below that.
    fixed_bytes: int
    row_bytes: int
    update_bytes: int
    unit: str = "row"
    row: int = 1
    shape: dict = field(default_factory=dict)
    stacks: tuple[Stack, ...] = ()  # only the cache of generation is filled in
    logits: int = 0  # counted in row_bytes
    published: str = ""
    trained: int = 0
    note: str = ""

    def parameters_by_part(self) -> dict[str, int]:
        return self.parts

    def flops_by_part(self) -> dict[str, tuple[float, float]]:
        return self.flops

    def flops_per_row(self) -> int:
        return round(sum(forward + backward for forward, backward in self.flops.values()))
