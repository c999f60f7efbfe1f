"""The calculators: memory, time and cost against published figures; FLOPs and bytes as in torch."""

import json
import re
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import call, count_parameters
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tinyfm.calc import __main__ as calc
from tinyfm.calc import estimate, memory, report, systems, trace
from tinyfm.calc.memory import Layout, MemoryUse, Training
from tinyfm.calc.network import MeasuredModule
from tinyfm.common import gpus, units
from tinyfm.common.seeds import row_generators
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.recipes import registry
from tinyfm.training.optim import OptimConfig, build_optimizers
from tinyfm.training.trainer import TrainConfig
from tinyfm.unet import Upsample

GB, GiB = 1e9, 2**30
SMALL = GPTConfig(300, context_length=64, n_layer=2, n_head=4, n_kv_head=2, d_model=32)


# ---- memory.py: published figures ----------------------------------------------------------------


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_zero_stages(stage, gigabytes):
    """Rajbhandari et al. 2020, figure 1."""
    shared = memory.state_memory(7.5e9, Training(), Layout(64, zero=stage))
    assert shared.total / GB == pytest.approx(gigabytes, abs=0.05)


def blocks(name):
    return systems.get(name).stacks[1]


def test_activations_of_korthikanti_et_al():
    """Korthikanti et al. 2022: equations 1, 2 and 4 for a block of GPT-3.

    Selective recomputation saves 70% of it.
    """
    gpt3 = blocks("gpt3-175b")
    whole = Training(fused=False, dropout=True)
    T, D, N = 2048, 12288, 96
    for t in (1, 8):
        layout = Layout(8, tensor=t)
        kept = memory.kept_by_block(gpt3, whole, layout)
        assert kept == pytest.approx(T * D * (10 + 24 / t + 5 * N * T / (D * t)))
        sequence = memory.kept_by_block(gpt3, whole, replace(layout, sequence=True))
        assert sequence == pytest.approx(T * D * (34 + 5 * N * T / D) / t)
    one = Layout()
    selective = replace(whole, checkpoint="selective")
    everything = memory.kept_by_block(gpt3, whole, one)
    saved = 1 - memory.kept_by_block(gpt3, selective, one) / everything
    assert everything / GB == pytest.approx(2.869, abs=5e-4)
    assert saved == pytest.approx(0.70, abs=0.005)
    assert memory.kept_by_block(gpt3, replace(whole, fused=True), one) == 34 * T * D


def test_activations_of_mt_nlg():
    """MT-NLG 530B has 105 layers of width 20480 with 128 heads; 65% is saved."""
    row = systems.rows()["gpt3-175b"] | {"layers": "105", "d_model": "20480", "heads": "128"}
    c = systems.read_shape(row)
    block = systems.ledgers.block(c, 2048)
    whole = Training(fused=False, dropout=True)
    everything = memory.kept_by_block(block, whole, Layout())
    selective = memory.kept_by_block(block, replace(whole, checkpoint="selective"), Layout())
    assert 1 - selective / everything == pytest.approx(0.65, abs=0.005)
    assert everything / GB == pytest.approx(4.110, abs=5e-4)


def test_full_checkpointing():
    """It keeps the inputs of all blocks, and one block whole."""
    gpt3 = systems.get("gpt3-175b")
    T, D, L = 2048, 12288, gpt3.shape["layers"]
    got = memory.activation_bytes(gpt3, Training(rows=3, checkpoint="full"), Layout())
    ends = 2 * 2 * T * D  # the final norm's input, and the head's
    assert got == 3 * (2 * T * D * L + 32 * T * D + ends)


def test_weights_of_published_checkpoints():
    """BLOOM's 329 "GB" are GiB, and its 2.3 "TB" TiB."""
    bloom = systems.get("bloom-176b")
    gpt3 = systems.get("gpt3-175b")
    assert 2 * bloom.parameters / GiB == pytest.approx(328.3, abs=0.05)
    assert 14 * bloom.parameters / 2**40 == pytest.approx(2.244, abs=5e-4)
    assert memory.serving_memory(gpt3, 1, dtype="fp32").weights / GB == pytest.approx(700, rel=3e-3)
    assert memory.serving_memory(gpt3, 1, tensor=8).weights == 2 * gpt3.parameters / 8


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("opt-13b", 800 * 1024), ("llama2-7b", 524_288), ("llama2-70b", 327_680),
        ("llama3-8b", 131_072), ("gpt3-175b", 4_718_592), ("bloom-176b", 4_014_080),
        ("falcon-7b", 8192), ("palm-540b", 120_832), ("gpt2", 36_864), ("bert-base", 0),
        ("resnet-50", 0),
    ],
)  # fmt: skip
def test_cache_of_a_token(name, size):
    """800 KiB is Kwon et al. 2023's (vLLM) for OPT-13B."""
    assert memory.cache_bytes(systems.get(name), 1) == size


def test_cache_of_windows_rows_and_encoders():
    mistral = systems.get("mistral-7b")
    t5 = systems.get("t5-small")
    token = memory.cache_bytes(mistral, 1)
    assert memory.cache_bytes(mistral, 9000, rows=2) == 2 * 4096 * token
    of_encoder = 2 * 6 * 2 * 512 * 512  # bytes, layers, keys and values, tokens, width
    assert memory.cache_bytes(t5, 10) == 2 * 6 * 2 * 512 * 10 + of_encoder


