"""Where the rows and the model of a recipe come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Model:
    """The causal LM that scores and is fine-tuned."""

    path: str = field(metadata={"help": "folder or Hub id"})
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    max_length: int | None = field(default=None, metadata={"help": "tokens per row; null: the model's, at most 2048"})


@dataclass(frozen=True)
class PoolSource:
    """Where the pool comes from and which of its rows may be used."""

    path: str = field(metadata={"help": "file, folder or Hub id"})
    columns: dict[str, str] | None = field(default=None, metadata={"help": "column map, e.g. {prompt: question}"})
    split: str = "train"
    limit: int | None = field(default=None, metadata={"help": "read only the first rows"})
    max_invalid: float = field(default=0.001, metadata={"help": "share of bad rows that stops the run"})
    max_row_bytes: int = 1_000_000
    decontaminate: bool = field(default=True, metadata={"help": "drop rows that share text with the test sets"})
    overlong: Literal["reject", "truncate"] = field(
        default="reject", metadata={"help": "rows whose responses do not fit into max_length"}
    )


@dataclass(frozen=True)
class TargetSource:
    """A task: a few examples to select for, and held-out rows to measure on."""

    dev: str
    test: str | None = None
    columns: dict[str, str] | None = None
    dev_limit: int | None = None
    test_limit: int | None = None
