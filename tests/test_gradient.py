"""Gradient features against autograd one row at a time, Adam against torch.optim, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import rows
import torch

import tiny
from llmselect import extractors as E
from llmselect import selectors
from llmselect.engine import gradients, moments
from llmselect.engine.backbone import Backbone
from llmselect.engine.extraction import extract
from llmselect.errors import LlmselectError, UsageError
from llmselect.store import FeatureStore
from llmselect.train import Train, finetune

LAYERS = "self_attn|mlp"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def pool():
    return rows.pool(14)


@pytest.fixture(scope="module")
def target():
    return rows.target(2)


@pytest.fixture(scope="module")
def warmed(folder, pool, tmp_path_factory):
    """A warm-up of six steps that kept three checkpoints."""
    out = tmp_path_factory.mktemp("warm") / "adapter"
    lora = {"r": 4, "lora_dropout": 0.3, "target_modules": ["q_proj", "v_proj"]}
    sft = {"learning_rate": 0.01, "lr_scheduler_type": "linear"}
    train = Train(tokens=360, batch_tokens=60, checkpoints=3, lora=lora, sft=sft)
    finetune(pool, folder, out, train, seed=0)
    return str(out)


def exact(backbone: Backbone, messages, parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Gradients of one row's mean response loss by the whole model's own forward and autograd."""
    (row,) = backbone.encoder.encode([messages])
    ids = torch.tensor([row.ids]).long()
    for p in parameters.values():
        p.requires_grad_(True)
    logits = backbone.causal_lm(ids).logits[0, :-1]
    told = torch.from_numpy(np.asarray(row.response))[1:]
    loss = torch.nn.functional.cross_entropy(logits[told], ids[0, 1:][told])
    found = torch.autograd.grad(loss, list(parameters.values()))
    for p in parameters.values():
        p.requires_grad_(False)
    return dict(zip(parameters, found, strict=True))


def unit(matrix: np.ndarray) -> np.ndarray:
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(found - expected).max() < 1e-5 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("options", [{}, {"last_blocks": 1}, {"layers_like": "q_proj|down_proj"}, {"packed": True}])
@pytest.mark.parametrize("batch_tokens", [1, 3000])
def test_rows_without_projection_are_autograds(folder, pool, target, tmp_path, options, batch_tokens):
    one = E.Gradient(model=folder, k=None, dim=None, store="float32", **options)
    store = FeatureStore(tmp_path)
    extract(pool, store, {"g": one}, target=target, batch_tokens=batch_tokens)
    backbone = Backbone(folder)
    layers = gradients.choose(backbone, one.layers_like, one.last_blocks)
    expected = [exact(backbone, m, {name: layer.weight for name, layer in layers.items()}) for m in pool["messages"]]
    flat = np.stack([torch.cat([g.flatten() for g in row.values()]).numpy() for row in expected])
    assert len(layers) == {"": 21, "last_blocks": 7, "layers_like": 6, "packed": 21}["".join(options)]
    assert close(store["g"][:], unit(flat))
    assert np.allclose(store["g.norm"][:][:, 0], np.linalg.norm(flat, axis=1), rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"last_blocks": 1}, {"packed": True}])
def test_input_norms_are_those_of_autograd_at_the_input_of_the_lowest_block(folder, pool, options):
    from llmselect.engine.passes import Pass

    backbone = Backbone(folder)
    run = Pass(backbone, {"g": E.Gradient(model=folder, k=4, dim=64, **options)}, {}, {}, batch_tokens=3000)
    found = run.compute(list(pool["messages"]), pool["id"], ["g"])["g"]["input_norm"]
    lowest, expected = backbone.blocks[-1 if "last_blocks" in options else 0], []
    for row in backbone.encoder.encode(list(pool["messages"])):
        seen = []
        hook = lowest.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].requires_grad_()) or args)
        ids, told = torch.tensor([row.ids]).long(), torch.from_numpy(np.asarray(row.response))[1:]
        logits = backbone.causal_lm(ids).logits[0, :-1]
        hook.remove()
        loss = torch.nn.functional.cross_entropy(logits[told], ids[0, 1:][told])
        expected.append(float(torch.autograd.grad(loss, seen)[0].norm()))
    assert found.shape == (14, 1) and np.allclose(found[:, 0], expected, rtol=1e-4)


