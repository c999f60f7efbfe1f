"""What the lessons' checks share: a comparison that says what was expected, and what came."""

import math

import torch


def shown(x: torch.Tensor) -> str:
    """All numbers of a small tensor, row by row; the first numbers of a large one."""
    if x.ndim == 0:
        return f"{x.item():.8g}"
    if x.numel() > 20:
        x = x.flatten()[:12]
    return "[" + ", ".join(shown(part) for part in x) + "]"


def agree(
    got, expected, what: str, tolerance: float = 1e-5, *, relative: float | None = None
) -> None:
    """Fail with both values if they differ: numbers, lists, arrays or tensors.

    |got - expected| may be at most tolerance + relative |expected|; relative is the tolerance too,
    if it is not given.
    """
    assert got is not None, f"{what}: got None; does the function return its result?"
    got = torch.as_tensor(got, dtype=torch.double).detach()
    expected = torch.as_tensor(expected, dtype=torch.double).detach()
    message = f"{what}: expected the shape {tuple(expected.shape)}, got {tuple(got.shape)}"
    assert got.shape == expected.shape, message
    message = f"{what}: expected {shown(expected)}, got {shown(got)}"
    relative = tolerance if relative is None else relative
    assert torch.allclose(got, expected, rtol=relative, atol=tolerance), message


def waves(*shape: int, shift: float = 0.0) -> torch.Tensor:
    """Numbers without a pattern that are the same on every machine."""
    squares = torch.arange(math.prod(shape), dtype=torch.float64).square()
    return torch.sin(1.7 * squares + shift).float().view(shape)
