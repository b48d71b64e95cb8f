"""Arrays made of arrays in a store: some rows, some columns, several side by side. Nothing is copied until it is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from llmselect.arrays import SparseArray
from llmselect.errors import UsageError


class Columns:
    """Dense arrays with the same rows, their columns side by side: `[n, Σ d]`, read when asked for.

    Errors: `UsageError` for sparse arrays and arrays computed on demand.
    """

    shape: tuple[int, int]
    dtype: np.dtype = np.dtype(np.float32)
    ndim: int = 2

    def __init__(self, arrays: Sequence[Any]):
        for one in arrays:
            if isinstance(one, SparseArray) or hasattr(one, "lazy"):
                raise UsageError(f"{one!r} cannot stand beside other features; give dense ones that are computed for all rows")
        self.arrays, self.ids = list(arrays), arrays[0].ids
        self.shape = len(arrays[0]), sum(math.prod(one.shape[1:]) for one in arrays)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def spec(self) -> dict[str, Any]:
        """What the features were made from."""
        return {"columns": [one.spec for one in self.arrays]}

    @cached_property
    def non_finite(self) -> np.ndarray:
        """Rows that are not finite in one of the features."""
        return np.unique(np.concatenate([one.non_finite for one in self.arrays]))

    def __getitem__(self, rows: Any) -> np.ndarray:
        if isinstance(rows, tuple):
            return self[rows[0]][(slice(None), *rows[1:])]
        if isinstance(rows, int | np.integer):
            return self[np.array([rows])][0]
        parts = [np.asarray(one[rows], np.float32) for one in self.arrays]
        return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)


class Subset:
    """Some rows of an array in a store, as an array of their own."""

    array: Any
    rows: np.ndarray
    shape: tuple[int, ...]
    dtype: np.dtype
    ndim: int

    def __init__(self, array: Any, rows: np.ndarray):
        self.array, self.rows = array, rows
        self.shape, self.dtype, self.ndim = (len(rows), *array.shape[1:]), array.dtype, array.ndim
        if isinstance(array, SparseArray):
            self.width = array.width
        if hasattr(array, "lazy"):
            self.lazy = True

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Any) -> Any:
        if isinstance(rows, tuple):
            return self[rows[0]][(slice(None), *rows[1:])]
        return self.array[self.rows[rows]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)


class GroupColumns:
    """Some columns of an array, as an array of their own; whatever else the array has (ids, spec, …) is seen through it."""

    array: Any
    columns: np.ndarray
    shape: tuple[int, ...]
    dtype: np.dtype
    ndim: int

    def __init__(self, array: Any, columns: np.ndarray):
        self.array, self.columns = array, columns
        self.shape, self.dtype, self.ndim = (len(array), len(columns), *array.shape[2:]), array.dtype, array.ndim

    def __getattr__(self, name: str) -> Any:
        if name in ("array", "blocks"):
            raise AttributeError(name)
        return getattr(self.array, name)

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, rows: Any) -> Any:
        if isinstance(rows, tuple):
            return self[rows[0]][(slice(None), *rows[1:])]
        if isinstance(rows, int | np.integer):
            return self.array[rows][self.columns]
        return self.array[rows][:, self.columns]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)
