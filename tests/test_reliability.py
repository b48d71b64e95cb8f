"""What stands between a fault and a wrong result: sealed manifests, folders replaced in one step, the account of the rows."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tiny
from llmselect import account, atomic
from llmselect.arrays import Ids
from llmselect.engine.backbone import Backbone
from llmselect.errors import LlmselectError, of_the_disk, of_the_machine
from llmselect.lazy import LazyArray
from llmselect.prepare import prepare
from llmselect.recipe import load_recipe
from llmselect.stages import Run, extract_stage, select_stage
from llmselect.store import FeatureStore


@pytest.fixture
def run(tmp_path, tiny_model) -> Run:
    for name, rows in (("pool", tiny.chats(24)), ("dev", tiny.chats(3, 50))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in rows))
    plan = {"name": "r", "out": str(tmp_path / "run"), "model": {"path": str(tiny_model), "max_length": 256},
            "pool": {"path": str(tmp_path / "pool.jsonl")}, "targets": {"t": {"dev": str(tmp_path / "dev.jsonl")}},
            "features": {"emb": {"extractor": "embedding"}},
            "methods": {"sim": {"selector": "similarity", "x": "emb"}}}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(plan))
    return Run(load_recipe(tmp_path / "recipe.yaml"))


def test_a_sealed_manifest_is_as_written_or_refused(tmp_path):
    file, about = tmp_path / "a.json", {"key": {"rows": 3}, "seconds": 1.5}
    atomic.write_sealed(file, about)
    assert atomic.read_sealed(file, "delete it") == about
    sound = file.read_bytes()
    for at in range(len(sound)):
        for bit in (0, 5):
            changed = bytearray(sound)
            changed[at] ^= 1 << bit
            file.write_bytes(changed)
            with pytest.raises(LlmselectError, match=r"a\.json is damaged .*; delete it"):
                atomic.read_sealed(file, "delete it")
    for size in range(len(sound)):
        file.write_bytes(sound[:size])
        with pytest.raises(LlmselectError, match="damaged"):
            atomic.read_sealed(file, "delete it")
    file.unlink()
    with pytest.raises(LlmselectError, match=r"a\.json is missing; delete it"):
        atomic.read_sealed(file, "delete it")
    atomic.write_json(file, about)  # of a version without checksums
    assert atomic.read_sealed(file, "delete it") == about


@pytest.mark.parametrize("step", ["mkdtemp", "replace", "rmtree"])
def test_a_folder_that_is_replaced_is_the_old_or_the_new_whenever_it_stops(tmp_path, monkeypatch, step):
    """Where a file was deleted after the other, a kill left half of the old folder, which nothing could continue."""
    place, homes = tmp_path / "made", {"mkdtemp": atomic.tempfile, "replace": os, "rmtree": shutil}
    for name in ("a", "b"):
        with atomic.replace_dir(place) as beside:
            for file in "xyz":
                (beside / file).write_text(name)
    states, calls = [], []
    original = getattr(homes[step], step)

    def stop(*args, **kwargs):
        calls.append(args)
        states.append({f.name: f.read_text() for f in place.iterdir()} if place.exists() else None)
        return original(*args, **kwargs)

    monkeypatch.setattr(homes[step], step, stop)
    with atomic.replace_dir(place) as beside:
        for file in "xyz":
            (beside / file).write_text("c")
    whole = [dict.fromkeys("xyz", name) for name in "bc"]
    assert calls and all(state is None or state in whole for state in states)
    assert {f.name for f in tmp_path.iterdir()} == {"made"} and (place / "x").read_text() == "c"
    if step == "rmtree":
        assert states == [whole[1]]  # nothing is deleted where a reader looks


def test_rows_of_another_recipe_are_never_vouched_for(run, monkeypatch):
    """Killed while rows are read for a smaller pool: back at the first recipe, its own rows come back."""
    prepare(run)
    first = list(run.pool["id"])
    smaller = replace(run.recipe, pool=replace(run.recipe.pool, limit=5))
    with monkeypatch.context() as patch:
        patch.setattr("llmselect.prepare._usable", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(Run(smaller))
    again = Run(run.recipe)
    prepare(again)
    assert list(again.pool["id"]) == first and len(first) == 24


@pytest.mark.parametrize("name", ["pool/pool.arrow", "pool/usable.npy", "targets/t/pool.arrow", "versions.json", "rows.json"])
def test_changed_rows_are_named_and_read_anew(run, name):
    prepare(run)
    file = run.folder / name
    sound = file.read_bytes()
    changed = bytearray(sound)
    changed[len(changed) // 2] ^= 4
    file.write_bytes(changed)
    with pytest.raises(LlmselectError, match=rf"{name} is (missing or )?damaged.*; delete .*rows\.json and run again"):
        again = Run(run.recipe)
        prepare(again)
        len(again.pool), len(again.target)
    (run.folder / account.NAME).unlink()
    again = Run(run.recipe)
    prepare(again)
    assert len(again.pool) == 24 and len(again.target) == 3 and file.read_bytes() == sound


def test_a_copy_of_the_rows_is_the_same_rows_and_other_bytes_are_not(run, monkeypatch):
    """A file with another time is read for its digest once; one with another byte at the same size is refused."""
    prepare(run)
    run.store.create("emb", {"shard_rows": 2, "arrays": {"value": ["float32", []]}, "threads": 1}, list(run.pool["id"]))
    pool, hashed = Path(run.recipe.pool.path), []
    digest = atomic.sha256_file
    monkeypatch.setattr("llmselect.readers.atomic.sha256_file", lambda file: hashed.append(str(file)) or digest(file))
    os.utime(pool, ns=(1, 1))
    for _ in range(2):
        prepare(Run(run.recipe))
    assert hashed.count(str(pool)) == 1
    pool.write_bytes(pool.read_bytes().replace(b"0", b"9", 1))
    with pytest.raises(LlmselectError, match=r"made from other rows"):
        prepare(Run(run.recipe))


def test_a_disk_that_refuses_is_no_missing_model(tiny_model, monkeypatch):
    """Libraries take an error at a file to mean that there is none; what the disk said must come through."""
    opened = open

    def refusing(file, *args, **options):
        if str(file).endswith("tokenizer_config.json"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        return opened(file, *args, **options)

    monkeypatch.setattr("builtins.open", refusing)
    with pytest.raises(OSError, match="No space left on device") as told:
        Backbone(str(tiny_model))
    assert of_the_disk(told.value) is told.value and of_the_machine(told.value) is not None


def test_the_recipe_in_the_run_is_the_one_last_run(run):
    prepare(run)
    more = replace(run.recipe, methods={**run.recipe.methods, "random": {"selector": "random"}})
    prepare(Run(more))
    assert list(load_recipe(run.folder / "config.yaml").methods) == ["sim", "random"]


def test_ids_of_a_feature_are_checked_and_written_again(tmp_path):
    store, ids = FeatureStore(tmp_path), [f"{i:032x}" for i in range(5)]
    spec = {"shard_rows": 2, "arrays": {"value": ["float32", []]}, "threads": 1}
    made = store.create("a", spec, ids)
    for shard in range(made.shards):
        made.write(shard, {"value": np.ones(len(made.rows(shard)), np.float32)})
    file = tmp_path / "a" / "ids.safetensors"
    sound = file.read_bytes()
    file.write_bytes(sound[:-1] + b"\x07")
    with pytest.raises(LlmselectError, match=r"ids\.safetensors is missing or damaged; type: llmselect extract … --repair"):
        store["a"]
    assert store.open("a").repair() == [] and not file.exists()
    store.create("a", spec, ids)
    assert file.read_bytes() == sound and list(store["a"].ids) == ids


def test_a_request_for_other_rows_is_never_answered_with_what_is_there(tmp_path):
    """Two rows of a lazy feature exchanged in the request: the values beside it are of the rows asked for first."""
    store, ids = FeatureStore(tmp_path), [f"{i:032x}" for i in range(9)]
    made = store.lazy_feature("a", {"arrays": {"value": ["float32", []]}, "threads": 1}, ids)
    compute = lambda rows: {"value": rows.astype(np.float32)}  # noqa: E731
    opened = lambda: LazyArray(made.folder, "value", (), Ids(made.ids.raw), compute)  # noqa: E731
    assert opened()[[1, 2, 5]].tolist() == [1, 2, 5]
    np.save(made.folder / "000000.npy", np.array([1, 3, 5]))
    with pytest.raises(LlmselectError, match=r"holds other rows than were asked for.*delete"):
        opened()
    np.save(made.folder / "000000.npy", np.array([1, 9]))
    with pytest.raises(LlmselectError, match=r"000000\.npy is damaged"):
        opened()


def test_a_model_of_nan_ranks_nothing_and_names_its_rows(run, tmp_path):
    import torch

    broken = tiny.model(vocab=len(tiny.tokenizer()))
    with torch.no_grad():
        broken.get_input_embeddings().weight.fill_(float("nan"))
    shutil.copytree(run.recipe.model.path, tmp_path / "nan")
    broken.save_pretrained(tmp_path / "nan")
    hurt = Run(replace(run.recipe, model=replace(run.recipe.model, path=str(tmp_path / "nan"))))
    prepare(hurt)
    extract_stage(hurt)
    entries = [json.loads(line) for line in (hurt.folder / "quarantine.jsonl").read_text().splitlines()]
    assert {one["id"] for one in entries if one["kind"] == "non_finite"} == set(hurt.pool["id"])
    with pytest.raises(LlmselectError, match="finite"):
        select_stage(hurt)
    assert not list(hurt.folder.rglob("selection.json"))


def test_what_the_machine_does_is_told_and_defects_are_not_hidden():
    import torch
    from safetensors import SafetensorError

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/x")
    for error, said in (
        (full, "No space left on device: '/data/x'; what is finished is kept"),
        (SafetensorError("Error while serializing: No space left on device (os error 28)"), "what is finished is kept"),
        (SafetensorError("IoError(Os { code: 28, kind: StorageFull })"), "type the same command to continue"),
        (MemoryError(), "out of memory (MemoryError)"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), "out of memory (CUDA out of memory. Tried"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "give the run more memory"),
    ):
        told = of_the_machine(error)
        assert told is not None and said in told and "\n" not in told
    for defect in (KeyError("x"), RuntimeError("shape mismatch"), ValueError("bad"), AssertionError()):
        assert of_the_machine(defect) is None


def test_seconds_are_noted_before_their_selection_and_a_changed_digit_is_refused(run, monkeypatch):
    prepare(run)
    extract_stage(run)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("llmselect.selection.Selection.save", killed)
        select_stage(run)
    assert list(account.seconds(run.folder, account.SELECTIONS)) == ["sim/seed-0"]
    account.took(run.folder, account.SELECTIONS, "sim/seed-0", 1.25)
    file = run.folder / account.SELECTIONS
    file.write_text(file.read_text().replace("1.25", "1.35"))
    with pytest.raises(LlmselectError, match=r"seconds\.json is damaged.*; delete .*seconds\.json and run again"):
        account.seconds(run.folder, account.SELECTIONS)
