"""The same selection whatever the launch: shards, blocks, threads and processes decide nothing, for every registered selector."""

from __future__ import annotations

import inspect
import sys
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import test_selector_contract as contract
from threadpoolctl import threadpool_limits

from llmselect.arrays import Csr
from llmselect.selection import Selection
from llmselect.store import FeatureStore

N, D, K, TARGETS = 500, 48, 60, 12
WIDE = 40  # columns of the sparse features
IDS = [f"{i * 2654435761 % 2**32:032x}" for i in range(N)]
# Names and defaults that say how many rows a kernel takes at a time.
SIZES = {"BLOCK", "BATCH"}


def features(case: contract.Case) -> dict[str, np.ndarray]:
    """Inputs of a case in half precision around a few directions; every third row is a copy of another: there are ties."""
    rng = np.random.default_rng(3)
    copies = np.arange(N) % 3 == 0
    source = rng.integers(0, N // 3, N) * 3 + 1

    def tied(values: np.ndarray) -> np.ndarray:
        values[copies] = values[np.minimum(source[copies], N - 1)]
        return values

    directions = rng.standard_normal((8, D))
    near = lambda rows: (directions[rng.integers(0, 8, rows)] + rng.standard_normal((rows, D))).astype(np.float16)  # noqa: E731
    if case.selector.x_sign == "nonnegative":
        near = lambda rows: np.maximum(rng.standard_normal((rows, WIDE)) - 1, 0).astype(np.float16)  # noqa: E731
    x = tied(near(N))
    groups = np.repeat(list("abc"), TARGETS // 3)
    made = {"x": x if case.ndim == 2 else x[:, 0].copy(), "target": near(TARGETS) + np.float16(0.01), "target_groups": groups,
            "target_cost": rng.integers(1, 500, TARGETS), "groups": np.array(list("aaabbc"))[rng.integers(0, 6, N)],
            "quality": tied(rng.standard_normal(N).astype(np.float16)), "cost": rng.integers(1, 500, N)}  # fmt: skip
    return {name: made[name] for name in case.wanted}


def stored(folder: Any, inputs: dict[str, np.ndarray], sparse: bool, shard_rows: int) -> dict[str, Any]:
    """The same inputs with x (and quality, where rows have one) read from a store."""
    store, out = FeatureStore(folder / str(shard_rows)), dict(inputs)
    for name in {"x", "quality"} & inputs.keys():
        value = np.asarray(inputs[name])
        kind = [f"csr:{value.dtype}", [value.shape[1]]] if sparse and name == "x" else [str(value.dtype), list(value.shape[1:])]
        feature = store.create(name, {"arrays": {"value": kind}, "shard_rows": shard_rows}, IDS)
        for shard in range(feature.shards):
            part = value[feature.rows(shard).start : feature.rows(shard).stop]
            filled = [(np.flatnonzero(row), row[np.flatnonzero(row)]) for row in part] if sparse and name == "x" else None
            feature.write(shard, {"value": part if filled is None else Csr.of_rows(filled, value.shape[1], value.dtype)})
        out[name] = store[name]
    return out


@contextmanager
def blocks_of(rows: int):
    """Every kernel and selector works on this many rows at a time."""
    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if not name.startswith(("llmselect.kernels.", "llmselect.selectors.")):
                continue
            sizes = {getattr(module, one) for one in SIZES if hasattr(module, one)}
            for one in SIZES & set(vars(module)):
                patch.setattr(module, one, rows)
            classes = [c for c in vars(module).values() if inspect.isclass(c)]
            for function in [f for place in (module, *classes) for f in vars(place).values() if inspect.isfunction(f)]:
                if function.__defaults__ and function.__module__ == name:
                    changed = tuple(rows if type(d) is int and d in {8192, *sizes} else d for d in function.__defaults__)
                    patch.setattr(function, "__defaults__", changed)
        yield


@contextmanager
def threads(count: int):
    """BLAS, OpenMP (FAISS, scikit-learn) and numba on this many threads."""
    import numba

    before = numba.get_num_threads()
    with threadpool_limits(limits=count):
        numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
        yield
        numba.set_num_threads(before)


def agree(one: Selection, other: Selection) -> None:
    """The same rows in the same order; scores, weights and evidence to float32."""
    assert other.indices.tolist() == one.indices.tolist()
    a, b = contract.arrays(one), contract.arrays(other)
    assert a.keys() == b.keys()
    for name, values in a.items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(b[name], values, rtol=1e-4, atol=1e-5, err_msg=name)
        else:
            assert b[name].tolist() == values.tolist(), name


def compare(case: contract.Case, folder: Any, launches: list[tuple[int, int, int]]) -> None:
    """Select from arrays on one thread, then from a store as each launch (rows of a shard, rows of a block, threads) says."""
    inputs = features(case)
    with threads(1):
        made = case.selector.select(K, seed=4, ids=IDS, n=N, **inputs)
    for shard_rows, block, count in launches:
        read = stored(folder, inputs, case.selector.sparse, shard_rows)
        with blocks_of(block), threads(count):
            agree(made, case.selector.select(K, seed=4, ids=IDS, n=N, **read))


@contract.every_default
def test_shards_blocks_and_threads_decide_nothing(case, tmp_path):
    compare(case, tmp_path, [(128, 96, 2)])


@pytest.mark.slow
@contract.every_case
def test_shards_blocks_and_threads_decide_nothing_in_any_variant(case, tmp_path):
    compare(case, tmp_path, [(64, 8192, 3), (7, 96, 4), (1024, 37, 1)])


@pytest.mark.slow
@contract.every_default
def test_an_inverted_file_gives_the_same_on_any_number_of_threads(case, tmp_path, monkeypatch):
    from llmselect.kernels.neighbours import neighbours

    monkeypatch.setattr(neighbours, "__defaults__", (100,))
    compare(case, tmp_path, [(128, 8192, 1), (128, 8192, 4), (128, 96, 3)])


def test_the_blocks_are_those_asked_for():
    from llmselect.kernels import cosine
    from llmselect.kernels.jaccard import sparse_blocks
    from llmselect.kernels.rows import Rows

    x = np.ones((20, 3))
    with blocks_of(7):
        assert [start for start, _ in Rows(x).blocks()] == [start for start, _ in sparse_blocks(x)] == [0, 7, 14]
        assert cosine.BLOCK == 7
    assert [start for start, _ in Rows(x).blocks()] == [0] and cosine.BLOCK == 8192


def test_centroids_from_fewer_rows_where_more_would_not_fit(monkeypatch):
    from llmselect.kernels import kmeans
    from llmselect.kernels.keyed import Keyed
    from llmselect.kernels.rows import Rows

    x, seen, gather = Rows(np.random.default_rng(0).standard_normal((900, 8))), [], Rows.gather
    monkeypatch.setattr(Rows, "gather", lambda self, rows, *dtype: seen.append(len(rows)) or gather(self, rows, *dtype))
    for held, wanted in ((8 * 900, 900), (8 * 500, 500), (8, 10 * kmeans.ENOUGH)):
        monkeypatch.setattr(kmeans, "HELD", held)
        made = kmeans.kmeans(x, 10, Keyed(0, np.arange(900, dtype=np.uint64)))
        assert seen.pop() == wanted and made.sizes.sum() == 900
