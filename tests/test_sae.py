"""SAE features and MONA: sae-lens's own encode judges the extractor, dense fp64 formulas the selector."""

from __future__ import annotations

import json
import os

os.environ.setdefault("WANDB_MODE", "disabled")

import numpy as np
import pytest
import rows
import sae_lens as lens
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

import tiny
from llmselect import extractors as E
from llmselect import selectors
from llmselect.arrays import Csr
from llmselect.engine.backbone import Backbone
from llmselect.engine.extraction import extract
from llmselect.errors import LlmselectError, UsageError
from llmselect.kernels.jaccard import jaccard, sparse_blocks
from llmselect.sae import describe, load, training
from llmselect.store import FeatureStore

WIDTH, K, LAYER = 192, 6, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("model"), layers=4))


@pytest.fixture(scope="module")
def pool():
    return rows.pool(60)


@pytest.fixture(scope="module")
def target():
    return rows.target(4)


SETTINGS = training.SaeTraining(layer=LAYER, expansion=4, k=K, tokens=20_000, batch_tokens=200, buffer_tokens=800,
                                held_out_rows=10)  # fmt: skip


@pytest.fixture(scope="module")
def trained(folder, pool, tmp_path_factory):
    out = tmp_path_factory.mktemp("sae") / "sae"
    report = training.train_sae(pool, Backbone(folder), out, SETTINGS)
    return out, report


def random_sae(folder, hook="blocks.1.hook_resid_post", seed=0):
    """A TopK SAE with random weights, saved in sae-lens's format."""
    torch.manual_seed(seed)
    config = lens.TopKSAEConfig(d_in=48, d_sae=WIDTH, k=K, dtype="float32", device="cpu")
    config.metadata.hook_name = hook
    sae = lens.TopKSAE(config)
    with torch.no_grad():
        sae.W_enc.normal_(), sae.b_enc.normal_()
    sae.save_model(folder)
    return str(folder)


def oracle(folder, sae, messages, layer=LAYER) -> np.ndarray:
    """Mean latents of one row's prompt and response tokens, by Hugging Face's hidden states and sae-lens's encode."""
    backbone = Backbone(folder)
    (row,) = backbone.encoder.encode([messages])
    with torch.no_grad():
        states = backbone.causal_lm(torch.tensor([row.ids]), output_hidden_states=True).hidden_states[layer][0]
        return sae.encode(states[torch.from_numpy(row.content > 0)]).double().mean(0).numpy()


def sparse(dense: np.ndarray) -> Csr:
    return next(sparse_blocks(np.asarray(dense, np.float32)))[1]


def naive(z: np.ndarray, p: np.ndarray) -> float:
    z, p = np.asarray(z, np.float64), np.asarray(p, np.float64)
    union = np.maximum(z, p).sum()
    return float(np.minimum(z, p).sum() / union) if union else 0.0


matrices = st.integers(0, 10_000).map(
    lambda seed: np.where(np.random.default_rng(seed).random((7, 20)) < 0.4, np.random.default_rng(seed + 1).random((7, 20)), 0)
)


@given(matrices, st.floats(0.01, 100))
def test_jaccard_laws(dense, scale):
    dense = dense.astype(np.float32)
    dense[3] = 0
    found = jaccard(sparse(dense), dense)
    assert np.allclose(found, [[naive(z, p) for p in dense] for z in dense], atol=1e-6)
    assert np.allclose(found, found.T, atol=1e-6) and found.min() >= 0 and found.max() <= 1
    full = dense.any(1)
    assert np.allclose(np.diag(found), full) and not found[3].any() and not found[:, 3].any()
    assert np.allclose(jaccard(sparse(scale * dense), scale * dense), found, atol=1e-5)


