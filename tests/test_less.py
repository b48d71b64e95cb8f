"""LESS from pool to subset, and what its parts promise each other."""

from __future__ import annotations

import json

import numpy as np
import pytest
import rows
from test_stages import recipe_of

import tiny
from llmselect.engine import moments
from llmselect.errors import UsageError
from llmselect.estimate import estimate
from llmselect.prepare import prepare
from llmselect.selection import Selection
from llmselect.selectors.similarity import Similarity
from llmselect.stages import Run, extract_stage, select_stage
from llmselect.train import Train, finetune

WARM = {"epochs": 3, "batch_tokens": 60, "checkpoints": 3, "lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        "sft": {"learning_rate": 1e-2, "lr_scheduler_type": "linear", "warmup_steps": 0}}  # fmt: skip
LESS = {"extractor": "gradient", "mode": "lora", "checkpoints": "warmup", "preconditioner": "adam", "dim": 512}


@pytest.fixture(scope="module")
def warm(tmp_path_factory, tiny_model):
    out = tmp_path_factory.mktemp("less") / "warm"
    finetune(rows.pool(20), str(tiny_model), out, Train(**WARM), seed=0)
    return out


def test_checkpoints_have_their_mean_learning_rates_and_the_last_is_the_adapter(warm):
    from safetensors.torch import load_file

    told = json.loads((warm / "train.json").read_text())
    steps, places = told["result"]["steps"], moments.folders(str(warm))
    about = [json.loads((place / "state.json").read_text()) for place in places]
    ends = [one["step"] for one in about]
    assert ends == [round(steps * (i + 1) / 3) for i in range(3)] and told["result"]["epochs"] == 3
    linear = np.array([1e-2 * (1 - i / steps) for i in range(steps)])
    for begin, end, one in zip((0, *ends), ends, about, strict=False):
        assert one["learning_rate"] == pytest.approx(linear[begin:end].mean(), rel=1e-6)
    last, final = (load_file(f / "adapter_model.safetensors") for f in (places[-1], warm))
    assert last.keys() == final.keys() and all((last[name] == final[name]).all() for name in final)
    assert f"checkpoints/{ends[0]:05d}/optimizer.safetensors" in told["sha256"]


def test_one_command_from_pool_to_subset(tmp_path, tiny_model):
    features = {"less": LESS, "last": {**LESS, "use": "last"}, "cold": {"extractor": "gradient", "k": 8, "dim": 512}}
    methods = {name: {"selector": "similarity", "x": name, "combine": "centroid", "across": "max"} for name in features}
    methods["grand"] = {"selector": "topk", "x": "cold.norm"}
    warmup = {"budget": "50%", "train": WARM}
    run = Run(recipe_of(tmp_path, tiny_model, tiny.chats(40), features=features, methods=methods, warmup=warmup))
    for stage in (prepare, extract_stage, select_stage):
        stage(run)
    assert run.store["less"].shape == (len(run.pool), 3 * 512) and run.store["less"].dtype == np.int8
    assert run.store["last"].shape == (len(run.pool), 512)
    unit = lambda a: a / np.linalg.norm(a, axis=1, keepdims=True)  # noqa: E731
    # The last of the concatenated checkpoints is the last checkpoint's feature, scaled.
    parts = [unit(x.astype(float)) for x in (run.store["less"][:][:, 1024:], run.store["last"][:])]
    assert (parts[0] * parts[1]).sum(1).min() > 0.99
    for name in methods:
        chosen = Selection.load(run.folder / "selections" / name / "seed-0")
        assert len(chosen) == int(0.2 * len(run.pool)) and chosen.scores.std() > 0
    assert estimate(run.recipe)["feature_bytes"] > 30 * (3 * 512 + 512)


def test_wrong_recipes_are_refused_before_a_model_loads(tmp_path, tiny_model):
    methods = {"less": {"selector": "similarity", "x": "less"}}
    with pytest.raises(UsageError, match=r"features\.less\.checkpoints: 'warmup' needs a warmup: section"):
        recipe_of(tmp_path, tiny_model, tiny.chats(3), features={"less": LESS}, methods=methods)
    with pytest.raises(UsageError, match=r"warmup\.train\.checkpoints"):
        recipe_of(tmp_path, tiny_model, tiny.chats(3), features={"less": LESS}, methods=methods,
                  warmup={"train": {**WARM, "checkpoints": 0}})  # fmt: skip
    with pytest.raises(UsageError, match="tokens and epochs"):
        Train(tokens=100, epochs=2)


def test_the_centroid_is_the_unit_mean_and_ranks_a_group_as_the_mean_does():
    rng = np.random.default_rng(0)
    x, t = rng.normal(size=(40, 6)), rng.normal(size=(7, 6))
    unit = lambda a: a / np.linalg.norm(a, axis=-1, keepdims=True)  # noqa: E731
    one = Similarity(combine="centroid", across="max").select(40, x=x, target=t)
    np.testing.assert_allclose(one.scores, unit(x) @ unit(unit(t).mean(0)), atol=1e-6)
    mean = Similarity(combine="mean", across="max").select(40, x=x, target=t)
    assert one.indices.tolist() == mean.indices.tolist()
    groups = np.array(["a"] * 3 + ["b"] * 4)
    both = Similarity(combine="centroid", across="max").select(40, x=x, target=t, target_groups=groups)
    expected = np.max([unit(x) @ unit(unit(t)[groups == g].mean(0)) for g in "ab"], axis=0)
    np.testing.assert_allclose(both.scores, expected, atol=1e-6)