def test_the_example_of_the_docstring():
    """GPT-2's largest size in GB, as memory.py works it through."""
    gpt2 = systems.get("gpt2-xl")
    training = Training(dropout=True)
    sharded = memory.training_memory(gpt2, training, Layout(8, zero=3))
    found = [memory.state_memory(gpt2.parameters, training, Layout()).total]
    for stage in (1, 2, 3):
        layout = Layout(8, zero=stage)
        found.append(memory.state_memory(gpt2.parameters, training, layout).total)
    for changes in ({"fused": False}, {}, {"checkpoint": "full"}):
        found.append(memory.activation_bytes(gpt2, replace(training, **changes), Layout()))
    found += [sharded.logits, sharded.buffers]
    expected = [24.9, 8.6, 5.8, 3.1, 9.0, 2.7, 0.2, 0.6, 0.5]
    assert [round(value / GB, 1) for value in found] == expected
    assert sharded.total < 24 * GB < found[0]


# ---- memory.py: properties ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "mixtral-8x7b", "t5-base", "clip-vit-b32", "sd1-unet"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_bytes_of_a_parameter(name, optimizer):
    system = systems.get(name)
    saved = 4 * system.matrices if optimizer == "muon" else 0  # Muon has one moment, AdamW two
    for dtype in ("bf16", "fp32"):
        training = Training(dtype=dtype, optimizer=optimizer)
        got = memory.state_memory(system.parameters, training, Layout(), system.matrices).total
        assert got == 16 * system.parameters - saved


def test_memory_is_linear_in_rows_and_falls_with_sharding():
    llama = systems.get("llama3-8b")
    totals = [memory.training_memory(llama, Training(rows=n)).total for n in (1, 2, 3)]
    assert totals[2] - totals[1] == totals[1] - totals[0] > 0
    spread = [memory.training_memory(llama, Training(), Layout(8, zero=z)) for z in range(4)]
    assert [m.total for m in spread] == sorted((m.total for m in spread), reverse=True)
    assert spread[3].weights == 2 * llama.parameters / 8
    both = memory.training_memory(llama, Training(), Layout(16, tensor=4, pipeline=2, zero=1))
    assert both.weights == 2 * llama.parameters / 8
    assert both.optimizer == 12 * llama.parameters / 8 / 2


def test_logits():
    gpt2 = systems.get("gpt2")
    got = memory.training_memory(gpt2, Training(rows=3)).logits
    assert got == 3 * 1024 * 50257 * 12
    assert memory.training_memory(systems.get("t5-small"), Training()).logits == 114 * 32128 * 12
    assert memory.training_memory(systems.get("bert-base"), Training()).logits == 0


@pytest.mark.parametrize("name", ["gpt2", "llama3-8b", "sd1-unet"])
@pytest.mark.parametrize("gib", [8, 24, 80])
@pytest.mark.parametrize("n", [1, 8])
def test_a_plan_has_the_largest_micro_batch(name, gib, n):
    system = systems.get(name)
    budget = gib * GiB
    best = memory.plan_training(system, budget, Training(), n)
    if best is None:
        fewest = memory.fewest_gpus(system, budget, Training())
        assert fewest == 0 or fewest > n
        return
    rows = best.training.rows
    assert best.memory.total <= budget
    more = replace(best.training, rows=rows + 1)
    assert memory.training_memory(system, more, best.layout).total > budget
    assert 1 <= memory.fewest_gpus(system, budget, Training()) <= n


def test_the_simplest_plan_is_chosen():
    def plan(name, budget, n=1):
        return memory.plan_training(systems.get(name), budget, Training(), n)

    assert plan("gpt2", 24 * GiB).way == "one GPU"
    assert plan("gpt2", 24 * GiB, 4).way == "DDP on 4 GPUs"
    assert plan("llama3-8b", 160 * GB).way == "one GPU with activation checkpointing"
    assert plan("llama3-8b", 80 * GB, 8).way == "FSDP2 on 8 GPUs"
    assert plan("llama3-8b", 24 * GiB) is None
    fewest = memory.fewest_gpus(systems.get("llama3-8b"), 24 * GiB, Training())
    assert plan("llama3-8b", 24 * GiB, fewest)
    assert not plan("llama3-8b", 24 * GiB, fewest - 1)
    assert memory.fewest_gpus(systems.get("llama3.1-405b"), 1 * GB, Training()) == 0


def test_largest_rows_where_the_update_takes_most_memory():
    """With few rows the update needs the most memory, so one row needs as much as 90 rows."""
    module = MeasuredModule(
        "m",
        parts={"a": 10},
        frozen={},
        parameters=10,
        non_embedding=10,
        matrices=10,
        largest_block=10,
        flops={},
        average=0,
        fixed_bytes=100,
        row_bytes=10,
        update_bytes=1000,
    )
    held = memory.state_memory(10, Training(), Layout(), 10).total
    for budget, rows in ((held + 999, 0), (held + 1000, 90), (held + 1009, 90), (held + 1010, 91)):
        assert memory.largest_rows(module, budget, Training(), Layout()) == rows


