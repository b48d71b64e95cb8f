"""FeatureStore: a folder of named `[n, …]` arrays in shards of a fixed number of rows.

Layout, the same whatever the number of processes that wrote it::

    <store>/<feature>/spec.json            what the feature is: fingerprint, n, shard size, arrays
    <store>/<feature>/ids.safetensors      the row ids, 16 bytes each, in order
    <store>/<feature>/00000.safetensors    rows [0, shard_rows)
    <store>/<feature>/00000.json           its sha256; written after the data, so it also says "complete"

The JSON files hold a checksum of themselves: a changed byte is noticed in every file of a feature.

An array is dense, or CSR as `<array>.indptr`, `.indices`, `.data`; spec.json declares its dtype as `csr:float16` then.
A feature on the target rows is called `<feature>@target`; one array of several is `<feature>.<array>`.
"""

from __future__ import annotations

# safetensors has types in part.
# pyright: reportUnknownVariableType=false
import hashlib
import json
import re
import reprlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llmselect import atomic
from llmselect.arrays import Csr, Ids, SparseArray, StoredArray, digest_ids, not_finite, read_shard
from llmselect.errors import LlmselectError, UsageError, nearest
from llmselect.lazy import Compute, LazyArray
from llmselect.plain import is_mapping

VALUE = "value"  # the array meant by a feature's bare name
SHARD_ROWS, FIT = 1024, "fit.safetensors"
REPAIR = "type: llmselect extract … --repair"
CSR_PARTS = ("indptr", "indices", "data")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+-]{0,99}(@target)?")


