"""Arrays of the store: sparse ones equal dense ones, rows that are not finite are marked, digests take their 16 bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmselect.array_views import Subset
from llmselect.arrays import Csr, Stored, not_finite
from llmselect.engine.passes import SparseRows
from llmselect.errors import LlmselectError, UsageError
from llmselect.pool import Seen
from llmselect.store import FeatureStore

WIDTH = 30


def matrix(n: int, seed: int = 0) -> np.ndarray:
    """Non-negative rows with many zeros, exact in fp16; one row is empty."""
    rng = np.random.default_rng(seed)
    dense = np.where(rng.random((n, WIDTH)) < 0.2, rng.integers(1, 500, (n, WIDTH)) / 16, 0).astype(np.float32)
    dense[n // 2] = 0
    return dense


def csr(dense: np.ndarray) -> Csr:
    rows = SparseRows(len(dense), dense.shape[1], "float16")
    rows[np.arange(len(dense))] = dense
    return rows.csr()


def store_of(folder, arrays: dict[str, np.ndarray], sparse: tuple[str, ...] = (), shard_rows: int = 4) -> FeatureStore:
    """A store with one feature `f`, written shard by shard."""
    store, n = FeatureStore(folder), len(next(iter(arrays.values())))
    spec = {name: ["csr:float16" if name in sparse else str(a.dtype), list(a.shape[1:])] for name, a in arrays.items()}
    feature = store.create("f", {"arrays": spec, "shard_rows": shard_rows, "threads": 1}, [f"row{i}" for i in range(n)])
    for shard in range(feature.shards):
        part = {name: a[feature.rows(shard).start : feature.rows(shard).stop] for name, a in arrays.items()}
        feature.write(shard, {name: csr(a) if name in sparse else a for name, a in part.items()})
    return store


def test_sparse_rows_read_as_the_dense_ones(tmp_path):
    dense = matrix(11)
    x = store_of(tmp_path, {"value": dense}, sparse=("value",))["f"]
    assert (x.shape, x.dtype, x.ndim, len(x)) == ((11, WIDTH), np.float16, 2, 11)
    full = store_of(tmp_path / "dense", {"value": dense})["f"]
    for rows in (slice(None), slice(2, 9, 3), [10, 0, 5, 5, -1], np.arange(11) % 2 == 0, slice(4, 4), np.zeros(11, bool)):
        assert np.array_equal(x[rows].toarray(), dense[rows])
        assert np.array_equal(full[rows], dense[rows])
    assert np.array_equal(x[7].toarray(), dense[7:8])
    assert np.array_equal(np.concatenate([block.toarray() for _, block in x.blocks(3)]), dense)
    for start, shard in x.shards():
        assert np.array_equal(shard.scipy().toarray(), dense[start : start + 4])
        assert shard.data.dtype == np.float16 and shard.indices.dtype == np.int32
    with pytest.raises(IndexError):
        x[[11]]


def test_a_row_that_no_batch_filled_is_marked_and_zeros_are_not_stored(tmp_path):
    rows = SparseRows(4, WIDTH, "float16")
    dense = matrix(3)
    dense[0, :2] = 1e-9, 1e9  # below and above what fp16 holds
    rows[np.array([3, 0, 2])] = dense
    made = rows.csr()
    assert not_finite(made).tolist() == [1, 3]
    assert 0 not in made.data and made.row(3)[0].tolist() == np.flatnonzero(dense[0] > 1e-6).tolist()
    assert np.array_equal(made.row(2)[1], dense[2][dense[2] > 0])


def test_rows_that_are_not_finite_are_marked_and_lost_to_the_whole_feature(tmp_path):
    a, b = np.ones((10, 3), np.float32), np.arange(10)
    a[[2, 9], 1] = np.nan, -np.inf
    store = store_of(tmp_path, {"a": a, "b": b})
    assert {k: v.tolist() for k, v in store.open("f").non_finite.items()} == {"a": [2, 9]}
    assert store["f.a"].non_finite.tolist() == store["f.b"].non_finite.tolist() == [2, 9]


@pytest.mark.parametrize("sparse", [False, True])
def test_a_subset_is_the_array_of_its_rows(tmp_path, sparse):
    dense = matrix(11)
    rows = np.array([9, 1, 4, 5])
    part = Subset(store_of(tmp_path, {"value": dense}, sparse=("value",) if sparse else ())["f"], rows)
    read = (lambda x: x.toarray()) if sparse else (lambda x: x)
    assert part.shape == (4, WIDTH) and part.ndim == 2 and len(part) == 4
    for index in (slice(None), slice(1, 3), np.array([3, 0])):
        assert np.array_equal(read(part[index]), dense[rows][index])


def test_a_shard_that_goes_while_it_is_read_is_named(tmp_path):
    store = store_of(tmp_path, {"value": np.ones((80, 2), np.float32)}, shard_rows=2)
    x = store["f"]
    assert x[:].sum() == 160  # all shards are verified, and the first ones no longer open
    store.open("f").path(0).unlink()
    with pytest.raises(LlmselectError, match=r"00000.safetensors is damaged.*--repair"):
        x[0]
    store.remove("f")
    with pytest.raises(LlmselectError, match=r"00000.safetensors is missing.*run the same command again"):
        x[0]


def test_few_shards_are_mapped_at_a_time(tmp_path):
    dense = np.random.default_rng(0).standard_normal((4 * (Stored.open_shards + 9), 3)).astype(np.float32)
    x = store_of(tmp_path, {"value": dense})["f"]
    assert np.array_equal(x[:], dense) and np.array_equal(x[::-1], dense[::-1])
    assert len(x._maps) == Stored.open_shards


@given(st.lists(st.integers(0, 40), max_size=300), st.integers(1, 9))
def test_seen_is_a_set(values, waiting):
    seen, known = Seen(waiting), set()
    for value in values:
        # Digests that end in zero bytes are the ones that fixed-width text would confuse.
        digest = (value % 7).to_bytes(2, "big") + bytes(12) + (value // 7).to_bytes(1, "big") + bytes(1)
        assert seen.add(digest) == (digest not in known)
        known.add(digest)
    assert sum(map(len, seen.runs)) + len(seen.waiting) == len(known)


def test_a_flipped_byte_or_another_origin_is_refused_and_repair_drops_the_shard(tmp_path):
    store, spec = FeatureStore(tmp_path), {"arrays": {"value": ["float32", [3]]}, "shard_rows": 4, "model": {"weights": "a"}}
    feature = store.create("emb", spec, [f"{i:032x}" for i in range(10)])
    for shard in range(feature.shards):
        feature.write(shard, {"value": np.full((len(feature.rows(shard)), 3), shard, np.float32)})
    with pytest.raises(LlmselectError, match="shard 2 2"):
        feature.write(2, {"value": np.zeros((3, 3), np.float32)})
    assert store["emb"][[9, 0, 5]][:, 0].tolist() == [2, 0, 1] and feature.repair() == []
    data = bytearray(feature.path(1).read_bytes())
    data[-1] ^= 1
    feature.path(1).write_bytes(data)
    with pytest.raises(LlmselectError, match=r"00001\.safetensors is damaged"):
        store["emb"][5]
    assert feature.repair() == [1] == feature.missing()
    with pytest.raises(LlmselectError, match="1 of 3 shards are missing"):
        store["emb"]
    with pytest.raises(LlmselectError, match="is missing: extraction did not finish"):
        feature.verify(1)
    with pytest.raises(LlmselectError, match=r"model\.weights: stored a ≠ wanted b"):
        store.create("emb", {**spec, "model": {"weights": "b"}}, [f"{i:032x}" for i in range(10)])
    store.remove("emb")
    with pytest.raises(UsageError, match="no feature 'emb'"):
        store["emb"]
    with pytest.raises(UsageError, match="no rows to extract from"):
        store.create("emb", spec, [])
    with pytest.raises(UsageError, match="is not a feature name"):
        store.create("../emb", spec, ["0"])
