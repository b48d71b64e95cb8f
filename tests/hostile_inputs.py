"""Every bad input tried, with what went wrong: nothing, when it was told in one of the library's own errors or set aside.

An attempt is `(name, problem)`; `share` scales the number of random ones, which always come from the same seeds.
"""

from __future__ import annotations

import gzip
import json
import math
import random
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np

import hostile
import tiny
from llmselect.errors import LlmselectError, UsageError

Attempts = Iterator[tuple[str, str]]
ANSWER = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]


def problem(work: Callable[[], Any], kind: type[Exception] = LlmselectError, must: bool = False, said: str = "") -> str:
    """What is wrong with how `work` ends: any error but `kind`, a message without `said` or beyond reading, or none at all."""
    try:
        work()
    except kind as error:
        told = str(error)
        return "" if said in told and len(told) < 3000 else f"says {len(told)} characters: {told[:200]!r}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "nothing was said" if must else ""


def read(place: Path, file: str, data: bytes) -> Any:
    """Pool and account of a file with these bytes."""
    from llmselect.pool import read_pool

    (place / file).write_bytes(data)
    try:
        return read_pool(str(place / file), workdir=place / "work", max_invalid=1.0)
    finally:
        (place / file).unlink()


def rows(place: Path, share: float) -> Attempts:
    """Bad rows before a good one: the bad one set aside for its reason, the good one kept."""

    def one(file: str, data: bytes, reasons: list[str]) -> None:
        pool, report = read(place, file, data)
        assert list(report.reasons) == reasons and pool[-1]["messages"] == ANSWER, report.describe()

    for name, (file, data, reason) in hostile.ROWS.items():
        yield name, problem(lambda file=file, data=data, reason=reason: one(file, data, [reason]), UsageError)
    for name, (file, data) in hostile.FINE.items():
        yield name, problem(lambda file=file, data=data: one(file, data, []), UsageError)


def files(place: Path, share: float) -> Attempts:
    """Files that are refused as a whole."""
    for name, (file, data, said) in hostile.FILES.items():
        yield name, problem(lambda file=file, data=data: read(place, file, data), must=True, said=said)


def random_files(place: Path, share: float) -> Attempts:
    """Sound files with bytes changed: read with every row accounted for, or refused."""
    rows = [{"messages": chat, "source": f"s{i}"} for i, chat in enumerate(tiny.chats(6))]
    pairs = [{"prompt": f'q,"{i}"', "completion": f"a\n{i}"} for i in range(6)]
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    table = "prompt,completion\n" + "".join('"{}","{}"\n'.format(*(v.replace('"', '""') for v in p.values())) for p in pairs)
    whole = hostile._parquet(prompt=[p["prompt"] for p in pairs], completion=[p["completion"] for p in pairs])
    kinds = {"a.jsonl": lines, "a.json": json.dumps(rows).encode(), "a.csv": table.encode(), "a.parquet": whole,
             "a.jsonl.gz": gzip.compress(lines, mtime=0)}  # fmt: skip

    def one(file: str, data: bytes) -> None:
        pool, report = read(place, file, data)
        assert report.read == report.kept + report.invalid + report.duplicates + report.contaminated, report.describe()
        assert len(pool) == report.kept and all(m["content"] is not None for row in pool["messages"] for m in row)
        entries = (place / "work" / "quarantine.jsonl").read_text("utf-8").splitlines()
        assert len([json.loads(line) for line in entries]) == report.read - report.kept

    for number, (file, data) in enumerate(kinds.items()):
        for i, changed in enumerate(hostile.mutants(data, math.ceil(60 * share), number)):
            yield f"{file} {i}", problem(lambda file=file, changed=changed: one(file, changed))