def test_rows_do_not_depend_on_order_padding_side_or_batch(folder, pool):
    from llmselect.engine.passes import Pass

    one = E.Gradient(model=folder, dim=512, k=8, store="float32")
    found = []
    for side, tokens, step in (("right", 1, 1), ("right", 5000, 1), ("left", 5000, 1), ("right", 700, -1)):
        run = Pass(Backbone(folder), {"g": one}, {}, {}, batch_tokens=tokens, padding_side=side)
        found.append(run.compute(list(pool["messages"])[::step], pool["id"][::step], ["g"])["g"]["value"][::step])
    assert all(close(other, found[0]) for other in found[1:])


def test_base_mode_projects_the_larger_side_alone(folder, pool):
    from llmselect.engine.passes import Pass
    from llmselect.engine.projection import Projection

    backbone = Backbone(folder)
    layers = gradients.choose(backbone, LAYERS)
    made = Projection(layers, k=16, dim=None, seed=0, device=backbone.device)
    sizes = {name: made.place[name].stop - made.place[name].start for name in layers}
    assert all(sizes[name] == 16 * min(layer.weight.shape) for name, layer in layers.items())
    one = Pass(backbone, {"g": E.Gradient(model=folder, k=16, dim=None, store="float32", layers_like=LAYERS)}, {}, {})
    value = one.compute(list(pool["messages"]), pool["id"], ["g"])["g"]["value"]
    expected = []
    for messages in pool["messages"]:
        row = exact(backbone, messages, {name: layer.weight for name, layer in layers.items()})
        small = [made.left[name] @ g if name in made.left else g @ made.right[name].T for name, g in row.items()]
        expected.append(torch.cat([g.flatten() for g in small]).numpy())
    assert {name.rpartition(".")[2] for name in made.left} == {"gate_proj", "up_proj"}
    assert close(value, unit(np.stack(expected)))


def test_lora_rows_with_adam_are_the_optimizers_next_step(folder, pool, target, warmed, tmp_path):
    one = E.Gradient(model=folder, mode="lora", checkpoints=warmed, preconditioner="adam", dim=None, store="float32")
    store = FeatureStore(tmp_path)
    extract(pool, store, {"g": one}, target=target)
    backbone = Backbone(folder)
    found = moments.load(backbone, moments.folders(warmed), True, False)
    rates = np.array([c.learning_rate for c in found])
    assert len(found) == 3 and rates.min() > 0 and len(set(rates)) == 3
    parts = {"pool": [], "target": []}
    for checkpoint in found:
        moments.activate(backbone, checkpoint)
        layers = gradients.choose(backbone, rf"lora_[AB]\.{checkpoint.adapter}$")
        for side, data in (("pool", pool), ("target", target)):
            lines = []
            for messages in data["messages"]:
                line = exact(backbone, messages, {name: layer.weight for name, layer in layers.items()})
                if side == "pool":
                    line = {name: adam_step(layers[name].weight, g, checkpoint, name) for name, g in line.items()}
                lines.append(torch.cat([g.flatten() for g in line.values()]).numpy())
            parts[side].append(unit(np.stack(lines)))
    shares = np.sqrt(rates / rates.sum())
    for side, name in (("pool", "g"), ("target", "g@target")):
        expected = np.concatenate([s * part for s, part in zip(shares, parts[side], strict=True)], axis=1)
        assert np.abs(store[name][:] - expected).max() < 2e-5
    scores = store["g"][:] @ store["g@target"][:].T
    naive = sum(rate / rates.sum() * p @ t.T for rate, p, t in zip(rates, parts["pool"], parts["target"], strict=True))
    assert np.allclose(scores, naive, atol=1e-5)
    made = selectors.Similarity(combine="mean", across="max").select(
        3, x=store["g"], target=store["g@target"], target_groups=np.array(target["group"])
    )
    by_group = np.stack([naive[:, np.array(target["group"]) == g].mean(1) for g in "ab"], 1).max(1)
    assert made.indices.tolist() == np.argsort(-by_group)[:3].tolist()


