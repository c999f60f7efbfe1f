"""A law of loss over size and data, fitted to a table of runs, and the size that suits a budget.

The runs are of one family of sizes, each trained as its size needs. Through their losses in bits
per byte goes the law of Hoffmann et al. (2022, eq. 2),

    L(M, D) = E + A (M / M0)^-alpha + B (U / D0)^-beta

M is the size as FLOPs of training a token, so that M D is the cost: it counts the head and the
attention, which are much of a small model (Porian et al. 2024). U are the tokens that D tokens of
training are worth, if the text has V and is read D / V times (Muennighoff et al. 2023):

    U = D                                   where D <= V
    U = V (1 + R (1 - e^-((D / V - 1) / R)))     beyond;  R = 15.4 as they found

So a second pass is worth nearly as much as new text, and the sixteenth two fifths of it. M0 and D0
are geometric means over the table.

Left out: other values of R; what a larger vocabulary or context would bring.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np

from tinyfm.calc.scaling_laws import SHARE, jacobian, least_squares, student_t
from tinyfm.common import gpus

FOLDER = Path(__file__).parent  # of the tables
REPEATS = 15.4  # R
FURTHEST = 100  # times the FLOPs of the table's largest run: beyond that the law is not asked

# ---- budgets ------------------------------------------------------------------------------------

UNITS = {
    "s": ("seconds", 1), "m": ("seconds", 60), "h": ("seconds", 3600),
    "seconds": ("seconds", 1), "minutes": ("seconds", 60), "hours": ("seconds", 3600),
    "": ("flops", 1), "FLOP": ("flops", 1), "FLOPs": ("flops", 1),
    "tokens": ("tokens", 1), "k tokens": ("tokens", 1e3), "M tokens": ("tokens", 1e6),
    "B tokens": ("tokens", 1e9), "dollars": ("dollars", 1), "$": ("dollars", 1),
}  # fmt: skip
EXAMPLES = "10m, 90s, 2h, 1e13 FLOP, 20M tokens, or 5 dollars with --gpu NAME"


@dataclass(frozen=True)
class Budget:
    """What may be spent: seconds of a command, FLOPs or tokens of training."""

    kind: Literal["seconds", "flops", "tokens"]
    amount: float
    text: str  # as it was given


def read_budget(text: str, gpu: str = "") -> Budget:
    """The budget that a text such as "10m" says. Dollars buy FLOPs on a GPU, at its dated price.

    Raises ValueError for another text, and for dollars without a GPU or its price.
    """
    found = re.fullmatch(r"(\$?)\s*(\d[\d.,]*(?:e[+-]?\d+)?)\s*([a-zA-Z ]*)", text.strip())
    number = found[2].replace(",", "") if found else ""
    unit = (found[1] or found[3].strip()) if found else None
    if unit not in UNITS or number.count(".") > 1 or not 0 < float(number) < math.inf:
        raise ValueError(f"the budget is {text!r}; use {EXAMPLES}")
    kind, factor = UNITS[unit]
    amount = float(number) * factor
    if kind != "dollars":
        if gpu:
            raise ValueError(f"--gpu is for a budget in dollars, and {text} is none: leave it out")
        return Budget(kind, amount, text)
    if not gpu:
        raise ValueError(f"{text} buy time on a GPU: add --gpu NAME, such as h100")
    rented = gpus.get(gpu)
    if not rented.price:
        priced = ", ".join(name for name, each in gpus.GPUS.items() if each.price)
        raise ValueError(f"no price of {rented.name} is known: use one of {priced}")
    mfu = gpus.Assumptions().mfu
    hours = amount / rented.price
    flops = hours * 3600 * rented.peak(next(iter(rented.peaks))) * mfu
    text = f"{text} ({hours:.3g} hours of {rented.name} at MFU {mfu:g}, prices of {rented.priced})"
    return Budget("flops", flops, text)


# ---- the law ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A run of the sweep."""

    width: int
    flops_per_token: float  # of training
    tokens: float
    unique: float  # training tokens that the text has
    bpb: float  # bits per byte of validation, at the end

    @classmethod
    def of(cls, row: Mapping[str, str]) -> Trained:
        """The run in a row of a table, whose other columns say where it comes from."""
        return cls(int(row["width"]), *(float(row[each.name]) for each in fields(cls)[1:]))


def read_table(path: Path) -> list[Trained]:
    """The runs of a table. Raises ValueError if it has not been recorded yet."""
    if not path.is_file():
        raise ValueError(
            f"{path.name} has not been recorded, so there is no law: run python "
            "benchmarks/budget.py sweep, about an hour of one core"
        )
    with path.open(encoding="utf-8", newline="") as file:
        return [Trained.of(row) for row in csv.DictReader(file)]


def worth(tokens: np.ndarray | float, unique: np.ndarray | float) -> np.ndarray:
    """The number of new tokens that are worth as much as these, of a text of `unique` tokens."""
    again = np.maximum(np.asarray(tokens) / unique - 1, 0)
    beyond = unique * REPEATS * -np.expm1(-again / REPEATS)
    return np.minimum(tokens, unique) + beyond


