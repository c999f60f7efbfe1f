"""Print an estimate: as text, as JSON, as a line of a table, or as a picture.

Nothing is computed here beyond the conversion of units.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from data.report import counted
from tinyfm.calc.memory import Fit, Layout, MemoryUse, Training
from tinyfm.calc.network import Network
from tinyfm.common import gpus
from tinyfm.common.gpus import GPU, Assumptions, Bill


@dataclass(frozen=True)
class Estimate:
    """Everything computed about one network under one set of options."""

    network: Network
    training: Training
    layout: Layout
    memory: MemoryUse  # of training, on the fullest GPU
    serving: MemoryUse  # of one row of full length
    # Bytes of a row that a block keeps, with fused and with unfused attention; None without blocks.
    block_bytes: tuple[float, float] | None
    units: float  # to train on; 0 = neither given nor published
    flops: float  # of that training
    assumed: Assumptions
    gpu: GPU | None = None
    bill: Bill | None = None


# ---- numbers and units --------------------------------------------------------------------------


def short(n: float) -> str:
    """12345678 -> "12.35 M", so that a unit can follow."""
    for scale, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= scale:
            return f"{n / scale:.4g} {letter}"
    return f"{n:.4g} "


def decimal(n: float) -> str:
    """1234.5 -> 1,234; 0.012345 -> 0.0123"""
    return f"{n:,.0f}" if n >= 100 else f"{n:.3g}"


def rows_text(n: int, network: Network) -> str:
    """3 rows of 1,024 tokens, or 3 images."""
    if network.row == 1:
        return counted(n, f"{network.unit}s")
    return f"{counted(n, 'rows')} of {counted(network.row, network.unit + 's')}"


# ---- JSON ---------------------------------------------------------------------------------------


def to_json(estimate: Estimate) -> dict[str, float | str | None]:
    """Plain numbers; None for those that are not known, such as the days without a GPU."""
    network = estimate.network
    bill = estimate.bill
    return {
        "name": network.name,
        "params_total": network.parameters,
        "params_non_embedding": network.non_embedding,
        "weights_bytes": int(estimate.serving.weights),
        "train_bytes_per_gpu": int(estimate.memory.total),
        "kv_cache_bytes": int(estimate.serving.cache),
        "train_flops": estimate.flops or None,
        "gpu_hours": bill.gpu_hours if bill else None,
        "days": bill.days if bill else None,
        "cost_usd": bill.cost_usd or None if bill else None,
    }


# ---- text ---------------------------------------------------------------------------------------


def to_text(estimate: Estimate) -> str:
    """All that is known, with the assumptions it rests on."""
    lines = parameter_lines(estimate.network)
    lines += training_lines(estimate)
    lines += serving_lines(estimate)
    lines += flops_lines(estimate)
    lines += bill_lines(estimate)
    return "\n".join(lines)


def memory_lines(use: MemoryUse) -> list[str]:
    """A line for each term that is not zero, and their sum."""
    lines = [f"  {name:12} {short(size):>9}B" for name, size in asdict(use).items() if size]
    lines.append(f"  {'in all':12} {short(use.total):>9}B = {use.total / 2**30:.4g} GiB")
    return lines


def parameter_lines(network: Network) -> list[str]:
    n = network.parameters
    published = f" (published: {network.published})" if network.published else ""
    lines = [f"{network.name}: {n:,} parameters{published}"]
    if network.note:
        lines.append(f"  note: {network.note}")
    for part, size in network.parameters_by_part().items():
        line = f"  {part:16} {size:>19,}"
        if part in network.frozen:
            line += f"  frozen: {network.frozen[part]:,}"
        lines.append(line)
    lines.append(f"  {'not embeddings':16} {network.non_embedding:>19,}")
    if network.active != n:
        lines.append(f"  {'active a token':16} {network.active:>19,}")
    if network.learnt != n:
        lines.append(f"  {'trained':16} {network.learnt:>19,}")
    with_optimizer = short(2 * n + 12 * network.learnt)
    lines.append(
        f"checkpoint: {short(4 * n)}B in fp32, {short(2 * n)}B in bf16 or fp16, "
        f"{with_optimizer}B with master weights and AdamW's averages"
    )
    return lines


def training_lines(estimate: Estimate) -> list[str]:
    """The memory of training."""
    network = estimate.network
    training = estimate.training
    layout = estimate.layout
    gpu = estimate.gpu
    how = f"{training.dtype}, {training.optimizer}, checkpointing: {training.checkpoint}"
    if layout.data > 1:
        stage = ("DDP", "ZeRO-1", "ZeRO-2", "FSDP2")[layout.zero]
        how += f", {stage} over {layout.data}"
    if layout.tensor > 1:
        how += f", tensor {layout.tensor}"
    if layout.pipeline > 1:
        how += f", pipeline {layout.pipeline}"
    where = f"each of {layout.gpus:,} GPUs" if layout.gpus > 1 else "one GPU"
    rows = rows_text(training.rows, network)
    lines = [f"to train, on {where}, micro-batches of {rows} ({how}):"]
    lines += memory_lines(estimate.memory)
    if estimate.block_bytes:
        fused, unfused = estimate.block_bytes
        lines.append(
            f"  not checkpointed, a block keeps {short(fused)}B of a row, {short(unfused)}B if "
            "attention is unfused"
        )
    if gpu and estimate.memory.total > 1e9 * gpu.memory:
        lines.append(f"  more than {gpu.name} has; --fit {gpu.memory:g}GB says what it can hold")
    return lines


def serving_lines(estimate: Estimate) -> list[str]:
    rows = rows_text(1, estimate.network)
    n = estimate.network.parameters
    lines = [f"to serve {rows} ({estimate.assumed.dtype}):", *memory_lines(estimate.serving)]
    if estimate.network.unit == "token":  # other networks have convolutions: quantize.py
        lines.append(
            f"  weights in int8: {short(n)}B; in int4: {short(4.5 / 8 * n)}B, and more for the "
            "table and the head, which keep 8 bits"
        )
    return lines


def flops_lines(estimate: Estimate) -> list[str]:
    """FLOPs of a unit of the data, of each part of the network, and of the whole training."""
    network = estimate.network
    unit = network.unit
    article = "an" if unit[0] in "aeiou" else "a"
    each = network.flops_per_row() / network.row
    first = (
        f"FLOPs, 2 a multiply-add, no discount for causality: {short(each)}FLOP {article} "
        f"{unit}, forward and backward"
    )
    has_encoder = any(stack.cross_cache for stack in network.stacks)
    if unit == "token" and not has_encoder:
        rule = gpus.rule_of_six(network.active, tokens=1)
        first += f"; the rule of 6 N gives {short(rule)}FLOP"
    lines = [first]
    for part, (forward, backward) in network.flops_by_part().items():
        lines.append(
            f"  {part:16} {short(forward / network.row):>9}FLOP forward, "
            f"{short(backward / network.row):>9}FLOP backward"
        )
    if estimate.units:
        lines.append(f"training on {estimate.units:.4g} {unit}s: {estimate.flops:.4g} FLOP")
    else:
        lines.append(f"to see the FLOPs of the whole training, add --tokens, the number of {unit}s")
    return lines


def bill_lines(estimate: Estimate) -> list[str]:
    """Days, energy and cost, if a GPU is given."""
    gpu = estimate.gpu
    bill = estimate.bill
    assumed = estimate.assumed
    if gpu is None:
        return ["to see days, energy and cost, add --gpu, the GPU to train on"]
    if bill is None:
        return []
    lines = [
        f"on {assumed.gpus:,} x {gpu.name}, at MFU {assumed.mfu:g} of {gpu.peaks[assumed.dtype]:g} "
        f"dense {assumed.dtype} TFLOP/s and availability {assumed.availability:g}: "
        f"{decimal(bill.days)} days, {decimal(bill.gpu_hours)} GPU-hours"
    ]
    if gpu.bandwidth:
        links = f", links of {gpu.link:g} GB/s" if gpu.link else ""
        lines.append(f"  {gpu.memory:g} GB of memory at {gpu.bandwidth:g} GB/s{links}")
    if bill.watts:
        lines.append(f"  {short(1000 * bill.energy_kwh)}Wh {power_text(gpu, assumed)}")
    if bill.cost_usd:
        rate = bill.cost_usd / bill.gpu_hours
        source = "" if assumed.price else f" ({gpu.priced}; --price sets another)"
        lines.append(f"  {decimal(bill.cost_usd)} USD at {rate:.2f} USD a GPU-hour{source}")
    else:
        lines.append("  its price is not known: add --price, in USD a GPU-hour")
    return lines


def power_text(gpu: GPU, assumed: Assumptions) -> str:
    """The power that an energy is computed with, in words."""
    pue = f"a PUE of {assumed.pue:g}"
    if assumed.watts is not None:
        return f"at {assumed.watts:g} W a GPU and {pue}"
    if gpu.server:
        return f"at most: {gpu.server:g} W a GPU, its share of the server included, and {pue}"
    return f"at most, and without the servers: {gpu.watts:g} W a GPU and {pue}"


def fit_text(network: Network, fit: Fit, size: str) -> str:
    """Whether training fits into GPUs of `size` ("24GiB"), and how."""
    if fit.fewest_plan is None:
        return (
            f"{network.name} does not fit into {size} on any number of GPUs: the activations of "
            f"one row take {fit.row_bytes / 2**30:.4g} GiB; try a shorter --context"
        )
    if fit.plan:
        best = fit.plan
        verdict = f"{network.name} fits into {size}"
    else:
        best = fit.fewest_plan
        count = counted(fit.gpus, "GPUs")
        verdict = f"{network.name} does not fit into {size} on {count}, but does"
    rows = rows_text(best.training.rows, network)
    first = (
        f"{verdict}: {best.way}, micro-batches of up to {rows}; it takes at least "
        f"{counted(fit.fewest_gpus, 'GPUs')}"
    )
    return "\n".join([first, *memory_lines(best.memory)])


# ---- side by side -------------------------------------------------------------------------------


def table(estimates: list[Estimate]) -> str:
    """A line for each network."""
    rows = [("", "parameters", "16 bits", "to train", "cache", "FLOP", "of a", "days", "USD")]
    for estimate in estimates:
        network = estimate.network
        bill = estimate.bill
        row = (
            network.name,
            f"{network.parameters:,}",
            short(2 * network.parameters) + "B",
            short(estimate.memory.total) + "B",
            short(estimate.serving.cache / network.row) + "B",
            short(network.flops_per_row() / network.row).strip(),
            network.unit,
            decimal(bill.days) if bill else "-",
            decimal(bill.cost_usd) if bill and bill.cost_usd else "-",
        )
        rows.append(row)
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    return "\n".join(lines)


def plot(estimates: list[Estimate], path: str | Path) -> None:
    """A bar for each network: the memory of training on the fullest GPU, by term, in GiB."""
    from tinyfm.common.figures import new_figure, save_figure

    figure = new_figure(3 + 1.5 * len(estimates), 5)
    axes = figure.add_subplot(ylabel="GiB to train, on the fullest GPU")
    names = [estimate.network.name for estimate in estimates]
    bottom = [0.0] * len(estimates)
    for term in asdict(estimates[0].memory):
        sizes = [getattr(estimate.memory, term) / 2**30 for estimate in estimates]
        if any(sizes):
            axes.bar(names, sizes, bottom=bottom, label=term, width=0.6)
            bottom = [low + size for low, size in zip(bottom, sizes)]
    for i, total in enumerate(bottom):
        axes.annotate(f"{decimal(total)} GiB", (i, total), ha="center", va="bottom")
    axes.margins(y=0.1)
    axes.legend()
    save_figure(figure, path)
