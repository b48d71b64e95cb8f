"""FeatureStore: a folder of named `[n, …]` arrays in shards of a fixed number of rows.

Layout, the same whatever the number of processes that wrote it::

    <store>/<feature>/spec.json            what the feature is: fingerprint, n, shard size, arrays
    <store>/<feature>/ids.safetensors      the row ids, 16 bytes each, in order
    <store>/<feature>/00000.safetensors    rows [0, shard_rows)
    <store>/<feature>/00000.json           its sha256; written after the data, so it also says "complete"

A feature on the target rows is called `<feature>@target`; one array of several is `<feature>.<array>`.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llmselect import atomic
from llmselect.errors import LlmselectError, UsageError, nearest

VALUE = "value"  # the array meant by a feature's bare name
SHARD_ROWS = 1024
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+-]*(@target)?")
_DTYPES = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "I8": np.int8, "I32": np.int32, "I64": np.int64,
           "U8": np.uint8, "BOOL": np.bool_}  # fmt: skip


def check_name(name: str) -> str:
    """A feature's name is also a folder's: anything that could leave the store is refused."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} is not a feature name; allowed: letters, digits, '_', '+', '-' and a final '@target'")
    return name


def digest_ids(ids: Sequence[str]) -> np.ndarray:
    """Row ids as `[n, 16]` bytes: hex content ids as they are, any other id by a 16-byte BLAKE2b digest."""
    out = bytearray()
    for one in ids:
        hexadecimal = len(one) == 32 and not one.strip("0123456789abcdef")
        out += bytes.fromhex(one) if hexadecimal else hashlib.blake2b(one.encode(), digest_size=16).digest()
    return np.frombuffer(bytes(out), np.uint8).reshape(-1, 16)


def fold_ids(raw: np.ndarray) -> np.ndarray:
    """`[n]` uint64 of `[n, 16]` bytes: the key of a row's random draws and of tie-breaks. All 16 bytes count."""
    high, low = np.ascontiguousarray(raw).view(">u8").astype(np.uint64).reshape(-1, 2).T
    return high ^ (low * np.uint64(0x9E3779B97F4A7C15))


class Ids(Sequence[str]):
    """The ids of a feature's rows, read from the memory map: 16 bytes a row, none of them Python strings until asked."""

    def __init__(self, raw: np.ndarray):
        self.raw = raw

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, int | np.integer):
            return self.raw[row].tobytes().hex()
        return [one.tobytes().hex() for one in self.raw[row]]


