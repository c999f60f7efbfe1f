"""What a run stands on and writes about itself: devices, costs, processes, its log."""

import json
import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tinyfm.calc import estimate
from tinyfm.common import device as machine
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.recipes import registry
from tinyfm.training import distributed
from tinyfm.training import log as logbook
from tinyfm.training.optim import OptimConfig, build_optimizers

CPU = torch.device("cpu")


# ---- machine.py ---------------------------------------------------------------------------------


def test_devices(monkeypatch):
    assert machine.choose_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert machine.choose_device("auto") == CPU
    with pytest.raises(ValueError, match=r"device 'gpu' cannot be used \(.*\); try auto or cpu"):
        machine.choose_device("gpu")
    assert "thread" in machine.describe_device(CPU)


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_where_it_is_fast(monkeypatch, fast):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: fast, raising=False)
    assert machine.choose_dtype("float32", CPU) == torch.float32
    assert machine.choose_dtype("auto", CPU) == (torch.bfloat16 if fast else torch.float32)
    if fast:
        assert machine.choose_dtype("bfloat16", CPU) == torch.bfloat16
    else:
        with pytest.raises(ValueError, match="this cpu only emulates bfloat16"):
            machine.choose_dtype("bfloat16", CPU)


@pytest.mark.parametrize(("capability", "fast"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_bfloat16_on_gpus(monkeypatch, capability, fast):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert machine.bfloat16_is_fast(torch.device("cuda")) is fast


def test_peaks(monkeypatch):
    assert machine.peak_flops(CPU, torch.bfloat16) is None  # not known, so no share of it is stated
    cuda = torch.device("cuda")
    peaks = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12,
             "Tesla V100-SXM2-32GB": None, "NVIDIA GeForce GTX 1080": None}  # fmt: skip
    for name, peak in peaks.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert machine.peak_flops(cuda, torch.bfloat16) == peak
        assert machine.peak_flops(cuda, torch.float32) is None


def test_peak_memory_counts_what_was_held():
    machine.keep_freed_memory()
    block = torch.ones(2**24)
    assert machine.peak_memory_bytes(CPU) > block.nbytes


# ---- calc.py and the presets --------------------------------------------------------------------

SMALL = GPTConfig(300, context_length=32, n_layer=2, n_head=4, n_kv_head=2, d_model=32)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("half_life", [0.0, 10.0])
def test_costs_are_those_of_a_training_step(optimizer, half_life):
    model, config = GPT(SMALL), OptimConfig(optimizer=optimizer, ema_half_life=half_life)
    cost = estimate.training_cost(model, config, batch_size=3)
    optimizers = build_optimizers(model, config)
    tokens = torch.randint(300, (3, SMALL.context_length + 1))
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model.loss({"tokens": tokens})[0].backward()
    for each in optimizers:
        each.step()
    parameters = list(model.parameters())
    assert cost.parameters == sum(p.numel() for p in parameters)
    assert cost.parameter_bytes == sum(p.nbytes for p in parameters)
    assert cost.gradient_bytes == sum(p.grad.nbytes for p in parameters)
    states = [value for each in optimizers for state in each.state.values()
              for name, value in state.items() if name != "step"]  # fmt: skip
    assert cost.optimizer_bytes == sum(value.nbytes for value in states)
    assert cost.average_bytes == (cost.parameter_bytes if half_life else 0)
    assert cost.flops_per_step == counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("gpt2-124m", 124_439_808), ("gpt2-1.5b", 1_557_611_200), ("llama-1b", 1_235_814_400)],
)
def test_large_presets_have_the_published_sizes(name, parameters):
    """What a dry run says of them is in test_cli.py."""
    run = registry.get_preset(name).run
    with torch.device("meta"):
        model = run.build_model()
        cost = estimate.training_cost(model, run.optim, run.train.batch_size)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert cost.parameters == parameters
    assert run.train.batch_size % (run.train.micro_batch_size * 8) == 0  # on one GPU, and on eight


# ---- distributed.py -----------------------------------------------------------------------------


def test_ranks_share_the_rows():
    parts = [distributed.World(rank, 4).rows(12) for rank in range(4)]
    assert [row for part in parts for row in part] == list(range(12))
    assert [distributed.World(rank, 4).first for rank in range(4)] == [True, False, False, False]


def test_alone_nothing_communicates(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.distributed, "init_process_group", None)
    world = distributed.start()
    with distributed.first_rank_first(world):
        assert distributed.total(torch.ones(2)).tolist() == [1, 1]
    distributed.stop()
    assert world == distributed.World() and world.first and world.rows(5) == range(5)


def test_more_processes_than_gpus(monkeypatch):
    for name, value in (("RANK", "2"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="--nproc_per_node=2 or less"):
        distributed.start()


# ---- logbook.py ---------------------------------------------------------------------------------


def book(run, start=0, first=True, **options) -> logbook.Logbook:
    return logbook.Logbook(run, 30, start, first, **options)


def test_rows_lines_and_curve(tmp_path, capsys):
    log = book(tmp_path)
    log.add({"step": 0, "val_loss": 5.5})
    log.add({"step": 10, "loss": 3.25, "lr": 0.5})
    log.say("--- step 10 writes: naïve")
    log.draw()
    log.close()
    assert capsys.readouterr().out.splitlines() == [
        "step 0/30  val_loss 5.5", "step 10/30  loss 3.25  lr 0.5", "--- step 10 writes: naïve",
    ]  # fmt: skip
    kept = logbook.read_metrics(tmp_path / "metrics.jsonl")
    assert [{k: v for k, v in row.items() if k != "time"} for row in kept] == [
        {"step": 0, "val_loss": 5.5}, {"step": 10, "loss": 3.25, "lr": 0.5},
    ]  # fmt: skip
    assert kept[0]["time"] > 1.7e9
    import matplotlib.image

    image = matplotlib.image.imread(tmp_path / "loss.png")
    assert image.ndim == 3 and 0.5 < image.mean() < 1 and image.min() < 0.5  # ink on white


def test_going_on_drops_what_came_after_and_a_line_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (10, 20, 30)]
    path.write_text("".join(lines) + lines[0][:9], encoding="utf-8")
    log = book(tmp_path, start=20)
    log.add({"step": 25, "loss": 0.5})
    log.close()
    assert [row["step"] for row in logbook.read_metrics(path)] == [10, 20, 25]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_other_ranks_are_silent(tmp_path, capsys):
    log = book(tmp_path / "run", first=False)
    log.add({"step": 1, "loss": math.pi})
    log.say("hello")
    log.draw()
    log.close()
    out = capsys.readouterr()
    assert not (tmp_path / "run").exists() and not out.out and not out.err


def test_a_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    log = book(tmp_path)
    log.add({"step": 10, "loss": 3.25})
    log.bar.update(10)
    log.say("a line")
    log.close()
    out = capsys.readouterr()
    assert out.out == "a line\n" and "10/30" in out.err and "loss=3.25" in out.err


def test_tensorboard_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        logbook.summary_writer()
