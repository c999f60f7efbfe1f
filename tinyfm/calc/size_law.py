"""A law of loss over size and data, fitted to a table of runs.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from tinyfm.calc.scaling_laws import SHARE, jacobian, least_squares, student_t

REPEATS = 15.4  # R


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
    """The runs of a table."""
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
    return SizeLaw(theta, M0, D0, deviation, np.linalg.pinv(J.T @ J), dof)