@pytest.mark.parametrize("which", ["random", "trained"])
def test_rows_are_the_mean_of_sae_lens_encode(which, folder, pool, target, trained, tmp_path):
    path = random_sae(tmp_path / "sae") if which == "random" else str(trained[0])
    sae = lens.SAE.load_from_disk(path)
    made = {f"b{size}": FeatureStore(tmp_path / str(size)) for size in (1, 4000)}
    for size, store in zip((1, 4000), made.values(), strict=True):
        one = E.Sae(model=folder, sae=path, layer=LAYER, max_fvu=None)
        extract(pool, store, {"z": one}, target=target, batch_tokens=size)
    alone, together = (store["z"][:].toarray() for store in made.values())
    expected = np.stack([oracle(folder, sae, m) for m in pool["messages"]])
    assert expected.max() > 0.1 and np.count_nonzero(expected[0]) > K
    # fp16 rounds to 2^-11; where two latents tie for the k-th place, either may win.
    assert np.abs(together - expected).max() < 2e-3 * expected.max()
    assert np.abs(alone - together).max() < 2e-3 * expected.max()


def test_a_folder_in_sparsifys_format_is_read(tmp_path):
    from safetensors.torch import save_file

    place = tmp_path / "layers.1"
    place.mkdir()
    torch.manual_seed(0)
    weights = {"encoder.weight": torch.randn(WIDTH, 48), "encoder.bias": torch.randn(WIDTH), "W_dec": torch.randn(WIDTH, 48),
               "b_dec": torch.randn(48)}  # fmt: skip
    save_file(weights, place / "sae.safetensors")
    (place / "cfg.json").write_text(json.dumps({"d_in": 48, "num_latents": WIDTH, "expansion_factor": 4, "k": K}))
    sae = load.load(str(place))
    assert load.candidates(sae, None, 4) == (1, 2, 3)
    x = torch.randn(5, 48)
    before = torch.relu((x - weights["b_dec"]) @ weights["encoder.weight"].T + weights["encoder.bias"])
    expected = before.where(before >= before.topk(K).values[:, -1:], 0)
    assert torch.allclose(sae.encode(x), expected, atol=1e-4)


def test_the_hidden_state_is_measured_not_believed(folder, pool, target, trained, tmp_path, caplog):
    for shift in (0, 1):
        sae = lens.SAE.load_from_disk(str(trained[0]))
        sae.cfg.metadata.hook_name = f"blocks.{LAYER - 1 + shift}.hook_resid_post"
        sae.save_model(tmp_path / f"sae{shift}")
        store = FeatureStore(tmp_path / f"store{shift}")
        extract(pool, store, {"z": E.Sae(model=folder, sae=str(tmp_path / f"sae{shift}"))}, target=target)
        assert int(load_file(tmp_path / f"store{shift}/z@target/fit.safetensors")["layer"]) == LAYER
    with pytest.raises(LlmselectError, match="does not reconstruct"):
        extract(pool, FeatureStore(tmp_path / "no"), {"z": E.Sae(model=folder, sae=random_sae(tmp_path / "r"))}, target=target)


def test_unexplained_variance_is_one_minus_r2():
    from sklearn.metrics import r2_score

    states = torch.randn(300, 8) * torch.arange(1, 9) + 5
    guess = lambda x: x + torch.sin(7 * x)  # noqa: E731
    unexplained = load.Unexplained()
    for part in states.split(77):
        unexplained.add(guess, part)
    expected = 1 - r2_score(states.numpy(), guess(states).numpy(), multioutput="variance_weighted")
    assert unexplained.value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "hook,state",
    [("blocks.3.hook_resid_post", 4), ("blocks.3.hook_resid_pre", 3), ("model.layers.3", 4), ("layers.0", 1),
     ("transformer.h.2", 3), (load.hook_of(5), 5), (load.hook_of(0), 0)],
)  # fmt: skip
def test_hooks_mean_hidden_states(hook, state):
    assert load.hidden_state_of(hook) == state


@pytest.mark.parametrize("hook", ["blocks.3.hook_mlp_out", "blocks.3.attn.hook_z", "xblocks.3.hook_resid_post"])
def test_hooks_elsewhere_are_refused(hook):
    with pytest.raises(UsageError, match="residual stream"):
        load.hidden_state_of(hook)


