"""Pools and targets of tiny chats, in memory."""

from __future__ import annotations

import tiny
from llmselect.pool import load_pool


def pool(count: int = 60, seed: int = 0):
    """A pool of `count` distinct chats from two sources."""
    return load_pool([{"messages": chat, "source": f"s{i % 2}"} for i, chat in enumerate(tiny.chats(count, seed))])


def target(per_group: int = 4, groups: tuple[str, ...] = ("a", "b"), seed: int = 90):
    """A target of `per_group` chats for each of `groups`."""
    from datasets import concatenate_datasets

    return concatenate_datasets(
        [load_pool([{"messages": c} for c in tiny.chats(per_group, seed + g)], group=name) for g, name in enumerate(groups)]
    )
