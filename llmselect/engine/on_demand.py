"""A feature whose rows are computed when a selector asks for them: the engine behind `llmselect.lazy`."""

from __future__ import annotations

# datasets and accelerate have no types, safetensors has them in part.
# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false
import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmselect.engine.backbone import Backbone
from llmselect.engine.extraction import content_digest, groups_of, spec_of
from llmselect.engine.passes import Pass, default_batch_tokens, fit
from llmselect.errors import UsageError
from llmselect.lazy import PART, LazyArray
from llmselect.store import FIT, intact_fit, write_fit

log = logging.getLogger("llmselect")

if TYPE_CHECKING:
    from datasets import Dataset

    from llmselect.engine.extractor import Extractor
    from llmselect.store import FeatureStore


def lazy(pool: Dataset, store: FeatureStore, name: str, extractor: Extractor, *, target: Dataset | None = None,
         batch_tokens: int | None = None, part: int = PART) -> LazyArray:  # fmt: skip
    """The feature `name` (or `name.array`) of the pool, computed by `extractor` for the rows that are read.

    Among several processes all must read the same rows in the same order; each computes its share of the parts. What was
    computed stays in `<store>/lazy/<name>`, and is refused when it was made from anything else.

    Args:
        part: rows per file, the most that a killed process loses.

    Errors: `UsageError` without a model, or without a target where the extractor learns from one; those of the store.
    """
    from accelerate import PartialState

    process: Any = PartialState(cpu=not torch.cuda.is_available())
    if not extractor.model or (extractor.fits and target is None):
        missing = "target=" if extractor.model else "a model: give model="
        raise UsageError(f"feature '{name}' ({extractor.name}) needs {missing}")
    feature = name.partition(".")[0]
    backbone = Backbone(extractor.model, extractor.adapter, extractor.dtype, extractor.max_length, tokens=store.tokens)
    run = Pass(backbone, {feature: extractor}, {}, {}, groups_of(target), batch_tokens or default_batch_tokens())
    spec = {**spec_of(run, extractor, pool, target, part), "batch_tokens": run.batch_tokens}
    if extractor.sample_rows:
        spec["sample"] = content_digest(pool)
    folder = store.path / "lazy" / feature

    def compute(rows: np.ndarray) -> dict[str, np.ndarray]:
        if extractor.fits and feature not in run.states:
            _fit(run, feature, folder, target, pool)
        log.info("%s: %d more rows of %d", feature, len(rows), len(pool))
        some: dict[str, Any] = pool[rows]
        return run.compute(some["messages"], some["id"], [feature])[feature]

    untyped: Any = pool
    launch: dict[str, Any] = {"part": part, "rank": process.process_index, "world": process.num_processes}
    if process.is_main_process:
        store.lazy_feature(feature, spec, untyped["id"])
        if extractor.fits:
            _fit(run, feature, folder, target, pool)
    process.wait_for_everyone()
    return store.lazy(name, spec, untyped["id"], compute, barrier=process.wait_for_everyone, **launch)


def _fit(run: Pass, feature: str, folder: Any, target: Any, pool: Dataset) -> None:
    """What the extractor learns, from the file if it has been learned."""
    from safetensors.torch import load_file, save

    file = folder / FIT
    if not file.exists():
        fit(run, target, pool)
        write_fit(folder, save({k: v.cpu().contiguous() for k, v in run.states[feature].items()}))
    intact_fit(folder, f"delete {file} and run again")
    run.states = {feature: {k: v.to(run.backbone.device) for k, v in load_file(file).items()}}
