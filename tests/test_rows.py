"""Rows in an order of their own against the same rows put in that order, and rows held in memory."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmselect.arrays import StoredArray
from llmselect.errors import LlmselectError
from llmselect.kernels import rows as module
from llmselect.kernels.rows import Held, Rows
from llmselect.store import FeatureStore


def stored(folder, x: np.ndarray, shard_rows: int) -> StoredArray:
    store = FeatureStore(folder)
    feature = store.create("x", {"arrays": {"value": ["float16", [x.shape[1]]]}, "shard_rows": shard_rows}, list(map(str, x)))
    for shard in range(feature.shards):
        feature.write(shard, {"value": x[feature.rows(shard)]})
    return store["x"]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 60), dim=st.sampled_from([None, 3]), ahead=st.sampled_from([1, 100, 999]))
def test_they_are_the_rows_in_that_order(tmp_path_factory, seed, n, dim, ahead):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 5)).astype(np.float16)
    x[rng.random(n) < 0.2] = 0
    order, some = rng.permutation(n), rng.integers(0, n, 9)
    asked = Rows(stored(tmp_path_factory.mktemp("store"), x, 7), dim=dim, order=order)
    plain = Rows(x[order], dim=dim)
    assert asked.shape == plain.shape
    with mock.patch.object(module, "AHEAD", ahead):
        for made, wanted in ((asked.blocks(8), plain.blocks(8)), (asked.rough_blocks(8), plain.rough_blocks(8))):
            for (start, block), (first, other) in zip(made, wanted, strict=True):
                assert start == first
                assert np.array_equal(block, other)
    assert np.array_equal(asked[some], plain[some])
    assert np.array_equal(asked[3:20], plain[3:20])
    assert np.array_equal(asked.gather(some), plain[some])


def test_a_shard_is_read_once_for_many_blocks(tmp_path, monkeypatch):
    x = np.random.default_rng(0).standard_normal((640, 4)).astype(np.float16)
    asked, opened = Rows(stored(tmp_path, x, 10), order=np.random.default_rng(1).permutation(640)), list[int]()
    shard = asked.x._shard
    monkeypatch.setattr(asked.x, "_shard", lambda one: opened.append(one) or shard(one))
    assert len(list(asked.blocks(8))) == 80
    assert sorted(opened) == list(range(64))
    opened.clear()
    monkeypatch.setattr(module, "BLOCK", 40)
    asked.gather(np.arange(640))
    assert sorted(opened) == list(range(64))


def test_rows_without_a_value_are_named_as_the_pool_names_them():
    x = np.ones((6, 2))
    x[4] = np.nan
    turned = Rows(x, order=np.arange(6)[::-1])
    walks = (lambda: list(turned.blocks(2)), lambda: list(turned.rough_blocks(2)))
    for read in (lambda: turned[0:3], lambda: turned[np.array([1])], *walks):
        with pytest.raises(LlmselectError, match=r"rows \[4\]"):
            read()
    with pytest.raises(LlmselectError, match=r"rows \[4\]"):
        list(Rows(x).blocks(4))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), numbers=st.integers(1, 60), n=st.integers(1, 30))
def test_held_rows_are_the_rows(seed, numbers, n):
    rng = np.random.default_rng(seed)
    rows = Rows(rng.standard_normal((n, 3)))
    held = Held(rows, numbers)
    for _ in range(12):
        asked = rng.permutation(n)[: rng.integers(0, n + 1)]
        assert np.array_equal(held.gather(asked), rows.gather(asked))
        expected = rng.permutation(n)[: rng.integers(0, n + 1)]
        held.ahead(expected)
        assert (held.slot[expected[: held.size]] >= 0).all()
        slots = np.flatnonzero(held.row >= 0)
        assert np.array_equal(held.slot[held.row[slots]], slots)
        assert (held.slot >= 0).sum() == len(slots)
