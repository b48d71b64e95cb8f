"""TRIM against a dense fp64 oracle written from the formula, and the laws of the method."""

from __future__ import annotations

import numpy as np
import pytest
import rows
import torch

import tiny
from llmselect.engine.attention import attention_statistics
from llmselect.engine.backbone import Backbone
from llmselect.engine.batch import collate
from llmselect.engine.extraction import extract
from llmselect.engine.passes import Pass, fit
from llmselect.errors import LlmselectError, UsageError
from llmselect.extractors import Trim
from llmselect.store import FeatureStore


@pytest.fixture(scope="module", params=[None, 9], ids=["causal", "sliding"])
def backbone(request, tmp_path_factory):
    return Backbone(str(tiny.save(tmp_path_factory.mktemp("m"), window=request.param)), max_length=128)


def fitted(backbone, target, trim=None):
    run = Pass(backbone, {"trim": trim or Trim(model=backbone.path)}, {}, {}, list(dict.fromkeys(target["group"])))
    fit(run, target)
    return run


def scores(run, data):
    return run.compute(list(data["messages"]), list(data["id"]), ["trim"])["trim"]


def eager(backbone, ids):
    """Attention maps `[L, H, T, T]` and last states `[T, d]` of one row, fp64, by transformers' own eager attention."""
    backbone.causal_lm.set_attn_implementation("eager")
    out = backbone.causal_lm(
        input_ids=torch.tensor(ids[None].astype(np.int64)), output_attentions=True, output_hidden_states=True
    )
    backbone.causal_lm.set_attn_implementation("sdpa")
    return np.stack([a[0].double().numpy() for a in out.attentions]), out.hidden_states[-1][0].double().numpy()


def signals(maps):
    """Q and K `[T]` from attention maps."""
    visible = maps > 0
    count = visible.sum(-1)
    entropy = -np.where(visible, maps * np.log(np.where(visible, maps, 1)), 0).sum(-1)
    q = np.where(count > 1, 1 - entropy / np.log(np.maximum(count, 2)), 0).mean((0, 1))
    k = (maps.sum(-2) / visible.sum(-2)).mean((0, 1))
    return q, k


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def scaled(x):
    return (x - x.min()) / (x.max() - x.min()) if np.ptp(x) > 0 else np.ones_like(x)


def oracle(backbone, target, pool, *, penalty=0.5, last_layers=4):
    """Scores `[n, G]` by the formula: loops over tokens, dictionaries of classes, fp64."""
    embedding = unit(backbone.causal_lm.get_input_embeddings().weight.double().numpy())
    encode = backbone.encoder.encode
    columns = []
    for group in dict.fromkeys(target["group"]):
        prints: dict[int, np.ndarray] = {}
        for row in encode([m for m, g in zip(target["messages"], target["group"], strict=True) if g == group]):
            maps, states = eager(backbone, row.ids)
            q, k = signals(maps[-last_layers:])
            keep = np.flatnonzero(row.content > 0)
            alpha = 0.5 * scaled(q[keep]) + 0.5 * scaled(k[keep])
            for a, at in zip(alpha, keep, strict=True):
                t = int(row.ids[at])
                prints[t] = prints.get(t, 0) + a * unit(states[at])
        prints = {t: unit(v) for t, v in prints.items() if np.linalg.norm(v) > 1e-6}
        classes = sorted(prints)
        column = []
        for row in encode(list(pool["messages"])):
            states = unit(eager(backbone, row.ids)[1])
            found = []
            for at in np.flatnonzero(row.content == 2):
                t = int(row.ids[at])
                match = t if t in prints else classes[int(np.argmax(embedding[classes] @ embedding[t]))]
                found.append((1 if t in prints else penalty) * states[at] @ prints[match])
            column.append(0.5 * np.mean(found) + 0.5 * np.max(found))
        columns.append(column)
    return np.array(columns).T


def test_scores_match_the_oracle(backbone):
    target, pool = rows.target(), rows.pool(20)
    got = scores(fitted(backbone, target), pool)["value"]
    np.testing.assert_allclose(got.astype(np.float64), oracle(backbone, target, pool), atol=6e-4)  # float16 in the store


def test_attention_statistics_match_eager_maps_in_padded_batches(backbone):
    encoded = backbone.encoder.encode(tiny.chats(7))
    for side in ("right", "left"):
        batch = collate(backbone, encoded, padding_side=side)
        with attention_statistics(backbone, batch.mask, None) as statistics:
            backbone.states(batch.ids, batch.mask, (-1,))
        for i, row in enumerate(encoded):
            at = batch.mask[i].numpy()
            q, k = signals(eager(backbone, row.ids)[0])
            np.testing.assert_allclose(statistics.row()[i].numpy()[at], q, atol=1e-4)
            np.testing.assert_allclose(statistics.column()[i].numpy()[at], k, atol=1e-4)


