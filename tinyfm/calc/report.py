"""What the calculators found about one model: as text, JSON, a line of a table, or a picture."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, replace

from tinyfm.calc import memory
from tinyfm.calc.memory import Layout, Memory, Network, Training
from tinyfm.common.gpus import GPU, Assumptions, Bill


@dataclass(frozen=True)
class Report:
    """Everything about one model under one set of options."""

    network: Network
    training: Training
    layout: Layout
    memory: Memory  # of training, on the fullest GPU
    serving: Memory  # of one row at full length
    units: float  # to train on; 0 = not said, and not published
    flops: float  # of that training
    assumed: Assumptions
    gpu: GPU | None = None
    bill: Bill | None = None


def short(n: float) -> str:
    """12345678 -> 12.35 M, for a unit to follow."""
    for scale, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= scale:
            return f"{n / scale:.4g} {letter}"
    return f"{n:.4g} "


def figure(n: float) -> str:
    """1234.5 -> 1,234; 0.012345 -> 0.0123"""
    return f"{n:,.0f}" if n >= 100 else f"{n:.3g}"


def plural(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def rows_text(n: int, network: Network) -> str:
    """3 rows of 1,024 tokens, or 3 images."""
    rows = f"{plural(n, 'row')} of {plural(network.row, network.unit)}"
    return rows if network.row > 1 else plural(n, network.unit)


# ---- JSON ---------------------------------------------------------------------------------------


def to_json(report: Report) -> dict[str, float | str | None]:
    """Plain numbers; None for what was not asked or is not known."""
    network, bill = report.network, report.bill
    return {
        "name": network.name,
        "params_total": network.parameters,
        "params_non_embedding": network.non_embedding,
        "weights_bytes": int(report.serving.weights),
        "train_bytes_per_gpu": int(report.memory.total),
        "kv_cache_bytes": int(report.serving.cache),
        "train_flops": report.flops or None,
        "gpu_hours": bill.gpu_hours if bill else None,
        "days": bill.days if bill else None,
        "cost_usd": bill.cost_usd or None if bill else None,
    }


# ---- text ---------------------------------------------------------------------------------------


def memory_text(amount: Memory) -> str:
    """One line a term that is not zero, and their sum."""
    lines = [f"  {name:12} {short(size):>9}B" for name, size in asdict(amount).items() if size]
    total = f"  {'in all':12} {short(amount.total):>9}B = {amount.total / 2**30:.4g} GiB"
    return "\n".join([*lines, total])


def parameter_lines(network: Network) -> list[str]:
    n = network.parameters
    published = f" (published: {network.published})" if network.published else ""
    lines = [f"{network.name}: {n:,} parameters{published}"]
    lines += [f"  note: {network.note}"] if network.note else []
    for part, size in network.by_part("parameters").items():
        frozen = network.frozen.get(part)
        lines.append(f"  {part:16} {size:>19,}{f'  frozen: {frozen:,}' if frozen else ''}")
    lines.append(f"  {'not embeddings':16} {network.non_embedding:>19,}")
    for what, size in (("active a token", network.active), ("trained", network.learnt)):
        lines += [f"  {what:16} {size:>19,}"] if size != n else []
    sizes = f"{short(4 * n)}B in fp32, {short(2 * n)}B in bf16 or fp16"
    whole = short(2 * n + 12 * network.learnt)
    lines.append(f"checkpoint: {sizes}, {whole}B with master weights and AdamW's averages")
    return lines


def training_line(report: Report) -> str:
    training, layout, network = report.training, report.layout, report.network
    how = f"{training.dtype}, {training.optimizer}, checkpointing: {training.checkpoint}"
    if layout.gpus > 1:
        stage = ("DDP", "ZeRO-1", "ZeRO-2", "FSDP2")[layout.zero]
        how += f", {stage} over {layout.data}" if layout.data > 1 else ""
        how += f", tensor {layout.tensor}" if layout.tensor > 1 else ""
        how += f", pipeline {layout.pipeline}" if layout.pipeline > 1 else ""
    where = f"each of {layout.gpus:,} GPUs" if layout.gpus > 1 else "one GPU"
    return f"to train, on {where}, micro-batches of {rows_text(training.rows, network)} ({how}):"


def block_lines(report: Report) -> list[str]:
    """What a block keeps of a row, with attention fused and not; nothing where none repeats."""
    blocks = [stack for stack in report.network.stacks if stack.boundary]
    ways = [replace(report.training, checkpoint="none", fused=fused) for fused in (True, False)]
    sizes = [[memory.kept_by_block(block, way, report.layout) for block in blocks] for way in ways]
    fused, stored = (short(max(size, default=0)) for size in sizes)
    text = f"  not checkpointed, a block keeps {fused}B of a row, {stored}B if attention is unfused"
    return [text] if blocks else []


def flops_lines(report: Report) -> list[str]:
    network, unit = report.network, report.network.unit
    each = network.flops_per_row() / network.row
    article = "an" if unit[0] in "aeiou" else "a"
    lines = [f"FLOPs, 2 a multiply-add, no discount for causality: {short(each)}FLOP {article} "
             f"{unit}, forward and backward"]  # fmt: skip
    if unit == "token" and not any(stack.cross_cache for stack in network.stacks):
        lines[0] += f"; the rule of 6 N gives {short(6 * network.active)}FLOP"
    for part, (forward, backward) in network.flops_by_part().items():
        forward, backward = (f"{short(n / network.row):>9}FLOP" for n in (forward, backward))
        lines.append(f"  {part:16} {forward} forward, {backward} backward")
    if not report.units:
        return [*lines, f"--tokens says how many {unit}s to train on: then, what it takes in all"]
    return [*lines, f"training on {report.units:.4g} {unit}s: {report.flops:.4g} FLOP"]


def bill_lines(bill: Bill, gpu: GPU, assumed: Assumptions) -> list[str]:
    lines = [
        f"on {assumed.gpus:,} x {gpu.name}, at MFU {assumed.mfu:g} of {gpu.peaks[assumed.dtype]:g} "
        f"dense {assumed.dtype} TFLOP/s and availability {assumed.availability:g}: "
        f"{figure(bill.days)} days, {figure(bill.gpu_hours)} GPU-hours"
    ]
    if gpu.bandwidth:
        links = f", links of {gpu.link:g} GB/s" if gpu.link else ""
        lines.append(f"  {gpu.memory:g} GB of memory at {gpu.bandwidth:g} GB/s{links}")
    if gpu.watts:
        use = f"{gpu.watts:g} W a GPU and a PUE of {assumed.pue:g}"
        lines.append(f"  {short(1000 * bill.energy_kwh)}Wh at {use}")
    if not bill.cost_usd:
        return [*lines, "  no price is known for it: --price says it, in USD a GPU-hour"]
    rate = bill.cost_usd / bill.gpu_hours
    when = "" if assumed.price else f" ({gpu.priced}; --price says otherwise)"
    return [*lines, f"  {figure(bill.cost_usd)} USD at {rate:.2f} USD a GPU-hour{when}"]


def to_text(report: Report) -> str:
    network, gpu = report.network, report.gpu
    lines = [*parameter_lines(network), training_line(report)]
    lines += [memory_text(report.memory), *block_lines(report)]
    if gpu and report.memory.total > 1e9 * gpu.memory:
        lines.append(f"  more than {gpu.name} has; --fit {gpu.memory:g}GB says what it can hold")
    lines += [f"to serve {rows_text(1, network)} ({report.assumed.dtype}):"]
    lines += [memory_text(report.serving), *flops_lines(report)]
    if gpu and report.bill:
        lines += bill_lines(report.bill, gpu, report.assumed)
    elif not gpu:
        lines.append("--gpu says what to train on: then, days, energy and cost")
    return "\n".join(lines)


def fit_text(report: Report, size: str) -> str:
    """Whether training fits into GPUs of `size` ("24GiB"), and how it would."""
    network, training, n = report.network, report.training, report.layout.gpus
    budget = memory.read_bytes(size)
    fewest = memory.fewest_gpus(network, budget, training)
    if not fewest:
        can = any(stack.boundary for stack in network.stacks)
        row = replace(training, rows=1, checkpoint="full" if can else "none")
        filled = memory.training_memory(network, row)
        need = (filled.activations + filled.logits) / 2**30
        return (
            f"{network.name} does not fit into {size} on any number of GPUs: the activations of "
            f"one row take {need:.4g} GiB; try a shorter --context"
        )
    best = memory.fit(network, budget, training, n)
    fits = f"{network.name} fits into {size}" if best else (
        f"{network.name} does not fit into {size} on {plural(n, 'GPU')}, but does"
    )  # fmt: skip
    best = best or memory.fit(network, budget, training, fewest)
    assert best
    return (
        f"{fits}: {best.way}, micro-batches of up to {rows_text(best.training.rows, network)}; it "
        f"takes at least {plural(fewest, 'GPU')}\n{memory_text(best.memory)}"
    )


# ---- side by side -------------------------------------------------------------------------------


def table(reports: list[Report]) -> str:
    """One line a model."""
    rows = [("", "parameters", "16 bits", "to train", "cache", "FLOP", "of a", "days", "USD")]
    for report in reports:
        network, bill = report.network, report.bill
        rows.append((
            network.name, f"{network.parameters:,}", short(2 * network.parameters) + "B",
            short(report.memory.total) + "B", short(report.serving.cache / network.row) + "B",
            short(network.flops_per_row() / network.row).strip(), network.unit,
            figure(bill.days) if bill else "-",
            figure(bill.cost_usd) if bill and bill.cost_usd else "-",
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths)) for row in rows)


def plot(reports: list[Report], path: str) -> None:
    """A bar for each model: the memory of training on the fullest GPU, by term, in GiB."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # without a window system
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 + 1.5 * len(reports), 5), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot(ylabel="GiB to train, on the fullest GPU")
    names, bottom = [report.network.name for report in reports], [0.0] * len(reports)
    for term in asdict(reports[0].memory):
        sizes = [getattr(report.memory, term) / 2**30 for report in reports]
        if any(sizes):
            axes.bar(names, sizes, bottom=bottom, label=term, width=0.6)
            bottom = [low + size for low, size in zip(bottom, sizes)]
    axes.legend()
    figure.savefig(path, dpi=110)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)
