"""The pass against one row at a time: padding, batching, layers, losses, memory, interruption."""

from __future__ import annotations

import numpy as np
import pytest
import rows
import torch

import tiny
from llmselect import extractors as E
from llmselect import selectors
from llmselect.engine.backbone import Backbone
from llmselect.engine.batch import plan
from llmselect.engine.extraction import extract
from llmselect.engine.memory import BackOff
from llmselect.engine.passes import Pass, fit
from llmselect.errors import LlmselectError, UsageError
from llmselect.store import FeatureStore


def run_of(backbone, extractors, *, target=None, batch_tokens=2048, side="right"):
    groups = [] if target is None else list(dict.fromkeys(target["group"]))
    made = Pass(backbone, extractors, {}, {}, groups, batch_tokens, side)
    if target is not None:
        fit(made, target)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def backbone(folder):
    return Backbone(folder, max_length=128)


def features(folder):
    return {
        "trim": E.Trim(model=folder),
        "mean1": E.Embedding(model=folder, layer=1, pooling="mean", normalize=False),
        "last": E.Embedding(model=folder, pooling="last", scope="response", template=False, normalize=False),
        "rds": E.Embedding(model=folder, normalize=False),
        "loss": E.Loss(model=folder),
        "tokens": E.Tokens(model=folder),
    }


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(("batch_tokens", "side"), [(600, "right"), (5000, "right"), (5000, "left")])
def test_batches_and_padding_change_nothing(tmp_path, window, batch_tokens, side):
    folder = str(tiny.save(tmp_path / "m", window=window))
    backbone, target, pool = Backbone(folder, max_length=96), rows.target(), rows.pool(24)
    alone = run_of(backbone, features(folder), target=target, batch_tokens=1)
    many = run_of(backbone, features(folder), target=target, batch_tokens=batch_tokens, side=side)
    names = list(features(folder))
    one, other = (r.compute(list(pool["messages"]), list(pool["id"]), names) for r in (alone, many))
    for name in names:
        for key, expected in one[name].items():
            if key.startswith("top_") and key != "top_score":
                continue  # positions count from the padded start; compared through top_score
            np.testing.assert_allclose(other[name][key], expected, rtol=2e-3, atol=2e-3, err_msg=f"{name}.{key}")
    np.testing.assert_allclose(other["loss"]["nll"], one["loss"]["nll"], atol=2e-5)
    np.testing.assert_allclose(other["rds"]["value"], one["rds"]["value"], atol=2e-5)


def test_embeddings_match_the_formula(backbone, folder):
    pool = rows.pool(6)
    names = ["mean1", "last", "rds"]
    run = run_of(backbone, {name: features(folder)[name] for name in names})
    got = run.compute(list(pool["messages"]), list(pool["id"]), names)
    for i, row in enumerate(backbone.encoder.encode(list(pool["messages"]))):
        out = backbone.causal_lm(input_ids=torch.tensor(row.ids[None].astype(np.int64)), output_hidden_states=True)
        first, final = (out.hidden_states[layer][0].double().numpy() for layer in (1, -1))
        t = np.arange(1, len(row.ids) + 1)
        np.testing.assert_allclose(got["mean1"]["value"][i], first.mean(0), atol=1e-5)
        np.testing.assert_allclose(got["rds"]["value"][i], (t[:, None] * final).sum(0) / t.sum(), atol=1e-5)
        np.testing.assert_allclose(got["last"]["value"][i], final[np.flatnonzero(row.content == 2)[-1]], atol=1e-5)


def test_losses_match_transformers(backbone, folder):
    pool = rows.pool(12)
    got = run_of(backbone, {"loss": E.Loss(model=folder)}).compute(list(pool["messages"]), list(pool["id"]), ["loss"])["loss"]
    for i, row in enumerate(backbone.encoder.encode(list(pool["messages"]))):
        ids = torch.tensor(row.ids[None].astype(np.int64))
        labels = torch.where(torch.tensor(row.response[None]), ids, -100)
        out = backbone.causal_lm(input_ids=ids, labels=labels)
        assert got["nll"][i] == pytest.approx(out.loss.item(), abs=1e-5)
        at = np.flatnonzero(row.response) - 1
        p = out.logits[0, at].double().softmax(-1)
        assert got["entropy"][i] == pytest.approx(-(p * p.log()).sum(-1).mean().item(), abs=1e-5)
        top = p.topk(2, -1).values
        assert got["margin"][i] == pytest.approx((top[:, 0] - top[:, 1]).mean().item(), abs=1e-5)
    np.testing.assert_allclose(got["ifd"], got["nll"] / got["nll_alone"], rtol=1e-6)
    np.testing.assert_allclose(got["ifd_ppl"], np.exp(got["nll"] - got["nll_alone"]), rtol=1e-5)


def test_loss_without_prompt_predicts_the_same_tokens(backbone, folder):
    chat = [{"role": "user", "content": "What is three plus four?"}, {"role": "assistant", "content": "The answer is seven."}]
    got = run_of(backbone, {"loss": E.Loss(model=folder)}).compute([chat], ["0" * 32], ["loss"])["loss"]
    row = backbone.encoder.encode([chat])[0]
    first = np.flatnonzero(row.response)[0]
    ids = torch.tensor(row.ids[None, first - 1 : np.flatnonzero(row.response)[-1] + 1].astype(np.int64))
    labels = ids.clone()
    labels[:, 0] = -100
    assert got["nll_alone"][0] == pytest.approx(backbone.causal_lm(input_ids=ids, labels=labels).loss.item(), abs=1e-5)