def test_amounts_of_memory():
    assert memory.read_bytes("24GiB") == 24 * 2**30
    assert memory.read_bytes(" 1.5 GB") == 1_500_000_000
    for text in ("24", "GiB", "24gib", "-1GB", "1.2.3GB", "0GB", ".GB"):
        with pytest.raises(ValueError, match="24GiB or 80GB"):
            memory.read_bytes(text)


def train_on(name, layout, checkpoint="none"):
    return memory.training_memory(systems.get(name), Training(checkpoint=checkpoint), layout)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Layout(10, tensor=4), "--gpus 10 .*tensor 4 x pipeline 1 = 4"),
        (lambda: Layout(0), "gpus is 0; .*at least 1"),
        (lambda: Layout(zero=4), "ZeRO stage is 4"),
        (lambda: Training(rows=0), "the micro-batch is 0"),
        (lambda: Training(dtype="int3"), "dtype is 'int3'; use bf16"),
        (lambda: Training(dtype="fp8"), "dtype is 'fp8'; use bf16"),
        (lambda: Training(optimizer="sgd"), "optimizer is 'sgd'; use adamw or muon"),
        (lambda: train_on("gpt2", Layout(5, 5)), "gpt2 has 12 heads, not divisible by 5"),
        (lambda: train_on("gpt2", Layout(5, 1, 5)), "gpt2 has 12 layers, not divisible by 5"),
        (lambda: train_on("resnet-50", Layout(2, 2)), "resnet-50 .*blocks"),
        (lambda: train_on("sd1-vae", Layout(), "full"), "no repeated blocks to checkpoint"),
    ],
)
def test_refused_layouts(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- gpus.py ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "flops", "petaflop_days"),
    [
        (125e6, 2.25e20, 2.6), (356e6, 6.41e20, 7.42), (760e6, 1.37e21, 15.8),
        (1320e6, 2.38e21, 27.5), (2.65e9, 4.77e21, 55.2), (6.66e9, 1.20e22, 139),
        (12.85e9, 2.31e22, 268), (174.6e9, 3.14e23, 3640),
    ],
)  # fmt: skip
def test_compute_of_gpt3(parameters, flops, petaflop_days):
    """Brown et al. 2020, table D.1: 6 FLOPs per parameter and token, also in PFLOP/s-days."""
    assert gpus.rule_of_six(parameters, 300e9) == pytest.approx(flops, rel=4e-3)
    assert gpus.rule_of_six(parameters, 300e9) / 8.64e19 == pytest.approx(petaflop_days, rel=4e-3)


def test_time_of_llama_65b():
    """380 tokens/s on each of 2048 A100: about 21 days (Touvron et al. 2023, section 2.4)."""
    a100 = gpus.get("a100")
    llama = systems.get("llama-65b")
    flops = gpus.rule_of_six(llama.parameters, 1)
    mfu = 380 * flops / a100.peak("bf16")
    assert mfu == pytest.approx(0.477, abs=5e-4)
    busy = gpus.busy_hours(flops * 1.4e12, a100, "bf16", mfu)
    assert gpus.bill(busy, a100, 2048).days == pytest.approx(20.8, abs=0.05)
    assert gpus.bill(busy, a100, 2048).gpu_hours == pytest.approx(1_022_362, rel=2e-3)


def test_cost_and_energy_of_stable_diffusion():
    """150,000 A100-hours on 256 GPUs at 4 USD; its model card has 250 W and 0.3 kg/kWh."""
    found = gpus.bill(150_000, gpus.get("a100-40gb"), 256, price=4.0, watts=250, pue=1.0)
    assert found.cost_usd == 600_000
    assert found.days == pytest.approx(24.4, abs=0.05)
    assert found.energy_kwh * 0.3 == pytest.approx(11_250)


def test_time_of_bloom():
    """Three and a half months on 384 A100 at 150 TFLOP/s; 3/4 of these are the model's FLOPs."""
    a100 = gpus.get("a100-80gb")
    bloom = systems.get("bloom-176b")
    mfu = 150e12 * 3 / 4 / a100.peak("bf16")
    busy = gpus.busy_hours(gpus.rule_of_six(bloom.parameters, bloom.trained), a100, mfu=mfu)
    found = gpus.bill(busy, a100, 384)
    assert found.days / 30.4 == pytest.approx(3.5, abs=0.1)
    stated = busy / 1_082_990  # of the GPU-hours that the paper states
    assert gpus.bill(busy, a100, 384, stated).gpu_hours == pytest.approx(1_082_990)
    assert stated == pytest.approx(0.88, abs=0.01)


def test_energy_of_gpt3():
    """10,000 V100 for 14.8 days, at 330 W and a PUE of 1.1 (Patterson et al. 2021, table 4)."""
    found = gpus.bill(10_000 * 14.8 * 24, gpus.get("v100"), 10_000, watts=330)
    assert found.energy_kwh / 1000 == pytest.approx(1287, rel=2e-3)
    assert found.days == pytest.approx(14.8)


