"""Do many processes compute what one computes, and what remains when one of them dies?

One small GPT is trained five times on the same batches: by one process; by several with DDP; by
several with FSDP2; by several that forget to exchange gradients; and by several of which one dies,
after which a single process resumes from the last checkpoint.
"""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tinyfm.batches.order import shuffle
from tinyfm.common import files
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.training import checkpoint, distributed, parallel
from tinyfm.training.parallel import Parallel

VARIANTS = ("2 processes", "3 processes", "4 processes")
UNITS = {
    "ddp_difference": "nats, from one process",
    "fsdp_difference": "nats, from one process",
    "resumed_difference": "nats, from one process",
    "apart_difference": "nats, from one process",
    "ddp_spread": "largest weight difference",
    "apart_spread": "largest weight difference",
    "one_val": "nats per byte",
    "ddp_val": "nats per byte",
    "apart_val": "nats per byte",
    "ddp_held": "numbers a rank",
    "fsdp_held": "numbers a rank",
}
CONFIG = GPTConfig(256, context_length=48, n_layer=2, n_head=2, d_model=64, zero_init=False)
ROWS = 12  # of a global batch; 2, 3 and 4 processes can share them
STEPS = 120
SAVED = 50  # the checkpoint is of this step
DIES = 70  # in this step the last process dies
LR = 1e-3


# ---- one process --------------------------------------------------------------------------------