def test_no_logits_where_no_loss_is_asked_and_no_block_after_the_layer(backbone, folder, monkeypatch):
    calls = []
    hooks = [backbone.blocks[i].register_forward_hook(lambda *_, i=i: calls.append(i)) for i in range(backbone.depth)]
    hooks.append(backbone.causal_lm.lm_head.register_forward_hook(lambda *_: calls.append("head")))
    pool = rows.pool(4)
    run_of(backbone, {"mean1": E.Embedding(model=folder, layer=1)}).compute(list(pool["messages"]), list(pool["id"]), ["mean1"])
    assert set(calls) == {0}
    calls.clear()
    run_of(backbone, {"rds": E.Embedding(model=folder)}).compute(list(pool["messages"]), list(pool["id"]), ["rds"])
    assert set(calls) == set(range(backbone.depth))
    for hook in hooks:
        hook.remove()


def test_together_is_alone(folder, tmp_path):
    pool, target = rows.pool(40), rows.target()
    shared = features(folder)
    together = extract(pool, FeatureStore(tmp_path / "t"), shared, target=target, shard_rows=16)
    for name, extractor in shared.items():
        alone = extract(pool, FeatureStore(tmp_path / name), {name: extractor}, target=target, shard_rows=16)
        for array in together.open(name).spec["arrays"]:
            np.testing.assert_array_equal(together[f"{name}.{array}"][:], alone[f"{name}.{array}"][:], err_msg=name)


def test_plan_respects_the_budget_and_covers_all():
    lengths = np.random.default_rng(0).integers(1, 300, 500)
    batches = plan(lengths, 1000)
    assert sorted(np.concatenate(batches).tolist()) == list(range(500))
    assert all(len(b) == 1 or len(b) * lengths[b].max() <= 1000 for b in batches)
    assert sum(len(b) * lengths[b].max() for b in batches) < 1.15 * lengths.sum()


def test_out_of_memory_halves_and_goes_on():
    tried = []

    def step(part):
        tried.append(len(part))
        if len(part) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return part * 10

    back_off = BackOff()
    found = [pair for batch in (np.arange(8), np.arange(8, 16)) for pair in back_off.run(batch, step, [""] * 16)]
    assert np.concatenate([result for _, result in found]).tolist() == [10 * i for i in range(16)]
    assert tried[:3] == [8, 4, 2]
    assert max(tried[3:]) == 2, "later batches start at the size that fits"


def test_a_row_that_never_fits_is_named():
    def step(part):
        raise MemoryError

    with pytest.raises(LlmselectError, match="row abc alone"):
        list(BackOff().run(np.arange(1), step, ["abc"]))


def test_oom_in_the_pass_changes_no_number(backbone, folder, monkeypatch):
    pool = rows.pool(30)
    args = list(pool["messages"]), list(pool["id"]), ["rds"]
    expected = run_of(backbone, {"rds": E.Embedding(model=folder)}).compute(*args)["rds"]["value"]
    states = Backbone.states

    def starved(self, ids, mask, layers):
        if len(ids) > 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return states(self, ids, mask, layers)

    monkeypatch.setattr(Backbone, "states", starved)
    got = run_of(backbone, {"rds": E.Embedding(model=folder)}).compute(*args)["rds"]["value"]
    np.testing.assert_allclose(got.astype(np.float32), expected.astype(np.float32), atol=1e-3)


def test_another_fingerprint_is_refused_with_the_difference(folder, tmp_path):
    pool, store = rows.pool(10), FeatureStore(tmp_path)
    extract(pool, store, {"rds": E.Embedding(model=folder)})
    with pytest.raises(LlmselectError, match=r"settings\.layer: stored -1 ≠ wanted 1"):
        extract(pool, store, {"rds": E.Embedding(model=folder, layer=1)})
    with pytest.raises(LlmselectError, match="rows: stored"):
        extract(rows.pool(10, seed=5), store, {"rds": E.Embedding(model=folder)})


def test_a_fitting_extractor_without_target_is_refused(folder, tmp_path):
    with pytest.raises(UsageError, match="give target="):
        extract(rows.pool(4), FeatureStore(tmp_path), {"trim": E.Trim(model=folder)})


def test_non_finite_rows_are_named_and_never_ranked(folder, tmp_path, monkeypatch, caplog):
    pool, store, honest = rows.pool(10), FeatureStore(tmp_path), E.Embedding.rows
    last = max(range(10), key=lambda i: len(str(pool["messages"][i])))  # batches start with the longest row

    def broken(self, batch, state):
        value = honest(self, batch, state)["value"]
        value[0] = torch.inf
        return {"value": value}

    monkeypatch.setattr(E.Embedding, "rows", broken)
    extract(pool, store, {"rds": E.Embedding(model=folder)}, shard_rows=6)
    bad = store["rds"].non_finite
    assert len(bad) == 2 and all(pool["id"][i] in caplog.text for i in bad) and last in bad
    for budget, count in ((3, 3), ("100%", 8)):
        made = selectors.Similarity(combine="mean").select(budget, x=store["rds"], target=np.ones((1, 48)))
        assert len(made) == count and not set(made.indices) & set(bad)
        assert np.flatnonzero(np.isnan(made.scores.reshape(10, -1)).all(1)).tolist() == bad.tolist()
        assert list(made.ids) == [pool["id"][i] for i in made.indices]
    monkeypatch.setattr(E.Embedding, "rows", lambda self, batch, state: {"value": torch.full((len(batch.ids), 48), torch.nan)})
    extract(pool, store, {"none": E.Embedding(model=folder)})
    with pytest.raises(LlmselectError, match="none of 10 rows"):
        selectors.Similarity().select(2, x=store["none"], target=np.ones((1, 48)))
