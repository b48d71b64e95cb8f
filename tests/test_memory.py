"""Rows of an earlier run in the pool of a later one: what stays, what falls, and that an old skill keeps its rows."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stages import recipe_of, write

from llmselect.errors import LlmselectError, UsageError
from llmselect.estimate import estimate
from llmselect.kernels.groups import waterfill
from llmselect.memory import remembered
from llmselect.pool import content_id, load_pool, read_pool
from llmselect.prepare import prepare
from llmselect.selection import Selection
from llmselect.semdedup import semantic_duplicates
from llmselect.sources import PoolSource, identity
from llmselect.stages import Run, extract_stage, select_stage

pytest.importorskip("faiss")
SKILLS = {"code": "def return add a b ( ) : sum function", "french": "Bonjour Translate French good morning Paris",
          "sums": "three plus four seven 0 1 2"}  # fmt: skip
PLAN = {
    "features": {"words": {"extractor": "embedding", "pooling": "mean", "layer": 0}, "loss": {"extractor": "loss"}},
    "methods": {"keep": {"selector": "adapt_inf", "x": "words", "quality": ["loss.nll", "loss.entropy"], "clusters": 6},
                "random": {"selector": "random"}},
    "dedup": {"x": "words", "threshold": 0.995, "clusters": 1}, "budget": 12,
}  # fmt: skip


def skill(name: str, count: int, start: int = 0) -> list[list[dict[str, str]]]:
    """Chats about one thing, each its own words in its own order."""
    rng, every = np.random.default_rng(start), SKILLS[name].split()
    say = lambda n: " ".join(rng.choice(every, n))  # noqa: E731
    chat = lambda i: [{"role": "user", "content": f"{i} {say(8)}"}, {"role": "assistant", "content": say(12)}]  # noqa: E731
    return [chat(start + i) for i in range(count)]


def made(folder, model, chats, memory: str | None = None) -> Run:
    folder.mkdir()
    pool = {"pool": {"path": write(folder / "pool.jsonl", chats), **({"memory": memory} if memory else {})}}
    run = Run(recipe_of(folder, model, chats, **PLAN, **pool))
    for stage in (prepare, extract_stage, select_stage):
        stage(run)
    return run


def selected(run: Run, method: str = "keep") -> Selection:
    return Selection.load(run.folder / "selections" / method / "seed-0")


def skill_of(row) -> str:
    said = set(row["messages"][1]["content"].split())
    return next(name for name, words in SKILLS.items() if said <= set(words.split()))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model):
    """A pool of code and French; one of sums and code, with a row of the memory again and one of it with a word more; one of
    sums alone."""
    folder = tmp_path_factory.mktemp("memory")
    first = made(folder / "one", tiny_model, skill("code", 20) + skill("french", 20, 100))
    kept = [first.pool[int(i)]["messages"] for i in selected(first).indices]
    near = [kept[0][0], {**kept[0][1], "content": kept[0][1]["content"] + " " + kept[0][1]["content"].split()[-1]}]
    chats = [near, *skill("sums", 24, 200), kept[1], *skill("code", 6, 300)]
    second = made(folder / "two", tiny_model, chats, "../one/run/selections/keep/seed-0")
    third = made(folder / "three", tiny_model, skill("sums", 30, 400), str(second.folder / "selections/keep/seed-0"))
    return first, second, third, content_id(near)


def test_the_rows_kept_join_the_next_pool_and_keep_their_ids(runs):
    first, second, _, near = runs
    old = selected(first)
    assert list(second.pool["id"])[:12] == list(old.ids) and len(set(second.pool["id"])) == len(second.pool) == 12 + 31
    assert list(second.pool["source"])[:12] == [first.pool[int(i)]["source"] for i in old.indices]
    told = json.loads((second.folder / "rows.json").read_text())["pool"]
    assert (told["read"], told["remembered"], told["duplicates"], told["kept"]) == (12 + 32, 12, 1, 43)
    assert near in second.pool["id"]
    for method in ("keep", "random"):
        made = selected(second, method)
        assert made.evidence["memory"].tolist() == (made.indices < 12).tolist()
        assert len(set(made.ids)) == 12
    assert "memory" not in selected(first).evidence
    assert "remembered" not in json.loads((first.folder / "rows.json").read_text())["pool"]


def test_what_is_nearly_an_old_row_falls_and_the_old_one_stays(runs):
    first, second, _, near = runs
    table = pq.read_table(second.folder / "semantic_duplicates.parquet").to_pydict()
    assert dict(zip(table["id"], table["nearest_id"], strict=True))[near] == selected(first).ids[0]
    assert not set(table["id"]) & set(selected(first).ids)
    for method in ("keep", "random"):
        assert near not in selected(second, method).ids


def test_an_old_skill_keeps_its_share_of_the_budget_when_no_new_row_has_it(runs):
    first, second, third, _ = runs
    count = lambda run: Counter(skill_of(run.pool[int(i)]) for i in selected(run).indices)  # noqa: E731
    assert count(first).keys() == {"code", "french"}
    for run in (second, third):  # no pool after the first has French, the last has no code
        assert count(run)["french"] >= 2 and count(run)["sums"] >= 2 and count(run)["code"] >= 1, count(run)
        made = selected(run)
        sizes = made.provenance["report"]["sizes"]
        assert sorted(np.bincount(made.evidence["cluster"], minlength=6)) == sorted(waterfill(12, sizes))
        is_old = selected(run).evidence["memory"]
        rows = [skill_of(run.pool[int(i)]) for i in selected(run).indices]
        assert all(old for old, name in zip(is_old, rows, strict=True) if name == "french") and not is_old.all()


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 40), ranked=st.booleans())
def test_rows_that_go_first_fall_only_to_one_another(seed, n, ranked):
    rng = np.random.default_rng(seed)
    x = np.round(rng.standard_normal((n, 2)), 1) + 0.01
    first, quality = rng.random(n) < 0.4, rng.permutation(n).astype(float) if ranked else None
    found = semantic_duplicates(x, 0.9, clusters=1, quality=quality, first=first)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine = (unit @ unit.T).astype(np.float32)
    alone = semantic_duplicates(x[first], 0.9, clusters=1, quality=None if quality is None else quality[first],
                                ids=np.flatnonzero(first).astype(np.uint64)) if first.any() else None  # fmt: skip
    old = np.flatnonzero(first)[alone.dropped].tolist() if alone else []
    assert [row for row in found.dropped if first[row]] == old  # the new rows change nothing among the old
    stays = np.setdiff1d(np.arange(n), found.dropped)
    near = cosine[np.ix_(stays, stays)] - 2 * np.eye(len(stays), dtype=np.float32)
    assert (near <= 0.9).all() and (cosine[found.dropped][:, stays].max(1, initial=-1) > 0.9).all()
    if ranked:  # gone through old before new, best first
        kept: list[int] = []
        for row in sorted(range(n), key=lambda i: (not first[i], -quality[i])):
            if not kept or cosine[row, kept].max() <= 0.9:
                kept.append(row)
        assert sorted(kept) == stays.tolist()


def test_a_limit_counts_new_rows_and_licences_are_not_mixed_up(runs):
    rows = [{"messages": one, "license": "MIT"} for one in skill("sums", 9, 700)]
    old = list(remembered(str(runs[0].folder / "selections/keep/seed-0")))
    pool, report = read_pool(rows, limit=4, memory=old)
    assert (report.kept, report.remembered, len(pool)) == (16, 12, 16)
    assert pool["license"][:] == ["not stated"] * 12 + ["MIT"] * 4
    assert list(load_pool(rows[:1], memory=rows[3:])["id"]) == [content_id(one["messages"]) for one in [*rows[3:], rows[0]]]


def test_a_memory_that_is_none_is_refused_before_anything_is_read(runs, tmp_path, tiny_model):
    place = runs[0].folder
    for wrong in (place, place / "selections", tmp_path / "nowhere"):
        with pytest.raises(UsageError, match=r"pool\.memory: .*RUN/selections/METHOD/seed-S"):
            made(tmp_path / str(len(list(tmp_path.iterdir()))), tiny_model, skill("sums", 5), str(wrong))
    assert "memory" not in identity(PoolSource("pool.jsonl"))  # runs made before there was one count
    assert identity(PoolSource("pool.jsonl", memory="m"))["memory"] == "m"
    copy = tmp_path / "copy"
    shutil.copytree(place, copy)
    arrow = copy / "pool" / "pool.arrow"
    arrow.write_bytes(arrow.read_bytes()[:-9] + b"\1" * 9)
    with pytest.raises(LlmselectError, match=r"pool\.arrow is missing or damaged"):
        list(remembered(str(copy / "selections/keep/seed-0")))


def test_a_dry_run_counts_it(runs):
    found = estimate(replace(runs[1].recipe, features={"words": PLAN["features"]["words"]}, methods={"r": {"selector": "random"}},
                             dedup=None))  # fmt: skip
    assert found["pool_rows"] == 32 + 12
