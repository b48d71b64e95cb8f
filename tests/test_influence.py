"""EK-FAC against dense Fisher matrices, and influence against explicit dot products."""

from __future__ import annotations

import numpy as np
import pytest
import rows
import torch

import tiny
from llmselect import extractors as E
from llmselect.engine import ekfac, gradients
from llmselect.engine.backbone import Backbone
from llmselect.engine.batch import Batch, collate
from llmselect.engine.extraction import extract
from llmselect.engine.gradients import outer, row_gradients
from llmselect.errors import UsageError
from llmselect.store import FeatureStore


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("model"), layers=1))


@pytest.fixture(scope="module")
def backbone(folder):
    return Backbone(folder)


def batches(backbone, count: int, seed: int = 0, size: int = 16):
    encoded = backbone.encoder.encode(tiny.chats(count, seed))
    return [collate(backbone, encoded[i : i + size]) for i in range(0, count, size)]


def explicit(backbone, layers, data, seed=None) -> dict[str, torch.Tensor]:
    """Per-row gradients `[rows, d_out, d_in]` of every layer."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    for batch, source in ekfac._draws(data, seed, backbone.device):
        row_gradients(backbone, batch, layers, lambda name, a: a, lambda name, a, g: found[name].append(outer(g, a)), source)
    return {name: torch.cat(parts) for name, parts in found.items()}


def orthogonal(size: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)))[0]


def test_the_inverse_product_is_the_dense_inverse_of_its_matrix():
    left, right = orthogonal(4, 0), orthogonal(5, 1)
    scale = torch.rand(4, 5, generator=torch.Generator().manual_seed(2)) + 0.01
    state, v = {"l.output": left, "l.input": right, "l.scale": scale}, torch.randn(3, 4, 5)
    basis = torch.kron(left, right)
    dense = basis @ torch.diag(scale.flatten()) @ basis.T
    damped = dense + 0.2 * scale.mean() * torch.eye(20)
    expected = torch.linalg.solve(damped, v.flatten(1).T).T.view(3, 4, 5)
    assert torch.allclose(ekfac.inverse_product(state, "l", v, 0.2), expected, atol=1e-4)


def narrow(folder) -> Backbone:
    """A model so narrow that the Fisher of a layer (32 weights) can be estimated densely from some thousand rows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny.tokenizer().save_pretrained(folder)
    shape = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, head_dim=4)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tiny.tokenizer()), initializer_range=0.02, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    return Backbone(str(folder), max_length=128)


