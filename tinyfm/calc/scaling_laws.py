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

For your own runs, fit_law draws one of two curves through (C, loss):

    power law   L = E + a C^-b
    BNSL        L = E + a C^-b (1 + (C / d)^(1 / f))^(-c f)      Caballero et al. 2022, one break

In the second the slope changes from b to b + c around C = d. Left out: laws of other quantities
than loss, and of repeated data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

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
    # Kaplan et al., table 6: N = 1.3e9 C^0.73, with C in PF-days and N without embeddings.
    Line("Kaplan", 0.73, PETAFLOP_DAY, 1.3e9),
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
    return "\n".join(lines)


# ---- fitting ------------------------------------------------------------------------------------


def least_squares(residuals: Callable[[np.ndarray], np.ndarray], theta: np.ndarray) -> np.ndarray:
    """A local minimum of the sum of squared residuals near theta.

    Gauss-Newton steps with adaptive damping (Levenberg 1944, Marquardt 1963).
    """
    r = residuals(theta)
    damping = 1e-2
    for _ in range(200):
        # The Jacobian, by central differences.
        steps = 1e-6 * np.eye(len(theta))
        columns = [(residuals(theta + h) - residuals(theta - h)) / 2e-6 for h in steps]
        J = np.stack(columns, axis=1)
        # A damped Gauss-Newton step.
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


def power_law(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """ln L at x = ln C - centre, for theta = (ln E, ln a, ln b)."""
    return np.logaddexp(theta[0], theta[1] - np.exp(theta[2]) * x)


def broken_power_law(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """ln L at x = ln C - centre, for theta = (ln E, ln a, ln b, ln d - centre, c, ln f)."""
    f = np.exp(theta[5])
    bend = -theta[4] * f * np.logaddexp(0, (x - theta[3]) / f)
    return np.logaddexp(theta[0], theta[1] - np.exp(theta[2]) * x + bend)


FORMS = {"power law": (power_law, 3), "BNSL": (broken_power_law, 6)}  # (curve, parameters)
PRIOR = 2e-3  # weight of the priors against a residual of ln L: as noise of 0.2% would have


@dataclass(frozen=True)
class FittedLaw:
    """A curve through your runs, and the curves of its bootstrap."""

    form: str
    centre: float  # mean of ln C
    theta: np.ndarray
    replicas: np.ndarray  # (R, number of parameters): theta of each replica

    def loss(self, flops: float | np.ndarray) -> np.ndarray:
        """Predicted loss at these FLOPs."""
        curve, _ = FORMS[self.form]
        return np.exp(curve(self.theta, np.log(flops) - self.centre))

    def interval(self, flops: float | np.ndarray, share: float = 0.9) -> np.ndarray:
        """The middle `share` of the losses that the replicas predict: (low, high)."""
        curve, _ = FORMS[self.form]
        x = np.log(flops) - self.centre
        losses = np.exp([curve(theta, x) for theta in self.replicas])
        return np.quantile(losses, [(1 - share) / 2, (1 + share) / 2], axis=0)

    def formula(self) -> str:
        """The curve as text, with a 90% interval of the exponent b."""
        E = np.exp(self.theta[0])
        b = np.exp(self.theta[2])
        a = np.exp(self.theta[1] + b * self.centre)
        low, high = np.quantile(np.exp(self.replicas[:, 2]), [0.05, 0.95])
        text = f"L = {E:.4g} + {a:.4g} C^-{b:.4g} [{low:.3g} to {high:.3g}]"
        if self.form == "BNSL":
            d = np.exp(self.theta[3] + self.centre)
            c = self.theta[4]
            f = np.exp(self.theta[5])
            text += f" (1 + (C / {d:.3g})^{1 / f:.3g})^({-c * f:.3g})"
        return text


def prior_mean(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Expected theta for ln losses y: a floor E of half the least loss, and a slope b of 0.1.

    A break is expected in the middle, with c = 0 and f = 1: no change of slope, gently.
    """
    return np.array([y.min() - math.log(2), y.mean() - math.log(2), math.log(0.1), 0.0, 0.0, 0.0])


def prior_deviation(x: np.ndarray) -> np.ndarray:
    """Standard deviations of theta around prior_mean."""
    return np.array([1.0, 3.0, 1.0, np.ptp(x) / 4, 0.1, 0.5])


def best_theta(form: str, x: np.ndarray, y: np.ndarray, starts: list[np.ndarray]) -> np.ndarray:
    """The best theta for ln losses y at x that least_squares finds from any of the starts.

    Weak priors decide what a few runs leave open.
    """
    curve, size = FORMS[form]
    mean = prior_mean(x, y)[:size]
    deviation = prior_deviation(x)[:size]

    def residuals(theta: np.ndarray) -> np.ndarray:
        return np.concatenate([curve(theta, x) - y, PRIOR * (theta - mean) / deviation])

    found = [least_squares(residuals, start) for start in starts]
    return min(found, key=lambda theta: float(np.sum(residuals(theta) ** 2)))


def fit_law(
    form: str, flops: np.ndarray, losses: np.ndarray, replicas: int = 100, seed: int = 0
) -> FittedLaw:
    """Fit a "power law" or "BNSL" to losses (n,) at flops (n,), with a residual bootstrap.

    Each replica is a fit to the curve plus residuals that are drawn with replacement. They are
    scaled by sqrt(n / (n - p)), because p parameters have absorbed part of the noise. Raises
    ValueError for fewer than 4 different budgets.
    """
    budgets = len(np.unique(flops))
    if budgets < 4:
        raise ValueError(f"{budgets} different budgets; a curve needs at least 4")
    curve, size = FORMS[form]
    n = len(flops)
    centre = float(np.log(flops).mean())
    x = np.log(flops) - centre
    y = np.log(losses)

    # Start from nine places around the prior: three floors times three slopes.
    starts = []
    for floor in (-1.5, 0.0, 0.5):
        for slope in (-1.0, 0.0, 1.0):
            move = np.array([floor, 0, slope, 0, 0, 0])
            starts.append(prior_mean(x, y)[:size] + move[:size])
    theta = best_theta(form, x, y, starts)

    # Bootstrap.
    fitted = curve(theta, x)
    residuals = (y - fitted) * math.sqrt(n / max(1, n - size))
    random = np.random.default_rng(seed)
    others = []
    for _ in range(replicas):
        drawn = fitted + random.choice(residuals, n)
        others.append(best_theta(form, x, drawn, [theta]))
    return FittedLaw(form, centre, theta, np.array(others))
