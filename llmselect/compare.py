"""Selections and results of several runs side by side: overlap, source mix, lengths, scores."""

from __future__ import annotations

# scipy and datasets have no types.
# pyright: reportMissingTypeStubs=false
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmselect import account, atomic
from llmselect.errors import UsageError
from llmselect.selection import Selection
from llmselect.store import FeatureStore


def compare(folders: list[Path]) -> dict[str, Any]:
    """What each selection of the runs holds and how far they overlap.

    Returns:
        `selections`: per selection its rows, supervised tokens (total and quartiles per row), mean score, source mix,
        the rank correlation of its scores with length, and where the run has an `ngram` feature `kl_reduction`: by how many
        nats its n-grams are nearer to the target's than the pool's are (DSIR, arXiv 2302.03169);
        `overlap`: Jaccard overlap by row id, as a matrix.

    Errors: `UsageError` for a folder that is no run.
    """
    found: dict[str, tuple[Selection, dict[str, Any]]] = {}
    for folder in folders:
        files = sorted(Path(folder).glob("selections/*/seed-*/selection.json"))
        if not files:
            raise UsageError(f"{folder}: no selections there; give the folder of a run that has selected (runs/NAME)")
        store = FeatureStore(Path(folder) / "features")
        sources = _sources(Path(folder))
        made = [Selection.load(file.parent) for file in files]
        for file, selection, nearer in zip(files, made, kl_reductions(store, made), strict=True):
            name = f"{Path(folder).name}/{file.parent.parent.name}/{file.parent.name}"
            found[name] = selection, {**_describe(selection, store, sources), "kl_reduction": nearer}
    names = list(found)
    ids = {name: set(found[name][0].ids or ()) for name in names}
    overlap = [[_jaccard(ids[a], ids[b]) for b in names] for a in names]
    tables = {str(f): Path(f) / "results.json" for f in folders}
    results = {
        name: atomic.read_json(file, f"type: llmselect evaluate {name}/config.yaml")["rows"]
        for name, file in tables.items()
        if file.exists()
    }
    return {"selections": {n: about for n, (_, about) in found.items()}, "names": names, "overlap": overlap, "results": results}


def _sources(folder: Path) -> np.ndarray:
    from datasets import Dataset

    data: Any = Dataset.from_file(str(account.intact(folder, "pool/pool.arrow")))
    return np.asarray(data["source"])[np.load(account.intact(folder, "pool/usable.npy"), allow_pickle=False)]


def _describe(selection: Selection, store: FeatureStore, sources: np.ndarray) -> dict[str, Any]:
    cost = np.asarray(store["tokens.supervised"])
    tokens = cost[selection.indices]
    given = selection.scores
    scores: np.ndarray | None = None if given is None else np.asarray(given, np.float64).reshape(selection.n, -1).max(1)
    known = None if scores is None else np.isfinite(scores)  # a method may leave rows without a score
    mix: Counter[str] = Counter(sources[selection.indices].tolist())
    return {
        "rows": len(selection),
        "tokens": int(tokens.sum()),
        "tokens_per_row": [float(q) for q in np.quantile(tokens, [0.25, 0.5, 0.75])],
        "mean_score": None if scores is None else float(np.nanmean(scores[selection.indices])),
        "score_length_correlation": None if scores is None else spearman(scores[known], cost[known]),
        "sources": dict(mix.most_common()),
    }


def kl_reductions(store: FeatureStore, selections: Sequence[Selection]) -> list[float | None]:
    """KL(target ‖ pool) - KL(target ‖ selection) over n-grams of each selection; None without such a feature in the store."""
    from llmselect.kernels import ngrams

    for name in sorted(store.names()):
        if f"{name}@target" in store.names() and store.open(name).spec.get("extractor") == "ngram":
            return [*ngrams.kl_reductions(store[name], [one.indices for one in selections], store[f"{name}@target"][:])]
    return [None] * len(selections)


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's rank correlation; None when one side is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks with ties averaged."""
    import scipy.stats

    stats: Any = scipy.stats
    return np.asarray(stats.rankdata(values))


def _jaccard(a: set[str], b: set[str]) -> float:
    return len(a & b) / max(1, len(a | b))