def check_name(name: str) -> str:
    """A feature's name is also a folder's: anything that could leave the store is refused."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{reprlib.repr(name)} is not a feature name; allowed: up to 100 letters, digits, '_', '+', '-' "
                         "and a final '@target'")  # fmt: skip
    return name


def check_folder_name(where: str, name: str) -> None:
    """Errors: `UsageError` for a name of a method, target or feature that could leave its folder, or means another row of the
    results."""
    if not name or len(name) > 100 or not all(c.isalnum() or c in "_+-" for c in name) or name in ("base", "full"):
        raise UsageError(f"{where}: not a name; allowed: up to 100 letters, digits, '_', '+', '-', not base or full")


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
        """Store one shard, complete or absent; rows that are not finite are marked beside its checksum."""
        from safetensors.numpy import save

        expected, parts = len(self.rows(shard)), dict[str, Any]()
        for name, array in arrays.items():
            if len(array) != expected:
                raise LlmselectError(f"{self.folder.name}: array '{name}' has {len(array)} rows, shard {shard} {expected}")
            sparse = isinstance(array, Csr)
            parts |= {f"{name}.{part}": getattr(array, part) for part in CSR_PARTS} if sparse else {name: array}
        bad = {name: (self.rows(shard).start + rows).tolist() for name, a in arrays.items() if len(rows := not_finite(a))}
        data = save({name: np.ascontiguousarray(array) for name, array in parts.items()})
        atomic.write_bytes(self.path(shard), data)
        about = {"sha256": hashlib.sha256(data).hexdigest(), **({"non_finite": bad} if bad else {})}
        atomic.write_sealed(self.path(shard).with_suffix(".json"), about)

    def about(self, shard: int) -> dict[str, Any]:
        """What is noted beside a shard: its sha256, and which rows are not finite."""
        return atomic.read_sealed(self.path(shard).with_suffix(".json"), REPAIR)

    @cached_property
    def non_finite(self) -> dict[str, np.ndarray]:
        """Per array the rows that hold a NaN or an infinity, ascending, as marked when they were stored."""
        found: dict[str, list[int]] = {}
        for shard in range(self.shards):
            for name, rows in self.about(shard).get("non_finite", {}).items():
                found.setdefault(name, []).extend(rows)
        return {name: np.array(rows, np.int64) for name, rows in found.items()}

    def verify(self, shard: int) -> None:
        """Compare one shard with its checksum; the error names the file and how to recompute it."""
        path = self.path(shard)
        if not path.with_suffix(".json").exists():
            raise LlmselectError(f"{path} is missing: extraction did not finish; run the same command again")
        if not path.exists() or atomic.sha256_file(path) != self.about(shard)["sha256"]:
            raise LlmselectError(f"{path} is damaged (its checksum differs); {REPAIR}")

    def repair(self) -> list[int]:
        """Drop damaged shards, so that the next extraction computes them again; returns their numbers.

        Damaged ids are dropped as well, and what the extractor learned: the next extraction makes them again.
        """
        damaged: list[int] = []
        try:
            self.ids  # noqa: B018
        except LlmselectError:
            self._ids_file.unlink(missing_ok=True)
        try:
            intact_fit(self.folder, REPAIR)
        except LlmselectError:
            (self.folder / FIT).unlink(missing_ok=True)
            (self.folder / FIT).with_suffix(".json").unlink(missing_ok=True)
        for shard in sorted(set(range(self.shards)) - set(self.missing())):
            try:
                self.verify(shard)
            except LlmselectError:
                self.path(shard).with_suffix(".json").unlink()
                self.path(shard).unlink(missing_ok=True)
                damaged.append(shard)
        return damaged

    @property
    def _ids_file(self) -> Path:
        return self.folder / "ids.safetensors"

    @cached_property
    def ids(self) -> Ids:
        """The ids of the rows, in order. Errors: `LlmselectError` when their file is missing or damaged."""
        known = self.spec.get("ids")  # None: written before there was a checksum
        if not self._ids_file.exists() or (known and atomic.sha256_file(self._ids_file) != known):
            raise LlmselectError(f"{self._ids_file} is missing or damaged; {REPAIR}")
        return Ids(read_shard(self._ids_file)["ids"])


class FeatureStore:
    """A folder of features. `store["emb"]` is an array; `store["loss.nll"]` one array of several.

    Errors: `UsageError` for an unknown feature or array (it names the nearest), `LlmselectError` for an incomplete or
    damaged one.
    """

    def __init__(self, path: Path | str):
        self.path: Path = Path(path)

    @property
    def tokens(self) -> Path:
        """Where the tokens of the rows are kept: no feature has a name that starts with a dot."""
        return self.path / ".tokens"

    def names(self) -> list[str]:
        """The features in the store, complete or not."""
        return sorted(p.parent.name for p in self.path.glob("*/spec.json"))

    def open(self, name: str) -> Feature:
        """The feature's folder and spec."""
        check_name(name)
        if name not in self.names():
            known = self.names()
            raise UsageError(f"no feature '{name}' in {self.path}.{nearest(name, known)} There are: {known or 'none'}")
        again = f"delete {self.path / name} and run again"
        return Feature(self.path / name, atomic.read_sealed(self.path / name / "spec.json", again))

    def create(self, name: str, spec: Mapping[str, Any], ids: Sequence[str]) -> Feature:
        """Open feature `name` for writing: new, or the unfinished one of exactly this fingerprint.

        Errors: `LlmselectError` showing the difference when the stored feature was made from anything else.
        """
        from safetensors.numpy import save

        folder = self.path / check_name(name)
        if not len(ids):
            raise UsageError(f"feature '{name}': there are no rows to extract from")
        raw = ids.raw if isinstance(ids, Ids) else digest_ids(ids)
        data = save({"ids": np.ascontiguousarray(raw)})
        spec = {"shard_rows": SHARD_ROWS, **spec, "n": len(ids), "ids": hashlib.sha256(data).hexdigest()}
        if known := (folder / "spec.json").exists():
            self._refuse_other(name, self.open(name).spec, spec)
        if not (folder / "ids.safetensors").exists():
            atomic.write_bytes(folder / "ids.safetensors", data)
        if not known:
            atomic.write_sealed(folder / "spec.json", spec)
        return self.open(name)

    def lazy(self, name: str, spec: Mapping[str, Any], ids: Sequence[str], compute: Compute, **launch: Any) -> LazyArray:
        """The feature `name` (or one array of several, `name.array`) with rows computed on demand; see `llmselect.lazy`.

        Errors: `LlmselectError` showing the difference when the rows there were made from anything else.
        """
        feature, _, array = name.partition(".")
        opened = self.lazy_feature(feature, spec, ids)
        known = opened.spec["arrays"]
        if (array or VALUE) not in known:
            raise UsageError(f"feature '{feature}' has no array '{array or VALUE}'. There are: {list(known)}")
        return LazyArray(opened.folder, array or VALUE, tuple(known[array or VALUE][1]), opened.ids, compute, **launch)

    def lazy_feature(self, name: str, spec: Mapping[str, Any], ids: Sequence[str]) -> Feature:
        """The folder of a feature that is computed on demand: new, or the one of exactly this fingerprint."""
        return FeatureStore(self.path / "lazy").create(name, spec, ids)

    def _refuse_other(self, name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        same = {"threads": 0, "ids": 0}  # the ids follow from the rows; older features do not note them
        old, new = (json.loads(json.dumps({**s, **same}, sort_keys=True)) for s in (old, new))
        lines = [f"  {key}: stored {a} ≠ wanted {b}" for key, a, b in _differences(old, new)]
        if lines:
            raise LlmselectError(
                f"feature '{name}' in {self.path} was made from something else:\n" + "\n".join(lines)
                + f"\nGive the feature another name, or delete {self.path / name} to make it again."
            )  # fmt: skip

    def fitted(self, name: str) -> dict[str, np.ndarray]:
        """What the extractor of feature `name` learned from the target rows."""
        from safetensors.numpy import load_file

        return load_file(self.fit_file(name))

    def fit_file(self, name: str) -> Path:
        """The file of what an extractor learned, intact. Errors: `LlmselectError` when it is not."""
        folder = self.path / f"{check_name(name)}@target"
        return intact_fit(folder, f"delete {folder} and {self.path / name} and run again")

    def remove(self, name: str) -> None:
        """Delete a feature."""
        shutil.rmtree(self.open(name).folder)

    def _repr_html_(self) -> str:
        from llmselect.notebook import store_html

        return store_html(self)

    def __contains__(self, name: str) -> bool:
        return name.partition(".")[0] in self.names()

    def __getitem__(self, name: str) -> StoredArray | SparseArray:
        feature, _, array = name.partition(".")
        opened = self.open(feature)
        known = list(opened.spec["arrays"])
        if (array or VALUE) not in known:
            choices = [f"{feature}.{one}" for one in known]
            raise UsageError(f"feature '{feature}' has no array '{array or VALUE}'.{nearest(name, choices)} There are: {choices}")
        sparse = opened.spec["arrays"][array or VALUE][0].startswith("csr:")
        return (SparseArray if sparse else StoredArray)(opened, array or VALUE)


def write_fit(folder: Path, data: bytes) -> None:
    """Keep what an extractor learned in the folder of a feature."""
    file = folder / FIT
    file.with_suffix(".json").unlink(missing_ok=True)  # of a file that was lost
    atomic.write_bytes(file, data)
    atomic.write_sealed(file.with_suffix(".json"), {"sha256": hashlib.sha256(data).hexdigest()})


def intact_fit(folder: Path, again: str) -> Path:
    """The file that `write_fit` wrote. Errors: `LlmselectError` saying `again`, what to type, when its bytes are others."""
    file, note = folder / FIT, (folder / FIT).with_suffix(".json")  # no note: written before there was one
    if note.exists() and (not file.exists() or atomic.sha256_file(file) != atomic.read_sealed(note, again).get("sha256")):
        raise LlmselectError(f"{file} is damaged (its checksum differs); {again}")
    return file


def _differences(old: Any, new: Any, at: str = "") -> Iterator[tuple[str, Any, Any]]:
    if is_mapping(old) and is_mapping(new):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{at}.{key}" if at else key)
    elif old != new:
        yield at, old, new
