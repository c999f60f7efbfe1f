"""The estimated cost of a training step equals the measured cost of one that runs."""

import pytest
import torch
from conftest import count_parameters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tinyfm.calc import estimate
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.recipes import registry
from tinyfm.training.optim import OptimConfig, build_optimizers

SMALL = GPTConfig(300, context_length=32, n_layer=2, n_head=4, n_kv_head=2, d_model=32)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("half_life", [0.0, 10.0])
def test_costs_are_those_of_a_training_step(optimizer, half_life):
    model = GPT(SMALL)
    config = OptimConfig(optimizer=optimizer, ema_half_life=half_life)
    cost = estimate.training_cost(model, config, batch_size=3)

    # Run one step.
    optimizers = build_optimizers(model, config)
    tokens = torch.randint(300, (3, SMALL.context_length + 1))
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model.loss({"tokens": tokens})[0].backward()
    state_bytes = 0
    for each in optimizers:
        each.step()
        for state in each.state.values():
            state_bytes += sum(value.nbytes for name, value in state.items() if name != "step")

    parameters = list(model.parameters())
    assert cost.parameters == count_parameters(model)
    assert cost.parameter_bytes == sum(p.nbytes for p in parameters)
    assert cost.gradient_bytes == sum(p.grad.nbytes for p in parameters)
    assert cost.optimizer_bytes == state_bytes
    assert cost.average_bytes == (cost.parameter_bytes if half_life else 0)
    assert cost.flops_per_step == counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("gpt2-124m", 124_439_808), ("gpt2-1.5b", 1_557_611_200), ("llama-1b", 1_235_814_400)],
)
def test_large_presets_have_the_published_sizes(name, parameters):
    """test_cli.py checks the text of a dry run about them."""
    run = registry.get_preset(name).run
    with torch.device("meta"):
        model = run.build_model()
        cost = estimate.training_cost(model, run.optim, run.train.batch_size)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert cost.parameters == parameters
    assert run.train.batch_size % (run.train.micro_batch_size * 8) == 0  # for one GPU and for eight


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("Tesla V100-SXM2-32GB", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peak_flops_of_gpus(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    cuda = torch.device("cuda")
    assert estimate.peak_flops(cuda, torch.bfloat16) == peak
    assert estimate.peak_flops(cuda, torch.float32) is None


def test_the_peak_of_a_cpu_is_unknown():
    assert estimate.peak_flops(torch.device("cpu"), torch.bfloat16) is None
