"""Loss trajectories against models loaded one by one, and clusters as the groups of a method."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import rows
import torch
from test_stages import recipe_of

import tiny
from llmselect.clustering import Clustering, clusters_of, memberships
from llmselect.engine import moments
from llmselect.engine.backbone import Backbone
from llmselect.engine.passes import Pass
from llmselect.errors import UsageError
from llmselect.estimate import estimate
from llmselect.extractors.loss import Loss
from llmselect.extractors.trajectory import Trajectory
from llmselect.kernels.keyed import Keyed
from llmselect.kernels.kmeans import kmeans
from llmselect.kernels.rows import Rows
from llmselect.prepare import prepare
from llmselect.selection import Selection
from llmselect.selectors.mig import Mig
from llmselect.selectors.similarity import Similarity
from llmselect.stages import Run, extract_stage, select_stage
from llmselect.train import Train, finetune

WARM = {"epochs": 3, "batch_tokens": 60, "checkpoints": 4, "lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        "sft": {"learning_rate": 1e-2}}  # fmt: skip


@pytest.fixture(scope="module")
def warm(tmp_path_factory, tiny_model):
    out = tmp_path_factory.mktemp("trajectory") / "warm"
    finetune(rows.pool(20), str(tiny_model), out, Train(**WARM), seed=0)
    return out


def naive(model: str, adapter: Path | None, chats) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean loss, entropy and EL2N of each row by PEFT's own loading and full logits in float64."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    lm = (PeftModel.from_pretrained(lm, str(adapter)) if adapter else lm).eval()
    found = []
    for row in Backbone(model, max_length=128).encoder.encode(chats):
        with torch.no_grad():
            logits = lm(input_ids=torch.tensor(row.ids[None].astype(np.int64))).logits[0].double()
        at = np.flatnonzero(row.response[1:])
        p = logits.softmax(-1).numpy()[at]
        label = row.ids[1:][at]
        own = p[np.arange(len(at)), label]
        entropy = -(p * np.log(p)).sum(1)
        el2n = [np.linalg.norm(one - np.eye(len(one))[y]) for one, y in zip(p, label, strict=True)]
        found.append((-np.log(own).mean(), entropy.mean(), np.mean(el2n)))
    return tuple(np.array(found).T)  # type: ignore[return-value]


def computed(extractor, chats, batch_tokens: int = 700):
    backbone = Backbone(extractor.model, max_length=128)
    run = Pass(backbone, {"f": extractor}, {}, {}, [], batch_tokens)
    return run.compute(chats, [str(i) for i in range(len(chats))], ["f"])["f"]


def test_every_column_is_the_model_at_its_checkpoint(warm, tiny_model):
    chats, places = tiny.chats(9, 30), moments.folders(str(warm))
    got = computed(Trajectory(model=str(tiny_model), checkpoints=str(warm)), chats)
    assert {name: one.shape for name, one in got.items()} == dict.fromkeys(("value", "entropy", "el2n"), (9, 5))
    for t, place in enumerate([None, *places]):
        for name, expected in zip(("value", "entropy", "el2n"), naive(str(tiny_model), place, chats), strict=True):
            np.testing.assert_allclose(got[name][:, t], expected, rtol=1e-4, atol=1e-5, err_msg=f"{name} {t}")
    assert np.ptp(got["value"], axis=1).min() > 0.05, "the checkpoints differ"
    without = computed(Trajectory(model=str(tiny_model), checkpoints=str(warm), base=False), chats)
    np.testing.assert_array_equal(without["value"], got["value"][:, 1:])


def test_el2n_of_the_loss_feature(tiny_model):
    chats = tiny.chats(9, 30)
    got = computed(Loss(model=str(tiny_model)), chats)
    _, entropy, el2n = naive(str(tiny_model), None, chats)
    np.testing.assert_allclose(got["el2n"], el2n, atol=1e-5)
    np.testing.assert_allclose(got["entropy"], entropy, rtol=1e-5, atol=1e-5)


class _Marked(np.ndarray):
    """An array that marks rows as a store does."""

    non_finite = np.array([5, 70])


def test_clusters_are_those_of_the_data_whatever_the_order_of_rows():
    pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 300)
    x = np.array([[3.0, 2, 1], [9, 6, 3], [1, 2, 3]])[truth] + 0.01 * rng.standard_normal((300, 3))
    ids = [f"row {i}" for i in range(300)]

    def agrees(label, wanted):
        pairs = {(a, b) for a, b in zip(label.tolist(), wanted.tolist(), strict=True)}
        return len(pairs) == len(set(wanted.tolist())) == len(set(label.tolist()))

    assert agrees(clusters_of(x, Clustering("x", 3, normalize=False), ids), truth)
    assert agrees(clusters_of(x, Clustering("x", 2), ids), np.where(truth == 1, 0, truth))  # same direction, another length
    order = rng.permutation(300)
    moved = clusters_of(x[order], Clustering("x", 3, normalize=False), [ids[i] for i in order])
    np.testing.assert_array_equal(moved, clusters_of(x, Clustering("x", 3, normalize=False), ids)[order])
    holes = x.copy().view(_Marked)
    holes[[5, 70]] = np.nan
    label = clusters_of(holes, Clustering("x", 3, normalize=False), ids)
    assert np.flatnonzero(label < 0).tolist() == [5, 70] and agrees(np.delete(label, [5, 70]), np.delete(truth, [5, 70]))
    assert len(np.unique(clusters_of(x[:2], Clustering("x", 5), ids[:2]))) <= 2


def test_memberships_are_shares_of_the_nearest_centroids():
    pytest.importorskip("faiss")
    rng = np.random.default_rng(1)
    x = np.eye(4)[rng.integers(0, 4, 120)] + 0.1 * rng.standard_normal((120, 4))
    ids = np.arange(120, dtype=np.uint64)
    found = memberships(x, 4, top=3, sharpness=5.0, ids=ids).toarray()
    centroids = kmeans(Rows(x), 4, Keyed(0, ids)).centroids.astype(float)
    for row, held in zip(x, found, strict=True):
        cosine = [row @ c / np.linalg.norm(row) / np.linalg.norm(c) for c in centroids]
        near = sorted(range(4), key=lambda j: -cosine[j])[:3]
        total = sum(math.exp(5 * cosine[j]) for j in near)
        expected = [math.exp(5 * cosine[j]) / total if j in near else 0.0 for j in range(4)]
        np.testing.assert_allclose(held, expected, atol=1e-5)
    tags = memberships(x, 4, ids=ids)
    picked = Mig(tau=None).select(4, x=tags, quality=np.ones(120)).indices
    assert sorted(tags.toarray()[picked].argmax(1)) == [0, 1, 2, 3]  # as tags, the four clusters are covered
    with pytest.raises(UsageError, match="top: 5"):
        memberships(x, 4, top=5)


def test_a_recipe_with_trajectories_and_clusters(tmp_path, tiny_model):
    pytest.importorskip("faiss")
    features = {"path": {"extractor": "trajectory"}, "emb": {"extractor": "embedding"}, "loss": {"extractor": "loss"}}
    methods = {
        "cld": {"selector": "cld", "x": "path"},
        "s2l": {"selector": "balanced", "groups": {"x": "path", "clusters": 4, "normalize": False}},
        "car": {"selector": "car", "quality": "loss.el2n", "groups": {"x": "emb", "clusters": 3}, "share": 0.0},
        "source": {"selector": "balanced", "groups": "source"},
        "experts": {"selector": "adapt_inf", "x": "emb", "quality": ["loss.nll", "loss.ifd", "path"], "clusters": 3},
        "both": {"selector": "topk", "x": ["loss.nll", "loss.entropy"], "reduce": "mean", "weights": [1, 3]},
        "beside": {"selector": "similarity", "x": ["emb", "loss.nll"]},
    }
    more = {"features": features, "methods": methods, "warmup": {"budget": "30%", "train": WARM}, "budget": 12}
    run = Run(recipe_of(tmp_path, tiny_model, tiny.chats(40), **more))
    for stage in (prepare, extract_stage, select_stage, select_stage):
        stage(run)
    assert run.store["path"].shape == (len(run.pool), 5) and run.store["path@target"].shape == (8, 5)
    made = {name: Selection.load(run.folder / "selections" / name / "seed-0") for name in methods}
    label = clusters_of(run.store["path"], Clustering("path", 4, normalize=False))
    sizes, taken = np.bincount(label, minlength=4), np.bincount(label[made["s2l"].indices], minlength=4)
    assert (label >= 0).all() and made["s2l"].evidence["group"].tolist() == label[made["s2l"].indices].tolist()
    assert all(t == s or t >= taken.max() - 1 for t, s in zip(taken, sizes, strict=True))
    best, emb = run.store["loss.el2n"][:], clusters_of(run.store["emb"], Clustering("emb", 3))
    assert set(made["car"].indices[:3]) == {int(np.where(emb == c, best, -1).argmax()) for c in range(3)}
    assert set(made["source"].evidence["group"]) == {"s0", "s1", "s2"}
    assert np.shape(made["experts"].provenance["report"]["entropy"]) == (3, 7)  # two losses, and five checkpoints
    mean = (run.store["loss.nll"][:].astype(float) + 3 * run.store["loss.entropy"][:]) / 4
    assert made["both"].indices.tolist() == np.argsort(-mean, kind="stable")[:12].tolist()
    side = [np.hstack([run.store[f"emb{t}"][:], run.store[f"loss{t}.nll"][:][:, None]]) for t in ("", "@target")]
    alone = Similarity().select(12, x=side[0], target=side[1], target_groups=run.target["group"], ids=run.store["emb"].ids)
    assert made["beside"].indices.tolist() == alone.indices.tolist()
    assert len(list((run.folder / "clusters").glob("*.npy"))) == 2
    assert estimate(run.recipe)["feature_bytes"] > 3 * 5 * 4 * 30


@pytest.mark.parametrize(
    "method,told",
    [
        ({"selector": "balanced", "groups": {"x": "nothing"}}, r"methods\.m\.groups: no feature 'nothing'"),
        ({"selector": "topk", "x": ["emb", "nothing"]}, r"methods\.m\.x: no feature 'nothing'"),
        ({"selector": "topk", "x": []}, "list of features is empty"),
        ({"selector": "balanced", "groups": {"x": "emb", "k": 3}}, r"methods\.m\.groups\.k: unknown key"),
        ({"selector": "balanced", "groups": {"x": "emb", "clusters": 0}}, "clusters: 0"),
        ({"selector": "random", "groups": "emb"}, "'random' takes no groups"),
        ({"selector": "balanced", "groups": "emb", "limits": {"caps": {"*": 0.5}}}, r"methods\.m\.limits: they are on sources"),
    ],
)
def test_mistakes_are_named(tmp_path, tiny_model, method, told):
    with pytest.raises(UsageError, match=told):
        recipe_of(tmp_path, tiny_model, tiny.chats(3), features={"emb": {"extractor": "embedding"}}, methods={"m": method})


def test_a_trajectory_needs_a_warm_up(tmp_path, tiny_model):
    features = {"path": {"extractor": "trajectory"}}
    with pytest.raises(UsageError, match="needs a warmup: section"):
        recipe_of(tmp_path, tiny_model, tiny.chats(3), features=features)
    with pytest.raises(UsageError, match=r"warmup\.train\.checkpoints"):
        recipe_of(tmp_path, tiny_model, tiny.chats(3), features=features, warmup={"train": {"epochs": 2}})