def rows_of_text() -> Tensor:
    """The documentation of Python as rows (N, 49) of bytes."""
    topics = pydoc_data.topics.topics
    text = "".join(topics[name] for name in sorted(topics)).encode()
    width = CONFIG.context_length + 1
    text = text[: len(text) // width * width]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long().view(-1, width)


def work(job: dict) -> None:
    """What each process does; rank 0 writes job["answer"]."""
    world = distributed.start()
    data = rows_of_text()
    val, train = data[:64], data[64:]
    torch.manual_seed(job["seed"])
    model = GPT(CONFIG)
    call = Parallel(model, world, fsdp=job["kind"] == "fsdp")
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    first = resume(job, model, optimizer) if job["resume"] else 0

    losses = []
    for step in range(first, STEPS):
        if job["dies"] and step == DIES and world.rank == world.size - 1:
            os._exit(1)
        samples = np.arange(step * ROWS, (step + 1) * ROWS)
        mine = shuffle(samples, len(train), job["seed"])[world.rows(ROWS)]
        batch = {"tokens": train[mine]}
        with call.exchanging(last=True):
            if job["kind"] == "apart":  # the mistake: DDP does not see this forward pass
                loss, _ = model.loss(batch)
            else:
                loss, _ = call(batch, [])
            loss.backward()
        optimizer.step()
        if step < STEPS - 1:
            optimizer.zero_grad()
        losses.append(distributed.total(loss.detach().clone()).item() / world.size)
        if job["dies"] and step + 1 == SAVED:
            save(job, model, optimizer)

    held = sum(distributed.local(t).numel() for t in tensors_of(model, optimizer))
    with torch.no_grad():
        val_loss = call.loss({"tokens": val}, [])[0].item()
    whole = parallel.copy_whole(parallel.state_dict(model), keep=True)
    weights = torch.cat([tensor.flatten() for tensor in whole.values()])
    everyone = distributed.gather(weights[None])  # (ranks, numbers)
    spread = (everyone.amax(0) - everyone.amin(0)).max().item()
    if world.first:
        answer = {"losses": losses, "held": held, "val": val_loss, "spread": spread}
        Path(job["answer"]).write_text(json.dumps(answer))
    distributed.stop()


def tensors_of(model: GPT, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Weights, their gradients, and the two moments of AdamW."""
    parameters = list(model.parameters())
    moments = [optimizer.state[p][name] for p in parameters for name in ("exp_avg", "exp_avg_sq")]
    return [*parameters, *(p.grad for p in parameters), *moments]


def save(job: dict, model: GPT, optimizer: torch.optim.Optimizer) -> None:
    whole = parallel.copy_whole(parallel.state_dict(model), keep=distributed.rank() == 0)
    state = checkpoint.collect_state(model, [optimizer], {"step": SAVED})
    checkpoint.save(job["run"], SAVED, {"model": whole}, state)


def resume(job: dict, model: GPT, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest checkpoint; returns its step."""
    folder = checkpoint.find(job["run"])
    parallel.load_model(model, files.load_tensors(folder))
    counters = {"step": 0}
    checkpoint.restore_state(folder, model, [optimizer], counters)
    return counters["step"]


# ---- many processes -----------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(job: dict, size: int) -> dict | None:
    """Start `size` processes; the answer of rank 0, or None if one of them died."""
    loopback = {"linux": "lo", "darwin": "lo0"}.get(sys.platform)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "USE_LIBUV": "0"}
    common |= {"WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    if loopback:
        common["GLOO_SOCKET_IFNAME"] = loopback
    processes = []
    for rank in range(size):
        environment = dict(os.environ)
        if size > 1:  # what torchrun would set
            environment |= common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        words = [sys.executable, __file__, json.dumps(job)]
        output = open(f"{job['answer']}.{rank}.txt", "w")  # noqa: SIM115  closed below
        processes.append((subprocess.Popen(words, env=environment, stderr=output), output))
    for process, output in processes:
        process.wait(timeout=300)
        output.close()
    if all(process.returncode == 0 for process, _ in processes):
        return json.loads(Path(job["answer"]).read_text())
    if not job["dies"]:
        raise RuntimeError(Path(f"{job['answer']}.0.txt").read_text()[-2000:])
    return None


def measure(seed: int, variant: str) -> dict:
    size = int(variant.split()[0])
    with tempfile.TemporaryDirectory() as folder:

        def run(kind: str, ranks: int, dies: bool = False, resume: bool = False) -> dict | None:
            print(f"{kind}, processes: {ranks}{', one dies' * dies}", flush=True)
            job = {"kind": kind, "seed": seed, "dies": dies, "resume": resume}
            job |= {"run": f"{folder}/run", "answer": f"{folder}/{kind}-{ranks}.json"}
            return launch(job, ranks)

        one = run("one", 1)
        ddp = run("ddp", size)
        fsdp = run("fsdp", size)
        apart = run("apart", size)
        if run("ddp", size, dies=True) is not None:
            raise RuntimeError("the process that should have died did not")
        resumed = run("resumed", 1, resume=True)

    def differences(other: dict) -> list[float]:
        """From the losses of one process, in the last steps of both."""
        count = len(other["losses"])
        pairs = zip(one["losses"][-count:], other["losses"], strict=True)
        return [abs(a - b) for a, b in pairs]

    curves = {
        "ddp": differences(ddp),
        "fsdp": differences(fsdp),
        "resumed": differences(resumed),
        "apart": differences(apart),
    }
    return {
        **{f"{name}_difference": max(curve) for name, curve in curves.items()},
        **{f"{name}_curve": curve for name, curve in curves.items()},
        "ddp_spread": ddp["spread"],
        "apart_spread": apart["spread"],
        "one_val": one["val"],
        "ddp_val": ddp["val"],
        "apart_val": apart["val"],
        "ddp_held": ddp["held"],
        "fsdp_held": fsdp["held"],
    }


LOOKS = {  # label, colour, marker, its size
    "apart": ("without exchanging gradients", "C1", ".", 4),
    "ddp": ("DDP", "C5", "o", 8),
    "fsdp": ("FSDP2", "C0", ".", 7),
    "resumed": ("one process, after a death", "C6", "x", 4),
}


def draw(figure, results) -> None:
    axes = figure.subplots()
    for number, result in enumerate(results):
        for name, (label, colour, marker, size) in LOOKS.items():
            curve = np.array(result[f"{name}_curve"])
            curve[curve == 0] = np.nan  # has no logarithm
            steps = np.arange(STEPS - len(curve), STEPS)
            axes.plot(
                steps,
                curve,
                marker,
                color=colour,
                markersize=size,
                label=label if number == 0 else None,
            )
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("difference of the loss\nfrom that of one process (nats)")
    axes.set_ylim(1e-7, 10)
    axes.legend(loc="center right")


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