@pytest.mark.parametrize(
    ("name", "kilowatts"), [("a100-80gb", 6.5), ("h100", 10.2), ("h200", 10.2), ("b200", 14.3)]
)
def test_energy_is_that_of_servers_times_the_pue(name, kilowatts):
    """The maximum in the user guide of the DGX, which holds eight of these GPUs.

    The PUE says nothing about the server: it is the building's energy over that of all computers.
    """
    gpu = gpus.get(name)
    hours = gpus.bill(8.0, gpu, 8, pue=1.0)  # one hour of the server
    assert hours.energy_kwh == pytest.approx(kilowatts)
    assert hours.energy_kwh > 1.7 * 8 * gpu.watts / 1000
    assert gpus.bill(8.0, gpu, 8, pue=1.2).energy_kwh == pytest.approx(1.2 * kilowatts)
    assert gpus.bill(8.0, gpu, 8, watts=900, pue=1.0).energy_kwh == pytest.approx(7.2)


def test_of_a_gpu_without_a_known_server_the_energy_is_its_own():
    found = gpus.bill(10.0, gpus.get("rtx-4090"), pue=1.0)
    assert found.watts == 450
    assert found.energy_kwh == pytest.approx(4.5)


def test_the_energy_names_its_power():
    job = ("gpt3-13b", "--tokens", 3e11, "--gpu")
    assert "1275 W a GPU, its share of the server included" in ask(*job, "h100")
    assert "at 980 W a GPU and a PUE of 1.2" in ask(*job, "h100", "--watts", 980, "--pue", 1.2)
    assert "without the servers: 350 W a GPU" in ask(*job, "rtx-3090")


@pytest.mark.parametrize("name", ["h100", "h100-pcie", "h200", "b200", "mi300x", "rtx-4090"])
def test_fp8_doubles_the_peak(name):
    gpu = gpus.get(name)
    assert gpu.peak("fp8") == pytest.approx(2 * gpu.peak("bf16"), rel=2e-3)
    assert next(iter(gpu.peaks)) == "bf16"  # the default


def test_training_in_fp8_keeps_bf16_and_serving_takes_half():
    half = json.loads(ask("llama3-8b", "--json", "--gpu", "b200"))
    eight = json.loads(ask("llama3-8b", "--json", "--gpu", "b200", "--dtype", "fp8"))
    assert eight["train_bytes_per_gpu"] == half["train_bytes_per_gpu"]
    assert eight["weights_bytes"] == half["weights_bytes"] / 2
    assert eight["gpu_hours"] == pytest.approx(half["gpu_hours"] / 2)
    with pytest.raises(ValueError, match="a100-80gb has no fp8; use bf16"):
        ask("llama3-8b", "--gpu", "a100", "--dtype", "fp8")


def test_weights_in_fewer_bits():
    """8.03 billion weights in 8 bits, and in 4.5. Convolutions keep their format."""
    assert "weights in int8: 8.03 GB; in int4: 4.517 GB" in ask("llama3-8b")
    assert "int8" not in ask("resnet-50")


def test_every_tpu_has_a_bandwidth():
    """TPU v3: 900 GB/s (cloud.google.com/tpu/docs/v3)."""
    assert gpus.get("tpu-v3").bandwidth == 900
    assert all(gpu.bandwidth > 0 for gpu in gpus.GPUS.values())


def test_time_and_cost_of_several_gpus():
    h100 = gpus.get("H100")
    busy = gpus.busy_hours(989e12 * 3600, h100, "bf16", 0.5)
    assert busy == pytest.approx(2)
    assert gpus.busy_hours(1e18, h100, "fp32") > gpus.busy_hours(1e18, h100, "bf16")
    one = gpus.bill(busy, h100)
    many = gpus.bill(busy, h100, 8, availability=0.8)
    assert many.gpu_hours == pytest.approx(one.gpu_hours / 0.8)
    assert many.days == pytest.approx(one.days / 8 / 0.8)
    assert many.cost_usd == pytest.approx(many.gpu_hours * h100.price)


