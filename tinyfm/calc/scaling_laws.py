"""Scaling laws: what loss a budget of compute buys, and how to split it between size and data.

Kaplan et al. (2020) and Hoffmann et al. (2022, "Chinchilla") fit the loss of language models, in
nats per token of their text and tokenizer, to N parameters, D tokens and C = 6 N D FLOPs. The form
of Chinchilla's third approach (eq. 2) shows the idea:

    L(N, D) = E + A / N^alpha + B / D^beta

E is the entropy of the text, and the others are what a finite model and finite data add. At a given
C they are in balance (eq. 4) where N = G (C / 6)^(beta / (alpha + beta)), with
G = (alpha A / (beta B))^(1 / (alpha + beta)).

The laws disagree: at Chinchilla's own budget, its published third fit asks for 93 tokens a
parameter and its other two for about 20. Besiroglu et al. (2024) fit that data again and get 18.

For one's own runs, `fit` draws two curves through (C, loss):

    power law   L = E + a C^-b
    BNSL        L = E + a C^-b (1 + (C / d)^(1 / f))^(-c f)      Caballero et al. 2022, one break

the second for when the slope changes from b to b + c around C = d. Left out: laws of other
quantities than loss, and of repeated data.
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
    """How a law spends a budget."""

    law: str
    parameters: float
    tokens: float


@dataclass(frozen=True)
class Parametric:
    """L = E + A / N^alpha + B / D^beta, with N all parameters."""

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
        """The N and D of least loss among those with 6 N D = flops."""
        total = self.alpha + self.beta
        G = (self.alpha * self.A / (self.beta * self.B)) ** (1 / total)
        N = G * (flops / 6) ** (self.beta / total)
        return Optimum(self.law, N, flops / 6 / N)


@dataclass(frozen=True)
class Line:
    """N grows as C^exponent through one point of it: N0 at C0."""

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
    Line("Chinchilla 1", 0.50, 1.23e22, 1e10),  # table 2; its line through a row of table 3,
    Line("Chinchilla 2", 0.49, 1.32e22, 1e10),  # or of table A3
    CHINCHILLA,
    UNROUNDED,
    REFIT,
)


def kaplan_loss(N: float = math.inf, D: float = math.inf) -> float:
    """Loss where only N (without embeddings) or only D limits it: Kaplan et al., eqs. 1.1, 1.2."""
    if math.isinf(N) == math.isinf(D):
        raise ValueError("give either N or D: each law holds where the other does not limit")
    return (8.8e13 / N) ** 0.076 if math.isinf(D) else (5.4e13 / D) ** 0.095


def kaplan_compute_loss(flops: float) -> float:
    """Loss of a budget that is well spent: Kaplan et al., eq. 1.3."""
    return (3.1e8 * PETAFLOP_DAY / flops) ** 0.050


def optima_text(flops: float) -> str:
    """What each law would do with a budget, and what the refit expects of it. One line a law."""
    if not 0 < flops < math.inf:
        raise ValueError(f"a budget of {flops} FLOPs; it must be above 0, such as 1e21")
    lines = [f"{flops:.4g} FLOPs = 6 N D", f"{'':36}{'N':>10}{'D':>10}{'D / N':>8}{'loss':>7}"]
    for law in LAWS:
        best = law.optimum(flops)
        N, D = best.parameters, best.tokens
        lines.append(f"{law.law:36}{N:10.3g}{D:10.3g}{D / N:8.3g}{REFIT.loss(N, D):7.3f}")
    return "\n".join([*lines, "losses by the refit, in nats per token of Chinchilla's text"])


# ---- fitting ------------------------------------------------------------------------------------


def least_squares(residuals: Callable[[np.ndarray], np.ndarray], theta: np.ndarray) -> np.ndarray:
    """A minimum of the sum of squares near theta (Levenberg 1944, Marquardt 1963)."""
    r, damping = residuals(theta), 1e-2
    for _ in range(200):
        steps = 1e-6 * np.eye(len(theta))
        J = np.stack([(residuals(theta + h) - residuals(theta - h)) / 2e-6 for h in steps], axis=1)
        A = J.T @ J
        A += damping * np.diag(np.diag(A)) + 1e-12 * np.eye(len(A))
        moved = theta - np.linalg.solve(A, J.T @ r)
        new = residuals(moved)
        if not new @ new < r @ r:  # not a number is no improvement either
            damping *= 4
            if damping > 1e10:
                break
            continue
        done = r @ r - new @ new < 1e-12 * (r @ r)
        theta, r, damping = moved, new, damping / 3
        if done:
            break
    return theta


def power_law(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """ln L at x = ln C - a centre, for theta = (ln E, ln a, ln b)."""
    return np.logaddexp(theta[0], theta[1] - np.exp(theta[2]) * x)


def broken_power_law(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """ln L for theta = (ln E, ln a, ln b, ln d - the centre, c, ln f)."""
    f = np.exp(theta[5])
    bend = -theta[4] * f * np.logaddexp(0, (x - theta[3]) / f)
    return np.logaddexp(theta[0], theta[1] - np.exp(theta[2]) * x + bend)


FORMS = {"power law": (power_law, 3), "BNSL": (broken_power_law, 6)}
PRIOR = 2e-3  # weight of the priors against a residual of ln L: what 0.2% of noise would give


@dataclass(frozen=True)
class Fitted:
    """A curve through one's runs, and those of the bootstrap around it."""

    form: str
    centre: float  # of ln C
    theta: np.ndarray
    replicas: np.ndarray  # (R, parameters)

    def loss(self, flops: float | np.ndarray) -> np.ndarray:
        return np.exp(FORMS[self.form][0](self.theta, np.log(flops) - self.centre))

    def interval(self, flops: float | np.ndarray, share: float = 0.9) -> np.ndarray:
        """The middle `share` of the replicas' losses: (low, high)."""
        curve, x = FORMS[self.form][0], np.log(flops) - self.centre
        losses = np.exp([curve(theta, x) for theta in self.replicas])
        return np.quantile(losses, [(1 - share) / 2, (1 + share) / 2], axis=0)

    def formula(self) -> str:
        E, b = np.exp(self.theta[0]), np.exp(self.theta[2])
        low, high = np.quantile(np.exp(self.replicas[:, 2]), [0.05, 0.95])
        a = np.exp(self.theta[1] + b * self.centre)
        text = f"L = {E:.4g} + {a:.4g} C^-{b:.4g} [{low:.3g} to {high:.3g}]"
        if self.form == "BNSL":
            d, c, f = np.exp(self.theta[3] + self.centre), self.theta[4], np.exp(self.theta[5])
            text += f" (1 + (C / {d:.3g})^{1 / f:.3g})^({-c * f:.3g})"
        return text


