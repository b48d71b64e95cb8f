"""Orthogonal matching pursuit: few rows whose span holds a vector.

Paper: Pati, Rezaiifar, Krishnaprasad, Asilomar 1993; for subsets of training data GradMatch, arXiv 2103.00123.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from llmselect.kernels.rows import BLOCK, HELD, Rows

SPENT = 1e-6  # share of the vector below which what is left is rounding


def pursue(x: Rows, members: np.ndarray, aim: np.ndarray, count: int, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`count` of the rows `members` of `x`, each the one with the largest ⟨x_i, r⟩, r what the span of those before leaves of
    `aim [d]`; and the share ‖r‖ / ‖aim‖ that is left after each. When nothing is left, `aim` is matched anew by other rows.

    Products are compared in float32, equal ones by ascending key. Time O(count · members · d), memory O(count · d) and the
    members, where they are at most 256 MB; else they are read anew for every row taken.
    """
    order, left = np.empty(count, np.int64), np.empty(count)
    free, whole = np.ones(len(members), bool), float(np.linalg.norm(aim))
    rest, basis = aim.copy(), np.zeros((0, len(aim)))
    held = [x.gather(members)] if len(members) * len(aim) <= HELD else None
    for i in range(count):
        inner = np.concatenate([part @ rest for part in held or _parts(x, members)])
        inner = np.where(free, inner.astype(np.float32), -np.inf)
        tied = np.flatnonzero(inner == inner.max())
        best = int(tied[keys[members[tied]].argmin()])
        free[best], order[i] = False, members[best]
        fresh = x.gather(order[i : i + 1])[0]
        length = np.linalg.norm(fresh)
        for _ in range(2):  # once more, or rounding leaves a part of the basis
            fresh = fresh - basis.T @ (basis @ fresh)
        if np.linalg.norm(fresh) > SPENT * length:
            basis = np.concatenate([basis, fresh[None] / np.linalg.norm(fresh)])
            rest = rest - basis[-1] * (basis[-1] @ rest)
        left[i] = np.linalg.norm(rest) / whole if whole else 0.0
        if left[i] <= SPENT or len(basis) == len(aim):
            rest, basis = aim.copy(), basis[:0]
    return order, left


def _parts(x: Rows, members: np.ndarray) -> Iterator[np.ndarray]:
    return (x.gather(members[at : at + BLOCK]) for at in range(0, len(members), BLOCK))
