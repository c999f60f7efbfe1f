"""Simulated FSDP2 jobs: the memory of a rank, the time of a step, refused layouts."""

import pytest
import torch.distributed as dist

from tinyfm.calc import __main__ as calc
from tinyfm.calc import cluster, systems
from tinyfm.calc.report import short
from tinyfm.common import gpus


def simulate(name, ranks, shard_size=0):
    """The job of `python -m tinyfm.calc cluster NAME --gpus RANKS`."""
    model, optim, batch = calc.find_trainable(name)
    rows = max(1, batch // ranks)
    return cluster.simulate(model, optim, rows, ranks, gpus.get("h100"), shard_size)


def test_llama_1b_over_64_ranks():
    """Rank 0 holds the bytes that memory.py predicts; more copies only add communication."""
    text = calc.answer(["cluster", "llama-1b", "--gpus", "64"])
    assert "1,235,814,400 parameters" in text
    assert "64 of 64 x h100" in text
    job = simulate("llama-1b", 64, shard_size=8)
    assert job.held == job.expected
    assert job.held.weights == 4 * job.parameters / 8
    assert max(job.computing, job.sending) < job.step < job.computing + job.sending
    assert f"the calculator says {short(job.expected.total / 8)}B" in text
    assert not dist.is_initialized()


def test_6_7b_parameters_over_1024_ranks():
    """50,257 rows of the vocabulary do not divide by 1,024, so rank 0 has a little more."""
    job = simulate("gpt3-6.7b", 1024)
    assert job.parameters == systems.get("gpt3-6.7b").parameters
    more = 4 * 4096 * (50 - 50_257 / 1024)  # bytes: 50 rows of 4,096 numbers, not 49.08
    assert job.held.weights - job.expected.weights == pytest.approx(more)
    assert job.held.optimizer == 2 * job.held.gradients == 2 * job.held.weights


def test_seconds_of_a_step():
    """Two blocks of 1,000 parameters and 500 outside them; 1,000 bytes a second; one copy.

    No computing hides the sending of the outermost unit and of the first block.
    """
    sending, step = cluster.step_seconds(300, [500, 1000, 1000], 0, 1, 1e3, 1e3)
    assert sending == 2 * 4 + 8 + 3 + 2
    assert step == 300 + 3 + 2  # computing hides the rest
    assert cluster.step_seconds(0, [500, 1000, 1000], 0, 1, 1e3, 1e3) == (sending, sending)
    _, step_of_four_copies = cluster.step_seconds(300, [500, 1000, 1000], 4000, 4, 1e3, 1e3)
    assert step_of_four_copies == step + 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("llama", "no preset 'llama'"),
        ("llama-1b --gpus 64 --shard-size 7", "7 .*64 processes; use one of"),
        ("bert-base", "family bert; use .*: gpt, bloom, .*palm"),
        ("mixtral-8x7b", "mixtral-8x7b is a mixture of experts"),
        ("gpt2 --gpu v100", "v100-32gb has no bf16"),
    ],
)
def test_refused_jobs(words, message):
    with pytest.raises(ValueError, match=message):
        calc.answer(["cluster", *words.split()])
    assert not dist.is_initialized()
