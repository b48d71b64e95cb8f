"""Optimal transport between two uniform distributions, exact (POT), or entropic for unique dual potentials."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmselect.errors import LlmselectError, require

log = logging.getLogger("llmselect")
ROUNDS = 200  # of a hundred steps each, per ε
ITERATIONS = 10_000_000  # POT's own 100,000 stop short of the optimum at a few thousand points, with only a warning


@dataclass(frozen=True, eq=False)
class Transport:
    """`value` = min ⟨P, C⟩ and the dual potentials `source [a]`, `target [b]`: source_i + target_j ≤ C_ij when exact."""

    value: float
    source: np.ndarray
    target: np.ndarray


def exact(cost: np.ndarray, start: tuple[np.ndarray, np.ndarray] | None = None) -> Transport:
    """The network simplex on `cost [a, b]` with uniform marginals, optionally from potentials near the optimum.

    Errors: `LlmselectError` when the solver did not reach the optimum.
    """
    ot: Any = require("ot", "ot")
    a, b = (np.full(size, 1 / size) for size in cost.shape)
    _, told = ot.emd(a, b, np.ascontiguousarray(cost, np.float64), numItermax=ITERATIONS, log=True, potentials_init=start)
    if told["warning"] is not None:
        raise LlmselectError(f"optimal transport {cost.shape} stopped short of the optimum: {told['warning']}")
    return Transport(float(told["cost"]), told["u"], told["v"])


def entropic(cost: np.ndarray, epsilon: float = 0.05, tolerance: float = 1e-4) -> Transport:
    """Sinkhorn with uniform marginals, ε annealed down to `epsilon` times the mean of `cost [a, b]`.

    Stabilised (Schmitzer, arXiv 1610.06519): products with a kernel whose scalings are moved into the potentials when they
    grow, so that a step is two matrix-vector products. POT's solver in the log domain takes exponentials of the whole matrix in
    every step, which for many small layers is most of a selection's time. `tolerance` bounds the L1 error of the marginals.

    The potentials are unique up to a constant, which those of the exact problem are not: they rank rows. `source` has mean 0.
    As ε → 0 the value tends to the exact one.
    """
    a, b = (np.full(size, 1 / size) for size in cost.shape)
    mean = max(float(cost.mean()), 1e-300)
    f, g, step = np.zeros(len(a)), np.zeros(len(b)), max(1.0, epsilon)
    plan, error = np.outer(a, b), np.inf
    while True:
        step = max(step / 2, epsilon)
        wanted = tolerance if step == epsilon else 0.1
        for _ in range(ROUNDS):
            f, g, plan, error = _scaled(cost, f, g, a, b, step * mean)
            if error < wanted:
                break
        if step == epsilon:
            break
    if not error < 10 * tolerance:
        log.warning("Sinkhorn at epsilon %g stopped with marginals off by %.1e", epsilon, error)
    return Transport(float((plan * cost).sum()), f - f.mean(), g + f.mean())


def _scaled(cost: np.ndarray, f: np.ndarray, g: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> tuple[Any, ...]:
    """Up to a hundred scaling steps from potentials f, g; then new potentials, the plan, and the error of its marginals."""
    f = _smallest(cost - g, scale) + scale * np.log(a)  # one exact step, so that no row of the kernel is all zero
    g = _smallest((cost - f[:, None]).T, scale) + scale * np.log(b)
    kernel = np.exp((f[:, None] + g - cost) / scale)
    u, v = np.ones(len(a)), np.ones(len(b))
    for _ in range(100):
        u = a / np.maximum(kernel @ v, 1e-200)
        v = b / np.maximum(u @ kernel, 1e-200)
        if max(abs(np.log(u)).max(), abs(np.log(v)).max()) > 30:
            break
    plan = u[:, None] * kernel * v
    return f + scale * np.log(u), g + scale * np.log(v), plan, float(abs(plan.sum(1) - a).sum() + abs(plan.sum(0) - b).sum())


def _smallest(matrix: np.ndarray, scale: float) -> np.ndarray:
    """-ε log Σ_j exp(-M_ij / ε) of each row: a smooth minimum."""
    least = matrix.min(1)
    return least - scale * np.log(np.exp((least[:, None] - matrix) / scale).sum(1))
