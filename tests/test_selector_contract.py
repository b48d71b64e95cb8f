"""The contract of every registered selector: a new method is tested here by being registered."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import itertools
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from hypothesis import given, settings
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
FLOATS, OF_TARGET = ("x", "target", "quality"), ("target", "target_groups")


def make(name: str, rng: np.random.Generator, ndim: int, tied: bool) -> Any:
    """An input by its name in the vocabulary; `tied` ones are exact in fp32, with many equal rows."""
    real = (lambda *shape: rng.choice([-1.0, 1.0], shape)) if tied else rng.standard_normal
    return {
        "x": lambda: np.repeat(real(N // 4, 1 if ndim == 1 else D), 4, 0) if tied else real(N, D),
        "target": lambda: real(len(TASKS), D),
        "target_groups": lambda: np.array(TASKS),
        "quality": lambda: real(N),
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

    def inputs(self, tied: bool = False, constant: bool = False) -> dict[str, Any]:
        made = {name: make(name, np.random.default_rng(7), self.ndim, tied or constant) for name in self.wanted}
        if self.ndim == 1 and "x" in made:
            made["x"] = made["x"][:, 0].copy()
        return {k: v if k in OF_TARGET or not constant else np.repeat(v[:1], N, 0) for k, v in made.items()}

    def select(self, budget: Any = K, inputs: dict[str, Any] | None = None, **more: Any) -> Selection:
        return self.selector.select(budget, **{"ids": IDS, "n": N, **(self.inputs() if inputs is None else inputs), **more})


def variants(cls: type) -> list[Selector]:
    """The selector with every choice of its switches that it accepts; other hyper-parameters at their defaults."""
    hints, choices = get_type_hints(cls), {}
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        if get_origin(hint) is Literal or hint is bool:
            choices[f.name] = (False, True) if hint is bool else get_args(hint)
    made = []
    for values in itertools.islice(itertools.product(*choices.values()), 48):
        try:
            made.append(cls(**dict(zip(choices, values, strict=True))))
        except UsageError:
            continue  # a combination that the method refuses
    return made


CLASSES = [selectors.get(name) for name in selectors.names()]
CASES = [Case(s, d) for cls in CLASSES for s in variants(cls) for d in (cls.x_ndim if "x" in inputs_of(cls) else (2,))]
BY_INPUT = [(Case(cls(), cls.x_ndim[-1]), name) for cls in CLASSES for name in inputs_of(cls)]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.name)
every_input = pytest.mark.parametrize("case,name", BY_INPUT, ids=str)


def same(a: Selection, b: Selection) -> bool:
    """Whether two selections are equal in all they hold, types of evidence aside."""
    arrays = [(a.indices, b.indices), (a.scores, b.scores), (a.weights, b.weights)]
    arrays += [(a.evidence[k], b.evidence.get(k)) for k in a.evidence]
    equal = all(x is y is None or (x is not None and y is not None and np.array_equal(x, y)) for x, y in arrays)
    about = (a.n, a.nested, list(a.ids or ()), dict(a.provenance), set(a.evidence))
    return equal and about == (b.n, b.nested, list(b.ids or ()), dict(b.provenance), set(b.evidence))


def permuted(inputs: dict[str, Any], order: np.ndarray) -> dict[str, Any]:
    return {k: v if k in OF_TARGET else v[order] for k, v in inputs.items()}


# What is selected


@every_case
@pytest.mark.parametrize("budget,rows", [(1, 1), (K, K), (N, N), ("10%", 6), (0.33, 19), ({"fraction": 1}, N), ("1%", 1)])
def test_rows_are_distinct_and_exactly_as_many(case, budget, rows):
    made = case.select(budget)
    assert made.indices.dtype == np.int64
    assert len(made) == rows == len(set(made.indices.tolist()))
    assert set(made.indices.tolist()) <= set(range(N))
    assert list(made.ids) == [IDS[i] for i in made.indices]
    assert all(len(v) == rows for v in (*made.evidence.values(), made.weights if made.weights is not None else made.indices))
    assert made.scores is None or len(made.scores) == N


@every_case
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99, 1, 2])
def test_token_budget_takes_the_longest_prefix(case, tied, share):
    inputs, cost = case.inputs(tied), np.random.default_rng(3).integers(0, 30, N)
    cost = inputs.setdefault("cost", cost)
    tokens = int(cost.sum() * share) + 4 * int(cost.max()) * (share < 1)
    made = case.select({"tokens": tokens}, inputs)
    spent = int(cost[made.indices].sum())
    assert spent <= tokens
    assert len(made) == N or tokens - spent < cost.max()
    if case.selector.nested:
        ranking = case.select(N, inputs).indices
        fits = int((np.cumsum(cost[ranking]) <= tokens).sum())
        assert made.indices.tolist() == ranking[:fits].tolist()


@every_case
def test_the_seed_alone_decides(case):
    assert same(case.select(seed=5), case.select(seed=5))
    others = [case.select(seed=s).indices.tolist() for s in (6, 7)]
    changed = [other != case.select(seed=5).indices.tolist() for other in others]
    assert changed == [case.selector.stochastic] * 2


@every_case
@pytest.mark.parametrize("tied", [False, True])
def test_the_order_of_the_pool_does_not_matter(case, tied):
    inputs, order = case.inputs(tied), np.random.default_rng(1).permutation(N)
    made = case.select(K, inputs)
    other = case.select(K, permuted(inputs, order), ids=[IDS[i] for i in order])
    assert order[other.indices].tolist() == made.indices.tolist()
    assert list(other.ids) == list(made.ids)


@every_case
def test_ties_go_by_id(case):
    made = case.select(K, case.inputs(constant=True))
    if not case.selector.stochastic:
        assert made.indices.tolist() == np.argsort(keys_of(IDS, N))[:K].tolist()


@every_case
def test_prefixes_are_smaller_budgets(case):
    whole = case.select(K)
    if not case.selector.nested:
        with pytest.raises(UsageError, match="nested"):
            whole.prefix(5)
        return
    for k in (1, 2, 7, 19):
        assert whole.prefix(k).indices.tolist() == case.select(k).indices.tolist() == whole.indices[:k].tolist()


# What is refused


@every_case
@pytest.mark.parametrize("name", ["x", "quality"])
def test_nan_is_an_error_naming_the_row(case, name):
    if name not in case.wanted:
        pytest.skip(f"takes no {name}")
    inputs = case.inputs()
    inputs[name][17] = np.nan
    with pytest.raises(LlmselectError, match=r"\b1 rows .*\[17\]"):
        case.select(K, inputs)


@every_input
def test_a_missing_input_is_named(case, name):
    inputs = {**case.inputs(), name: None}
    if case.wanted[name]:
        with pytest.raises(UsageError, match=rf"needs {name}\b"):
            case.select(K, inputs)
    else:
        assert len(case.select(K, inputs)) == K


@every_input
def test_an_input_of_another_length_is_named(case, name):
    inputs = case.inputs()
    inputs[name] = inputs[name][:, :-1] if name == "target" else inputs[name][:-1]
    with pytest.raises(UsageError, match=rf"\b{name}\b"):
        case.select(K, inputs)


@every_class
def test_other_mismatches_are_named(cls):
    case = Case(cls(), cls.x_ndim[-1])
    for wrong in ({"ids": IDS[:-1]}, {"n": N + 1}, {"cost": np.ones(N - 1)}):
        with pytest.raises(UsageError, match=rf"\b{next(iter(wrong))}\b"):
            case.select(K, **wrong)
    with pytest.raises(UsageError, match="qualty"):
        case.select(K, qualty=np.ones(N))
    with pytest.raises(UsageError, match="cost"):
        case.select({"tokens": 50}, **({"cost": None} if "cost" in case.wanted else {}))
    with pytest.raises(UsageError, match="61"):
        case.select(N + 1)
    with pytest.raises(UsageError, match="100000"):
        case.select({"tokens": 3}, cost=np.full(N, 100000))
    if "x" in case.wanted:
        with pytest.raises(UsageError, match=r"\bx\b"):
            case.select(K, x=np.ones((N, 2, 2)))
    if "target" in case.wanted:
        with pytest.raises(LlmselectError, match="target"):
            case.select(K, target=np.ones((0, D)), **({"target_groups": None} if "target_groups" in case.wanted else {}))


# How inputs may come, and that they are left alone


@every_case
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_inputs_are_left_as_they_are(case, dtype):
    inputs = {k: v.astype(dtype) if v.dtype.kind in "fi" else v for k, v in case.inputs().items()}
    before = {k: v.copy() for k, v in inputs.items()}
    made = case.select(K, inputs)
    for name, value in inputs.items():
        assert np.array_equal(value, before[name]), name
        assert value.flags.writeable, f"{name} was made read-only"
        assert made.scores is None or not np.shares_memory(made.scores, value), f"the scores are the caller's {name}"


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
    half = {k: v.astype(np.float16) if k in FLOATS else v for k, v in case.inputs().items()}
    assert same(case.select(K, half), case.select(K, {k: v.astype(np.float32) if k in FLOATS else v for k, v in half.items()}))


# The class and its file


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
        held = {"indices": one.indices, "scores": one.scores, "weights": one.weights, **one.evidence}
        assert not [name for name, array in held.items() if array is not None and array.flags.writeable]


@every_class
def test_the_docstring_and_length_of_the_file(cls):
    shown, text = describe(cls), inspect.cleandoc(sys.modules[cls.__module__].__doc__)
    assert shown["title"] and all(shown.get(section) for section in SECTIONS)
    at = [text.find(f"\n{section}:") for section in SECTIONS]
    assert -1 not in at and at == sorted(at)
    assert len(Path(inspect.getfile(cls)).read_text().splitlines()) <= 120


# Saving


@every_case
def test_save_and_load(case, tmp_path):
    made = case.select(K)
    made.save(tmp_path / "a")
    made.save(tmp_path / "b")
    made.save(tmp_path / "b")
    loaded = Selection.load(tmp_path / "a")
    assert same(loaded, made)
    assert {k: v.dtype for k, v in loaded.evidence.items()} == {k: v.dtype for k, v in made.evidence.items()}
    files = {f.name: f.read_bytes() for f in (tmp_path / "a").iterdir()}
    assert files == {f.name: f.read_bytes() for f in (tmp_path / "b").iterdir()}
    loaded.save(tmp_path / "c")
    assert files == {f.name: f.read_bytes() for f in (tmp_path / "c").iterdir()}


@every_class
@pytest.mark.parametrize("name", ["selected.parquet", "scores.npy", "selection.json"])
def test_a_flipped_bit_or_missing_file_is_named(cls, name, tmp_path):
    Case(cls(), cls.x_ndim[-1]).select(K).save(tmp_path / "s")
    path = tmp_path / "s" / name
    if not path.exists():
        pytest.skip(f"saves no {name}")
    whole, silent = path.read_bytes(), []
    for at in np.linspace(0, len(whole) - 1, 60).astype(int):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            Selection.load(tmp_path / "s")
            silent.append(f"{at}: loaded")
        except Exception as error:  # every other kind of error is a failure of the contract
            if not isinstance(error, LlmselectError) or name not in str(error):
                silent.append(f"{at}: {error!r}")
    assert not silent
    path.unlink()
    with pytest.raises(LlmselectError, match=name):
        Selection.load(tmp_path / "s")


# Budgets


BAD = [0, -1, 2.5, "200%", "0%", "-5%", "lots", "", True, False, None, float("nan"), float("inf"), -0.5, [5], {}]
BAD += [{"rows": 1, "tokens": 2}, {"fraction": 1.5}, {"fraction": 0}, {"rows": None}, {"tokens": -1}, {"row": 3}]
BAD += [{"rows": "5"}, {"rows": True}, {"fraction": float("nan")}, {"tokens": 1.5}]


@pytest.mark.parametrize("value", BAD, ids=repr)
def test_no_budget(value):
    with pytest.raises(UsageError):
        Budget.parse(value)


@pytest.mark.parametrize("value,plain", [
    (5, {"rows": 5}), ("5", {"rows": 5}), (" 5 % ", {"fraction": 0.05}), (0.05, {"fraction": 0.05}),
    ("100%", {"fraction": 1}), ({"tokens": 7}, {"tokens": 7}), (Budget(rows=3), {"rows": 3}),
])  # fmt: skip
def test_budgets(value, plain):
    assert Budget.parse(value).plain() == plain
    assert Budget.parse(Budget.parse(value).plain()) == Budget.parse(value)


@settings(max_examples=300, deadline=None)
@given(percent=st.integers(1, 100), n=st.integers(1, 50_000_000) | st.integers(1, 500_000).map(lambda i: 100 * i))
def test_a_fraction_is_exact(percent, n):
    assert Budget.parse(f"{percent}%").rows_of(n) == max(1, percent * n // 100)