def read_shard(path: Path) -> dict[str, np.ndarray]:
    """The arrays of one safetensors file as read-only memory maps."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    arrays = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
        if begin == end:  # an empty array cannot be mapped
            arrays[name] = np.zeros(shape, dtype)
        else:
            arrays[name] = np.memmap(path, dtype, "r", offset=8 + size + begin, shape=shape)
    return arrays


@dataclass(frozen=True)
class Feature:
    """One feature's folder: its spec, what is missing, its shards."""

    folder: Path
    spec: Mapping[str, Any]

    @property
    def n(self) -> int:
        return self.spec["n"]

    @property
    def shards(self) -> int:
        return -(-self.n // self.spec["shard_rows"])

    def rows(self, shard: int) -> range:
        """The pool rows of a shard: a function of the data alone, never of the launch."""
        size = self.spec["shard_rows"]
        return range(shard * size, min(self.n, (shard + 1) * size))

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / f"{shard:05d}.safetensors"

    def missing(self) -> list[int]:
        """Shards without a complete file."""
        return [s for s in range(self.shards) if not self.path(s).with_suffix(".json").exists()]

    def write(self, shard: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Store one shard, complete or absent."""
        from safetensors.numpy import save

        expected = len(self.rows(shard))
        for name, array in arrays.items():
            if len(array) != expected:
                raise LlmselectError(f"{self.folder.name}: array '{name}' has {len(array)} rows, shard {shard} {expected}")
        data = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
        atomic.write_bytes(self.path(shard), data)
        atomic.write_json(self.path(shard).with_suffix(".json"), {"sha256": hashlib.sha256(data).hexdigest()})

    def verify(self, shard: int) -> None:
        """Compare one shard with its checksum; the error names the file and how to recompute it."""
        path = self.path(shard)
        if not path.with_suffix(".json").exists():
            raise LlmselectError(f"{path} is missing: extraction did not finish; run the same command again")
        expected = json.loads(path.with_suffix(".json").read_text())["sha256"]
        if not path.exists() or atomic.sha256_file(path) != expected:
            raise LlmselectError(f"{path} is damaged (its checksum differs); type: llmselect extract … --repair")

    def repair(self) -> list[int]:
        """Drop damaged shards, so that the next extraction computes them again; returns their numbers."""
        damaged = []
        for shard in sorted(set(range(self.shards)) - set(self.missing())):
            try:
                self.verify(shard)
            except LlmselectError:
                self.path(shard).with_suffix(".json").unlink()
                self.path(shard).unlink(missing_ok=True)
                damaged.append(shard)
        return damaged

    @cached_property
    def ids(self) -> Ids:
        return Ids(read_shard(self.folder / "ids.safetensors")["ids"])


class StoredArray:
    """An `[n, …]` array in a store: sliced, gathered or walked in blocks from the memory map, never held whole."""

    def __init__(self, feature: Feature, name: str):
        if missing := feature.missing():
            raise LlmselectError(
                f"feature '{feature.folder.name}' is incomplete: {len(missing)} of {feature.shards} shards are "
                "missing; run the same extraction again to continue it"
            )
        self.feature, self.name, self.ids = feature, name, feature.ids
        self._maps: dict[int, np.ndarray] = {}
        first = self._shard(0)
        self.shape, self.dtype, self.ndim = (feature.n, *first.shape[1:]), first.dtype, first.ndim

    def _shard(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            self.feature.verify(shard)
            self._maps[shard] = read_shard(self.feature.path(shard))[self.name]
        return self._maps[shard]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        if isinstance(rows, tuple):
            return self[rows[0]][(slice(None), *rows[1:])]
        if isinstance(rows, int | np.integer):
            return self[np.array([rows])][0]
        index = np.arange(len(self))[rows] if isinstance(rows, slice) else np.asarray(rows)
        index = np.flatnonzero(index) if index.dtype == bool else index.astype(np.int64)
        if len(index) and not -len(self) <= index.min() <= index.max() < len(self):
            raise IndexError(f"row out of range for {len(self)} rows")
        index = np.where(index < 0, index + len(self), index)
        out = np.empty((len(index), *self.shape[1:]), self.dtype)
        size = self.feature.spec["shard_rows"]
        shard_of = index // size
        for shard in np.unique(shard_of):
            here = shard_of == shard
            out[here] = self._shard(int(shard))[index[here] - shard * size]
        return out

    def blocks(self, rows: int = 8192) -> Iterator[tuple[int, np.ndarray]]:
        """`(start, block)` over all rows in order."""
        for start in range(0, len(self), rows):
            yield start, self[start : start + rows]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def __repr__(self) -> str:
        return f"StoredArray({self.feature.folder.name!r}, {self.name!r}, shape={self.shape}, dtype={self.dtype})"


class FeatureStore:
    """A folder of features. `store["emb"]` is an array; `store["loss.nll"]` one array of several.

    Errors: `UsageError` for an unknown feature or array (it names the nearest), `LlmselectError` for an incomplete or
    damaged one.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)

    def names(self) -> list[str]:
        """The features in the store, complete or not."""
        return sorted(p.parent.name for p in self.path.glob("*/spec.json"))

    def open(self, name: str) -> Feature:
        """The feature's folder and spec."""
        check_name(name)
        if name not in self.names():
            known = self.names()
            raise UsageError(f"no feature '{name}' in {self.path}.{nearest(name, known)} There are: {known or 'none'}")
        return Feature(self.path / name, json.loads((self.path / name / "spec.json").read_text()))

    def create(self, name: str, spec: Mapping[str, Any], ids: Sequence[str]) -> Feature:
        """Open feature `name` for writing: new, or the unfinished one of exactly this fingerprint.

        Errors: `LlmselectError` showing the difference when the stored feature was made from anything else.
        """
        from safetensors.numpy import save

        folder = self.path / check_name(name)
        spec = {"shard_rows": SHARD_ROWS, **spec, "n": len(ids)}
        if (folder / "spec.json").exists():
            self._refuse_other(name, self.open(name).spec, spec)
            return self.open(name)
        if not len(ids):
            raise UsageError(f"feature '{name}': there are no rows to extract from")
        raw = ids.raw if isinstance(ids, Ids) else digest_ids(ids)
        atomic.write_bytes(folder / "ids.safetensors", save({"ids": np.ascontiguousarray(raw)}))
        atomic.write_json(folder / "spec.json", spec)
        return Feature(folder, json.loads((folder / "spec.json").read_text()))

    def _refuse_other(self, name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        old, new = (json.loads(json.dumps({**s, "threads": 0}, sort_keys=True)) for s in (old, new))
        lines = [f"  {key}: stored {a} ≠ wanted {b}" for key, a, b in _differences(old, new)]
        if lines:
            raise LlmselectError(
                f"feature '{name}' in {self.path} was made from something else:\n" + "\n".join(lines)
                + f"\nGive the feature another name, or delete {self.path / name} to make it again."
            )  # fmt: skip

    def remove(self, name: str) -> None:
        """Delete a feature."""
        shutil.rmtree(self.open(name).folder)

    def __contains__(self, name: str) -> bool:
        return name.partition(".")[0] in self.names()

    def __getitem__(self, name: str) -> StoredArray:
        feature, _, array = name.partition(".")
        opened = self.open(feature)
        known = list(opened.spec["arrays"])
        if (array or VALUE) not in known:
            choices = [f"{feature}.{one}" for one in known]
            raise UsageError(f"feature '{feature}' has no array '{array or VALUE}'.{nearest(name, choices)} There are: {choices}")
        return StoredArray(opened, array or VALUE)


def _differences(old: Any, new: Any, at: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{at}.{key}" if at else key)
    elif old != new:
        yield at, old, new
