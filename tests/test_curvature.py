"""The curvature of the loss at the input against double backward passes in float64."""

from __future__ import annotations

import numpy as np
import pytest
import rows
import torch

import tiny
from llmselect import extractors as E
from llmselect import selectors as S
from llmselect.engine import curvature
from llmselect.engine.backbone import Backbone
from llmselect.engine.batch import collate
from llmselect.engine.extraction import extract
from llmselect.engine.passes import Pass
from llmselect.errors import UsageError
from llmselect.store import FeatureStore


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("model"), layers=2))


def exact(backbone: Backbone, chats, direction: str, signs=None) -> dict[str, np.ndarray]:
    """‖Hz‖, zᵀHz and ‖g‖ of each row by two backward passes through whole logits in float64."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(backbone.path, dtype=torch.float64, attn_implementation="eager").eval()
    found = []
    for i, row in enumerate(backbone.encoder.encode(chats)):
        ids, told = torch.from_numpy(row.ids.astype(np.int64))[None], torch.from_numpy(row.response.copy())[1:]
        x = lm.get_input_embeddings()(ids).detach().requires_grad_()
        logits = lm(inputs_embeds=x).logits[0, :-1][told]
        g = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, ids[0, 1:][told]), x, create_graph=True)[0]
        zs = signs[i] if signs is not None else [g.detach().sign() if direction == "sign" else g.detach()]
        told = []
        for z in zs:
            z = z.double() / z.double().norm()
            hz = torch.autograd.grad((g * z).sum(), x, retain_graph=True)[0]
            told.append((float(hz.square().sum()), float((hz * z).sum())))
        found.append((np.sqrt(np.mean([a for a, _ in told])), np.mean([b for _, b in told]), float(g.detach().norm())))
    return dict(zip(("value", "along", "input_norm"), np.array(found).T, strict=True))


def computed(folder, chats, tokens=900, side="right", **options):
    run = Pass(Backbone(folder), {"f": E.Curvature(model=folder, **options)}, {}, {}, [], tokens, side)
    return run.compute(chats, [str(i) for i in range(len(chats))], ["f"])["f"]


@pytest.mark.parametrize("direction", ["sign", "gradient"])
@pytest.mark.parametrize(("side", "tokens"), [("right", 900), ("left", 900), ("right", 1)])
def test_it_is_that_of_two_backward_passes(folder, direction, side, tokens):
    chats = tiny.chats(9, 4)
    expected = exact(Backbone(folder), chats, direction)
    found = computed(folder, chats, tokens, side, direction=direction)
    for name, one in expected.items():
        np.testing.assert_allclose(found[name], one, rtol=2e-3, atol=2e-3 * np.abs(one).max(), err_msg=name)
    assert expected["value"].std() > 0.1 * expected["value"].mean() and (expected["along"] != 0).all()


def test_random_directions_are_of_the_row_alone(folder):
    chats, backbone = tiny.chats(6, 4), Backbone(folder)
    encoded = backbone.encoder.encode(chats)
    signs = []
    for row in encoded:
        batch = collate(backbone, [row])
        signs.append([curvature._signs(batch, torch.zeros(1, len(row.ids), 48), 7, draw) for draw in range(3)])
    assert {float(one) for draws in signs for z in draws for one in z.unique()} == {-1.0, 1.0}
    assert not torch.equal(signs[0][0], signs[0][1])
    found = computed(folder, chats, direction="random", draws=3, seed=7)
    for name, one in exact(backbone, chats, "random", signs).items():
        np.testing.assert_allclose(found[name], one, rtol=5e-3, atol=5e-3 * np.abs(one).max(), err_msg=name)
    again = computed(folder, chats[::-1], 1, direction="random", draws=3, seed=7)
    np.testing.assert_allclose(again["value"][::-1], found["value"], rtol=5e-3)
    assert not np.allclose(computed(folder, chats, direction="random", draws=3)["value"], found["value"], rtol=0.01)


def test_the_error_falls_with_the_square_of_the_step(folder):
    chats = tiny.chats(5, 4)
    expected = exact(Backbone(folder), chats, "sign")["value"]
    wrong = [np.abs(computed(folder, chats, step=step)["value"] - expected).max() for step in (2e-3, 1e-3)]
    assert 3 < wrong[0] / wrong[1] < 5


def test_ccs_covers_it_and_input_norms_are_those_of_the_gradient_feature(folder, tmp_path):
    store, pool, target = FeatureStore(tmp_path), rows.pool(24), rows.target(2)
    extract(pool, store, {"c": E.Curvature(model=folder), "g": E.Gradient(model=folder, k=4, dim=32)}, target=target)
    np.testing.assert_allclose(store["c.input_norm"][:], store["g.input_norm"][:][:, 0], rtol=1e-4)
    made = S.Ccs(beta=0.25).select(18, x=store["c"])
    assert set(made.indices.tolist()) == set(np.argsort(store["c"][:])[:18].tolist())


def test_a_row_without_response_tokens_has_none(folder):
    backbone = Backbone(folder)
    batch = collate(backbone, backbone.encoder.encode(tiny.chats(2)))
    batch.response[1] = False
    found = curvature.curvature(backbone, batch, "sign", 1e-4)
    assert all(one[0].isfinite() and one[1].isnan() for one in found.values())
    batch.response[0] = False
    assert all(one.isnan().all() for one in curvature.curvature(backbone, batch, "sign", 1e-4).values())


def test_mistakes_are_named(folder):
    with pytest.raises(UsageError, match="draws: 0"):
        E.Curvature(model="m", draws=0)
    with pytest.raises(UsageError, match="dtype: float32"):
        E.Curvature(model=folder).arrays(Backbone(folder, dtype="bfloat16"), [])
