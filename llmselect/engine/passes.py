"""One forward pass over the rows, many features: shard by shard, resumable, on any number of processes."""

from __future__ import annotations

# datasets and pyarrow have no types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
import logging
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmselect.arrays import Csr, not_finite
from llmselect.engine.ahead import ahead, behind
from llmselect.engine.batch import Batch, collate, plan
from llmselect.engine.memory import BackOff
from llmselect.engine.progress import Progress
from llmselect.errors import LlmselectError

if TYPE_CHECKING:
    from datasets import Dataset

    from llmselect.chat import Encoded
    from llmselect.engine.backbone import Backbone
    from llmselect.engine.extractor import Extractor
    from llmselect.formats import Message
    from llmselect.store import Feature

log = logging.getLogger("llmselect")


def default_batch_tokens() -> int:
    """Padded tokens per batch: a GPU needs many to be busy, a CPU's caches like few."""
    return 32768 if torch.cuda.is_available() else 4096


class SparseRows:
    """Collects the dense rows `[B, width]` of batches as the sparse rows of a shard."""

    def __init__(self, rows: int, width: int, dtype: str):
        self.parts = [(np.zeros(1, np.int32), np.full(1, np.nan, dtype))] * rows  # until filled: no row, not a row of zeros
        self.width, self.dtype = width, dtype

    def __setitem__(self, rows: np.ndarray, values: np.ndarray) -> None:
        # Rounded first: what becomes zero is not stored.
        with np.errstate(over="ignore"):  # an overflow becomes infinite and is reported as that
            values = values.astype(self.dtype)
        for row, dense in zip(rows, values, strict=True):
            columns = np.flatnonzero(dense)
            self.parts[int(row)] = columns.astype(np.int32), dense[columns]

    def csr(self) -> Csr:
        """All rows collected."""
        return Csr.of_rows(self.parts, self.width, self.dtype)