def test_names_that_drivers_give_to_gpus():
    """The PCIe form of an H100 is slower than the SXM form."""
    assert gpus.by_driver_name("NVIDIA H100 80GB HBM3").peaks["bf16"] == 989
    assert gpus.by_driver_name("NVIDIA H100 PCIe").peaks["bf16"] == 756
    assert gpus.by_driver_name("NVIDIA B200").name == "b200"
    assert gpus.by_driver_name("NVIDIA GB200") is None  # a faster form
    assert gpus.by_driver_name("NVIDIA GeForce GTX 1080") is None
    assert {gpus.by_driver_name(name).name for name in gpus.DRIVER_NAMES} <= gpus.GPUS.keys()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gpus.get("h1000"), "no GPU 'h1000'; did you mean h100"),
        (lambda: gpus.get("v100").peak("bf16"), "v100-32gb has no bf16; use fp16"),
        (lambda: gpus.busy_hours(1, gpus.get("h100"), mfu=40), "mfu is 40; .*above 0"),
        (lambda: gpus.bill(1, gpus.get("h100"), availability=0), "availability is 0"),
        (lambda: gpus.bill(1, gpus.get("h100"), watts=-1), "-1 W a GPU; .*at least 0"),
        (lambda: gpus.bill(1, gpus.get("h100"), gpus=0), "0 GPUs"),
        (lambda: gpus.bill(1, gpus.get("h100"), price=-1), "a price of -1"),
    ],
)
def test_refused_gpus(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- trace.py and estimate.py: modules of this repository ---------------------------------------

VARIANTS = [
    SMALL,
    replace(SMALL, tied=True, window=16),
    replace(SMALL, mlp="gelu", dropout=0.1),
    replace(SMALL, position="learned", norm="layernorm", bias=True, n_kv_head=0),
]


@pytest.mark.parametrize("config", VARIANTS)
def test_flops_are_counted_exactly(config):
    """The count without memory equals that of real tensors, and the closed form of the GPT."""
    model = GPT(config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.loss(model.example_batch(2))[0].backward()
    found = trace.count_flops(model, 2)
    assert found.keys() == {"blocks", "head"}
    assert sum(map(sum, found.values())) == counter.get_total_flops() == 2 * model.flops_per_row()
    assert all(backward == 2 * forward for forward, backward in found.values())


@pytest.mark.parametrize("name", ["clip", "autoencoder", "ddpm", "text2image"])
def test_flops_of_every_family_are_counted_exactly(name):
    """The sum equals torch's count on real tensors. Each component is within its bounds."""
    model = registry.get_preset(name).run.build_model()
    rows = 2
    found = trace.count_flops(model, rows)
    if hasattr(model, "whole_batch"):
        model.rows_at_once = 0
        model.gather = lambda rows: rows
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.loss(model.example_batch(rows), row_generators(0, 0, range(rows)))[0].backward()
    assert sum(map(sum, found.values())) == counter.get_total_flops()
    assert found.keys() - {"loss"} <= trace.count_parts(model).keys()
    frozen = trace.count_parts(model, frozen=True)
    for part, (forward, backward) in found.items():
        if part in frozen:
            assert backward == 0, part
        else:
            # A layer that reads the data needs only half: no gradient of its input.
            assert forward <= backward <= 2 * forward, part
    if name == "clip":  # all pairs of an image and a text, in both directions
        columns = rows + model.config.memory
        E = model.config.embed_dim
        assert found["loss"] == [2 * n * rows * columns * E for n in (2, 4)]


class Enlarge(nn.Module):
    """One U-Net layer between two others, so that gradients pass through it."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.up = Upsample(8)

    def example_batch(self, rows):
        return {"images": torch.zeros(rows, 3, 10, 12)}

    def loss(self, batch, generators):
        return self.up(self.down(batch["images"])).square().mean(), {}


def test_flops_of_upsampling():
    """For each pair of channels and each input pixel: 4 x 4 multiply-adds."""
    forward = 2 * (16 * 8 * 8) * (5 * 6)
    assert trace.count_flops(Enlarge(), 3)["up"] == [3 * forward, 3 * 2 * forward]


def state_bytes(optimizers):
    """The bytes of the moments, without the step counters."""
    total = 0
    for optimizer in optimizers:
        for state in optimizer.state.values():
            total += sum(value.nbytes for name, value in state.items() if name != "step")
    return total


def real_peak(model, optim, rows, accumulate):
    """Peak bytes of a step, from the allocations that torch's profiler records."""
    optimizers = build_optimizers(model, optim)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    if not accumulate:
        model.zero_grad()
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    held += sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    held += state_bytes(optimizers)
    batch = model.example_batch(rows)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        model.loss(batch)[0].backward()
    now = 0
    most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return held + batch["tokens"].nbytes + most


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("config", VARIANTS)
def test_peak_is_what_is_allocated(config, accumulate):
    model = GPT(config)
    optim = OptimConfig()
    predicted, _ = trace.step_bytes(model, optim, 8, accumulate)
    assert predicted == pytest.approx(real_peak(model, optim, 8, accumulate), abs=1000)


def test_measuring_leaves_the_model_alone():
    model = GPT(replace(SMALL, tied=True)).eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    measured = estimate.measured("small", model, OptimConfig(ema_half_life=3.0))
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert measured.parameters == count_parameters(model)
    assert sum(measured.parts.values()) == measured.parameters
    assert measured.non_embedding == measured.parameters - 300 * 32
    assert memory.cache_bytes(measured, 10, dtype="fp32") == 10 * 4 * 2 * 2 * 2 * 8


@pytest.mark.parametrize("optim", [OptimConfig(), OptimConfig("adamw", ema_half_life=9.0)])
def test_measured_memory_predicts_the_peak_of_other_micro_batches(optim):
    model = GPT(SMALL)
    rows = 7
    network = estimate.measured("small", model, optim, accumulate=True)
    training = Training(rows, "fp32", optim.optimizer)
    predicted = memory.training_memory(network, training).total
    assert predicted == max(trace.step_bytes(model, optim, rows, accumulate=True))
    assert network.average == (4 * network.parameters if optim.ema_half_life else 0)
    with pytest.raises(ValueError, match="small has no activation checkpointing"):
        memory.activation_bytes(network, Training(checkpoint="full"), Layout())


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_bytes_of_moments_and_averages(optimizer):
    model = GPT(SMALL)
    optim = OptimConfig(optimizer=optimizer, ema_half_life=1.0)
    model.head.requires_grad_(False)
    optimizers = build_optimizers(model, optim)
    model.loss(model.example_batch(1))[0].backward()
    for each in optimizers:
        each.step()
    weights = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert trace.average_bytes(model, optim) == (state_bytes(optimizers), weights)


class Pairs(nn.Module):
    """A model of no family: convolutions, random numbers, and a loss that compares rows."""

    outer = ()
    whole_batch = True

    def __init__(self):
        super().__init__()
        self.config = None
        self.rows_at_once = 0
        self.gather = None
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.out = nn.Linear(8, 16)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)

    def example_batch(self, rows):
        return {"images": torch.zeros(rows, 3, 16, 16)}

    def loss(self, batch, generators):
        if len(generators) < 2:
            raise ValueError("one row")
        noise = torch.stack([torch.randn(3, 16, 16, generator=g) for g in generators])
        x = batch["images"] + noise.to(batch["images"].device)
        z = self.frozen(self.out(self.conv(x).relu().mean(dim=(2, 3))))
        z = self.gather(z)
        return (z @ z.T).square().mean(), {}


def test_any_module_can_be_measured():
    model = Pairs()
    train = TrainConfig(5, batch_size=6, micro_batch_size=2, device="cpu")
    line = estimate.describe(model, OptimConfig(), train)
    forward = 6 * 2 * (16 * 16 * 27 * 8 + 8 * 16 + 16 * 16) + 2 * 6 * 6 * 16
    counted = trace.count_flops(model, 6)
    assert sum(done for done, _ in counted.values()) == forward
    assert counted["loss"] == [2 * 6 * 6 * 16, 4 * 6 * 6 * 16]
    assert counted["frozen"] == [6 * 2 * 16 * 16] * 2  # gradients pass through it, but it has none
    assert "640 parameters" in line and "368 of them trained" in line and "2 rows" in line
    assert estimate.micro_batch(model, train) == (6, False)  # the loss needs the whole batch
    assert estimate.micro_batch(GPT(SMALL), train) == (2, True)
    assert estimate.micro_batch(GPT(SMALL), train, world=3) == (2, False)
    network = estimate.measured("pairs", model, OptimConfig("adamw"), 6)
    assert network.frozen == {"frozen": 16 * 17} and network.learnt == 368
    held = memory.training_memory(network, Training(6, "fp32"))
    assert (held.weights, held.gradients, held.optimizer) == (4 * 640, 4 * 368, 8 * 368)
    whole = max(trace.step_bytes(model, OptimConfig("adamw"), 6))
    assert memory.training_memory(network, Training(6, "fp32")).total == whole
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pairs, "loss", lambda *_: 1 / 0)
        line = estimate.describe(model, OptimConfig(), train)
    assert "cannot be predicted (ZeroDivisionError" in line


