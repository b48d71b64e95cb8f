"""Tokens of conversations on disk, made once: extraction, training and evaluation read what preparing the pool has encoded.

Layout: `<folder>/<fingerprint of the encoder>/<sha256 of the file>.safetensors`, a segment for each batch of new rows. A row is
found by what it says, not by its place, so whoever asks, in whatever order, finds it; a file's name is its checksum.
What a template makes of the day's date is that of the day when a row was first met.
"""

from __future__ import annotations

# safetensors has types in part.
# pyright: reportUnknownVariableType=false
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmselect import atomic
from llmselect.arrays import read_shard

if TYPE_CHECKING:
    from llmselect.chat import Encoded

log = logging.getLogger("llmselect")
LEAST = 32  # rows worth a file
OPEN = 32  # segments held mapped
TOKEN_BYTES, ROW_BYTES = 5, 40  # on disk
SEGMENT_BITS = 24  # a place in the index: segment · 2²⁴ + row


class Index:
    """64-bit keys and their places, 16 bytes a row: sorted runs, merged when the last two are of a size.

    Of a key that joined twice the later place counts: the file of the earlier one was lost or damaged.
    """

    def __init__(self) -> None:
        self.runs = list[tuple[np.ndarray, np.ndarray]]()

    def add(self, keys: np.ndarray, places: np.ndarray) -> None:
        """Join `keys [m]` uint64 at `places [m]`."""
        while self.runs and len(self.runs[-1][0]) <= 2 * len(keys):
            more = self.runs.pop()
            keys, places = np.concatenate([keys, more[0]]), np.concatenate([places, more[1]])  # the later ones first
        order = np.argsort(keys, kind="stable")
        self.runs.append((keys[order], places[order]))

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The place of each key, -1 where there is none."""
        found = np.full(len(keys), -1, np.int64)
        for known, places in self.runs:
            at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
            found = np.where(known[at] == keys, places[at], found)
        return found


@dataclass(frozen=True, eq=False)
class Segment:
    """`m` encoded rows of `T` tokens together: `key [m, 16]`; `start [m + 1]`; `ids [T]`; `marks [T]`: content + 4·response;
    `cut [m, 2]`."""

    key: np.ndarray
    start: np.ndarray
    ids: np.ndarray
    marks: np.ndarray
    cut: np.ndarray

    @classmethod
    def of(cls, key: np.ndarray, rows: Sequence[Encoded]) -> Segment:
        """The rows of `key [m, 16]`, in order."""
        start = np.cumsum([0, *(len(row.ids) for row in rows)], dtype=np.int64)
        marks = [row.content.astype(np.uint8) + 4 * row.response.astype(np.uint8) for row in rows]
        cut = np.array([(row.prompt_cut, row.response_cut) for row in rows], np.int64)
        return cls(key, start, np.concatenate([row.ids for row in rows]).astype(np.int32), np.concatenate(marks), cut)

    def row(self, number: int) -> Encoded:
        """One row, in memory of its own."""
        from llmselect.chat import Encoded

        at = slice(*self.start[number : number + 2])
        marks = self.marks[at]
        return Encoded(self.ids[at].copy(), marks > 3, (marks & 3).astype(np.int8), *self.cut[number].tolist())


class TokenCache:
    """What one encoder made of conversations, by their content. Segments of other processes are seen when it is opened."""

    def __init__(self, folder: Path):
        self.folder, self.index, self.files = folder, Index(), list[Path]()
        self.open, self.intact = dict[Path, Segment](), set[Path]()
        for file in sorted(folder.glob("*.safetensors")):
            if (key := keys_of(file)) is None:
                self._drop(file)
            else:
                self._join(file, key)

    def encode(self, conversations: Sequence[Any], encode: Callable[[Sequence[Any]], list[Encoded]]) -> list[Encoded]:
        """`encode(conversations)`, but only of those that are not known; these are kept."""
        keys = np.frombuffer(b"".join(digest(one) for one in conversations), np.uint8).reshape(-1, 16)
        places = self.index.find(short(keys))
        found: list[Encoded | None] = [None] * len(keys)
        for i in np.argsort(places, kind="stable").tolist():  # a segment is then opened once
            found[i] = self._row(int(places[i]), keys[i])
        missing = [i for i, row in enumerate(found) if row is None]
        made = dict(zip(missing, encode([conversations[i] for i in missing]), strict=True))
        if len(missing) >= LEAST:
            self._write(Segment.of(keys[missing], list(made.values())))
        return [made[i] if row is None else row for i, row in enumerate(found)]

    def _row(self, place: int, key: np.ndarray) -> Encoded | None:
        if place < 0 or (segment := self._segment(self.files[place >> SEGMENT_BITS])) is None:
            return None
        row = place & ((1 << SEGMENT_BITS) - 1)
        return segment.row(row) if np.array_equal(segment.key[row], key) else None

    def _segment(self, file: Path) -> Segment | None:
        """A segment that is as it was written; None where it is not, and then its rows are encoded again."""
        if file in self.open:
            return self.open[file]
        try:
            if file not in self.intact and atomic.sha256_file(file) != file.stem:
                return self._drop(file)
            found = Segment(**read_shard(file))
        except FileNotFoundError:  # lost, or dropped by another process
            return None
        self.intact.add(file)
        while len(self.open) >= OPEN:
            self.open.pop(next(iter(self.open)))
        self.open[file] = found
        return found

    def _drop(self, file: Path) -> None:
        log.warning("%s is damaged (its checksum differs); its rows are tokenised again", file)
        file.unlink(missing_ok=True)

    def _write(self, segment: Segment) -> None:
        from safetensors.numpy import save

        data = save({name: np.ascontiguousarray(array) for name, array in vars(segment).items()})
        file = self.folder / f"{hashlib.sha256(data).hexdigest()}.safetensors"
        atomic.write_bytes(file, data)
        self._join(file, segment.key)

    def _join(self, file: Path, key: np.ndarray) -> None:
        self.index.add(short(key), (len(self.files) << SEGMENT_BITS) + np.arange(len(key)))
        self.files.append(file)


def keys_of(file: Path) -> np.ndarray | None:
    """The keys of a segment, `[m, 16]`, not yet compared with its checksum; None where there are none to read."""
    try:
        key = read_shard(file)["key"]
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    return key if key.dtype == np.uint8 and key.shape[1:] == (16,) else None


def digest(messages: Any) -> bytes:
    """16 bytes that stand for what a conversation says."""
    return hashlib.blake2b(json.dumps(messages, sort_keys=True, default=str).encode(), digest_size=16).digest()


def short(keys: np.ndarray) -> np.ndarray:
    """The first 8 of 16 bytes: enough to find a row, whose key is then compared whole."""
    return np.ascontiguousarray(keys[:, :8]).view(np.uint64).ravel()
