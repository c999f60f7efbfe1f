"""Devices: the choice of device and number format, peak speed and memory, compiled functions."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from tinyfm.common import device as devices

CPU = torch.device("cpu")


def test_choose_device(monkeypatch):
    assert devices.choose_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert devices.choose_device("auto") == CPU
    with pytest.raises(ValueError, match=r"device 'gpu' .*; try auto or cpu"):
        devices.choose_device("gpu")
    assert "thread" in devices.describe_device(CPU)


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_is_chosen_only_if_it_is_fast(monkeypatch, fast):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: fast, raising=False)
    assert devices.choose_dtype("float32", CPU) == torch.float32
    assert devices.choose_dtype("auto", CPU) == (torch.bfloat16 if fast else torch.float32)
    if fast:
        assert devices.choose_dtype("bfloat16", CPU) == torch.bfloat16
    else:
        with pytest.raises(ValueError, match="emulates bfloat16"):
            devices.choose_dtype("bfloat16", CPU)


@pytest.mark.parametrize(("capability", "fast"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_bfloat16_on_gpus(monkeypatch, capability, fast):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert devices.bfloat16_is_fast(torch.device("cuda")) is fast


def test_peak_memory_counts_a_large_tensor():
    devices.keep_freed_memory()
    block = torch.ones(2**24)
    assert devices.peak_memory_bytes(CPU) > block.nbytes


def test_without_a_compiler_a_function_runs_uncompiled(monkeypatch, capsys):
    def broken(function, **options):
        def call(*args):
            raise RuntimeError("no C++ compiler\nlong story")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    add = devices.Compiled(lambda a, b: a + b)
    assert [add(1, 2), add(3, 4)] == [3, 7]
    assert capsys.readouterr().out.count("(RuntimeError: no C++ compiler)") == 1


def test_an_error_inside_a_compiled_function_is_raised(monkeypatch):
    """It is not mistaken for a missing compiler."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda *args: function(*args))
    divide = devices.Compiled(lambda a, b: a / b)
    assert divide(6, 3) == 2
    with pytest.raises(ZeroDivisionError):
        divide(1, 0)


@pytest.mark.parametrize("own", [None, "ACTIVE"])
def test_threads_sleep_while_they_wait_unless_a_user_says_otherwise(own):
    """In a process that imports tinyfm before torch, as every command does."""
    code = "import os, sys, tinyfm; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if "OMP_WAIT" not in name}
    if own:
        environment["OMP_WAIT_POLICY"] = own
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [own or "PASSIVE", "False"]