def adam_step(weight: torch.Tensor, gradient: torch.Tensor, checkpoint: moments.Checkpoint, name: str) -> torch.Tensor:
    """-Δθ / η of torch.optim.AdamW's next update from the stored state."""
    state, layer = checkpoint.moments, gradients.names_of([name])[0]
    parameter = torch.nn.Parameter(weight.detach().double())
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, betas=state.betas, eps=state.epsilon, weight_decay=0.0)
    optimizer.state[parameter] = {"step": torch.tensor(float(state.taken)), "exp_avg": state.first[layer].double(),
                                  "exp_avg_sq": state.second[layer].double()}  # fmt: skip
    parameter.grad = gradient.double()
    optimizer.step()
    return ((weight.detach().double() - parameter.detach()) / 1e-3).float()


def test_the_reference_formula_is_that_of_the_published_code():
    g, m, v = (torch.rand(5, 3, 2), torch.rand(3, 2), torch.rand(3, 2))
    made = moments.Moments({"l": m}, {"l": v}, 7, reference=True).step("l", g.clone())
    assert torch.allclose(made, (0.9 * m + 0.1 * g) / torch.sqrt(0.999 * v + 0.001 * g * g + 1e-8), atol=1e-6)


def test_a_trainers_optimizer_is_read_by_number(folder, warmed, tmp_path):
    backbone = Backbone(folder)
    ours = moments.load(backbone, moments.folders(warmed), True, False)[0]
    names = [n for n, _ in backbone.causal_lm.named_parameters() if ".checkpoint0." in n]
    state = {i: {"step": torch.tensor(2.0), "exp_avg": ours.moments.first[moments.canonical(n)],
                 "exp_avg_sq": ours.moments.second[moments.canonical(n)]} for i, n in enumerate(names)}  # fmt: skip
    group = {"params": list(range(len(names))), "betas": (0.9, 0.999), "eps": 1e-8}
    torch.save({"state": state, "param_groups": [group]}, tmp_path / "optimizer.pt")
    found = moments._trainer_moments(backbone, tmp_path / "optimizer.pt", "checkpoint0", False)
    assert found.taken == 2 and found.first.keys() == ours.moments.first.keys()
    assert all(torch.equal(found.second[k], v) for k, v in ours.moments.second.items())
    group["params"] = group["params"][1:]
    torch.save({"state": state, "param_groups": [group]}, tmp_path / "optimizer.pt")
    with pytest.raises(LlmselectError, match="11 parameters, the adapter has 12"):
        moments._trainer_moments(backbone, tmp_path / "optimizer.pt", "checkpoint0", False)


def test_int8_rows_give_the_cosines_of_the_exact_ones(folder, pool, target, warmed, tmp_path):
    store = FeatureStore(tmp_path)
    shared = {"model": folder, "mode": "lora", "checkpoints": warmed, "dim": 1024}
    extract(pool, store, {"a": E.Gradient(**shared), "b": E.Gradient(**shared, store="float32")}, target=target)
    a, b = unit(store["a"][:].astype(float)), store["b"][:]
    assert store["a"].dtype == np.int8 and np.abs(store["a"][:]).max(1).tolist() == [127] * len(pool)
    assert np.abs(a @ a.T - b @ b.T).max() < 0.01
    assert np.allclose(np.linalg.norm(b, axis=1), 1, atol=1e-5)


def test_a_new_adapter_has_gradients_of_b_only(folder, pool, target, tmp_path):
    store = FeatureStore(tmp_path)
    one = E.Gradient(model=folder, mode="lora", rank=2, dim=None, store="float32", layers_like="q_proj")
    extract(pool, store, {"g": one}, target=target)
    a, b = 2 * 48, 48 * 2
    value = store["g"][:].reshape(len(pool), 3, a + b)
    assert not value[:, :, :a].any() and value[:, :, a:].any()