# ---- the command --------------------------------------------------------------------------------


def test_description_of_a_run():
    model = GPT(SMALL)
    optim = OptimConfig()
    train = TrainConfig(steps=10, batch_size=32, micro_batch_size=4, device="cpu", dtype="float32")
    line = estimate.describe(model, optim, train)
    peak = max(trace.step_bytes(model, optim, 4, accumulate=True))
    assert f"a peak of {units.size(peak)} of tensors" in line
    assert "4 rows" in line and "float32" in line
    assert f"{32 * model.flops_per_row() * 10:.3g} FLOP" in line
    assert "\n" not in line
    costs = estimate.forecast(model, optim, train)
    assert costs.flops == 320 * model.flops_per_row() and 0 < costs.seconds < 60
    # A dry run for another machine: this one may have no GPU.
    assert "peak of" in estimate.describe(model, optim, replace(train, device="cuda", dtype="auto"))


def ask(*words):
    return calc.answer(list(map(str, words)))


def test_json_of_a_system():
    training = ["--gpu", "h100", "--gpus", 1024, "--tokens", 3e11]
    assumptions = ["--price", 2, "--mfu", 0.5, "--availability", 0.9]
    found = json.loads(ask("gpt3-175b", "--json", *training, *assumptions))
    gpt3 = systems.get("gpt3-175b")
    assert list(found) == [
        "name",
        "params_total",
        "params_non_embedding",
        "weights_bytes",
        "train_bytes_per_gpu",
        "kv_cache_bytes",
        "train_flops",
        "gpu_hours",
        "days",
        "cost_usd",
    ]
    assert found["params_total"] == gpt3.parameters == 174_604_259_328
    assert found["params_non_embedding"] == gpt3.non_embedding
    assert found["weights_bytes"] == 2 * gpt3.parameters
    assert found["kv_cache_bytes"] == 2048 * 4_718_592
    attention = 1.0277  # which the published 3.14e23 leaves out
    assert found["train_flops"] == pytest.approx(3.14e23 * attention, rel=2e-3)
    assert found["gpu_hours"] == pytest.approx(found["train_flops"] / 989e12 / 0.5 / 3600 / 0.9)
    assert found["days"] == pytest.approx(found["gpu_hours"] / 1024 / 24)
    assert found["cost_usd"] == pytest.approx(2 * found["gpu_hours"])
    spread = memory.training_memory(gpt3, Training(), Layout(1024, zero=3))
    assert found["train_bytes_per_gpu"] == int(spread.total)


