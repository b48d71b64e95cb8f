"""The graph of nearest neighbours that compares lists with lists, against dense cosines."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from llmselect.kernels import neighbours as kernel
from llmselect.kernels.neighbours import neighbours
from llmselect.kernels.rows import Rows


def clustered(n: int, d: int, directions: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((directions, d))[rng.integers(0, directions, n)] + rng.standard_normal((n, d))


def dense(x: np.ndarray) -> np.ndarray:
    """Cosines, a row's with itself below all others."""
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300)
    found = unit @ unit.T
    np.fill_diagonal(found, -9)
    return found


def recall(near: np.ndarray, cosine: np.ndarray) -> float:
    """Share of the nearest rows found."""
    best = np.argsort(-cosine, axis=1)[:, : near.shape[1]]
    return float(np.mean([len(set(a) & set(b)) / len(a) for a, b in zip(near.tolist(), best.tolist(), strict=True)]))


def check(x: np.ndarray, near: np.ndarray, cosine: np.ndarray) -> np.ndarray:
    """Every row has k different others, best first, with their cosines; these are given back."""
    n = len(near)
    assert ((near >= 0) & (near < n) & (near != np.arange(n)[:, None])).all()
    assert (np.diff(np.sort(near, 1), axis=1) > 0).all() and (np.diff(cosine, axis=1) <= 0).all()
    expected = np.take_along_axis(dense(x), near.astype(np.int64), 1)
    np.testing.assert_allclose(cosine, expected, atol=2e-3)
    return expected


@pytest.mark.parametrize("d,directions", [(64, 25), (16, 20)])
def test_few_neighbours_are_missed_where_rows_cluster(monkeypatch, d, directions):
    compared, compare = 0, kernel._Lists._compare

    def counted(self, best, asking, first, one):
        nonlocal compared
        compared += len(asking) * (self.start[one + 1] - self.start[one])
        compare(self, best, asking, first, one)

    monkeypatch.setattr(kernel._Lists, "_compare", counted)
    x = clustered(4000, d, directions)
    near, cosine = neighbours(Rows(x), 20, 100)
    check(x, near, cosine)
    assert recall(near, dense(x)) > 0.98 and compared < 4000 * 4000 / 4


@pytest.mark.parametrize("numbers", [1, 1 << 23])
def test_one_list_is_exact(monkeypatch, numbers):
    monkeypatch.setattr(kernel, "NUMBERS", numbers)  # 64 rows at a time, or all
    x = clustered(700, 12, 5).astype(np.float16)
    for rows, values, near in kernel._lists(Rows(x), 1).search(6):
        assert (near[:, 0] == rows).all()
        others = np.take_along_axis(dense(x.astype(np.float64))[rows], near[:, 1:], 1)
        np.testing.assert_allclose(values[:, 1:], others, atol=2e-3)
        np.testing.assert_allclose(others, -np.sort(-dense(x.astype(np.float64))[rows], 1)[:, :5], atol=2e-3)


@pytest.mark.parametrize("n,k", [(3000, 7), (400, 64), (150, 149)])
def test_equal_rows_make_one_list_that_is_compared_with_itself(n, k):
    x = np.tile(np.random.default_rng(0).standard_normal(5), (n, 1))
    near, cosine = neighbours(Rows(x), k, 10)
    check(x, near, cosine)
    assert np.allclose(cosine, 1, atol=2e-3)


def test_rows_of_zeros_have_neighbours_of_cosine_zero():
    x = clustered(500, 8, 4)
    x[::3] = 0
    near, cosine = neighbours(Rows(x), 5, 10)
    check(x, near, cosine)
    assert (cosine[::3] == 0).all() and (cosine[1::3] > 0.5).all()
    assert (neighbours(Rows(np.zeros((60, 4))), 3, 10)[1] == 0).all()


def test_copies_find_one_another():
    x = np.repeat(clustered(500, 24, 500), 3, axis=0)
    near, cosine = neighbours(Rows(x), 2, 100)
    check(x, near, cosine)
    assert (near // 3 == np.arange(1500)[:, None] // 3).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(40, 300), k=st.integers(1, 12), copies=st.booleans())
def test_every_row_has_neighbours(seed, n, k, copies):
    rng = np.random.default_rng(seed)
    x = clustered(n, 6, 5, seed)[rng.integers(0, n, n) if copies else slice(None)]
    near, cosine = neighbours(Rows(x), k, 1)
    assert near.shape == (n, k)
    check(x, near, cosine)


def test_a_list_of_fewer_rows_leaves_places_empty(monkeypatch):
    monkeypatch.setattr(kernel, "READ", 1)
    x = clustered(400, 16, 10)
    near, cosine = neighbours(Rows(x), 15, 100)
    sizes = np.diff(kernel._lists(Rows(x), 80).start)
    missing = near < 0
    assert sorted((~missing).sum(1).tolist()) == sorted(np.repeat(np.minimum(sizes - 1, 15), sizes).tolist())
    assert missing.any() and (cosine[missing] == 0).all() and (near[~missing] != np.nonzero(~missing)[0]).all()


def test_sizes_of_blocks_decide_nothing(monkeypatch):
    x = clustered(1500, 24, 12)
    x[:600] = x[0]
    whole = neighbours(Rows(x), 10, 100)
    monkeypatch.setattr(kernel, "NUMBERS", 1)  # 64 rows at a time
    near, cosine = neighbours(Rows(x), 10, 100)
    assert (near == whole[0])[600:].mean() > 0.99
    np.testing.assert_allclose(cosine, whole[1], atol=1e-6)


def test_another_number_of_threads_gives_the_same_bits():
    x = clustered(20000, 96, 30)
    x[::3] = x[1]
    lists, found = kernel._lists(Rows(x), 400), list[list[np.ndarray]]()
    for threads in (1, 3):
        with threadpool_limits(threads):
            found.append([np.concatenate(part) for part in zip(*lists.search(5), strict=True)])
    assert all(np.array_equal(one, other) for one, other in zip(*found, strict=True))


def test_what_lies_in_files_is_what_memory_holds(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    x, mapped = Rows(np.random.default_rng(0).standard_normal((1500, 24)).astype(np.float16)), list[tuple[int, ...]]()
    real = np.memmap

    def recorded(file, dtype, mode, shape):
        mapped.append(shape)
        assert file.seek(0, 2) == np.prod(shape) * np.dtype(dtype).itemsize, "written before it is mapped"
        return real(file, dtype, mode, shape=shape)

    monkeypatch.setattr(np, "memmap", recorded)
    held = neighbours(x, 10, 100)
    assert not mapped
    monkeypatch.setattr("llmselect.kernels.room.HELD", 1)
    monkeypatch.setattr(kernel, "VECTORS", 1)
    monkeypatch.setattr(kernel, "BLOCK", 400)
    filed = neighbours(x, 10, 100)
    assert np.array_equal(held[0], filed[0]) and np.array_equal(held[1], filed[1])
    assert sorted(mapped) == [*4 * [(1500, 10)], (1500, 24), (1500, 36), (1500, 36)]
    assert not list(tmp_path.iterdir()), "files without a name, gone with their arrays"
