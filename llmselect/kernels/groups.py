"""Fair shares between groups, and turns between ranked lists."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def waterfill(k: int, sizes: Sequence[int] | np.ndarray) -> np.ndarray:
    """Shares `b [B]` of `k` over groups of `sizes [B]`: as equal as the sizes allow, summing to min(k, Σ sizes).

    In ascending order of size, b_j = min(size_j, ⌊rest / (B - j)⌋); what is left of the division goes one each to the
    largest groups.
    """
    sizes = np.asarray(sizes, np.int64)
    out, rest = np.zeros(len(sizes), np.int64), min(int(k), int(sizes.sum()))
    order = np.argsort(sizes, kind="stable")
    for j, group in enumerate(order):
        out[group] = min(int(sizes[group]), rest // (len(order) - j))
        rest -= int(out[group])
    return out


def rounds(group: np.ndarray, within: np.ndarray, between: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """All rows in rounds, each of which takes one row of every group that has rows left: every prefix has waterfill
    shares, up to the rows that its last round lacks.

    Args:
        group: `[n]` numbers 0, 1, …; a group may be empty.
        within: `[n]`, the turn of a row in its group: the smallest first.
        between: `[n]`, the place of a row in its round. Ties of both by `keys [n]`.
    """
    by_group = np.lexsort((keys, within, group))
    starts = np.searchsorted(group[by_group], np.arange(int(group.max(initial=-1)) + 1))
    turn = np.empty(len(group), np.int64)
    turn[by_group] = np.arange(len(group)) - starts[group[by_group]]
    return np.lexsort((keys, between, turn))


def apportion(k: int, weights: Sequence[float] | np.ndarray, sizes: Sequence[int] | np.ndarray) -> np.ndarray:
    """Shares `[B]` of `k` in proportion to `weights [B]` ≥ 0, at most `sizes [B]`, summing to min(k, Σ sizes).

    Largest remainder (Hamilton); what a full group cannot take is divided among the others in the same way. Ties go to the
    earlier group. Groups of weight 0 are served last, in proportion to their size.
    """
    sizes, weights = np.asarray(sizes, np.int64), np.asarray(weights, np.float64)
    out, rest = np.zeros(len(sizes), np.int64), min(int(k), int(sizes.sum()))
    while rest:
        free = sizes - out
        share = np.where(free > 0, weights, 0)
        share = share if share.sum() > 0 else free.astype(np.float64)
        quota = rest * (share / share.sum())
        more = np.minimum(np.floor(quota + 1e-9).astype(np.int64), free)
        left = np.argsort(-(quota - more), kind="stable")
        left = left[((free - more)[left] > 0) & (share[left] > 0)][: rest - int(more.sum())]
        if (quota <= free).all() or not more.sum():
            more[left] += 1
        out += more
        rest -= int(more.sum())
    return out


def round_robin(lists: Sequence[np.ndarray], k: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `k` distinct rows when the lists take turns, each giving its best row not yet taken.

    Args:
        lists: row numbers (< n), best first.

    Returns:
        rows `[≤ k]` in the order taken, and the list `[≤ k]` that gave each; fewer when the lists run out.
    """
    taken = np.zeros(n, bool)
    order, origin, at = list[int](), list[int](), [0] * len(lists)
    alive = list(range(len(lists)))
    while alive and len(order) < k:
        for which in list(alive):
            ranked = lists[which]
            while at[which] < len(ranked) and taken[ranked[at[which]]]:
                at[which] += 1
            if at[which] == len(ranked):
                alive.remove(which)
                continue
            row = int(ranked[at[which]])
            taken[row] = True
            order.append(row)
            origin.append(which)
            if len(order) == k:
                break
    return np.array(order, np.int64), np.array(origin, np.int64)