def test_a_row_without_response_tokens_is_set_aside(folder, target, tmp_path):
    chats = [{"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "yes"}]} for i in range(5)]
    chats[2]["messages"][0]["content"] = "word " * 300
    from llmselect.pool import load_pool

    pool, store = load_pool(chats), FeatureStore(tmp_path)
    extract(pool, store, {"g": E.Gradient(model=folder, dim=64, max_length=60)}, target=target)
    bad = np.flatnonzero(np.isnan(store["g.norm"][:]).any(1)).tolist()
    assert store["g"].non_finite.tolist() == bad
    made = selectors.Similarity(combine="mean").select("100%", x=store["g"], target=store["g@target"])
    assert sorted(made.indices.tolist()) == [i for i in range(5) if i not in bad]


def test_what_linear_hooks_cannot_see_is_refused_by_name(folder):
    backbone = Backbone(folder)
    blocks, lm = backbone.blocks, backbone.causal_lm
    with pytest.raises(UsageError, match=r"no linear layer .* matches 'nothing'"):
        gradients.choose(backbone, "nothing")
    with pytest.raises(UsageError, match="matches"):  # vectors are no weight matrices: nothing is left
        gradients.choose(backbone, "input_layernorm$")
    kept = blocks[1].mlp.up_proj
    blocks[1].mlp.up_proj = blocks[1].mlp.gate_proj
    with pytest.raises(LlmselectError, match="is shared with others"):
        gradients.choose(backbone, LAYERS)
    from transformers.pytorch_utils import Conv1D

    blocks[1].mlp.up_proj = Conv1D(96, 48)
    with pytest.raises(UsageError, match=r"layers\.1\.mlp\.up_proj is a Conv1D"):
        gradients.choose(backbone, LAYERS)
    blocks[1].mlp.up_proj = kept
    blocks[2].mlp.experts = torch.nn.Module()
    blocks[2].mlp.experts.gate_up = torch.nn.Parameter(torch.zeros(2, 3, 4))
    with pytest.raises(LlmselectError, match=r"layers\.2\.mlp\.experts holds fused experts"):
        gradients.choose(backbone, LAYERS)
    assert len(gradients.choose(backbone, "q_proj")) == 3 and lm is backbone.causal_lm


def test_a_layer_that_runs_twice_is_refused(folder, pool):
    from llmselect.engine.batch import collate

    backbone = Backbone(folder)
    layers = gradients.choose(backbone, "q_proj")
    attention = backbone.blocks[0].self_attn
    twice = lambda module, args, kwargs: (module.q_proj(kwargs["hidden_states"]), None)[1]  # noqa: E731
    attention.register_forward_pre_hook(twice, with_kwargs=True)
    batch = collate(backbone, backbone.encoder.encode(pool[:2]["messages"]))
    with pytest.raises(LlmselectError, match=r"layers\.0\.self_attn\.q_proj ran twice"):
        gradients.row_gradients(backbone, batch, layers, lambda name, a: a, lambda *a: None)


def test_losses_and_parameters_are_untouched(folder, pool, target, tmp_path):
    store = FeatureStore(tmp_path)
    made = {"g": E.Gradient(model=folder, dim=64), "loss": E.Loss(model=folder, without_prompt=False)}
    extract(pool, store, made, target=target)
    assert np.allclose(store["g.loss"][:], store["loss.nll"][:], atol=1e-5)


@pytest.mark.parametrize(
    "options,told",
    [({"preconditioner": "adam"}, "needs mode: lora"), ({"checkpoints": "x"}, "give mode: lora"), ({"k": 0}, "k: 0"),
     ({"dim": 0}, "dim: 0")],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(options, told):
    with pytest.raises(UsageError, match=told):
        E.Gradient(model="m", **options)


def test_a_folder_without_checkpoints_or_state_is_refused(folder, tmp_path):
    with pytest.raises(UsageError, match="holds no adapter"):
        moments.folders(str(tmp_path))
    with pytest.raises(UsageError, match="no optimizer state"):
        moments._moments(Backbone(folder), tmp_path, "a", {}, False)