def test_json_is_null_where_nothing_is_known():
    found = json.loads(ask("mistral-7b", "--json"))
    assert found["train_flops"] is found["gpu_hours"] is found["days"] is found["cost_usd"] is None
    assert json.loads(ask("gpt2", "--json", "--gpu", "tpu-v4", "--tokens", 1))["cost_usd"] is None


def test_text_states_its_assumptions():
    text = ask("gpt3-13b", "--gpu", "h100", "--gpus", 8)
    for part in (
        "12,853,386,240 parameters (published: 12.85B)",
        "Table 2.1 has a width of 5140",
        "51.41 GB in fp32, 25.71 GB in bf16",
        "FSDP2 over 8",
        "2 a multiply-add",
        "no discount for causality",
        "training on 3e+11 tokens",
        "availability 1",
        "8 x h100, at MFU 0.4 of 989",
        "2.79 USD a GPU-hour (April 2026",
        "PUE of 1.1",
        "80 GB of memory",
        "3350 GB/s",
        "900 GB/s",
    ):
        assert part in text, part
    without_gpu = ask("gpt2")
    assert "add --tokens" in without_gpu and "rule of 6 N" in without_gpu
    assert "add --gpu" in ask("gpt3-13b")
    on_gpu = ask("gpt2", "--gpu", "h100")
    assert "add --gpu" not in on_gpu and "more than" not in on_gpu
    assert re.search("more than h100 has; .*--fit 80GB", ask("gpt3-13b", "--gpu", "h100"))
    assert "active a token" in ask("mixtral-8x7b")
    assert "rule of 6 N" not in ask("t5-11b")
    assert "FLOP an image, forward" in ask("sd1-unet")


def test_text_has_lines_for_components_and_a_block():
    text = ask("gpt3-175b")
    gpt3 = systems.get("gpt3-175b")
    attention = 2 * gpt3.by_part("macs")["attention"] / 2048 / 1e9
    assert f"{attention:.4g} GFLOP forward,   {2 * attention:.4g} GFLOP backward" in text
    forward, backward = (sum(flops) for flops in zip(*gpt3.flops_by_part().values()))
    assert forward == gpt3.flops_per_row(backward=False)
    assert backward == 2 * forward
    block = 2048 * 12288 * 32 / 1e6  # without dropout's masks
    assert f"a block keeps {block:.4g} MB of a row, 1.611 GB if attention is unfused" in text
    assert "activations    9.676 GB" in ask("gpt3-175b", "--gpus", 8, "--tensor", 8, "--sequence")
    assert "tensor 8" in ask("gpt3-175b", "--gpus", 8, "--tensor", 8)
    vae = ask("sd1-vae")
    assert "a block" not in vae and "micro-batches of 1 image (" in vae


def test_fit_answers():
    text = ask("gpt2", "--fit", "24GiB")
    assert re.search("fits into 24GiB: one GPU, .*up to 25 rows", text)
    text = ask("llama3-8b", "--fit", "24GiB")
    assert re.search("does not fit into 24GiB on 1 GPU, .*FSDP2 on", text)
    assert "at least" in text
    assert "on any number of GPUs" in ask("llama3.1-405b", "--fit", "1GB")


def test_table_plot_and_list(tmp_path):
    import matplotlib.image

    picture = tmp_path / "memory.png"
    names = ("gpt2", "bloom-176b", "sd1-unet")
    lines = ask("--compare", *names, "--plot", picture).splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(names)
    assert len({len(line) for line in lines}) == 1
    assert "176,247,271,424" in lines[2] and "4.014 MB" in lines[2]
    image = matplotlib.image.imread(picture)
    assert image.shape[1] > image.shape[0] > 300
    colours = {tuple(pixel) for pixel in image[::9, ::9, :3].reshape(-1, 3)}
    assert len(colours) > 4
    listed = ask("--list").splitlines()
    assert [line.split()[0] for line in listed] == list(systems.rows())


def test_a_run_directory(tiny_run):
    found = json.loads(ask(tiny_run, "--json", "--gpu", "a100"))
    record = json.loads((tiny_run / "config.json").read_text(encoding="utf-8"))
    model = GPT(GPTConfig(**record["model"]))
    train = record["train"]
    assert found["params_total"] == count_parameters(model)
    assert found["train_flops"] == train["steps"] * train["batch_size"] * model.flops_per_row()
    assert found["kv_cache_bytes"] > 0 and found["days"] > 0
    assert "token_embedding" in ask(tiny_run)
    assert "one GPU" in ask(tiny_run, "--fit", "1GiB")


def test_a_preset_is_a_name_too():
    assert json.loads(ask("gpt", "--json"))["params_total"] == 3_704_576


@pytest.mark.parametrize("name", ["text2image-clip", "sweep-1"])
def test_the_estimate_of_a_preset_is_measured_on_its_model(name):
    run = registry.get_preset(name).run
    model = run.build_model()
    found = json.loads(ask(name, "--json"))
    assert found["params_total"] == count_parameters(model)
    cost = estimate.training_cost(model, run.optim, run.train.batch_size)
    assert found["train_flops"] == pytest.approx(cost.flops_per_step * run.train.steps)
    rows, several = estimate.micro_batch(model, run.train)
    peak = trace.step_bytes(model, run.optim, rows, several, dtype=torch.bfloat16)
    assert found["train_bytes_per_gpu"] == max(peak)


