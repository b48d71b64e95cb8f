"""The golden score of NUGGETS against one whole pass for every pair of row and target row."""

from __future__ import annotations

import numpy as np
import pytest
import rows
import torch
from test_stages import recipe_of

import tiny
from llmselect import extractors as E
from llmselect import selectors as S
from llmselect.benchmark.costs import forwards
from llmselect.engine import one_shot
from llmselect.engine.backbone import Backbone
from llmselect.engine.extraction import extract
from llmselect.engine.passes import Pass, fit
from llmselect.errors import LlmselectError, UsageError
from llmselect.estimate import estimate
from llmselect.pool import load_pool
from llmselect.prepare import prepare
from llmselect.stages import Run, extract_stage, select_stage
from llmselect.store import FeatureStore


def loss(backbone: Backbone, ids: np.ndarray, counted: np.ndarray) -> float:
    """Mean -log p of the tokens at `counted`, from full logits in float64."""
    with torch.no_grad():
        logits = backbone.causal_lm(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0].double()
    own = logits.log_softmax(-1)[np.flatnonzero(counted) - 1, ids[counted]]
    return -float(own.mean())


def naive(backbone: Backbone, pool, target, bos: int) -> tuple[np.ndarray, np.ndarray]:
    """Golden score and gain of every row for every group, a pass per pair."""
    examples = [row.ids for row in backbone.encoder.encode(list(pool["messages"]))]
    groups = list(dict.fromkeys(target["group"]))
    fall, helped = {g: [] for g in groups}, {g: [] for g in groups}
    for row, group in zip(backbone.encoder.encode(list(target["messages"])), target["group"], strict=True):
        first = int(row.ids[0] == bos)
        told = row.response[first:].copy()
        told[0] = False
        alone = loss(backbone, row.ids, np.concatenate([np.zeros(first, bool), told]))
        behind = [loss(backbone, np.concatenate([e, row.ids[first:]]), np.concatenate([np.zeros(len(e), bool), told]))
                  for e in examples]  # fmt: skip
        fall[group].append(alone - np.array(behind))
        helped[group].append(np.array(behind) < alone * (1 - 1e-5))
    value, gain = (np.stack([np.mean(one[g], 0) for g in groups], 1) for one in (helped, fall))
    return value, gain


def computed(folder, pool, target, batch_tokens=900, side="right", **options) -> dict[str, np.ndarray]:
    run = Pass(Backbone(folder, max_length=160), {"f": E.Nuggets(model=folder, **options)}, {}, {}, list(dict.fromkeys(
        target["group"])), batch_tokens, side)  # fmt: skip
    fit(run, target)
    return run.compute(list(pool["messages"]), pool["id"], ["f"])["f"]


TEMPLATES = {"chatml": tiny.CHATML, "bos": "{{ bos_token }}" + tiny.CHATML}


@pytest.fixture(scope="module", params=["chatml", "bos", "window"])
def folder(request, tmp_path_factory):
    shape = {"layers": 2, **({"window": 16} if request.param == "window" else {})}
    return str(tiny.save(tmp_path_factory.mktemp("model"), template=TEMPLATES.get(request.param, tiny.CHATML), **shape))


@pytest.fixture(scope="module")
def target():
    return rows.target(5, ("a", "b"))


@pytest.mark.parametrize("options", [{}, {"share": False}, {"side": "left", "batch_tokens": 1}])
def test_scores_are_those_of_one_pass_per_pair(folder, target, options):
    pool = rows.pool(9)
    value, gain = naive(Backbone(folder, max_length=160), pool, target, bos=0)
    found = computed(folder, pool, target, anchors=None, **options)
    np.testing.assert_allclose(found["gain"], gain, atol=2e-5)
    np.testing.assert_allclose(found["value"], value, atol=1e-6)
    assert np.unique(value).size > 2, "the rows differ in how many target rows they help"


def test_topk_takes_the_rows_that_help_most(tmp_path, tiny_model):
    target = rows.target(6, ("a",))
    store = FeatureStore(tmp_path)
    extract(rows.pool(14), store, {"f": E.Nuggets(model=str(tiny_model), anchors=6)}, target=target)
    made = S.TopK().select(5, x=store["f"])
    value = store["f"][:][:, 0]
    assert store["f@target"].shape == (6, 1) and store["f.gain"].shape == (14, 1)
    assert value[made.indices].min() >= np.delete(value, made.indices).max()
    assert set(np.round(value * 6, 4)) <= set(range(7))


