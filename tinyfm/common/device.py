"""What the run stands on: device, number format, memory, and the peak it is measured against."""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Callable
from typing import Any

import torch

from tinyfm.common import gpus


def choose_device(name: str) -> torch.device:
    """The named device; "auto" is CUDA, else MPS, else the CPU. ValueError if it is not there."""
    if name == "auto":
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        name = "cuda" if cuda else "mps" if mps else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used ({reason}); try auto or cpu") from None
    return torch.device(name)


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 itself, rather than by emulation."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu":  # the flags have no public name in torch yet
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, check, bool)() for check in checks)
    return False


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The named type; "auto" is bfloat16 where fast, else float32. ValueError if asked in vain."""
    if name == "auto":
        name = "bfloat16" if bfloat16_is_fast(device) else "float32"
    if name == "bfloat16" and not bfloat16_is_fast(device):
        raise ValueError(f"this {device.type} only emulates bfloat16, slowly; use float32 or auto")
    return getattr(torch, name)


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"{device.type} ({platform.processor() or platform.machine()}{threads})"


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense peak in FLOP/s, or None where it is not known: no utilisation is stated then."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    gpu = gpus.by_driver_name(torch.cuda.get_device_name(device))
    return gpu.peak("bf16") if gpu and "bf16" in gpu.peaks else None


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step.

    By default it returns large buffers to the system at once, and every step pays to have them
    mapped and zeroed again: on a small model a fifth of the time, or far more. No effect elsewhere.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Compiled:
    """torch.compile, or the function as it is once a call, mostly the first, fails to compile."""

    def __init__(self, function: Callable, **options: Any):
        self.function = function
        self.call = torch.compile(function, **options)

    def __call__(self, *args) -> Any:
        if self.call is not self.function:
            try:
                return self.call(*args)
            except Exception as error:  # the compiler's; the function's own comes again below
                reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
                print(f"torch.compile fails here ({reason}); going on without it", flush=True)
                self.call = self.function
        return self.function(*args)
