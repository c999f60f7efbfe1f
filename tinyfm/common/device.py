"""The device of a run: how to choose it and its number format, its peak speed and memory.

Also `Compiled`, which is torch.compile with a fallback for machines where compiling fails.
"""

from __future__ import annotations

import ctypes
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import torch


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA if there is any, else MPS, else the CPU.

    Raises ValueError if the device does not exist on this machine.
    """
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
        else:
            name = "cpu"
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
    if device.type == "cpu":  # torch has no public name for these flags yet
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, check, bool)() for check in checks)
    return False


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number format of that name; "auto" is bfloat16 where it is fast, else float32.

    Raises ValueError for bfloat16 on a device that only emulates it.
    """
    if name == "auto":
        name = "bfloat16" if bfloat16_is_fast(device) else "float32"
    if name == "bfloat16" and not bfloat16_is_fast(device):
        raise ValueError(f"this {device.type} only emulates bfloat16, slowly; use float32 or auto")
    return getattr(torch, name)


def describe_device(device: torch.device) -> str:
    """Name of the device for the log, such as "cpu (x86_64, 2 threads)"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    processor = platform.processor() or platform.machine()
    if device.type == "cpu":
        return f"cpu ({processor}, {torch.get_num_threads()} threads)"
    return f"{device.type} ({processor})"


def product_speed(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on the device, as measured in about a tenth of a second."""
    width = 1024 if device.type == "cpu" else 4096
    with torch.device(device):  # also where the caller builds on the meta device
        a = torch.ones(width, width, dtype=dtype)
        times = []
        for _ in range(4):  # the first one warms up; the fastest was least disturbed
            start = time.perf_counter()
            (a @ a)[0, 0].item()  # waits for the result
            times.append(time.perf_counter() - start)
    return 2 * width**3 / min(times)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step; no effect on other systems.

    By default glibc returns large buffers to the system at once, and in every step they must be
    mapped and set to zero again: for a small model that takes a fifth of the time or more.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        M_TRIM_THRESHOLD = -1
        M_MMAP_MAX = -4
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory held so far, in bytes: of the GPU, or of this process; 0 on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource  # Windows does not have it

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


class Compiled:
    """A function compiled by torch.compile; if compiling fails, the function uncompiled.

    Compilation happens at the first call, and again for new shapes. When a call fails, a line is
    printed, and this call and all later ones run the function itself.
    """

    def __init__(self, function: Callable, **options: Any):
        self.function = function
        self.call = torch.compile(function, **options)

    def __call__(self, *args) -> Any:
        if self.call is not self.function:
            try:
                return self.call(*args)
            except Exception as error:  # of the compiler; the function's own is raised again below
                reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
                print(f"torch.compile fails here ({reason}); continuing without it", flush=True)
                self.call = self.function
        return self.function(*args)
