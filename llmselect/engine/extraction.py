"""From extractors and rows to features in a store: fingerprints, the fit on the target, the passes."""

from __future__ import annotations

# datasets and accelerate have no types, safetensors has them in part.
# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false
import hashlib
import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from llmselect.arrays import digest_ids
from llmselect.engine.backbone import Backbone
from llmselect.engine.passes import Pass, default_batch_tokens, fit
from llmselect.engine.selfcheck import warn_of_dependence
from llmselect.errors import LlmselectError, UsageError
from llmselect.store import FIT, SHARD_ROWS, FeatureStore, write_fit

if TYPE_CHECKING:
    from datasets import Dataset

    from llmselect.engine.extractor import Extractor

log = logging.getLogger("llmselect")
_Shared = tuple[str, str | None, str, int | None, str]  # model, adapter, dtype, length; the name of one that runs alone


def extract(pool: Dataset, store: FeatureStore, extractors: Mapping[str, Extractor], *, target: Dataset | None = None,
            batch_tokens: int | None = None, shard_rows: int = SHARD_ROWS) -> FeatureStore:  # fmt: skip
    """Compute features of every pool row, and of every target row as `<name>@target`.

    Extractors with the same model, adapter, dtype and length share one forward pass. What is already complete is not
    computed again; what was begun continues, on any number of processes (`accelerate launch`).

    Args:
        pool: rows with `id` and `messages`.
        store: where the arrays go.
        extractors: feature name → extractor.
        target: rows with `group`; needed by extractors that fit (TRIM).
        batch_tokens: padded tokens per batch.
        shard_rows: rows per shard. A killed process loses the one at work, and the one being written.
    """
    from accelerate import PartialState

    process: Any = PartialState(cpu=not torch.cuda.is_available())
    for name, extractor in extractors.items():
        if extractor.fits and target is None:
            raise UsageError(f"feature '{name}' ({extractor.name}) learns from the target rows: give target=")
        if not extractor.model:
            raise UsageError(f"feature '{name}' ({extractor.name}) needs a model: give model=, a folder or a Hub id")
    for key, members in _by_pass(extractors).items():
        backbone = Backbone(*key[:4], tokens=store.tokens)
        run = Pass(backbone, members, {}, {}, groups_of(target), batch_tokens or default_batch_tokens())
        for data, suffix in ((target, "@target"), (pool, "")):
            if data is not None:
                _pass(run, data, target, store, suffix, shard_rows, process, pool)
    return store


def _by_pass(extractors: Mapping[str, Extractor]) -> dict[_Shared, dict[str, Extractor]]:
    passes: dict[_Shared, dict[str, Extractor]] = {}
    for name, e in extractors.items():
        passes.setdefault((e.model, e.adapter, e.dtype, e.max_length, name if e.alone else ""), {})[name] = e
    return passes


def groups_of(target: Dataset | None) -> list[str]:
    """The target groups, in the order of their first rows."""
    named: list[str] = [] if target is None else [*target["group"]]
    return list(dict.fromkeys(named))


def content_digest(data: Dataset) -> str:
    """SHA-256 over the row ids (content hashes) in order, and the groups of a target."""
    total = hashlib.sha256()
    # The messages stay on disk: as Python objects a block of them would be most of the memory of a run.
    narrow = data.select_columns([name for name in ("id", "group") if name in data.column_names])
    for start in range(0, len(narrow), 8192):
        part: dict[str, list[str]] = narrow[start : start + 8192]
        total.update(digest_ids(part["id"]).tobytes())
        total.update(json.dumps(part.get("group", [])).encode())
    return total.hexdigest()


def _pass(run: Pass, data: Dataset, target: Dataset | None, store: FeatureStore, suffix: str, shard_rows: int,
          process: Any, pool: Dataset) -> None:  # fmt: skip
    """Create (rank 0) or open the features of one side, fit if needed, fill the missing shards."""
    specs = {name: spec_of(run, e, data, target, shard_rows) for name, e in run.extractors.items()}
    for name, extractor in run.extractors.items():
        if extractor.sample_rows:
            specs[name]["sample"] = content_digest(pool)
    if process.is_main_process:
        rows: Any = data
        for name, spec in specs.items():
            store.create(name + suffix, spec, rows["id"])
    process.wait_for_everyone()
    run.features, run.side = {name: store.open(name + suffix) for name in specs}, "target" if suffix else "pool"
    if run.backbone.device.type == "cpu":
        # Sums are split over threads, so another number of threads gives other last bits: a resumed run takes that of
        # the run that began, whatever the number of processes.
        torch.set_num_threads(min(feature.spec["threads"] for feature in run.features.values()))
    incomplete = [name for name in specs if run.features[name].missing()]
    fitting = [name for name, e in run.extractors.items() if e.fits and name not in run.states]
    if any(name in incomplete or not (store.path / f"{name}@target" / FIT).exists() for name in fitting):
        _fit(run, store, target, process, pool)
    if suffix and incomplete and process.is_main_process and run.backbone.dtype != torch.float32:
        warn_of_dependence(run, data)
    label = "target rows" if suffix else f"{', '.join(run.extractors)}: pool rows"
    run.run(data, label, process.process_index, process.num_processes, process.wait_for_everyone)
    process.wait_for_everyone()
    for name, feature in run.features.items():
        if missing := feature.missing():
            raise LlmselectError(f"feature '{name}': shards {missing[:5]} were not written; run the same command again")


def spec_of(run: Pass, extractor: Extractor, data: Dataset, target: Dataset | None, shard_rows: int) -> dict[str, Any]:
    """The fingerprint of a feature: what its numbers depend on."""
    arrays = {key: [dtype, list(tail)] for key, (dtype, tail) in extractor.arrays(run.backbone, run.groups).items()}
    spec = {
        "extractor": extractor.name,
        "version": extractor.version,
        "settings": extractor.settings(),
        "arrays": arrays,
        "shard_rows": shard_rows,
        "rows": content_digest(data),
        "threads": torch.get_num_threads(),
    }
    if extractor.views():
        spec |= {"tokens": run.backbone.encoder.fingerprint}
    if extractor.layers() or extractor.alone:
        spec |= {"weights": run.backbone.digest(), "dtype": str(run.backbone.dtype).removeprefix("torch.")}
    if extractor.fits and target is not None:
        spec |= {"target": content_digest(target), "groups": run.groups}
    return spec


def _fit(run: Pass, store: FeatureStore, target: Dataset | None, process: Any, pool: Dataset) -> None:
    """Fit on rank 0 and hand the state to all through the store, so that a resumed run reads the same numbers."""
    from safetensors.torch import load_file, save

    fitting = [name for name, e in run.extractors.items() if e.fits]
    folders = {name: store.path / f"{name}@target" for name in fitting}
    if process.is_main_process and not all((folder / FIT).exists() for folder in folders.values()):
        assert target is not None
        fit(run, target, pool)
        for name, folder in folders.items():
            write_fit(folder, save({k: v.cpu().contiguous() for k, v in run.states[name].items()}))
    process.wait_for_everyone()
    device = run.backbone.device
    run.states = {name: {k: v.to(device) for k, v in load_file(store.fit_file(name)).items()} for name in fitting}
