"""Steps that would spoil a run: skipped, and, if they do not end, the end of it.

A step whose loss or gradient norm is not finite changes no weight; nor does a spike, far above the
steps before it, if one asks for that. Several in a row are no accident any more. All ranks decide
alike, as the numbers that they decide by are sums over ranks.
"""

import math
import statistics
from collections.abc import Callable

WINDOW = 128  # steps that a new one is compared with


def is_spike(recent: list[tuple[float, float]], new: tuple[float, float], sigmas: float) -> bool:
    """Whether a step's loss or gradient norm is far above those of the steps before it: by more
    than `sigmas` standard deviations (6 in OLMo 2, arXiv 2501.00656), each at least 1% of the mean.

    None is, before half a window of steps was made.
    """
    if not sigmas or len(recent) < WINDOW // 2:
        return False
    limits = []
    for values in zip(*recent):
        mean = statistics.fmean(values)
        limits.append(mean + sigmas * max(statistics.pstdev(values, mean), abs(mean) / 100))
    return any(value > limit for value, limit in zip(new, limits))


class Guard:
    """Says which steps to make. What it has seen is in `counters`, and so in each checkpoint."""

    def __init__(self, patience: int, sigmas: float, counters: dict):
        self.patience, self.sigmas, self.counters = patience, sigmas, counters
        self.skipped = 0  # in a row
        if sigmas:
            counters["recent"] = []  # (loss, gradient norm) of the last steps

    def passes(self, loss: float, norm: float) -> bool:
        """Whether to make a step of this loss and gradient norm."""
        fine = math.isfinite(loss) and math.isfinite(norm)
        if fine and self.sigmas:
            recent = self.counters["recent"]
            fine = not is_spike(recent, (loss, norm), self.sigmas)
            # With the spikes: what stays on a new level is soon none.
            self.counters["recent"] = [*recent, (loss, norm)][-WINDOW:]
        self.skipped = 0 if fine else self.skipped + 1
        return fine

    def tell(
        self, step: int, loss: float, norm: float, say: Callable[[str], None], advice: str
    ) -> None:
        """Say that this step was skipped. Raises FloatingPointError if patience is at its end."""
        say(f"step {step}: loss {loss}, gradient norm {norm}: skipped, no weight was changed")
        if self.skipped == self.patience:
            what = "spikes" if math.isfinite(loss) and math.isfinite(norm) else "not finite"
            raise FloatingPointError(
                f"{self.skipped} steps in a row were {what}, to step {step}; {advice}"
            )