def test_blocks_do_not_show(backbone, monkeypatch):
    from llmselect.engine import attention

    batch = collate(backbone, backbone.encoder.encode(tiny.chats(4)))
    found = []
    for block in (7, 1000):
        monkeypatch.setattr(attention, "BLOCK", block)
        with attention_statistics(backbone, batch.mask, 2) as statistics:
            backbone.states(batch.ids, batch.mask, (-1,))
        found.append((statistics.row(), statistics.column()))
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=0)


def test_special_and_template_tokens_never_score(backbone):
    out = scores(fitted(backbone, rows.target()), pool := rows.pool(20))
    special = set(backbone.tokenizer.all_special_ids)
    assert not special & set(out["top_token"].ravel().tolist()) and not special & set(out["top_class"].ravel().tolist())
    for i, row in enumerate(backbone.encoder.encode(list(pool["messages"]))):
        positions = [p for p in out["top_position"][i].ravel() if p >= 0]
        assert all(row.content[p] == 2 for p in positions)
    assert out["value"].astype(float).std(0).min() > 1e-3, "the maximum must not be one constant"


def test_lambda_one_and_all_classes_present_is_plain_cosine(backbone):
    target = rows.target(per_group=3, groups=("a",))
    run = fitted(backbone, target, Trim(model=backbone.path, penalty=1.0, scope="all", mean_weight=1.0))
    state = run.states["trim"]
    row = backbone.encoder.encode([target["messages"][0]])[0]
    states = unit(eager(backbone, row.ids)[1])
    classes = state["0.classes"].tolist()
    keep = [at for at in np.flatnonzero(row.content > 0) if int(row.ids[at]) in classes]
    assert len(keep) >= (row.content > 0).sum() - 1  # a token whose saliency is 0 has no fingerprint
    vectors = state["0.vectors"].double().numpy()
    cosines = [states[at] @ vectors[classes.index(int(row.ids[at]))] for at in keep]
    got = run.compute([target["messages"][0]], ["0" * 32], ["trim"])["trim"]["value"][0, 0]
    if len(keep) == (row.content > 0).sum():
        assert float(got) == pytest.approx(np.mean(cosines), abs=1e-3)


def test_a_target_row_beats_its_shuffled_copy(backbone):
    target = rows.target(per_group=6, groups=("a",))
    run = fitted(backbone, target)
    rng, wins = np.random.default_rng(0), 0
    for messages in target["messages"]:
        words = messages[-1]["content"].split()
        shuffled = [*messages[:-1], {"role": "assistant", "content": " ".join(rng.permutation(words))}]
        own, other = run.compute([messages, shuffled], ["0" * 32, "1" * 32], ["trim"])["trim"]["value"][:, 0]
        wins += own >= other
    assert wins >= 5


def test_duplicate_target_rows_change_no_fingerprint(backbone):
    from datasets import concatenate_datasets

    target = rows.target()
    once, twice = (fitted(backbone, t).states["trim"] for t in (target, concatenate_datasets([target, target.select([0, 5])])))
    assert once.keys() == twice.keys()
    for key in once:
        torch.testing.assert_close(once[key], twice[key])


def test_permuting_the_pool_permutes_the_scores(backbone):
    run, pool = fitted(backbone, rows.target()), rows.pool(20)
    order = np.random.default_rng(0).permutation(20)
    np.testing.assert_allclose(scores(run, pool.select(order))["value"], scores(run, pool)["value"][order], atol=1e-3)


def test_uniform_saliency_is_another_score(backbone):
    target, pool = rows.target(), rows.pool(20)
    with_attention = scores(fitted(backbone, target), pool)["value"]
    without = scores(fitted(backbone, target, Trim(model=backbone.path, saliency="uniform")), pool)["value"]
    assert 0 < np.abs(with_attention.astype(float) - without.astype(float)).max() < 0.5


@pytest.mark.parametrize(
    "wrong", [{"penalty": 0.0}, {"penalty": 1.5}, {"mean_weight": -0.1}, {"evidence": 0}, {"last_layers": 0}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(UsageError):
        Trim(model="m", **wrong)


@pytest.mark.parametrize("name", ["fit.safetensors", "fit.json"])
def test_what_was_learned_is_found_damaged_dropped_by_a_repair_and_learned_again(tmp_path, tiny_model, name):
    store, file = FeatureStore(tmp_path), tmp_path / "trim@target" / name
    made = {"trim": Trim(model=str(tiny_model))}
    extract(rows.pool(6), store, made, target=rows.target())
    sound, shard = file.read_bytes(), (tmp_path / "trim/00000.safetensors").stat().st_mtime_ns
    file.write_bytes(sound[:-9] + bytes([sound[-9] ^ 1]) + sound[-8:])
    with pytest.raises(LlmselectError, match="is damaged"):
        store.fitted("trim")
    assert store.open("trim@target").repair() == [] and not file.exists()
    extract(rows.pool(6), store, made, target=rows.target())
    assert file.read_bytes() == sound and store.fitted("trim")
    assert (tmp_path / "trim/00000.safetensors").stat().st_mtime_ns == shard
