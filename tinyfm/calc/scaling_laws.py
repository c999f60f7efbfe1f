"""Scaling laws: what loss a budget of compute buys, and how to divide it between size and data.

Kaplan et al. (2020) and Hoffmann et al. (2022, "Chinchilla") fit the loss of language models, in
nats per token of their text and tokenizer, to N parameters, D tokens and C = 6 N D FLOPs. The form
of Chinchilla's third approach (eq. 2) shows the idea:

    L(N, D) = E + A / N^alpha + B / D^beta

E is the entropy of the text; the other two terms are the cost of a finite model and of finite data.
For a given C the loss is least (eq. 4) at N = G (C / 6)^(beta / (alpha + beta)), where
G = (alpha A / (beta B))^(1 / (alpha + beta)).

The laws disagree: at Chinchilla's own budget, its published third fit recommends 93 tokens a
parameter and its other two about 20. Besiroglu et al. (2024) repeat the third fit on the same data
and get 18.

For your own runs, fit_power_law draws a curve of three parameters through (C, loss):

    power law   L = E + A C^-alpha

A law with more of them is not better. This one (Caballero et al. 2022, one break) has six, and its
slope changes from b to b + c around C = d:

    BNSL        L = E + a C^-b (1 + (C / d)^(1 / f))^(-c f)

Eight points leave most of that open, so that a prior decides: fit_broken_law shows how much.
size_law.py has a law of size and data for runs of your own, which knows of repeated data. Left out:
laws of other quantities than loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

PETAFLOP_DAY = 8.64e19  # FLOPs

# ---- published laws -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Optimum:
    """The size and the data that a law recommends for a budget."""

    law: str
    parameters: float
    tokens: float


@dataclass(frozen=True)
class Parametric:
    """L = E + A / N^alpha + B / D^beta, where N counts all parameters."""

    law: str
    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, N: float, D: float) -> float:
        """Nats per token."""
        return self.E + self.A / N**self.alpha + self.B / D**self.beta

    def optimum(self, flops: float) -> Optimum:
        """The N and D of least loss among all with 6 N D = flops."""
        total = self.alpha + self.beta
        G = (self.alpha * self.A / (self.beta * self.B)) ** (1 / total)
        N = G * (flops / 6) ** (self.beta / total)
        return Optimum(self.law, N, flops / 6 / N)


@dataclass(frozen=True)
class Line:
    """N = N0 (C / C0)^exponent: a straight line in log-log axes, through the point (C0, N0)."""

    law: str
    exponent: float
    C0: float
    N0: float

    def optimum(self, flops: float) -> Optimum:
        N = self.N0 * (flops / self.C0) ** self.exponent
        return Optimum(self.law, N, flops / 6 / N)


CHINCHILLA = Parametric("Chinchilla 3, as printed", 1.69, 406.4, 410.7, 0.34, 0.28)
UNROUNDED = Parametric("Chinchilla 3, exponents to 4 places", 1.69, 406.4, 410.7, 0.3392, 0.2849)
REFIT = Parametric("Besiroglu et al.'s refit", 1.8172, 482.01, 2085.43, 0.3478, 0.3658)
LAWS = (
    # Kaplan et al., table 6: N = 1.3e9 C_min^0.73, with C_min in PF-days and N without embeddings.
    # C_min is the compute at a batch size far below the critical one. At the critical one, where
    # they advise to train, the same loss takes twice as many tokens: C = 2 C_min (eq. 6.7). That
    # is how the table's D = 2e10 C_min^0.27 is meant, which 6 N D = 2 C_min gives within 11%.
    Line("Kaplan", 0.73, 2 * PETAFLOP_DAY, 1.3e9),
    # Hoffmann et al.: exponents of table 2, through a row of table 3 and of table A3.
    Line("Chinchilla 1", 0.50, 1.23e22, 1e10),
    Line("Chinchilla 2", 0.49, 1.32e22, 1e10),
    CHINCHILLA,
    UNROUNDED,
    REFIT,
)


def optima_text(flops: float) -> str:
    """A line for each law: how it would spend a budget, and the loss that the refit predicts.

    Raises ValueError for a budget that is not above 0 and finite.
    """
    if not 0 < flops < math.inf:
        raise ValueError(f"the budget is {flops} FLOPs; it must be above 0, such as 1e21")
    lines = [f"{flops:.4g} FLOPs = 6 N D", f"{'':36}{'N':>10}{'D':>10}{'D / N':>8}{'loss':>7}"]
    for law in LAWS:
        best = law.optimum(flops)
        N = best.parameters
        D = best.tokens
        lines.append(f"{law.law:36}{N:10.3g}{D:10.3g}{D / N:8.3g}{REFIT.loss(N, D):7.3f}")
    lines.append("losses by the refit, in nats per token of Chinchilla's text")
    lines.append("Kaplan: N without embeddings, at the critical batch size, where C = 2 C_min")
    return "\n".join(lines)


# ---- a law of your own runs ---------------------------------------------------------------------

EXPONENTS = np.geomspace(0.01, 3, 300)  # values of alpha to try, 2% apart
SHARE = 0.9  # of the truths that an interval is meant to contain


def student_t(share: float, dof: int) -> float:
    """Half width of the middle `share` of Student's t, to 0.5% from 2 degrees of freedom on.

    Abramowitz & Stegun 1964, 26.7.5.
    """
    z = NormalDist().inv_cdf((1 + share) / 2)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / dof**i for i, term in enumerate(terms))


@dataclass(frozen=True)
class PowerLaw:
    """L = E + A (C / C0)^-alpha, fitted to the losses of n budgets."""

    C0: float  # geometric mean of the budgets
    E: float
    A: float
    alpha: float
    alphas: tuple[float, float]  # interval of alpha
    deviation: float  # standard deviation of a loss from the law
    dof: int  # degrees of freedom that it was estimated with: n - 3
    covariance: np.ndarray  # (3, 3) of (E, A, alpha), for a deviation of 1

    def loss(self, flops: float | np.ndarray) -> np.ndarray:
        """Predicted loss at these FLOPs."""
        return self.E + self.A * (np.asarray(flops) / self.C0) ** -self.alpha

    def interval(self, flops: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(low, high): where a new measurement at these FLOPs is expected, in 90% of the cases.

        It has two sources of error: the law's, by the delta method, and its own, which is like
        that of the points. So it holds for a mean over as many seeds as theirs. Simulated sweeps of
        eight sizes test it; a bootstrap of their residuals contained 82 to 87% of the truths.
        """
        g = gradient(np.log(np.asarray(flops) / self.C0), self.A, self.alpha)  # (.., 3)
        variance = 1 + np.einsum("...i,ij,...j->...", g, self.covariance, g)
        half = student_t(SHARE, self.dof) * self.deviation * np.sqrt(variance)
        return self.loss(flops) - half, self.loss(flops) + half

    def formula(self) -> str:
        """The law as text, with the interval of the exponent."""
        a = self.A * self.C0**self.alpha
        low, high = self.alphas
        return f"L = {self.E:.4g} + {a:.4g} C^-{self.alpha:.3g}, exponent {low:.3g} to {high:.3g}"