def recipes(place: Path, share: float) -> Attempts:
    """Wrong values at every place of a recipe, and its text with bytes changed: wrong usage, or a recipe."""
    from llmselect.recipe import load_recipe

    (place / "model").mkdir()
    (place / "model" / "config.json").write_text("{}")
    sound, draw, share = hostile.settings(place), random.Random("recipes"), 0.15 * share
    file = place / "recipe.yaml"
    with chdir(place):
        for where in hostile.PLACES:
            for value in hostile.VALUES:
                if draw.random() < share:
                    file.write_text(json.dumps(hostile.spoil(sound, where, value)))
                    yield f"{where}={str(value)[:30]!r}", problem(lambda: load_recipe(file), UsageError)
        for i, changed in enumerate(hostile.mutants(json.dumps(sound, indent=1).encode(), math.ceil(500 * share), 1)):
            file.write_bytes(changed)
            yield f"bytes {i}", problem(lambda: load_recipe(file), UsageError)


def grids(place: Path, share: float) -> Attempts:
    """The same for the benchmark's grids."""
    from llmselect.benchmark.grid import load_grid

    (place / "model").mkdir()
    (place / "model" / "config.json").write_text("{}")
    plain, draw = hostile.settings(place), random.Random("grids")
    sound = {"name": "g", "models": {"m": plain["model"]}, "pool": plain["pool"], "methods": plain["methods"],
             "tasks": {"t": {**plain["targets"]["t"], "test": plain["targets"]["t"]["dev"]}}, "features": plain["features"],
             "budgets": ["5%"], "train": {"tokens": 100}}  # fmt: skip
    places = ["name", "models", "models.m", "models.m.path", "tasks", "tasks.t", "tasks.t.test", "targets", "targets.t",
              "budgets", "seeds", "methods", "methods.random", "methods.x", "methods.x.budgets", "train", "train.tokens",
              "cells", "out", "vars", "warmup", "sae", "features.emb"]  # fmt: skip
    file = place / "grid.yaml"
    for where in places:
        for value in hostile.VALUES:
            if draw.random() < 0.3 * share:
                file.write_text(json.dumps(hostile.spoil(sound, where, value)))
                yield f"{where}={str(value)[:30]!r}", problem(lambda: load_grid(file), UsageError)
    for i, changed in enumerate(hostile.mutants(json.dumps(sound, indent=1).encode(), math.ceil(100 * share), 2)):
        file.write_bytes(changed)
        yield f"bytes {i}", problem(lambda: load_grid(file), UsageError)


def templates(place: Path, share: float) -> Attempts:
    """Chat templates that fail, run wild or look for a way out of their sandbox."""
    from llmselect.chat import ChatEncoder

    tokenizer = tiny.tokenizer()
    for name, template in hostile.TEMPLATES.items():
        chat = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "defg"}]
        yield name, problem(lambda template=template, chat=chat: ChatEncoder(tokenizer, 64, template).encode([chat]), must=True)


def models(place: Path, share: float) -> Attempts:
    """Folders that look like a model and are none; no code of theirs runs, and nobody is asked whether it should."""
    from llmselect.engine.backbone import Backbone

    def load(folder: Path) -> None:
        backbone = Backbone(str(folder))
        backbone.encoder.encode([ANSWER])
        backbone.causal_lm  # noqa: B018

    with chdir(place):
        for name, folder in hostile.broken_models(place):
            said = problem(lambda folder=folder: load(folder), must=True)
            yield name, said or ("its code ran" if list(place.rglob("OWNED")) else "")


