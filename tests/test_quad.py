"""The bandit on pools with known good clusters, lazy arrays that are killed and resumed, and rewards against gradients."""

from __future__ import annotations

import json

import numpy as np
import pytest
import rows
import torch

import tiny
from llmselect import extractors as E
from llmselect import registry, selectors
from llmselect.engine import directional, gradients
from llmselect.engine.backbone import Backbone
from llmselect.engine.batch import collate
from llmselect.engine.extraction import extract
from llmselect.engine.on_demand import lazy
from llmselect.errors import LlmselectError, UsageError
from llmselect.kernels.bandit import Bandit
from llmselect.kernels.keyed import Keyed
from llmselect.kernels.kmeans import Clusters
from llmselect.store import FeatureStore


def synthetic(n: int = 4000, groups: int = 20, good: int = 4, seed: int = 0):
    """Rows of `groups` clusters; rewards N(1, 1) in the good ones, N(0, 1) elsewhere."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, groups, n)
    x = 5 * rng.standard_normal((groups, 8))[label] + 0.1 * rng.standard_normal((n, 8))
    return x, rng.standard_normal(n) + (label < good), label


class Counting:
    """A reward that notes which rows were asked for."""

    lazy, dtype, ndim = True, np.dtype(np.float64), 1

    def __init__(self, values: np.ndarray):
        self.values, self.asked, self.shape = values, [], values.shape

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows):
        self.asked += np.asarray(rows).tolist()
        return self.values[rows]


@pytest.mark.parametrize("accept", ["draws", "top"])
@pytest.mark.parametrize("seed", range(5))
def test_good_clusters_are_found_and_few_rows_scored(accept, seed):
    x, reward, label = synthetic(seed=seed)
    source = Counting(reward)
    made = selectors.Quad(clusters=20, accept=accept, share=0.25).select("5%", seed=seed, x=x, quality=source)
    told = made.provenance["report"]
    assert len(made) == 200
    assert told["scored"] == len(source.asked) == len(set(source.asked)) < 0.3 * 4000
    assert set(made.indices.tolist()) <= set(source.asked), "only rows that were scored are selected"
    assert np.isfinite(made.scores).sum() == told["scored"] == sum(one["rows"] for one in told["trace"])
    assert np.allclose(made.evidence["reward"], reward[made.indices])
    assert (label[made.indices] < 4).mean() > (0.75 if accept == "top" else 0.4), "4 of 20 clusters are good"
    assert reward[made.indices].mean() > (2.0 if accept == "top" else 0.5)


def test_accepted_draws_are_whole_and_above_the_threshold():
    x, reward, _ = synthetic()
    made = selectors.Quad(clusters=20, threshold=0.4).select(300, x=x, quality=reward)
    trace = made.provenance["report"]["trace"]
    assert all(one["accepted"] == (one["mean"] > 0.4) for one in trace)
    rounds = made.evidence["round"]
    taken = {(int(r), int(c)) for r, c in zip(rounds, made.evidence["cluster"], strict=True)}
    whole = [one for one in trace if one["accepted"]]
    assert taken <= {(one["round"], one["cluster"]) for one in whole}
    for one in whole[:-5]:
        assert ((rounds == one["round"]) & (made.evidence["cluster"] == one["cluster"])).sum() == one["rows"]


def test_regret_falls():
    """Later draws come from better clusters than the first ones."""
    late, early = [], []
    for seed in range(10):
        x, reward, _ = synthetic(seed=seed)
        made = selectors.Quad(clusters=20, accept="top", share=0.3).select(200, seed=seed, x=x, quality=reward)
        means = [one["mean"] for one in made.provenance["report"]["trace"]]
        early.append(np.mean(means[:20]))
        late.append(np.mean(means[-20:]))
    assert np.mean(early) == pytest.approx(0.2, abs=0.1)  # every arm once: what uniform sampling gives
    assert np.mean(late) > 1.6 * np.mean(early)


def test_scores_are_the_formula():
    clusters = Clusters(np.repeat(np.arange(3), 50).astype(np.int32), np.zeros(150, np.float32), np.eye(3, dtype=np.float32))
    bandit = Bandit(clusters, Keyed(0, np.arange(150, dtype=np.uint64)), gamma=0.1, least=2, alpha=0.7)
    assert np.isinf(bandit.scores()).all()
    rng, seen, pulls, means = np.random.default_rng(0), [], np.zeros(3), [[], [], []]
    for arms in ([0, 1, 2], [1], [1, 2]):
        drawn = bandit.draw(np.array(arms))
        assert [len(r) for _, r in drawn] == [5] * len(arms)
        reward = rng.standard_normal(5 * len(arms))
        bandit.update(drawn, reward, lambda means: 0.0, True)
        for i, arm in enumerate(arms):
            pulls[arm] += 1
            means[arm] += reward[5 * i : 5 * i + 5].tolist()
        seen += reward.tolist()
    expected = [np.mean(means[i]) + 0.7 * np.std(seen) * np.sqrt(2 * np.log(pulls.sum()) / pulls[i]) for i in range(3)]
    assert np.allclose(bandit.scores(), expected)
    while bandit.draw(np.array([0])):
        pass
    assert bandit.scores()[0] == -np.inf


def test_neighbours_share_rewards_by_distance():
    places = np.array([[0.0, 0], [1, 0], [10, 0], [11, 0]], np.float32)
    clusters = Clusters(np.repeat(np.arange(4), 20).astype(np.int32), np.zeros(80, np.float32), places)
    bandit = Bandit(clusters, Keyed(0, np.arange(80, dtype=np.uint64)), gamma=0.5, least=2, alpha=0.0, near=1)
    bandit.update(bandit.draw(np.arange(4)), np.repeat([4.0, 0, 1, 1], 10), lambda means: 0.0, True)
    w = np.exp(-1.0)
    assert np.allclose(bandit.scores(), [(4 + 0 * w) / (1 + w), (0 + 4 * w) / (1 + w), 1, 1])


def test_rows_without_a_reward_are_passed_over():
    x, reward, _ = synthetic(400, 4, 1)
    reward[::3] = np.nan
    made = selectors.Quad(clusters=4).select(50, x=x, quality=Counting(reward))
    assert len(made) == 50 and np.isfinite(reward[made.indices]).all()
    with pytest.raises(LlmselectError, match="fewer than the 300"):
        selectors.Quad(clusters=4).select(300, x=x, quality=Counting(reward))


def test_other_selectors_refuse_a_lazy_input_and_excluded_rows_are_never_scored():
    x, reward, _ = synthetic(400)
    source = Counting(reward)
    with pytest.raises(UsageError, match="lazy: false"):
        selectors.Kmq(clusters=2).select(5, x=x, quality=source)
    made = selectors.Quad(clusters=4).select(40, x=x, quality=source, exclude=np.arange(0, 400, 2))
    assert len(made) == 40 and all(row % 2 for row in [*made.indices.tolist(), *source.asked])


@pytest.mark.parametrize("options", [{"gamma": 0}, {"arms": 2}, {"quantile": 1}, {"alpha": -1}, {"share": 0}, {"least": 0}])
def test_options_that_make_no_sense(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        selectors.Quad(**options)


# Lazy features


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("model")))


def test_lazy_rows_are_computed_once_and_are_the_features(folder, tmp_path):
    pool, store = rows.pool(40), FeatureStore(tmp_path)
    one = E.Loss(model=folder)
    extract(pool, store, {"whole": one})
    some = lazy(pool, store, "some.ifd", one, part=4)
    passed = []
    inner = some.compute
    some.compute = lambda r: passed.extend(r.tolist()) or inner(r)
    wanted = np.array([7, 3, 3, 30, 12, 1, 5])
    assert np.allclose(some[wanted], store["whole.ifd"][wanted], atol=1e-6)
    assert sorted(passed) == sorted(set(wanted.tolist())) and some.computed == 6
    assert np.allclose(some[np.array([3, 8])], store["whole.ifd"][[3, 8]], atol=1e-6)
    assert sorted(passed) == [1, 3, 5, 7, 8, 12, 30]
    again = lazy(pool, store, "some.ifd", one, part=4)
    again.compute = None
    assert again.computed == 7 and (again[wanted] == some[wanted]).all()
    assert "some" not in store
    with pytest.raises(LlmselectError, match="made from something else"):
        lazy(pool, store, "some.ifd", E.Loss(model=folder, without_prompt=False), part=4)
    with pytest.raises(UsageError, match=r"no array 'nl'"):
        lazy(pool, store, "some.nl", one, part=4)


@pytest.mark.parametrize("name", ["fit.safetensors", "fit.json"])
def test_what_a_lazy_feature_learned_is_checked_and_learned_again(folder, tmp_path, name):
    pool, target, store = rows.pool(12), rows.target(), FeatureStore(tmp_path)
    some = lazy(pool, store, "t", E.Trim(model=folder), target=target, part=4)
    expected, file = some[np.arange(3)], tmp_path / "lazy/t" / name
    sound = file.read_bytes()
    file.write_bytes(sound[:-9] + bytes([sound[-9] ^ 1]) + sound[-8:])
    with pytest.raises(LlmselectError, match=r"fit\.\w+ is damaged.*; delete .*fit\.safetensors and run again"):
        lazy(pool, store, "t", E.Trim(model=folder), target=target, part=4)
    (tmp_path / "lazy/t/fit.safetensors").unlink()
    again = lazy(pool, store, "t", E.Trim(model=folder), target=target, part=4)
    assert file.read_bytes() == sound and (again[np.arange(3)] == expected).all()


def test_a_killed_request_is_finished_with_the_same_parts(folder, tmp_path):
    pool, one = rows.pool(40), E.Loss(model=folder)
    requests = [np.arange(0, 40, 3), np.arange(0, 40, 2), np.arange(40)]

    def files(store: FeatureStore) -> dict[str, bytes]:
        return {f.name: f.read_bytes() for f in sorted((store.path / "lazy" / "nll").iterdir())}

    whole = FeatureStore(tmp_path / "whole")
    array = lazy(pool, whole, "nll.nll", one, part=4)
    expected = [array[r].copy() for r in requests]
    killed = FeatureStore(tmp_path / "killed")
    for after in (2, 3, 1, 100):
        array = lazy(pool, killed, "nll.nll", one, part=4) if after == 2 else None
        try:
            calls, found = [], []
            array = array or reopened(pool, killed, one, calls, after)
            limit(array, calls, after)
            for r in requests:
                found.append(array[r].copy())
        except KeyboardInterrupt:
            continue
    assert all((a == b).all() for a, b in zip(expected, found, strict=True))
    assert files(whole) == files(killed)
    damaged = next((killed.path / "lazy" / "nll").glob("*.safetensors"))
    target = sorted((killed.path / "lazy" / "nll").glob("0*-*.safetensors"))[0]
    target.write_bytes(target.read_bytes()[:-1] + b"x")
    with pytest.raises(LlmselectError, match="is damaged"):
        lazy(pool, killed, "nll.nll", one, part=4)
    assert damaged.exists()


def limit(array, calls: list, after: int) -> None:
    inner = array.compute

    def compute(r):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(1)
        return inner(r)

    array.compute = compute


def reopened(pool, store, one, calls, after):
    from llmselect import lazy as module

    honest = module.LazyArray.__init__

    def init(self, folder, name, tail, ids, compute, **launch):
        def counted(r):
            if len(calls) == after:
                raise KeyboardInterrupt
            calls.append(1)
            return compute(r)

        honest(self, folder, name, tail, ids, counted, **launch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.LazyArray, "__init__", init)
        made = lazy(pool, store, "nll.nll", one, part=4)
    calls.clear()
    return made


# Rewards


@pytest.mark.parametrize("method,tolerance", [("jvp", 1e-5), ("difference", 5e-3), ("sketch", 0.1)])
def test_rewards_are_products_with_explicit_gradients(folder, tmp_path, method, tolerance):
    pool, target, store = rows.pool(24), rows.target(3), FeatureStore(tmp_path)
    # A wide sketch of layers too narrow to be projected: its error is ‖∇L(z)‖ / √dim, and these products are much smaller.
    one = E.Influence(model=folder, method=method, fisher_rows=16, layers_like="q_proj|o_proj", dim=1 << 20)
    extract(pool, store, {"i": one}, target=target)
    backbone, state = Backbone(folder), store.fitted("i")
    layers = gradients.choose(backbone, one.layers_like)
    batch = collate(backbone, backbone.encoder.encode(list(pool["messages"])))
    mine: dict[str, torch.Tensor] = {}
    gradients.row_gradients(backbone, batch, layers, lambda n, a: a, lambda n, a, g: mine.update({n: gradients.outer(g, a)}))
    for g in range(2):
        expected = sum((mine[n] * torch.from_numpy(state[f"{g}/{n}"])).sum((1, 2)) for n in layers).numpy()
        assert np.abs(store["i"][:][:, g] - expected).max() < tolerance * np.abs(expected).max()


def test_tangents_leave_the_model_as_it_was_and_a_row_without_response_is_nan(folder):
    backbone = Backbone(folder)
    before = {name: p.clone() for name, p in backbone.causal_lm.named_parameters()}
    layers = gradients.choose(backbone, "o_proj")
    batch = collate(backbone, backbone.encoder.encode(list(rows.pool(4)["messages"])))
    batch.response[2] = False
    found = directional.tangents(backbone, batch, [{n: torch.ones_like(m.weight) for n, m in layers.items()}])
    assert found.isnan()[:, 0].tolist() == [False, False, True, False]
    after = dict(backbone.causal_lm.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[n], p) for n, p in before.items())
    assert all(isinstance(m.weight, torch.nn.Parameter) for m in layers.values())


def test_quad_on_a_lazy_influence_is_quad_on_the_whole_one(folder, tmp_path):
    pool, target, store = rows.pool(60), rows.target(3), FeatureStore(tmp_path)
    one, emb = E.Influence(model=folder, fisher_rows=16), E.Embedding(model=folder)
    extract(pool, store, {"emb": emb, "whole": one}, target=target)
    some = lazy(pool, store, "part", one, target=target, part=8)
    quad = selectors.Quad(clusters=4, least=4)
    a = quad.select(8, x=store["emb"], quality=some)
    b = quad.select(8, x=store["emb"], quality=store["whole"][:])
    assert a.indices.tolist() == b.indices.tolist()
    assert some.computed == a.provenance["report"]["scored"] < 60
    assert json.dumps(a.provenance["report"])
    assert registry.describe(type(quad))["Paper"]
