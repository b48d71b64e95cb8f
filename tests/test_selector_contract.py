"""The contract of every registered selector: a new method is tested here by being registered."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import itertools
from contextlib import nullcontext
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmselect import config
from llmselect.errors import LlmselectError, UsageError
from llmselect.kernels.keyed import keys_of
from llmselect.registry import SECTIONS, describe, selectors
from llmselect.selection import Budget, Selection
from llmselect.selectors._base import Selector, inputs_of

N, D, K = 60, 16, 20
TASKS = ["b", "a", "b", "c", "a", "d"]
IDS = [hashlib.sha256(str(i).encode()).hexdigest()[:32] for i in range(N)]
FLOATS, OF_TARGET = ("x", "target", "quality"), ("target", "target_groups", "target_cost")


def make(name: str, ndim: int, tied: bool, sign: str = "any", scores: int = 1) -> np.ndarray:
    """An input by its name in the vocabulary; `tied` ones are exact in fp32, with many equal rows."""
    rng = np.random.default_rng(7)
    low = -1.0 if sign == "any" else 0.0
    real = (lambda *shape: rng.choice([low, 1.0], shape)) if tied else (lambda *shape: rng.standard_normal(shape))
    if sign == "nonnegative" and not tied:
        real = lambda *shape: np.maximum(rng.standard_normal(shape), 0)  # noqa: E731
    if name == "x":
        x = np.repeat(real(N // 4, D), 4, axis=0) if tied else real(N, D)
        return x if ndim == 2 else x[:, 0].copy()
    return {
        "target": lambda: real(len(TASKS), D),
        "target_groups": lambda: np.array(TASKS),
        "target_cost": lambda: rng.integers(1, 4 if tied else 500, len(TASKS)),
        "quality": lambda: real(N) if scores == 1 else np.abs(real(N, scores) + tied),  # `deita` multiplies several
        "groups": lambda: np.array(list("aaaabbbccd"))[rng.integers(0, 10, N)],
        "cost": lambda: rng.integers(1, 4 if tied else 500, N),
    }[name]()


@dataclasses.dataclass(frozen=True)
class Case:
    """A configured selector and the number of axes of its x."""

    selector: Selector
    ndim: int

    def __str__(self) -> str:
        changed = [str(v) for v in config.to_dict(self.selector).values()]
        return "-".join([self.selector.name, *changed, *([f"{self.ndim}d"] if len(self.selector.x_ndim) > 1 else [])])

    @property
    def wanted(self) -> dict[str, bool]:
        return inputs_of(type(self.selector))

    def inputs(self, tied: bool = False, dtype: Any = None) -> dict[str, Any]:
        about = self.ndim, tied, self.selector.x_sign, 3 if 2 in self.selector.quality_ndim else 1
        made = {name: make(name, *about) for name in self.wanted}
        return {k: v.astype(dtype) if dtype and k in FLOATS else v for k, v in made.items()}

    def select(self, budget: Any = K, inputs: dict[str, Any] | None = None, **more: Any) -> Selection:
        inputs = self.inputs() if inputs is None else inputs
        return self.selector.select(budget, **{"ids": IDS, "n": N, **inputs, **more})


def variants(cls: type) -> list[Selector]:
    """The selector with choices of its switches that it accepts, other hyper-parameters at their defaults."""
    choices, made = {}, []
    for f in dataclasses.fields(cls):
        hint = get_type_hints(cls)[f.name]
        if hint is bool or get_origin(hint) is Literal:
            choices[f.name] = get_args(hint) or (False, True)
    for values in few(list(choices.values())):
        try:
            made.append(cls(**dict(zip(choices, values, strict=True))))
        except UsageError:
            continue  # a combination that the method refuses
    return made


def few(choices: list[tuple]) -> list[tuple]:
    """All combinations when they are at most eight; else enough that every value is met, refused ones being spare."""
    if len(every := list(itertools.product(*choices))) <= 8:
        return every
    alone = [tuple(v if j == i else c[0] for j, c in enumerate(choices)) for i, one in enumerate(choices) for v in one]
    return list(dict.fromkeys([*alone, *every[:: max(1, len(every) // 4)]]))


CLASSES = [selectors.get(name) for name in selectors.names()]
CASES = [Case(s, d) for cls in CLASSES for s in variants(cls) for d in (cls.x_ndim if "x" in inputs_of(cls) else (2,))]
DEFAULTS = [Case(cls(), cls.x_ndim[-1]) for cls in CLASSES]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_default = pytest.mark.parametrize("case", DEFAULTS, ids=str)
every_input = pytest.mark.parametrize("case,name", [(c, name) for c in DEFAULTS for name in c.wanted], ids=str)
tied_or_not = pytest.mark.parametrize("tied", [False, True], ids=["distinct", "tied"])


def arrays(one: Selection) -> dict[str, np.ndarray]:
    named = {"indices": one.indices, "scores": one.scores, "weights": one.weights, **one.evidence}
    return {name: array for name, array in named.items() if array is not None}


def same(a: Selection, b: Selection) -> bool:
    """Whether two selections are equal in all they hold, types of arrays aside."""
    x, y = arrays(a), arrays(b)
    about = [(one.n, one.nested, list(one.ids or ()), dict(one.provenance)) for one in (a, b)]
    equal = lambda k: np.array_equal(x[k], y[k], equal_nan=x[k].dtype.kind == "f")  # noqa: E731 - NaN: never scored
    return x.keys() == y.keys() and all(equal(k) for k in x) and about[0] == about[1]


@every_case
@pytest.mark.parametrize("budget,rows", [(1, 1), (K, K), (N, N), ("10%", 6), (0.33, 19), ({"fraction": 1}, N)])
def test_rows_are_distinct_and_exactly_as_many(case, budget, rows):
    made = case.select(budget)
    assert made.indices.dtype == np.int64
    assert len(made) == len(set(made.indices.tolist()) & set(range(N)))
    assert len(made) == rows or (case.selector.chooses_size and 0 < len(made) < rows)
    assert list(made.ids) == [IDS[i] for i in made.indices]
    assert all(len(one) == len(made) for one in (*made.evidence.values(), made.weights) if one is not None)
    assert made.scores is None or len(made.scores) == N


@every_case
@tied_or_not
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99, 1, 2])
def test_token_budget_takes_the_longest_prefix(case, tied, share):
    inputs = case.inputs(tied)
    cost = inputs.setdefault("cost", np.random.default_rng(3).integers(0, 30, N))
    tokens = int(cost.sum() * share) + 4 * int(cost.max()) * (share < 1)
    made = case.select({"tokens": tokens}, inputs)
    spent = int(cost[made.indices].sum())
    assert spent <= tokens
    assert len(made) == N or tokens - spent < cost.max() or case.selector.chooses_size
    if case.selector.nested:
        ranking = case.select(N, inputs).indices
        assert made.indices.tolist() == ranking[np.cumsum(cost[ranking]) <= tokens].tolist()


@every_case
def test_the_seed_alone_decides(case):
    assert same(case.select(seed=5), case.select(seed=5))
    draws = {tuple(case.select(seed=s).indices) for s in (5, 6, 7)}
    assert len(draws) == (3 if case.selector.stochastic else 1)


@every_case
@tied_or_not
def test_the_order_of_the_pool_does_not_matter(case, tied):
    inputs, order = case.inputs(tied), np.random.default_rng(1).permutation(N)
    other = {k: v if k in OF_TARGET else v[order] for k, v in inputs.items()}
    made, moved = case.select(K, inputs), case.select(K, other, ids=[IDS[i] for i in order])
    assert order[moved.indices].tolist() == made.indices.tolist()
    assert list(moved.ids) == list(made.ids)


@every_case
def test_ties_go_by_id(case):
    constant = {k: v if k in OF_TARGET else np.repeat(v[:1], N, axis=0) for k, v in case.inputs(tied=True).items()}
    if not case.selector.stochastic and not case.selector.chooses_size:
        assert case.select(K, constant).indices.tolist() == np.argsort(keys_of(IDS, N))[:K].tolist()


@every_case
def test_prefixes_are_smaller_budgets(case):
    for k, whole in ((k, case.select(K)) for k in (1, 2, 7, 19)):
        if case.selector.nested:
            assert whole.prefix(k).indices.tolist() == case.select(k).indices.tolist() == whole.indices[:k].tolist()
        else:
            with pytest.raises(UsageError, match="nested"):
                whole.prefix(k)


@pytest.mark.parametrize("case,name", [(c, x) for c in CASES for x in ("x", "quality") if x in c.wanted], ids=str)
def test_nan_is_an_error_naming_the_row(case, name):
    inputs = case.inputs()
    inputs[name][17] = np.nan
    with pytest.raises(LlmselectError, match=r"\b1 rows .*\[17\]"):
        case.select(K, inputs)


@every_input
def test_missing_and_mismatched_inputs_are_named(case, name):
    inputs = case.inputs()
    short = inputs[name][:, :-1] if name == "target" else inputs[name][:-1]
    with pytest.raises(UsageError, match=rf"\b{name}\b"):
        case.select(K, {**inputs, name: short})
    with pytest.raises(UsageError, match=rf"needs {name}\b") if case.wanted[name] else nullcontext():
        case.select(K, {**inputs, name: None})


@every_case
@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "budget,wrong,named",
    [
        (K, {"ids": IDS[:-1]}, "ids"),
        (K, {"n": N + 1}, r"\bn\b"),
        (K, {"cost": np.ones(N - 1)}, "cost"),
        (K, {"qualty": np.ones(N)}, "qualty"),
        ({"tokens": 50}, {"cost": None}, "cost"),
        (N + 1, {}, "61 rows"),
        ({"tokens": 3}, {"cost": np.full(N, 9999)}, "9999"),
        (K, {"x": np.ones((N, 2, 2))}, r"\bx\b"),
        (K, {"target": np.ones((0, D)), "target_groups": None}, "target"),
        (K, {"target_groups": []}, "target_groups"),
    ],
)
def test_other_mistakes_are_named(case, budget, wrong, named):
    with pytest.raises(UsageError, match=named):
        case.select(budget, **wrong)


@every_case
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_inputs_are_left_as_they_are(case, dtype):
    inputs = {k: v.astype(dtype) if v.dtype.kind in "fi" else v for k, v in case.inputs().items()}
    before = {k: v.copy() for k, v in inputs.items()}
    made = case.select(K, inputs)
    assert not [k for k, v in inputs.items() if not np.array_equal(v, before[k])]
    assert not [k for k, v in inputs.items() if not v.flags.writeable], "made read-only"
    assert made.scores is None or not [k for k, v in inputs.items() if np.shares_memory(v, made.scores)], "shared"


class Lazy:
    """An array-like with a shape and rows to fetch, and nothing else."""

    def __init__(self, array: np.ndarray):
        self._array, self.shape = array, array.shape

    def __getitem__(self, rows: Any) -> np.ndarray:
        assert isinstance(rows, slice) or (isinstance(rows, np.ndarray) and rows.dtype.kind == "i")
        return self._array[rows]


@every_input
def test_an_array_like_gives_the_same(case, name):
    inputs = case.inputs()
    assert same(case.select(K, {**inputs, name: Lazy(inputs[name])}), case.select(K, inputs))


@every_case
def test_half_precision_gives_the_same(case):
    half = case.inputs(dtype=np.float16)
    single = {k: v.astype(np.float32) if k in FLOATS else v for k, v in half.items()}
    assert same(case.select(K, half), case.select(K, single))


@every_case
def test_config_round_trip_and_frozen(case):
    plain = config.to_dict(case.selector)
    assert config.from_dict(type(case.selector), plain) == case.selector
    assert case.select().provenance["config"] == plain
    for attribute in (*plain, "anything"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(case.selector, attribute, None)


@every_case
@pytest.mark.parametrize("budget", [K, {"tokens": 3000}], ids=["rows", "tokens"])
def test_the_selection_is_frozen(case, budget):
    made = case.select(budget, cost=np.full(N, 200))
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.n = 1
    for one in (made, made.prefix(3)) if made.nested else (made,):
        assert [name for name, array in arrays(one).items() if array.flags.writeable] == []


@every_default
def test_the_docstring_and_length_of_the_file(case):
    about = describe(type(case.selector))
    assert [part for part in ("title", *SECTIONS) if not about.get(part)] == []
    assert len(inspect.getsourcelines(inspect.getmodule(type(case.selector)))[0]) <= 120


@every_case
def test_save_and_load(case, tmp_path):
    for folder in ("a", "b", "b"):
        (made := case.select(K)).save(tmp_path / folder)
    assert same(Selection.load(tmp_path / "a"), made)
    Selection.load(tmp_path / "a").save(tmp_path / "c")
    a, b, c = ({f.name: f.read_bytes() for f in (tmp_path / folder).iterdir()} for folder in "abc")
    assert a == b, "saving twice differs"
    assert a == c, "saving what was loaded differs"


@every_default
@pytest.mark.parametrize("name", ["selected.parquet", "scores.npy", "selection.json"])
def test_a_flipped_bit_or_missing_file_is_named(case, name, tmp_path):
    case.select(K).save(tmp_path / "s")
    if not (path := tmp_path / "s" / name).exists():
        pytest.skip(f"saves no {name}")
    whole = path.read_bytes()
    for at in [None, *np.linspace(0, len(whole) - 1, 60).astype(int)]:
        path.unlink() if at is None else path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(LlmselectError, match=name):
            Selection.load(tmp_path / "s")


BAD = [0, -1, 2.5, -0.5, "200%", "0%", "-5%", "lots", "", True, False, None, float("nan"), float("inf"), [5], {}]
BAD += [{"rows": 1, "tokens": 2}, {"fraction": 1.5}, {"rows": None}, {"tokens": -1}, {"row": 3}, {"rows": "5"}]


@pytest.mark.parametrize("value", BAD, ids=repr)
def test_what_is_no_budget(value):
    with pytest.raises(UsageError):
        Budget.parse(value)


@given(percent=st.integers(1, 100), n=st.integers(1, 20_000_000) | st.integers(1, 200_000).map(lambda i: 100 * i))
def test_a_fraction_is_exact(percent, n):
    assert Budget.parse(f" {percent} %").rows_of(n) == max(1, percent * n // 100)