def test_training_explains_held_out_rows_and_is_judged_by_sae_lens(folder, pool, trained):
    out, report = trained
    text = (out / "cfg.json").read_text()
    assert list(json.loads(text)) == sorted(json.loads(text))  # sae-lens's own order changes between processes
    sae, backbone = lens.SAE.load_from_disk(str(out)), Backbone(folder)
    states = training.States(pool, backbone, LAYER, SETTINGS)
    x = states.of(states.held_out)
    with torch.no_grad():
        fvu = float((x - sae(x)).square().sum() / (x - x.mean(0)).square().sum())
    assert report.fvu == pytest.approx(fvu, rel=1e-3) and fvu < 0.7
    assert report.l0 == pytest.approx(float((sae.encode(x) > 0).sum(1).float().mean()), abs=1e-2) and report.l0 <= K
    assert 0 <= report.dead < report.width == WIDTH
    assert not set(states.held_out) & set(states.rows) and len(states.held_out) == 10
    assert sae.cfg.metadata.hook_name == load.hook_of(LAYER)
    assert not out.with_name("sae.training").exists()


def test_an_interrupted_training_ends_in_the_same_weights(folder, pool, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    honest, left = training.States.of, [0]

    def failing(self, which):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return honest(self, which)

    monkeypatch.setattr(training.States, "of", failing)
    out = tmp_path / "sae"
    for calls in (3, 4, 10_000):
        left[0] = calls
        try:
            training.train_sae(pool, Backbone(folder), out, SETTINGS)
        except KeyboardInterrupt:
            assert (tmp_path / "sae.training" / "state.safetensors").exists() and not out.exists()
    expected, found = (load_file(folder / "sae_weights.safetensors") for folder in (trained[0], out))
    # Not the bytes: a GEMM may round its last bit by how memory happens to be aligned.
    assert all(np.allclose(found[name], expected[name], rtol=1e-4, atol=1e-6) for name in expected)
    left[0] = 1  # a finished SAE is kept: no state is computed again
    training.train_sae(pool, Backbone(folder), out, SETTINGS)
    with pytest.raises(LlmselectError, match=r"settings\.k"):
        training.train_sae(pool, Backbone(folder), out, training.SaeTraining(**{**vars(SETTINGS), "k": 7}))


def test_batchtopk_trains_too(folder, pool, tmp_path):
    settings = training.SaeTraining(**{**vars(SETTINGS), "kind": "batchtopk"})
    report = training.train_sae(pool, Backbone(folder), tmp_path / "sae", settings)
    assert report.fvu < 0.75 and K / 3 < report.l0 < 3 * K


def test_mona_ranks_by_the_dense_formula_and_shows_why(folder, pool, target, trained, tmp_path):
    store = FeatureStore(tmp_path)
    extract(pool, store, {"z": E.Sae(model=folder, sae=str(trained[0]))}, target=target)
    z, t, group = store["z"][:].toarray(), store["z@target"][:].toarray(), np.array(target["group"])
    prototypes = [t[group == g].mean(0, dtype=np.float64) for g in "ab"]
    expected = np.array([[naive(row, p) for p in prototypes] for row in z])
    made = selectors.Mona(across="mean").select(9, x=store["z"], target=store["z@target"], target_groups=group)
    assert np.allclose(made.scores, expected, atol=1e-6)
    assert made.indices.tolist() == np.argsort(-made.scores.mean(1, dtype=np.float64), kind="stable")[:9].tolist()
    turns = selectors.Mona().select(6, x=store["z"], target=store["z@target"], target_groups=group)
    assert turns.evidence["group"].tolist() == ["a", "b"] * 3
    assert turns.indices[:2].tolist() == [int(expected[:, 0].argmax()), int(expected[:, 1].argmax())]
    row, p = z[turns.indices[0]], prototypes[0]
    best = np.argsort(-np.minimum(row, p), kind="stable")[:5]
    assert turns.evidence["latent"][0].tolist() == best.tolist()
    assert np.allclose(turns.evidence["value"][0], row[best]) and np.allclose(turns.evidence["target_value"][0], p[best])
    dense = selectors.Mona(across="mean").select(9, x=z, target=t, target_groups=group, ids=pool["id"])
    assert dense.indices.tolist() == made.indices.tolist()


def test_ablation_metrics_equal_sklearn(pool):
    from sklearn.metrics.pairwise import cosine_similarity, euclidean_distances

    rng = np.random.default_rng(0)
    x, t = rng.random((30, 12)).astype(np.float32), rng.random((4, 12)).astype(np.float32)
    p = t.mean(0, dtype=np.float64, keepdims=True)
    for metric, expected in (("cosine", cosine_similarity(x, p)), ("euclidean", -euclidean_distances(x, p))):
        assert np.allclose(selectors.Mona(metric=metric).select(3, x=x, target=t).scores, expected, atol=1e-6)


def test_dense_selectors_refuse_sparse_features_and_negative_values_are_named(folder, pool, target, trained, tmp_path):
    store = FeatureStore(tmp_path)
    extract(pool, store, {"z": E.Sae(model=folder, sae=str(trained[0]))}, target=target)
    with pytest.raises(UsageError, match="x is sparse; give a dense one"):
        selectors.Similarity().select(3, x=store["z"], target=store["z@target"])
    with pytest.raises(LlmselectError, match=r"1 rows are negative.*\[4\]"):
        selectors.Mona().select(2, x=np.where(np.arange(8)[:, None] == 4, -1.0, 1.0) * np.ones((8, 3)), target=np.ones((1, 3)))


def test_descriptions_show_the_rows_and_tokens_that_fire(folder, pool, target, trained, tmp_path):
    store = FeatureStore(tmp_path)
    extract(pool, store, {"z": E.Sae(model=folder, sae=str(trained[0]))}, target=target)
    z, sae, backbone = store["z"][:].toarray(), lens.SAE.load_from_disk(str(trained[0])), Backbone(folder)
    latents = np.argsort(-z.max(0))[:2].tolist()
    found = describe.describe(pool, store["z"], sae, backbone, LAYER, latents, rows=3)
    for latent, one in zip(latents, found, strict=True):
        assert one["fires_in"] == pytest.approx((z[:, latent] > 0).mean())
        assert [row["row"] for row in one["rows"]] == np.argsort(-z[:, latent], kind="stable")[:3].tolist()
        assert all(row["peak"] >= row["mean"] > 0 and row["token"] for row in one["rows"])
        assert one["rows"][0]["token"] in str(pool["messages"][one["rows"][0]["row"]])
    assert f"latent {latents[0]}: fires in" in describe.text(found)


def test_features_together_are_the_features_alone_on_one_forward(folder, pool, target, trained, tmp_path, monkeypatch):
    made = {"trim": E.Trim(model=folder), "z": E.Sae(model=folder, sae=str(trained[0])), "last": E.Embedding(model=folder),
            "early": E.Embedding(model=folder, layer=1, pooling="mean"), "loss": E.Loss(model=folder)}  # fmt: skip
    together, passed, honest = FeatureStore(tmp_path / "all"), [], Backbone.states

    def counted(self, ids, mask, layers):
        passed.append(len(ids))
        return honest(self, ids, mask, layers)

    monkeypatch.setattr(Backbone, "states", counted)
    extract(pool, together, made, target=target)
    forwards = len(passed)
    for name, one in made.items():
        passed.clear()
        alone = FeatureStore(tmp_path / name)
        extract(pool, alone, {name: one}, target=target)
        for array in alone.open(name).spec["arrays"]:
            a, b = alone[f"{name}.{array}"][:], together[f"{name}.{array}"][:]
            a, b = (x.toarray() if hasattr(x, "toarray") else x for x in (a, b))
            assert np.array_equal(a, b, equal_nan=True), f"{name}.{array}"
        # `loss` alone passes rows and bare responses; together there is nothing more, but for two fits on the target.
        assert len(passed) <= forwards <= len(passed) + 2 * len(target) or name != "loss"