def test_the_draw_of_anchors_depends_on_their_tokens_and_the_seed_alone(tiny_model):
    target, pool = rows.target(20, ("a",)), rows.pool(4)
    order = np.random.default_rng(0).permutation(20)
    found = [computed(str(tiny_model), pool, t, anchors=5, seed=s)["gain"]
             for t, s in ((target, 0), (target.select(order), 0), (target, 1))]  # fmt: skip
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    assert np.abs(found[0] - found[2]).min() > 1e-4
    doubled = target.select([*range(20), *range(20)])
    np.testing.assert_allclose(computed(str(tiny_model), pool, doubled, anchors=None)["gain"],
                               computed(str(tiny_model), pool, target, anchors=None)["gain"], atol=1e-6)  # fmt: skip


def test_what_does_not_fit_is_cut_as_told(tmp_path):
    """A model of 64 positions: a target row keeps its last 32 tokens, an example its first token and its last ones."""
    folder = tmp_path / "short"
    fast, model = tiny.tokenizer(), tiny.model(layers=1, vocab=len(tiny.tokenizer()))
    model.config.max_position_embeddings = fast.model_max_length = 64
    model.save_pretrained(folder), fast.save_pretrained(folder)
    backbone, pool, target = Backbone(str(folder)), rows.pool(8), rows.target(4, ("a",))
    short = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    pool = load_pool([*pool.select_columns(["messages"]), short])
    anchors, examples = (backbone.encoder.encode(list(data["messages"])) for data in (target, pool))
    kept = [(a.ids[-32:], np.r_[False, a.response[-32:][1:]]) for a in anchors]
    kept = [one for one in kept if one[1].any()]
    room = 64 - max(len(ids) for ids, _ in kept)
    assert room == 32 and len(examples[-1].ids) <= room < len(examples[0].ids)
    expected = []
    for e in examples:
        ids = e.ids if len(e.ids) <= room else np.r_[e.ids[:1], e.ids[-(room - 1) :]]
        falls = [loss(backbone, a, c) - loss(backbone, np.r_[ids, a], np.r_[np.zeros(len(ids), bool), c]) for a, c in kept]
        expected.append(np.mean(falls))
    run = Pass(backbone, {"f": E.Nuggets(model=str(folder), anchors=None)}, {}, {}, ["a"], 600)
    fit(run, target)
    np.testing.assert_allclose(run.compute(list(pool["messages"]), pool["id"], ["f"])["f"]["gain"][:, 0], expected, atol=2e-5)


def test_a_cache_that_is_not_the_rows_own_is_refused(tiny_model, monkeypatch):
    states = one_shot._states

    def forgetful(backbone, example, part, past):
        return states(backbone, example if past is None else example.roll(1), part, past) * (1.0 if past is None else 1.1)

    monkeypatch.setattr(one_shot, "_states", forgetful)
    with pytest.raises(LlmselectError, match="give share: false"):
        computed(str(tiny_model), rows.pool(2), rows.target(3, ("a",)))
    computed(str(tiny_model), rows.pool(2), rows.target(3, ("a",)), share=False)


def test_a_dry_run_measures_it_on_few_rows_and_the_benchmark_counts_its_passes(tmp_path, tiny_model, monkeypatch):
    seen = []
    whole = E.Nuggets.rows
    monkeypatch.setattr(E.Nuggets, "rows", lambda self, batch, state: seen.append(len(batch.ids)) or whole(self, batch, state))
    features = {"n": {"extractor": "nuggets", "anchors": 3}, "loss": {"extractor": "loss"}}
    methods = {"n": {"selector": "topk", "x": "n"}, "high": {"selector": "topk", "x": "loss.nll"}}
    run = Run(recipe_of(tmp_path, tiny_model, tiny.chats(60), features=features, methods=methods))
    told = estimate(run.recipe)
    assert sum(seen) == 16 and told["extract_minutes"] >= told["costly_minutes"]["n"]
    assert told["feature_bytes"] > told["usable_rows"] * (2 * 2 * 4 + 7 * 4)
    for stage in (prepare, extract_stage, select_stage):
        stage(run)
    tokens, theirs = (np.asarray(run.store[name]) for name in ("tokens.total", "tokens@target.total"))
    assert forwards(run, "n") == pytest.approx(1 + 6 * theirs.reshape(2, 4).mean() / tokens.mean())
    assert sum(seen) == 16 + len(run.pool) + 8


def test_mistakes_are_named(tiny_model, tmp_path):
    with pytest.raises(UsageError, match="anchors: 0"):
        E.Nuggets(model="m", anchors=0)
    with pytest.raises(UsageError, match="give target="):
        extract(rows.pool(2), FeatureStore(tmp_path), {"f": E.Nuggets(model=str(tiny_model))})