def gradient(x: np.ndarray, A: float, alpha: float) -> np.ndarray:
    """Derivatives of E + A e^(-alpha x) by E, A and alpha: (.., 3)."""
    u = np.exp(-alpha * x)
    return np.stack([np.ones_like(u), u, -A * x * u], axis=-1)


def regress(
    x: np.ndarray, losses: np.ndarray, alphas: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """E and A of the best E + A e^(-alpha x) for each alpha, and its sum of squared residuals.

    x, losses: (n,), the points. alphas: (m,), the exponents to try. Returns three arrays (m,). The
    best is that of least squares.
    """
    u = np.exp(-alphas[:, None] * x)  # (alphas, n)
    mean = u.mean(1, keepdims=True)
    A = (u - mean) @ (losses - losses.mean()) / ((u - mean) ** 2).sum(1)
    E = losses.mean() - A * mean[:, 0]
    squares = ((losses - E[:, None] - A[:, None] * u) ** 2).sum(1)
    return E, A, squares


def fit_power_law(flops: np.ndarray, losses: np.ndarray) -> PowerLaw:
    """The law of least squares through losses (n,) at flops (n,), one point for each budget.

    For a given alpha the law is a straight line in u = (C / C0)^-alpha, so E and A are those of a
    linear regression. What is left is to try all exponents. There is no prior: E may come out
    below 0, where the points cannot tell a floor from a slow decline.

    Raises ValueError for fewer than 5 different budgets.
    """
    n = len(flops)
    budgets = len(np.unique(flops))
    if budgets < 5:
        raise ValueError(f"{budgets} different budgets; a law of 3 parameters needs at least 5")
    C0 = float(np.exp(np.log(flops).mean()))
    x = np.log(flops / C0)

    # The best exponent of a coarse grid, then of a fine one around it.
    _, _, squares = regress(x, losses, EXPONENTS)
    best = int(squares.argmin())
    around = EXPONENTS[max(best - 1, 0) : best + 2]
    fine = np.linspace(around[0], around[-1], 200)
    E, A, fine_squares = regress(x, losses, fine)
    best = int(fine_squares.argmin())

    # Exponents that fit hardly worse: an F test of each against the best.
    dof = n - 3
    limit = fine_squares[best] * (1 + student_t(SHARE, dof) ** 2 / dof)
    likely = [fine[best], *EXPONENTS[squares <= limit]]
    J = gradient(x, A[best], fine[best])  # (n, 3)
    return PowerLaw(
        C0=C0,
        E=float(E[best]),
        A=float(A[best]),
        alpha=float(fine[best]),
        alphas=(float(min(likely)), float(max(likely))),
        deviation=math.sqrt(fine_squares[best] / dof),
        dof=dof,
        covariance=np.linalg.pinv(J.T @ J),
    )


# ---- a law with more parameters than the points can determine -----------------------------------


def jacobian(function: Callable[[np.ndarray], np.ndarray], theta: np.ndarray) -> np.ndarray:
    """Derivatives of a function (..) by theta (m,), by central differences: (.., m)."""
    steps = 1e-6 * np.eye(len(theta))
    return np.stack([(function(theta + h) - function(theta - h)) / 2e-6 for h in steps], axis=-1)


def least_squares(residuals: Callable[[np.ndarray], np.ndarray], theta: np.ndarray) -> np.ndarray:
    """A local minimum of the sum of squared residuals near theta.

    Gauss-Newton steps with adaptive damping (Levenberg 1944, Marquardt 1963).
    """
    r = residuals(theta)
    damping = 1e-2
    for _ in range(200):
        # A damped Gauss-Newton step.
        J = jacobian(residuals, theta)
        A = J.T @ J
        A += damping * np.diag(np.diag(A)) + 1e-12 * np.eye(len(A))
        moved = theta - np.linalg.solve(A, J.T @ r)
        new = residuals(moved)
        if not new @ new < r @ r:  # written like this, NaN is no improvement either
            damping *= 4
            if damping > 1e10:
                break
            continue
        converged = r @ r - new @ new < 1e-12 * (r @ r)
        theta = moved
        r = new
        damping /= 3
        if converged:
            break
    return theta


def broken_power_law(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """ln L at x = ln C - centre, for theta = (ln E, ln a, ln b, ln d - centre, c, ln f)."""
    f = np.exp(theta[5])
    bend = -theta[4] * f * np.logaddexp(0, (x - theta[3]) / f)
    return np.logaddexp(theta[0], theta[1] - np.exp(theta[2]) * x + bend)


PRIORS = (2e-2, 2e-3, 2e-4)  # a prior's weight against a residual of ln L: noise of 2% to 0.02%


def fit_broken_law(
    flops: np.ndarray, losses: np.ndarray, prior: float
) -> Callable[[float | np.ndarray], np.ndarray]:
    """BNSL through losses (n,) at flops (n,), as a function from FLOPs to loss.

    The prior expects a floor E of half the least loss, a slope b of 0.1, and a break in the middle
    that changes no slope. The larger its weight, the closer the law stays to that.
    """
    centre = np.log(flops).mean()
    x = np.log(flops) - centre
    y = np.log(losses)
    half = math.log(2)
    mean = np.array([y.min() - half, y.mean() - half, math.log(0.1), 0.0, 0.0, 0.0])
    deviation = np.array([1.0, 3.0, 1.0, np.ptp(x) / 4, 0.1, 0.5])

    def residuals(theta: np.ndarray) -> np.ndarray:
        return np.concatenate([broken_power_law(theta, x) - y, prior * (theta - mean) / deviation])

    # Start from nine places around the prior: three floors times three slopes.
    found = []
    for floor in (-1.5, 0.0, 0.5):
        for slope in (-1.0, 0.0, 1.0):
            start = mean + np.array([floor, 0, slope, 0, 0, 0])
            found.append(least_squares(residuals, start))
    theta = min(found, key=lambda theta: float(np.sum(residuals(theta) ** 2)))
    return lambda flops: np.exp(broken_power_law(theta, np.log(flops) - centre))