@dataclass
class Pass:
    """Extractors that share a model and tokenisation, the features they fill, and how to run them."""

    backbone: Backbone
    extractors: Mapping[str, Extractor]
    features: Mapping[str, Feature]
    states: Mapping[str, Mapping[str, torch.Tensor]]
    groups: Sequence[str] = ()
    batch_tokens: int = 8192
    padding_side: str = "right"
    side: str = "pool"
    back_off: BackOff = field(default_factory=BackOff)

    def layers(self, view: str) -> tuple[int, ...]:
        """Every hidden state that some extractor reads in this view; none means that no forward is needed."""
        reading = {name: e for name, e in self.extractors.items() if view in e.views()}
        return tuple(sorted({n for name, e in reading.items() for n in e.layers(self.states.get(name, {}))}))

    def encode(self, messages: list[list[dict[str, str]]], view: str) -> list[Encoded]:
        """The rows' token sequences in a view."""
        reading = next((e for e in self.extractors.values() if view in e.views()), None)
        return self.backbone.encoder.encode(messages) if reading is None else reading.encode(self.backbone, messages, view)

    def encoded(self, messages: list[list[Message]], names: Sequence[str]) -> dict[str, list[Encoded]]:
        """The rows' token sequences in every view that a feature in `names` reads: "row" before "response"."""
        views = sorted({view for name in names for view in self.extractors[name].views()}, reverse=True)
        return {view: self.encode(messages, view) for view in views}

    def compute(self, messages: list[list[Message]], ids: Sequence[str], names: Sequence[str],
                encoded: Mapping[str, list[Encoded]] | None = None) -> dict[str, dict[str, Any]]:  # fmt: skip
        """Arrays of every feature in `names` for these rows, `encoded` already or now: feature → array → `[rows, …]`."""
        read = [name for name in names if self.extractors[name].views()]
        out = {name: self._empty(name, len(messages)) if name in read else self.extractors[name].texts(messages)
               for name in names}  # fmt: skip
        for view, sequences in (self.encoded(messages, names) if encoded is None else encoded).items():
            active = [name for name in names if view in self.extractors[name].views()]

            def step(rows: np.ndarray, encoded: list[Encoded] = sequences, view: str = view,
                     active: list[str] = active) -> dict[str, dict[str, np.ndarray]]:  # fmt: skip
                batch = collate(self.backbone, [encoded[int(i)] for i in rows], self.layers(view), view, self.padding_side)
                return self._rows(replace(batch, side=self.side, names=[ids[int(i)] for i in rows]), active)

            filled = np.array([i for i, row in enumerate(sequences) if len(row.ids)], np.int64)
            for batch in plan([len(sequences[int(i)].ids) for i in filled], self.batch_tokens):
                for rows, found in self.back_off.run(filled[batch], step, ids):
                    for name, arrays in found.items():
                        for key, values in arrays.items():
                            out[name][key][rows] = values
        for name in names:
            self.extractors[name].derive(out[name])
        return {name: {k: v.csr() if isinstance(v, SparseRows) else v for k, v in one.items()} for name, one in out.items()}

    def parts(self, data: Dataset, wanted: Iterable[tuple[range, Sequence[str]]]) -> Generator[tuple[list[str], dict[str, Any]]]:
        """`(ids, arrays)` of some rows after others, each with the names of their features; the next rows are read and tokenised
        in a thread while a part is computed."""

        def read(one: tuple[range, Sequence[str]]) -> tuple[dict[str, list[Any]], dict[str, list[Encoded]]]:
            part: dict[str, list[Any]] = data[one[0].start : one[0].stop]
            return part, self.encoded(part["messages"], one[1])

        with closing(ahead(wanted, read)) as coming:
            for (_, names), (part, encoded) in coming:
                yield part["id"], self.compute(part["messages"], part["id"], names, encoded)

    def _rows(self, batch: Batch, names: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
        # What is made in inference mode can take no part in a backward pass.
        backward = any(self.extractors[name].alone for name in names)
        with torch.no_grad() if backward else torch.inference_mode():
            found = {name: self.extractors[name].rows(batch, self.states.get(name, {})) for name in names}
        return {name: {k: v.float().cpu().numpy() if v.dtype == torch.bfloat16 else v.cpu().numpy()
                       for k, v in arrays.items()} for name, arrays in found.items()}  # fmt: skip

    def _empty(self, name: str, rows: int) -> dict[str, Any]:
        declared = self.extractors[name].arrays(self.backbone, self.groups)
        # A row that no batch fills (nothing to score) must not look like a score of zero.
        empty = dict[str, Any]()
        for key, (dtype, tail) in declared.items():
            if dtype.startswith("csr:"):
                empty[key] = SparseRows(rows, tail[0], dtype.removeprefix("csr:"))
            else:
                empty[key] = np.full((rows, *tail), np.nan if np.dtype(dtype).kind == "f" else 0, dtype)
        return empty

    def run(self, data: Dataset, label: str, rank: int, world: int, ready: Any) -> None:
        """Fill this process's share of the missing shards. `ready()` is a barrier between listing and writing."""
        missing = {name: set(feature.missing()) for name, feature in self.features.items()}
        shards = sorted(set[int]().union(*missing.values()))
        ready()
        if not shards:
            return
        some = next(iter(self.features.values()))
        mine = shards[rank::world]
        sizes = characters(data, some, mine)
        progress = Progress(label, sum(sizes), show=rank == 0)
        wanted = [(some.rows(shard), [name for name in self.features if shard in missing[name]]) for shard in mine]
        with behind() as do, closing(self.parts(data, wanted)) as parts:
            for shard, size, (ids, arrays) in zip(mine, sizes, parts, strict=True):
                do(self._write, shard, ids, arrays)
                progress.step(size, len(ids))
        progress.close()

    def _write(self, shard: int, ids: Sequence[str], arrays: Mapping[str, Mapping[str, Any]]) -> None:
        for name, values in arrays.items():
            report_non_finite(self.features[name].folder.name, values, ids)
            self.features[name].write(shard, values)


def characters(data: Dataset, feature: Feature, shards: Sequence[int]) -> list[int]:
    """Bytes of text in each shard, read from the Arrow offsets without touching the text."""
    from pyarrow import compute

    pc: Any = compute  # its functions are made at import, so type checkers know none of them
    totals = list[int]()
    for shard in shards:
        rows = feature.rows(shard)
        column: Any = data.with_format("arrow")[rows.start : rows.stop]["messages"]
        contents = pc.struct_field(pc.list_flatten(column), "content")
        totals.append(int(pc.sum(pc.binary_length(contents)).as_py() or 1))
    return totals


def report_non_finite(name: str, arrays: Mapping[str, Any], ids: Sequence[str]) -> None:
    """Name the rows whose numbers are NaN or infinite: they stay marked in the store and are never ranked."""
    for key, values in arrays.items():
        if len(bad := not_finite(values)):
            shown = ", ".join(str(ids[int(i)]) for i in bad[:5])
            log.warning("%s.%s: %d rows have no finite value and cannot be ranked: %s", name, key, len(bad), shown)


def fit(run: Pass, target: Dataset, pool: Dataset | None = None) -> None:
    """Fit the extractors that learn from the target rows, some from a seeded sample of the pool too; the states join
    `run.states`."""
    wanting = {name: e for name, e in run.extractors.items() if e.fits}
    if not wanting:
        return
    batches: dict[str, list[Batch]] = {}
    groups: list[str] = [*target["group"]]
    for name in run.groups:
        rows = target.select(np.flatnonzero(np.array(groups) == name))
        encoded = run.encode([*rows["messages"]], "row")
        # One row a batch: a target set is small, and no statistic can then depend on padding.
        batches[name] = [collate(run.backbone, [one], run.layers("row")) for one in encoded]
        if not batches[name]:
            raise LlmselectError(f"target group '{name}' has no rows")
    for name, extractor in wanting.items():
        more = {"sample": _sample(run, pool, extractor.sample_rows)} if extractor.sample_rows and pool is not None else {}
        run.states = {**run.states, name: extractor.fit(run.backbone, batches, **more)}


def _sample(run: Pass, pool: Dataset, count: int) -> list[Batch]:
    rows = np.random.default_rng(0).permutation(len(pool))[:count]
    drawn: dict[str, list[Any]] = pool[np.sort(rows)]
    encoded = [row for row in run.encode(drawn["messages"], "row") if len(row.ids)]
    batches = plan([len(row.ids) for row in encoded], run.batch_tokens)
    return [collate(run.backbone, [encoded[int(i)] for i in batch]) for batch in batches]