def manifests(place: Path, share: float) -> Attempts:
    """Files of a store and of a selection with bytes changed: refused, or nothing was changed."""
    from llmselect.selection import Selection
    from llmselect.store import FeatureStore

    store, values = FeatureStore(place / "store"), np.arange(24.0, dtype=np.float32).reshape(12, 2)
    ids = [f"{i:032x}" for i in range(12)]
    made = store.create("emb", {"shard_rows": 5, "arrays": {"value": ["float32", [2]]}, "extractor": "x", "threads": 1}, ids)
    values[7, 1] = np.nan
    for shard in range(made.shards):
        made.write(shard, {"value": values[made.rows(shard)]})
    more: dict[str, Any] = {"evidence": {"a": np.arange(3)}, "provenance": {"seed": 0}, "ids": ids[:3]}
    chosen = Selection(np.array([3, 1, 2]), 12, np.arange(12.0), **more)
    chosen.save(place / "selection")

    def one() -> None:
        array = store["emb"]
        np.testing.assert_array_equal(array[:], values)
        assert list(array.ids) == ids and array.non_finite.tolist() == [7] and array.spec["extractor"] == "x"
        again = Selection.load(place / "selection")
        assert again.indices.tolist() == [3, 1, 2] and again.provenance == chosen.provenance and list(again.ids or ()) == ids[:3]
        np.testing.assert_array_equal(again.scores, chosen.scores)

    everything = [f for f in sorted(place.rglob("*")) if f.is_file()]
    for number, file in enumerate(everything):
        sound = file.read_bytes()
        for i, changed in enumerate(hostile.mutants(sound, math.ceil(15 * share), number)):
            file.write_bytes(changed)
            yield f"{file.name} {i}", problem(one)
        file.write_bytes(sound)
    assert problem(one) == ""


def cells(place: Path, share: float) -> Attempts:
    """Results of the benchmark with bytes changed."""
    from llmselect.benchmark import results

    losses, key = {"t": np.array([1.25, 2.5]), "u": np.array([0.5])}, {"pool": {"limit": 3}}
    sound = results.Result("g", "m", "t", "random", "5%", 0, 3, 99, {"train": 1.0}, 0.5, {"t": "ab"}, losses, key)
    sound.save(place / "cell.json")
    text = (place / "cell.json").read_bytes()

    def one() -> None:
        again = results.load(place / "cell.json")
        assert {k: v.tolist() for k, v in again.losses.items()} == {k: v.tolist() for k, v in losses.items()}
        assert [getattr(again, name) for name in results.FACTS] == [getattr(sound, name) for name in results.FACTS]
        assert dict(again.key) == sound.key

    for i, changed in enumerate(hostile.mutants(text, math.ceil(150 * share), 5)):
        (place / "cell.json").write_bytes(changed)
        yield str(i), problem(one)


def places(place: Path, share: float) -> Attempts:
    """Names that would leave their folder."""
    from llmselect.recipe import load_recipe
    from llmselect.store import FeatureStore

    store, sound, spec = FeatureStore(place / "inside"), hostile.settings(place), {"arrays": {"value": ["float32", []]}}
    (place / "model").mkdir()
    (place / "model" / "config.json").write_text("{}")
    for name in ("..", "../x", "/tmp/x", "a/b", "a\\b", "a\0", "", ".", "~", "a@target/../x", "-x", "@target", "x" * 300, "a\n"):
        yield f"feature {name[:9]!r}", problem(lambda name=name: store.create(name, spec, ["0" * 32]), must=True)
        for kind, other in (("features", {"extractor": "embedding"}), ("methods", {"selector": "random"})):
            if (kind, name) == ("methods", "-x"):
                continue  # the name of a folder like any other
            (place / "recipe.yaml").write_text(json.dumps({**sound, kind: {name: other}}))
            yield f"{kind} {name[:9]!r}", problem(lambda: load_recipe(place / "recipe.yaml"), UsageError, must=True)
    made = {str(f.relative_to(place)) for f in place.rglob("*")} - {"model", "model/config.json", "recipe.yaml", "pool.jsonl"}
    yield "files made", "" if made == {"dev.jsonl"} and not Path("/tmp/x").exists() else f"{made}"


GROUPS: dict[str, Callable[[Path, float], Attempts]] = {
    "rows": rows, "files": files, "files with random changes": random_files, "recipes": recipes, "grids": grids,
    "chat templates": templates, "models and tokenizers": models, "stores and selections with random changes": manifests,
    "cells of the benchmark with random changes": cells, "names that would leave their folder": places,
}  # fmt: skip
