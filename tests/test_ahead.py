"""Reading and writing run beside the model: proved by events that only another thread can set."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import rows

import llmselect as ls
from llmselect import extractors as E
from llmselect.engine.ahead import ahead, behind
from llmselect.engine.passes import Pass
from llmselect.store import Feature, FeatureStore

PATIENCE = 20.0


def test_one_is_made_while_the_one_before_is_used() -> None:
    made, begun = list[int](), {n: threading.Event() for n in range(6)}

    def make(n: int) -> int:
        begun[n].set()
        made.append(n)
        return n * n

    for n, square in ahead(range(5), make):
        assert square == n * n
        if n < 4:
            assert begun[n + 1].wait(PATIENCE)  # in the other thread: this one is here
            assert not begun[n + 2].is_set()  # and no further
    assert made == [0, 1, 2, 3, 4] and list(ahead([], make)) == []


def test_an_error_comes_where_its_item_would() -> None:
    seen = list[int]()
    with pytest.raises(ZeroDivisionError):
        for n, _ in ahead([2, 1, 0, 3], lambda n: 1 / n):
            seen.append(n)
    assert seen == [2, 1]


def test_work_behind_is_one_piece_at_a_time_in_order_and_done_at_the_end() -> None:
    done, free = list[int](), threading.Event()

    def write(n: int) -> None:
        assert free.wait(PATIENCE)
        done.append(n)

    with behind() as do:
        do(write, 0)
        assert done == []  # it goes on meanwhile
        free.set()
        do(write, 1)
        assert done[0] == 0  # the one before was waited for
    assert done == [0, 1]


@pytest.mark.parametrize("pieces", [1, 2])
def test_an_error_behind_is_raised_at_the_next_piece_or_at_the_end(pieces: int) -> None:
    reached = list[int]()
    with pytest.raises(OSError, match="full"), behind() as do:
        for n in range(pieces):
            do(_fail)
            reached.append(n)
    assert reached == [0]


def _fail() -> None:
    raise OSError("full")


def test_an_error_of_the_block_waits_for_the_work_behind() -> None:
    done, free = list[int](), threading.Event()
    with pytest.raises(KeyError), behind() as do:
        do(lambda: (free.wait(PATIENCE), done.append(1)))
        threading.Timer(0.05, free.set).start()
        raise KeyError
    assert done == [1]


def test_a_pass_reads_the_next_shard_and_writes_the_last_while_it_computes(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shard 1 is computed only once shard 2 is tokenised, and shard 0 is written only once shard 1 is being computed."""
    pool = rows.pool(12)
    encoded, computing = {n: threading.Event() for n in range(4)}, {n: threading.Event() for n in range(3)}
    kept, place = (Pass.encoded, Pass.compute, Feature.write), {row: i // 4 for i, row in enumerate([*pool["id"]])}

    def encode(self: Any, messages: Any, names: Any) -> Any:
        found = kept[0](self, messages, names)
        next(event for event in encoded.values() if not event.is_set()).set()
        return found

    def compute(self: Any, messages: Any, ids: Any, *more: Any) -> Any:
        shard = place[ids[0]]
        computing[shard].set()
        assert shard == 2 or encoded[shard + 1].wait(PATIENCE)
        return kept[1](self, messages, ids, *more)

    def write(self: Any, shard: int, arrays: Any) -> None:
        assert shard == 2 or computing[shard + 1].wait(PATIENCE)
        kept[2](self, shard, arrays)

    monkeypatch.setattr(Pass, "encoded", encode)
    monkeypatch.setattr(Pass, "compute", compute)
    monkeypatch.setattr(Feature, "write", write)
    store = ls.extract(pool, FeatureStore(tmp_path / "s"), {"loss": E.Loss(model=str(tiny_model))}, shard_rows=4)
    assert store["loss.nll"].shape == (12,) and not encoded[3].is_set()
