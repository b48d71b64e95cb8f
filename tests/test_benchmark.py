"""The benchmark: a grid that stops, continues and is shared; its statistics against loops; leaderboard and LDS."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

import tiny
from llmselect.benchmark import lds, outlook, results, statistics
from llmselect.benchmark.cells import run_grid
from llmselect.benchmark.claims import claim, holder
from llmselect.benchmark.grid import load_grid, parse_only
from llmselect.benchmark.leaderboard import arms, leaderboard, lines
from llmselect.benchmark.results import Result, load, load_all
from llmselect.errors import LlmselectError, UsageError

ROOT = Path(__file__).parents[1]
TWO = ["method=random,trim"]


def grid(folder: Path, model: Path, out: str = "out", **more):
    write = lambda name, chats: (folder / name).write_text("".join(json.dumps({"messages": c}) + "\n" for c in chats))  # noqa: E731
    write("pool.jsonl", tiny.chats(40))
    write("dev.jsonl", tiny.chats(4, 50))
    write("test.jsonl", tiny.chats(6, 70))
    plan = {
        "name": "g",
        "vars": {"model": str(model)},
        "models": {"tiny": {"path": "${model}", "max_length": 96}},
        "pool": {"path": "./pool.jsonl"},
        "tasks": {"t": {"dev": "./dev.jsonl", "test": "./test.jsonl"}},
        "features": {"trim": {"extractor": "trim"}, "rds": {"extractor": "embedding"}},
        "methods": {"trim": {"selector": "topk", "x": "trim"}, "rds": {"selector": "similarity", "x": "rds"}},
        "budgets": ["20%"],
        "seeds": [0, 1],
        "train": {"tokens": 300, "batch_tokens": 150},
        "out": str(folder / out / "run"),
        "cells": str(folder / out / "cells"),
        **more,
    }
    (folder / f"{out}.yaml").write_text(json.dumps(plan))
    return folder / f"{out}.yaml"


def start(file: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "llmselect", "benchmark", str(file), "--only", TWO[0], "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def losses(folder: Path) -> dict[str, list]:
    return {str(f.relative_to(folder)): json.loads(f.read_text())["losses"] for f in sorted(folder.rglob("*.json"))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("grid")
    plan = load_grid(grid(folder, tiny_model))
    return plan, run_grid(plan, parse_only(TWO, plan))


def test_a_grid_runs_once(finished):
    plan, tally = finished
    only = parse_only(TWO, plan)
    assert [(c.method, c.seed) for c in tally.ran] == [("random", 0), ("random", 1), ("trim", 0), ("trim", 1)]
    results = [load(plan.results / c.path) for c in tally.ran]
    usable = len(np.load(plan.folder / "tiny/pool/usable.npy"))
    assert [(r.rows, r.losses["t"].shape) for r in results] == [(usable // 5, (6,))] * 4
    assert all(0 < r.tokens < 500 and r.seconds["train"] > 0 for r in results)
    assert [r.forwards for r in results] == [0, 0, 1, 1] and results[2].seconds["features"] > 0
    assert len({tuple(r.losses["t"]) for r in results}) == 4
    assert not list(plan.folder.glob("**/adapter_model.safetensors")) and not (plan.folder / "tiny/features/rds").exists()
    stamps = {f: f.stat().st_mtime_ns for f in plan.results.rglob("*.json")}
    assert run_grid(plan, only).ran == [] and {f: f.stat().st_mtime_ns for f in plan.results.rglob("*.json")} == stamps
    text = (plan.results / tally.ran[0].path).read_text()
    assert str(plan.home) not in text and "${model}" in text
    told = outlook.outlook(plan)
    assert (told["cells"], told["done"], told["missing"]) == (13, 4, 9) and told["seconds"] > 0
    assert "4 of 13 cells done" in outlook.text(told, plan)


def test_other_settings_are_refused(finished):
    plan, _ = finished
    changed = load_grid(plan.home / "out.yaml", ["train.tokens=400"])
    with pytest.raises(LlmselectError, match=r"train.tokens: 300 -> 400"):
        run_grid(changed, parse_only(TWO, changed))


def test_a_killed_grid_continues_to_the_same_numbers(finished, tmp_path, tiny_model):
    plan = load_grid(grid(tmp_path, tiny_model))
    process, deadline = start(plan.home / "out.yaml"), time.monotonic() + 200
    while not list(plan.results.rglob("*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)  # into the next cell
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = len(list(plan.results.rglob("*.json")))
    assert 1 <= done < 4, "killed too late to show anything"
    assert len(run_grid(plan, parse_only(TWO, plan)).ran) == 4 - done
    assert losses(plan.results) == losses(finished[0].results)


@pytest.mark.slow
def test_two_processes_share_a_grid(finished, tmp_path, tiny_model):
    plan = load_grid(grid(tmp_path, tiny_model))
    both = [start(plan.home / "out.yaml") for _ in range(2)]
    told = [(p.communicate(timeout=250), p.returncode) for p in both]
    assert [code for _, code in told] == [0, 0], told
    ran = [json.loads(out)["ran"] for (out, _), _ in told]
    assert sum(ran) == 4
    assert losses(plan.results) == losses(finished[0].results)


@pytest.mark.parametrize(
    "more,told",
    [
        ({"train": {}}, r"train\.tokens: a benchmark trains"),
        ({"targets": {"a": ["tt"]}}, r"targets\.a: no task 'tt'"),
        ({"methods": {"m": {"selector": "random", "budgets": ["0%"]}}}, r"methods\.m\.budgets"),
        ({"methods": {"full": {"selector": "random"}}}, r"methods\.full: this name is kept"),
        ({"methods": {"random": {"selector": "length"}}}, r"methods\.random: this name is kept"),
        ({"methods": {"m": {"selector": "topk", "x": "tirm"}}}, r"no feature 'tirm'"),
        ({"tasks": {"t": {"dev": "./dev.jsonl"}}}, r"tasks\.t\.test: missing"),
    ],
)
def test_mistakes_in_a_grid_are_named(tmp_path, tiny_model, more, told):
    with pytest.raises(UsageError, match=told):
        load_grid(grid(tmp_path, tiny_model, **more))


def test_filters_name_what_there_is(finished):
    plan, _ = finished
    assert len(plan.cells(parse_only(["method=rds", "seed=1", "budget=20%"], plan))) == 1
    with pytest.raises(UsageError, match=r"method=trimm: no cell has it\. .*trim"):
        parse_only(["method=trimm"], plan)
    with pytest.raises(UsageError, match="KEY one of model, target, method, budget, seed"):
        parse_only(["metod=trim"], plan)


def test_what_a_method_reads_is_its_cost(tmp_path, tiny_model):
    methods = {"car": {"selector": "car", "quality": "trim", "groups": {"x": "rds", "clusters": 3}},
               "both": {"selector": "topk", "x": ["rds.value", "trim"]}}  # fmt: skip
    plan = load_grid(grid(tmp_path, tiny_model, methods=methods))
    assert plan.reads("car") == ["trim", "rds"] and plan.reads("both") == ["rds", "trim"] and plan.reads("random") == []
    assert [plan.aimed(name) for name in ("car", "both", "random", "random_matched", "full")] == [True, True, False, True, False]


def test_claims_exclude_and_those_of_the_dead_are_broken(tmp_path):
    path = tmp_path / "a" / "claim"
    with claim(path) as first, claim(path) as second:
        assert first and not second and holder(path)["pid"] == os.getpid()
    assert not path.exists()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stale = {"host": socket.gethostname(), "pid": dead.pid, "started": "1"}
    for about, free in ((stale, True), ({**stale, "pid": os.getpid()}, True), ({**stale, "host": "elsewhere"}, False)):
        path.write_text(json.dumps(about))
        with claim(path) as held:
            assert held == free, about


def test_paired_bootstrap_is_the_loop():
    rng, draws = np.random.default_rng(1), 300
    data = {"a": {"t": rng.normal(-0.2, 1, (3, 7)), "u": rng.normal(0.1, 1, (3, 5))}, "b": {"t": rng.normal(0, 1, (2, 4))}}
    uniform, found = np.random.default_rng(0).random((draws, 3)), []
    rows = {(t, k): statistics.drawn_rows(f"{t}/{k}", v.shape[1], draws) for t, ks in data.items() for k, v in ks.items()}
    for b in range(draws):
        targets = []
        for target, tasks in data.items():
            means = []
            for task, values in tasks.items():
                seeds = [int(u * len(values)) for u in uniform[b, : len(values)]]
                means.append(np.mean([values[s][r] for s in seeds for r in rows[target, task][b]]))
            targets.append(np.mean(means))
        found.append(np.mean(targets))
    made = statistics.paired(data, draws)
    assert made.mean == pytest.approx(np.mean([np.mean([v.mean() for v in tasks.values()]) for tasks in data.values()]))
    np.testing.assert_allclose([made.low, made.high], np.quantile(found, [0.025, 0.975]))
    below = sum(x <= 0 for x in found)
    assert made.p == pytest.approx(min(1, 2 * (min(below, draws - below) + 1) / (draws + 1)))


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0] and statistics.holm([]) == []


def synthetic(method, budget, target, seed, values, rows=10, **more):
    seconds = {"features": 2.0, "select": 0.5 + seed, "train": 1.0, "evaluate": 1.0}
    facts = {"rows": rows, "tokens": 100, "seconds": seconds, "forwards": 1.5, "tests": {"x": "same"}, "key": {}, **more}
    return Result("g", "m", target, method, budget, seed, losses={"x": np.asarray(values, float)}, **facts)


def table() -> list[Result]:
    rng, made = np.random.default_rng(0), []
    for target, shift in (("a", -0.5), ("b", 0.3)):
        noise = [rng.normal(2, 0.1, 30) for _ in range(3)]
        made.append(synthetic("base", "0%", target, 0, np.full(30, 4.0), 0))
        for seed in range(3):
            made.append(synthetic("full", "100%", target, seed, np.full(30, 1.0), 1000))
            made.append(synthetic("random", "5%", target, seed, noise[seed], 50))
            made.append(synthetic("good", "5%", target, seed, noise[seed] + shift, 50))
            made.append(synthetic("sized", "100%", target, seed, noise[seed] - 0.1, 60))
    return made


def test_lines_of_the_leaderboard():
    results = table()
    found = {(one.method, one.budget): one for one in lines(arms(results))}
    good = found["good", "5%"]
    mean = np.mean([[r.losses["x"].mean() for r in results if (r.method, r.seed) == ("good", s)] for s in range(3)], axis=1)
    assert good.nll == pytest.approx(mean.mean()) and good.sd == pytest.approx(mean.std(ddof=1))
    assert good.difference.mean == pytest.approx(-0.1) and (good.wins, good.compared) == (1, 2)
    assert good.kept == pytest.approx((4 - good.nll) / 3) and (good.seconds, good.forwards) == (4.5, 1.5)
    assert found["sized", "100%"].difference.mean == pytest.approx(-0.1), "set beside the random of the nearest size"
    assert found["random", "5%"].difference is None and found["full", "100%"].difference is None
    p = [found[k].difference.p for k in (("good", "5%"), ("sized", "100%"))]
    assert [found[k].holm for k in (("good", "5%"), ("sized", "100%"))] == pytest.approx(statistics.holm(p))


def test_the_text_of_the_leaderboard(tmp_path):
    for i, one in enumerate(table()):
        one.save(tmp_path / f"{i:03d}.json")
    text = leaderboard(tmp_path)
    assert text == leaderboard(tmp_path) and "| balanced | not measured |" in text and "| random_matched | not" in text
    assert "| good | 2/2 | 3 |" in text and "-0.1000 [-0.1000, -0.1000]" in text and "Holm" in text
    synthetic("good", "5%", "a", 9, np.ones(30), tests={"x": "other"}).save(tmp_path / "zzz.json")
    with pytest.raises(LlmselectError, match="other rows"):
        load_all(tmp_path)


def test_many_losses_go_beside_the_file(tmp_path):
    values = np.random.default_rng(0).random(5000)
    synthetic("good", "5%", "a", 0, values).save(tmp_path / "a.json")
    np.testing.assert_allclose(load(tmp_path / "a.json").losses["x"], values, atol=6e-5)
    (tmp_path / "a.npy").write_bytes(b"x")
    with pytest.raises(LlmselectError, match=r"a\.npy is missing or damaged"):
        load(tmp_path / "a.json")


def test_the_committed_leaderboard_is_that_of_the_committed_cells():
    here = ROOT / "eval" / "benchmark"
    stale = (here / "leaderboard.md").read_text("utf-8") != leaderboard(here / "cells")
    assert not stale, "type: python eval/benchmark/leaderboard.py"


def test_lds_of_a_linear_datamodel_is_known():
    rng = np.random.default_rng(0)
    n, m = 400, 1000
    theta = rng.standard_normal(n)
    members = [rng.choice(n, n // 2, replace=False) for _ in range(m)]
    signal_ = np.array([theta[rows].sum() for rows in members])
    nll = -(signal_ + rng.normal(0, signal_.std(), m))  # as much noise as signal: Pearson's correlation is √½
    scores = {"true": theta, "wrong": -theta, "other": rng.standard_normal(n), "none": np.ones(n)}
    found = {one.method: one for one in lds.lds(scores, members, nll)}
    expected = 6 / np.pi * np.arcsin(np.sqrt(0.5) / 2)  # Spearman's of a bivariate normal
    assert found["true"].rho == pytest.approx(expected, abs=0.05) and found["wrong"].rho == pytest.approx(-found["true"].rho)
    assert found["true"].low < expected < found["true"].high and abs(found["other"].rho) < 0.15
    assert found["true"].rho == pytest.approx(spearmanr(signal_, -nll).statistic) and np.isnan(found["none"].rho)
    assert lds.lds({"true": theta}, members[:40], -signal_[:40])[0].rho == pytest.approx(1)


def test_lds_on_a_tiny_model_resumes(tmp_path, tiny_model):
    plan = load_grid(grid(tmp_path, tiny_model))
    files = lds.train_subsets(plan, "tiny", tmp_path / "lds", 3)
    first = json.loads(files[0].read_text())
    files[1].unlink()
    stamp = files[0].stat().st_mtime_ns
    again = lds.train_subsets(plan, "tiny", tmp_path / "lds", 4)
    assert len(again) == 4 and files[0].stat().st_mtime_ns == stamp and first["rows"] == 17
    found = {one.method: one for one in lds.report(plan, "tiny", "t", again)}
    assert {"trim", "rds", "random"} <= set(found) and all(one.subsets == 4 for one in found.values())
    with pytest.raises(LlmselectError, match="fraction"):
        lds.train_subsets(plan, "tiny", tmp_path / "lds", 3, 0.4)


def test_a_cell_whose_checksum_was_cut_away_is_refused(tmp_path):
    losses = {"t": np.array([1.25, 2.5])}
    one = Result("g", "m", "t", "random", "5%", 0, 3, 99, {"train": 1.0}, 0.5, {"t": "ab"}, losses, {})
    one.save(tmp_path / "cell.json")
    about = json.loads((tmp_path / "cell.json").read_text())
    assert results.load(tmp_path / "cell.json").nll == 1.875 and about.pop("checksum")
    (tmp_path / "cell.json").write_text(results._text(about))
    with pytest.raises(LlmselectError, match="its checksum differs"):
        results.load(tmp_path / "cell.json")