@dataclass(frozen=True)
class SizeLaw:
    """L = E + A (M / M0)^-alpha + B (U / D0)^-beta, by theta = ln (E, A, B, alpha, beta)."""

    theta: np.ndarray
    M0: float
    D0: float
    deviation: float  # standard deviation of ln L from the law
    covariance: np.ndarray  # (5, 5) of theta, for a deviation of 1
    dof: int  # runs that are not used up by the five parameters
    most: float  # FLOPs of the largest run

    def loss(self, M: float, U: float) -> float:
        return float(np.exp(log_law(self.theta, np.log(M / self.M0), np.log(U / self.D0))))

    def interval(self, M: float, U: float) -> tuple[float, float]:
        """(low, high): where the loss of one more run is expected, in 90% of the cases.

        By the delta method, as in scaling_laws.PowerLaw, for the logarithm of the loss.
        """
        x, y = np.log(M / self.M0), np.log(U / self.D0)
        g = jacobian(lambda theta: log_law(theta, x, y), self.theta)
        half = student_t(SHARE, self.dof) * self.deviation
        half *= math.sqrt(1 + float(g @ self.covariance @ g))
        return self.loss(M, U) * math.exp(-half), self.loss(M, U) * math.exp(half)

    def best_size(self, U: float) -> float:
        """The M that is best of those that, with these tokens, cost the same: alpha A M^-alpha =
        beta B U^-beta, as in scaling_laws.Parametric."""
        _, A, B, alpha, beta = np.exp(self.theta)
        return float(self.M0 * (alpha * A / (beta * B) * (U / self.D0) ** beta) ** (1 / alpha))


def log_law(theta: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """ln L at x = ln (M / M0) and y = ln (U / D0)."""
    size = theta[1] - np.exp(theta[3]) * x
    return np.logaddexp(theta[0], np.logaddexp(size, theta[2] - np.exp(theta[4]) * y))


def fit_size_law(runs: Sequence[Trained]) -> SizeLaw:
    """The law of least squares of ln L. Raises ValueError for fewer than 8 runs or 3 widths."""
    widths = len({run.width for run in runs})
    if len(runs) < 8 or widths < 3:
        raise ValueError(
            f"the table has {len(runs)} runs of {widths} widths: a law of 5 parameters needs at "
            "least 8 of 3"
        )
    M = np.array([run.flops_per_token for run in runs])
    U = np.array([worth(run.tokens, run.unique) for run in runs])
    M0, D0 = (float(np.exp(np.log(each).mean())) for each in (M, U))
    x, y, losses = np.log(M / M0), np.log(U / D0), np.log([run.bpb for run in runs])

    def residuals(theta: np.ndarray) -> np.ndarray:
        return log_law(theta, x, y) - losses

    # Start from three floors, as shares of the mean loss.
    found = []
    for floor in (0.2, 0.5, 0.8):
        shares = [floor, (1 - floor) / 2, (1 - floor) / 2]
        start = [*(np.log(shares) + losses.mean()), *np.log([0.4, 0.4])]
        found.append(least_squares(residuals, np.array(start)))
    theta = min(found, key=lambda theta: float(np.sum(residuals(theta) ** 2)))
    J = jacobian(residuals, theta)
    dof = len(runs) - len(theta)
    deviation = math.sqrt(float(np.sum(residuals(theta) ** 2)) / dof)
    most = max(run.flops_per_token * run.tokens for run in runs)
    return SizeLaw(theta, M0, D0, deviation, np.linalg.pinv(J.T @ J), dof, most)


# ---- the choice ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """A size with its tokens, and what the law says of them."""

    width: int
    tokens: float
    loss: float
    low: float
    high: float


def promise(law: SizeLaw, width: int, M: float, tokens: float, V: float) -> Choice:
    """What the law says of a size with its tokens. M: FLOPs a token. V: tokens of the text."""
    U = float(worth(tokens, V))
    return Choice(width, tokens, law.loss(M, U), *law.interval(M, U))


def consider(
    law: SizeLaw, sizes: Mapping[int, float], tokens: Mapping[int, float], V: float
) -> list[Choice]:
    """Each size with its tokens. sizes: {width: FLOPs a token}. tokens: {width: tokens}. V: tokens
    of the text.

    Raises ValueError if all of them cost far more than the runs that the law knows.
    """
    least = min(sizes[width] * tokens[width] for width in tokens)
    if least > FURTHEST * law.most:
        raise ValueError(
            f"the budget is {least:.2g} FLOP, and the sweep behind the law ends at "
            f"{law.most:.2g}: see python -m tinyfm.calc optimal {least:.2g}"
        )
    return [promise(law, width, sizes[width], n, V) for width, n in tokens.items()]


def choose(
    law: SizeLaw, sizes: Mapping[int, float], considered: Sequence[Choice], budget: Budget, V: float
) -> Choice:
    """The size of least loss. A budget of tokens sets no limit to the size: then the one for which
    this many tokens are right. V: tokens of the text.
    """
    if budget.kind != "tokens":
        return min(considered, key=lambda choice: choice.loss)
    wanted = math.log(law.best_size(float(worth(budget.amount, V))))
    return min(considered, key=lambda choice: abs(math.log(sizes[choice.width]) - wanted))
