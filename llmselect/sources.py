"""Where the rows and the model of a recipe come from."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from llmselect.readers import means_file


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
    subset: str | None = field(default=None, metadata={"help": "configuration of a Hub dataset, e.g. main"})
    limit: int | None = field(default=None, metadata={"help": "read only the first rows"})
    max_invalid: float = field(default=0.001, metadata={"help": "share of bad rows that stops the run"})
    max_row_bytes: int = 1_000_000
    decontaminate: bool = field(default=True, metadata={"help": "drop rows that share text with the test sets"})
    overlong: Literal["reject", "truncate"] = field(
        default="reject", metadata={"help": "rows whose responses do not fit into max_length"}
    )
    memory: str | None = field(default=None, metadata={"help": "an earlier run's selection, whose rows join the pool"})


@dataclass(frozen=True)
class TargetSource:
    """A task: a few examples to select for, and held-out rows to measure on."""

    dev: str
    test: str | None = None
    columns: dict[str, str] | None = None
    subset: str | None = field(default=None, metadata={"help": "configuration of Hub datasets, e.g. main"})
    dev_split: str = field(default="train", metadata={"help": "of a Hub dataset"})
    test_split: str = field(default="test", metadata={"help": "of a Hub dataset"})
    dev_limit: int | None = None
    test_limit: int | None = None


_NEWER = (("subset", None), ("memory", None))


def identity(source: PoolSource | TargetSource) -> dict[str, Any]:
    """The settings that decide which rows a source gives.

    `subset`, `memory` and the splits of targets are left out where they are not read, so that runs made before there were
    any count.
    """
    places = [source.path] if isinstance(source, PoolSource) else [source.dev, *([source.test] if source.test else [])]
    local = all(Path(place).expanduser().exists() or means_file(place) for place in places)
    unread: set[str] = {"dev_split", "test_split", "subset"} if local else set()
    return {key: value for key, value in asdict(source).items() if key not in unread and (key, value) not in _NEWER}