def minimise(form: str, x: np.ndarray, y: np.ndarray, starts: list[np.ndarray]) -> np.ndarray:
    """The best theta for ln losses y at x from any of the starts.

    Weak priors stand for what few runs do not tell: a floor E of about half the least loss, a
    slope near 0.1, and, of a break, that it is in the middle, gentle, and small.
    """
    curve, size = FORMS[form]
    middle, spread = middle_of(x, y)[:size], spread_of(x)[:size]

    def residuals(theta):
        return np.concatenate([curve(theta, x) - y, PRIOR * (theta - middle) / spread])

    found = [least_squares(residuals, start) for start in starts]
    return min(found, key=lambda theta: float(np.sum(residuals(theta) ** 2)))


def middle_of(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.array([y.min() - math.log(2), y.mean() - math.log(2), math.log(0.1), 0.0, 0.0, 0.0])


def spread_of(x: np.ndarray) -> np.ndarray:
    return np.array([1.0, 3.0, 1.0, np.ptp(x) / 4, 0.1, 0.5])


def fit_law(
    form: str, flops: np.ndarray, losses: np.ndarray, replicas: int = 100, seed: int = 0
) -> Fitted:
    """A "power law" or "BNSL" through losses (n,) at flops (n,), with a residual bootstrap.

    A replica is fitted to the curve plus residuals drawn anew, made larger by sqrt(n / (n - p)), as
    p parameters took their part of the noise. Raises ValueError below 4 different budgets.
    """
    if len(np.unique(flops)) < 4:
        raise ValueError(f"{len(np.unique(flops))} different budgets; a curve needs at least 4")
    curve, size = FORMS[form]
    centre, n = float(np.log(flops).mean()), len(flops)
    x, y = np.log(flops) - centre, np.log(losses)
    moves = [(low, slope) for low in (-1.5, 0.0, 0.5) for slope in (-1.0, 0.0, 1.0)]
    starts = [middle_of(x, y)[:size] + np.array([low, 0, slope, 0, 0, 0])[:size]
              for low, slope in moves]  # fmt: skip
    theta = minimise(form, x, y, starts)
    fitted = curve(theta, x)
    left = (y - fitted) * math.sqrt(n / max(1, n - size))
    random = np.random.default_rng(seed)
    others = [minimise(form, x, fitted + random.choice(left, n), [theta]) for _ in range(replicas)]
    return Fitted(form, centre, theta, np.array(others))