def random_rows(backbone, count: int, length: int = 5, size: int = 1000):
    """Batches of random tokens, the last two of each row supervised."""
    source = torch.Generator().manual_seed(1)
    for _ in range(count // size):
        ids = torch.randint(4, backbone.text_config.vocab_size, (size, length), generator=source)
        response = torch.zeros(size, length, dtype=torch.bool)
        response[:, -2:] = True
        whole = torch.ones_like(response)
        yield Batch(backbone, ids, whole, response, whole.to(torch.int8), torch.zeros(size, 2))


def test_the_eigenvalues_are_exact_in_the_basis_and_the_inverse_is_near_the_dense_one(tmp_path):
    # With predictions near uniform, the gradient at the output of the last layer does not depend on its input: the Fisher is
    # a Kronecker product, and EK-FAC must find its inverse. Elsewhere it is an approximation: eval/LOG.md has cosines.
    backbone = narrow(tmp_path)
    layers = gradients.choose(backbone, "down_proj")
    data, (name,) = list(random_rows(backbone, 8000)), layers
    state = ekfac.factors(backbone, layers, data, seed=0)
    rows_of = explicit(backbone, layers, data, seed=0)[name]
    turned = state[f"{name}.output"].T @ rows_of @ state[f"{name}.input"]
    assert torch.allclose(state[f"{name}.scale"], turned.square().mean(0), rtol=1e-3, atol=1e-12)
    flat = rows_of.flatten(1).double()
    fisher = flat.T @ flat / len(flat)
    cosine = lambda a, b: float(a @ b / a.norm() / b.norm())  # noqa: E731
    for seed, damping in ((0, 0.1), (1, 0.1), (2, 1.0)):
        v = torch.randn(layers[name].weight.shape, generator=torch.Generator().manual_seed(seed))
        damped = fisher + damping * float(state[f"{name}.scale"].mean()) * torch.eye(len(fisher), dtype=torch.float64)
        dense = torch.linalg.solve(damped, v.flatten().double())
        found = ekfac.inverse_product(state, name, v, damping).flatten().double()
        assert cosine(found, dense) > 0.99 > cosine(v.flatten().double(), dense)


def test_mean_gradients_are_means_of_rows(backbone):
    layers, data = gradients.choose(backbone, "."), batches(backbone, 20)
    rows_of = explicit(backbone, layers, data)
    for name, mean in ekfac.mean_gradient(backbone, layers, data).items():
        assert torch.allclose(mean, rows_of[name].mean(0), atol=1e-6)


def test_labels_are_drawn_from_the_model(backbone):
    layers, data = gradients.choose(backbone, "v_proj"), batches(backbone, 32)
    first, again, other, given = (ekfac.factors(backbone, layers, data, seed=s) for s in (0, 0, 1, None))
    key = next(name for name in first if name.endswith("scale"))
    assert torch.equal(first[key], again[key])
    assert not torch.equal(first[key], other[key]) and not torch.equal(first[key], given[key])
    # The mean loss of labels drawn from the model is its entropy.
    keep, source = (lambda name, a: a), torch.Generator().manual_seed(3)
    entropy = torch.cat([row_gradients(backbone, b, layers, keep, lambda *a: None, sample=source) for b in data]).mean()
    from llmselect.engine.head import token_stats

    stats = token_stats(backbone, backbone.forward(data[0].ids, data[0].mask), data[0].ids, data[0].response)
    assert float(entropy) == pytest.approx(float(stats.entropy.mean()), rel=0.1)


@pytest.mark.parametrize("curvature", ["none", "ekfac"])
def test_influence_is_the_dot_product_of_explicit_gradients(folder, backbone, tmp_path, curvature):
    pool, target, store = rows.pool(24), rows.target(3), FeatureStore(tmp_path)
    one = E.Influence(model=folder, curvature=curvature, fisher_rows=20)
    before = {name: p.clone() for name, p in backbone.causal_lm.named_parameters()}
    extract(pool, store, {"i": one}, target=target)
    layers = gradients.choose(backbone, ".")
    mine = explicit(backbone, layers, [collate(backbone, backbone.encoder.encode(list(pool["messages"])))])
    state = store.fitted("i")
    for g, group in enumerate("ab"):
        v = {name: torch.from_numpy(state[f"{g}/{name}"]) for name in layers}
        assert float(sum(x.square().sum() for x in v.values())) == pytest.approx(1, rel=1e-4)
        expected = sum((mine[name] * v[name]).sum((1, 2)) for name in layers).numpy()
        assert np.abs(store["i"][:][:, g] - expected).max() < 5e-3 * np.abs(expected).max()
        if curvature == "none":
            theirs = [m for m, name in zip(target["messages"], target["group"], strict=True) if name == group]
            mean = ekfac.mean_gradient(backbone, layers, [collate(backbone, backbone.encoder.encode(theirs))])
            norm = torch.stack([x.norm() for x in mean.values()]).norm()
            assert all(torch.allclose(v[name], mean[name] / norm, atol=1e-5) for name in layers)
    assert all(torch.equal(p, before[name]) for name, p in backbone.causal_lm.named_parameters())


def test_ekfac_preconditions_the_target_side_alone(folder, backbone, tmp_path):
    pool, target, store = rows.pool(20), rows.target(2), FeatureStore(tmp_path)
    shared = {"model": folder, "layers_like": "q_proj|down_proj", "k": None, "dim": None, "store": "float32"}
    plain, made = E.Gradient(**shared), E.Gradient(**shared, preconditioner="ekfac", fisher_rows=16)
    extract(pool, store, {"plain": plain, "made": made}, target=target)
    assert np.allclose(store["plain"][:], store["made"][:], atol=1e-6)
    layers = gradients.choose(backbone, "q_proj|down_proj")
    state = {name: torch.from_numpy(value) for name, value in store.fitted("made").items()}
    data = [collate(backbone, backbone.encoder.encode(list(target["messages"])))]
    parts = [ekfac.inverse_product(state, name, g, 0.1).flatten(1) for name, g in explicit(backbone, layers, data).items()]
    expected = torch.cat(parts, 1)
    expected = (expected / expected.norm(dim=1, keepdim=True)).numpy()
    assert np.abs(store["made@target"][:] - expected).max() < 1e-4
    k = E.Gradient(**{**shared, "k": 8}, preconditioner="ekfac", fisher_rows=16)
    extract(pool, store, {"k": k}, target=target)
    assert store["k"].shape[1] == 8 * 48 + 48 * 8


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(UsageError, match="mode: base"):
        E.Gradient(model="m", mode="lora", preconditioner="ekfac")
    with pytest.raises(UsageError, match="damping"):
        E.Influence(model="m", damping=0.0)
