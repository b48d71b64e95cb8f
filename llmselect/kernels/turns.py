"""Turns between queries: each gives its best row not yet taken, from lists that are made longer only when they run out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llmselect.kernels.topk import Best


def queries_in_turn(
    best: Callable[[int], tuple[Best, np.ndarray]], group: np.ndarray, k: int, n: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`k` rows, the query of each, and the largest value `[n]` of every row: turns go from group to group and, inside a
    group, from query to query. `best(count)` gives each query's `count` best rows with their values and each row's largest."""
    place = np.empty(len(group), np.int64)
    for g in np.unique(group):
        place[group == g] = np.arange((group == g).sum())
    count = min(n, max(64, -(-4 * k // len(group))))
    while True:
        lists, largest = best(count)
        order, query, short = take_turns([rows for rows, _ in lists], group, place, k, n)
        if count == n or not short:
            return order, query, largest
        count = min(n, 2 * count)  # a list ran out before its turn ended: look deeper


def take_turns(lists: list[np.ndarray], group: np.ndarray, place: np.ndarray, k: int,
               n: int) -> tuple[np.ndarray, np.ndarray, bool]:  # fmt: skip
    """Round robin in which each group has one turn per round and its queries share those turns in rotation.

    Returns rows, the query of each, and whether a list ended although the pool has more rows than it holds.
    """
    taken, at = np.zeros(n, bool), np.zeros(len(lists), np.int64)
    members = [np.flatnonzero(group == g)[np.argsort(place[group == g])] for g in np.unique(group)]
    turn, order, query = np.zeros(len(members), np.int64), list[int](), list[int]()
    while len(order) < min(k, n):
        for g, queries in enumerate(members):
            q = int(queries[turn[g] % len(queries)])
            turn[g] += 1
            ranked = lists[q]
            while at[q] < len(ranked) and taken[ranked[at[q]]]:
                at[q] += 1
            if at[q] == len(ranked):
                return np.array(order, np.int64), np.array(query, np.int64), True
            taken[ranked[at[q]]] = True
            order.append(int(ranked[at[q]]))
            query.append(q)
            if len(order) == min(k, n):
                break
    return np.array(order, np.int64), np.array(query, np.int64), False
