"""A run on disk: rows that a tokenizer refuses, warm-up, evidence, and the statistics of the table."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import tiny
from llmselect.errors import LlmselectError, UsageError
from llmselect.evaluate import bootstrap
from llmselect.prepare import prepare
from llmselect.recipe import load_recipe
from llmselect.selection import Selection
from llmselect.stages import Run, extract_stage, select_stage


def write(path, chats):
    path.write_text("".join(json.dumps({"messages": c, "source": f"s{i % 3}"}) + "\n" for i, c in enumerate(chats)))
    return str(path)


def recipe_of(folder, model, chats, **more):
    plan = {
        "name": "stages",
        "out": str(folder / "run"),
        "model": {"path": str(model), "max_length": 96},
        "pool": {"path": write(folder / "pool.jsonl", chats)},
        "targets": {
            "t": {"dev": write(folder / "dev.jsonl", tiny.chats(4, 50))},
            "u": {"dev": write(folder / "dev2.jsonl", tiny.chats(4, 60))},
        },
        "methods": {"random": {"selector": "random"}},
        "budget": "20%",
        **more,
    }
    (folder / "recipe.yaml").write_text(json.dumps(plan))
    return load_recipe(folder / "recipe.yaml")


def turn(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_rows_that_a_tokenizer_refuses(tmp_path, tiny_model):
    good = [turn(f"question {i}", f"answer {i}") for i in range(10)]
    odd = [
        turn("special", "<|im_end|><|endoftext|>"),
        turn("long", "word " * 400),
        turn("word " * 400, "a long prompt alone is cut"),
    ]
    run = Run(recipe_of(tmp_path, tiny_model, good + odd))
    prepare(run)
    assert len(run.pool) == 11
    entries = [json.loads(x) for x in (run.folder / "quarantine.jsonl").read_text().splitlines()]
    assert [e["reason"] for e in entries] == ["only_special_tokens", "longer_than_context"]
    account = json.loads((run.folder / "rows.json").read_text())
    assert account["usable"] == 11 and account["unusable"] == {"only_special_tokens": 1, "longer_than_context": 1}
    kept = Run(
        recipe_of(
            tmp_path,
            tiny_model,
            good + odd,
            out=str(tmp_path / "cut"),
            pool={"path": str(tmp_path / "pool.jsonl"), "overlong": "truncate"},
        )
    )
    prepare(kept)
    assert len(kept.pool) == 12


def test_a_changed_pool_is_refused_once_features_exist(tmp_path, tiny_model):
    recipe = recipe_of(tmp_path, tiny_model, tiny.chats(20), features={"rds": {"extractor": "embedding"}})
    run = Run(recipe)
    prepare(run)
    extract_stage(run)
    write(tmp_path / "pool.jsonl", tiny.chats(21))
    with pytest.raises(LlmselectError, match="another out="):
        prepare(Run(recipe))


def test_warm_up_changes_the_scores_and_evidence_reaches_the_selection(tmp_path, tiny_model):
    features = {"cold": {"extractor": "trim"}, "warm": {"extractor": "trim", "adapter": "warmup"}}
    methods = {name: {"selector": "topk", "x": name} for name in features}
    warmup = {"budget": "20%", "train": {"tokens": 300, "batch_tokens": 100, "sft": {"learning_rate": 1e-2}}}
    run = Run(recipe_of(tmp_path, tiny_model, tiny.chats(40), features=features, methods=methods, warmup=warmup))
    for stage in (prepare, extract_stage, select_stage):
        stage(run)
    cold, warm = (np.asarray(run.store[n], np.float32) for n in features)
    assert np.abs(cold - warm).max() > 1e-3
    selection = Selection.load(run.folder / "selections" / "warm" / "seed-0")
    assert selection.evidence["top_token"].shape == (len(selection), 2, 4)
    np.testing.assert_array_equal(selection.evidence["top_token"], run.store["warm.top_token"][selection.indices])
    np.testing.assert_allclose(selection.evidence["score"], warm[selection.indices, selection.evidence["group"]])


def test_duplicates_in_meaning_limits_and_a_budget_of_ones_own(tmp_path, tiny_model):
    chats = tiny.chats(40)
    chats += [[{**turn, "content": turn["content"] + " ."} for turn in chat] for chat in chats[:8]]
    more = {
        "features": {"emb": {"extractor": "embedding"}},
        "dedup": {"x": "emb", "threshold": 0.92},
        "methods": {
            "all": {"selector": "random", "budget": "100%"},
            "few": {"selector": "random", "limits": {"proportions": {"s0": 0.5, "s1": 0.5}}},
            "split": {"selector": "similarity", "combine": "max", "x": "emb", "limits": {"quotas": {"t": 0.75, "u": 0.25}}},
        },
        "budget": 8,
    }
    run = Run(recipe_of(tmp_path, tiny_model, chats, **more))
    prepare(run)
    extract_stage(run)
    select_stage(run)
    import pyarrow.parquet as pq

    table = pq.read_table(run.folder / "semantic_duplicates.parquet").to_pydict()
    ids, pool = table["id"], list(run.pool["id"])
    assert len(ids) == 6 and [pool[i] for i in table["index"]] == ids
    assert [pool[i] for i in table["nearest"]] == table["nearest_id"]
    x = np.asarray(run.store["emb"][:], np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    assert np.allclose((x[table["index"]] * x[table["nearest"]]).sum(1), table["cosine"], atol=1e-5)
    made = {name: Selection.load(run.folder / "selections" / name / "seed-0") for name in more["methods"]}
    assert not any(set(one.ids) & set(ids) for one in made.values())
    assert len(made["all"]) == len(pool) - len(ids) and not set(made["all"].ids) & set(ids)
    sources = np.array(run.pool["source"])
    assert sorted(sources[made["few"].indices].tolist()) == ["s0"] * 4 + ["s1"] * 4
    assert sorted(made["split"].evidence["quota"].tolist()) == ["t"] * 6 + ["u"] * 2
    select_stage(run)  # finds everything as it is
    changed = recipe_of(tmp_path, tiny_model, chats, **{**more, "dedup": {"x": "emb", "threshold": 0.9}})
    with pytest.raises(LlmselectError, match="dedup"):
        select_stage(Run(changed))


def test_a_lazy_feature_is_computed_for_the_rows_that_quad_scores(tmp_path, tiny_model):
    more = {
        "features": {
            "emb": {"extractor": "embedding"},
            "inf": {"extractor": "influence", "fisher_rows": 8, "lazy": True},
            "all": {"extractor": "influence", "fisher_rows": 8},
        },
        "methods": {
            "quad": {"selector": "quad", "x": "emb", "quality": "inf", "clusters": 3, "least": 4},
            "same": {"selector": "quad", "x": "emb", "quality": "all", "clusters": 3, "least": 4},
        },
        "budget": 5,
        "seeds": [0, 1],
    }
    run = Run(recipe_of(tmp_path, tiny_model, tiny.chats(60), **more))
    prepare(run)
    extract_stage(run)
    select_stage(run)
    assert set(run.store.names()) == {"emb", "emb@target", "all", "all@target", "tokens", "tokens@target"}
    asked = 0
    for seed in (0, 1):
        made = {name: Selection.load(run.folder / "selections" / name / f"seed-{seed}") for name in more["methods"]}
        assert made["quad"].indices.tolist() == made["same"].indices.tolist()
        asked += made["quad"].provenance["report"]["scored"]
    assert run.array("inf").computed <= min(asked, len(run.pool))
    select_stage(Run(run.recipe))  # finds the selections as they are


@pytest.mark.slow
def test_two_processes_compute_the_same_lazy_rows(tmp_path, tiny_model):
    more = {
        "features": {"emb": {"extractor": "embedding"}, "inf": {"extractor": "influence", "fisher_rows": 8, "lazy": True}},
        "methods": {"quad": {"selector": "quad", "x": "emb", "quality": "inf", "clusters": 3, "least": 4}},
        "budget": 5,
    }
    recipe_of(tmp_path, tiny_model, tiny.chats(60), **more)
    files = {}
    for count in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if count == 2 else []
        out = tmp_path / str(count)
        command = [sys.executable, *launch, "-m", "llmselect", "select", str(tmp_path / "recipe.yaml"), f"out={out}"]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        places = [*(out / "features" / "lazy" / "inf").iterdir(), *(out / "selections" / "quad" / "seed-0").iterdir()]
        files[count] = {f.name: f.read_bytes() for f in places}
    assert files[1] == files[2] and len(files[1]) > 6


@pytest.mark.parametrize(
    "more,told",
    [
        ({"features": {"i": {"extractor": "loss", "lazy": 1}}}, r"features\.i\.lazy: true or false"),
        (
            {"features": {"i": {"extractor": "loss", "lazy": True}}, "methods": {"t": {"selector": "topk", "x": "i.nll"}}},
            "lazy: false",
        ),
        ({"dedup": {"x": "embb"}}, r"dedup\.x: no feature 'embb'"),
        ({"dedup": {"x": "emb", "threshold": 2}}, r"dedup\.threshold: 2"),
        ({"methods": {"r": {"selector": "random", "limits": {"quotas": {"v": 1}}}}}, r"r\.limits\.quotas\.v: no such target"),
        ({"methods": {"r": {"selector": "random", "limits": {"cap": {"a": 1}}}}}, r"methods\.r\.limits\.cap: unknown key"),
        ({"methods": {"r": {"selector": "random", "budget": "200%"}}}, r"methods\.r\.budget"),
    ],
)
def test_mistakes_in_limits_and_duplicates_are_named(tmp_path, tiny_model, more, told):
    with pytest.raises(UsageError, match=told):
        recipe_of(tmp_path, tiny_model, tiny.chats(3), **{"features": {"emb": {"extractor": "embedding"}}, **more})


def test_bootstrap_interval_covers_and_matches_the_normal_one():
    rng = np.random.default_rng(0)
    covered, widths = 0, []
    for i in range(200):
        found = bootstrap([rng.normal(1.0, 1.0, 100), rng.normal(3.0, 2.0, 150)], seed=i, resamples=500)
        covered += found.low <= 2.0 <= found.high
        widths.append(found.high - found.low)
    assert 0.90 <= covered / 200 <= 0.99
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 0.5 * np.sqrt(1 / 100 + 4 / 150), rel=0.05)


def test_bootstrap_averages_seeds_and_refuses_nothing():
    values = np.array([[1.0, 3.0], [3.0, 5.0]])
    assert bootstrap([values]).mean == 3.0
    with pytest.raises(LlmselectError):
        bootstrap([np.zeros(0)])