def test_frozen_parameters_have_no_gradients_and_no_averages():
    """Text-to-image trains its denoiser alone."""
    run = registry.get_preset("text2image").run
    network, training = calc.measure_run("text2image", run)
    model = run.build_model()
    parts = ("text_tower", "autoencoder", "diffusion")
    sizes = {part: count_parameters(getattr(model, part)) for part in parts}
    assert network.parts == sizes
    assert network.learnt == sizes.pop("diffusion")
    assert network.frozen == sizes
    held = memory.training_memory(network, training)
    optimizers = build_optimizers(model, run.optim)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert held.weights == 4 * network.parameters
    assert held.gradients == 4 * network.learnt
    average = 4 * network.learnt
    assert held.optimizer == state_bytes(optimizers) + average
    for part in sizes:  # that are frozen
        assert network.flops.get(part, (0, 0))[1] == 0
    lines = [line.split() for line in report.parameter_lines(network)]
    for part, size in sizes.items():
        assert [part, f"{size:,}", "frozen:", f"{size:,}"] in lines
    assert ["diffusion", f"{network.learnt:,}"] in lines
    assert ["trained", f"{network.learnt:,}"] in lines
    assert report.rows_text(training.rows, network) == "64 pairs"


@pytest.mark.parametrize(
    ("preset", "task", "unit"),
    [
        ("gpt", "", ("token", 256)),
        ("gpt", "classify", ("token", 256)),
        ("clip", "", ("pair", 1)),
        ("clip", "classify", ("image", 1)),
        ("autoencoder", "", ("image", 1)),
        ("ddpm", "", ("image", 1)),
        ("ddpm", "classify", ("image", 1)),
        ("text2image", "", ("pair", 1)),
    ],
)
def test_the_unit_of_the_data(preset, task, unit):
    run = registry.get_preset(preset, task).run
    with torch.device("meta"):
        model = run.build_model()
    assert estimate.data_unit(model) == unit


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("gpt3-175", "'gpt3-175'; did you mean gpt3-175b"),
        ("gpt2-124", "did you mean gpt2-124m"),
        ("tests", "tests is not a run directory: .*config.json"),
        ("gpt3", "did you mean gpt3-125m or gpt3-350m"),
        ("runs/none", "'runs/none'; train.py makes a run"),
        ("gpt2 --gpus 0", "--gpus: 0 must be above 0"),
        ("gpt2 --tokens -3", "--tokens: -3 must be above 0"),
        ("gpt2 --tokens nan", "--tokens: nan is not a finite number"),
        ("gpt2 --tokens many", "'many' is not a number"),
        ("gpt2 --rows 1.5", "1.5 is not a whole number"),
        ("gpt2 --gpu v100 --dtype bf16", "v100-32gb has no bf16; use fp16"),
        ("gpt2 --gpu h1000", "there is no GPU 'h1000'"),
        ("gpt2 --gpus 10 --tensor 4", "--gpus 10 .*tensor 4"),
        ("gpt2 --fit 24", "write it as 24GiB"),
        ("gpt2 --fit 24GB --zero 0", "--fit .*; leave out --zero"),
        ("gpt2 --fit 24GB --tensor 2", "leave out --tensor"),
        ("gpt2 --fit 24GB --json", "--fit answers in words"),
        ("gpt2 --list", "--list .*; leave out gpt2"),
        ("gpt2 --mfu 40", "mfu is 40"),
        ("gpt2 --availability 2", "availability is 2"),
        ("gpt2 --pue 0.5", "pue is 0.5; .*at least 1"),
        ("gpt2 gpt1", "add --compare"),
        ("--compare gpt2 gpt1 --json", "one name at a time"),
        ("gpt2 --bogus", "unrecognized arguments: --bogus"),
        ("gpt2-124m --context 5", "--context is for published systems"),
        ("", "name a system, a preset or a run directory"),
        ("sweep --seeds 1000000000000", "--seeds 1000000000000: use at most 1000"),
        ("sweep --at-once 1000000000000", "--at-once 1000000000000: use at most 1000"),
        ("cluster gpt2 --gpus 1000000000000", "1000000000000 GPUs .*at most 1048576"),
    ],
)
def test_refused_questions(words, message, capsys):
    with pytest.raises(ValueError, match=message) as caught:
        ask(*words.split())
    assert "\n" not in str(caught.value)
    assert call(calc, *words.split()) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_it_answers_without_loading_torch():
    code = """
import sys
from tinyfm.calc import __main__ as calc
assert "174,604,259,328" in calc.answer(["gpt3-175b"])
assert "torch" not in sys.modules
"""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert time.perf_counter() - start < 5


def test_memory_adds_up():
    use = MemoryUse(1, 2, 3, 4, 5, 6, 7)
    assert use.total == 28
    assert report.memory_lines(use)[-1].split()[:4] == ["in", "all", "28", "B"]
