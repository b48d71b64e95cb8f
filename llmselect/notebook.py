"""How selections and feature stores show themselves in a notebook: small tables, every text escaped, nothing loaded."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from llmselect.selection import Selection
    from llmselect.store import FeatureStore

ROWS, COLUMNS, CHARACTERS = 8, 6, 80


def selection_html(selection: Selection) -> str:
    """What made a selection, and its first rows with their scores and evidence."""
    told = selection.provenance
    facts = {"rows": f"{len(selection):,} of {selection.n:,}", "selector": told.get("selector", "by hand"),
             **{key: told[key] for key in ("method", "seed", "budget") if key in told}}  # fmt: skip
    first, columns = slice(0, ROWS), {}
    columns["rank"] = list(range(1, len(selection.indices[first]) + 1))
    columns["row"] = selection.indices[first].tolist()
    if selection.ids is not None:
        columns["id"] = list(selection.ids[first])
    if selection.scores is not None:
        columns["score"] = list(selection.scores[selection.indices[first]])
    if selection.weights is not None:
        columns["weight"] = selection.weights[first].tolist()
    plain = [name for name, values in selection.evidence.items() if values.ndim == 1]
    columns |= {name: list(selection.evidence[name][first]) for name in plain[:COLUMNS]}
    lines = list(zip(*columns.values(), strict=True))
    more = f"<p>… and {len(selection) - ROWS:,} more</p>" if len(selection) > ROWS else ""
    return f"<div>{_facts(facts)}{_table(list(columns), lines)}{more}</div>"


def store_html(store: FeatureStore) -> str:
    """The features of a store: extractor, rows, arrays, and whether they are complete."""
    lines = []
    for name in store.names():
        feature = store.open(name)
        arrays = ", ".join(f"{one} {dtype} {[feature.n, *shape]}" for one, (dtype, shape) in feature.spec["arrays"].items())
        missing = len(feature.missing())
        state = "complete" if not missing else f"{missing} of {feature.shards} shards missing"
        lines.append((name, feature.spec.get("extractor", ""), f"{feature.n:,}", arrays, state))
    head = ["feature", "extractor", "rows", "arrays", "state"]
    return f"<div>{_facts({'store': store.path, 'features': len(lines)})}{_table(head, lines)}</div>"


def _facts(facts: dict[str, Any]) -> str:
    return "<p>" + ", ".join(f"{escape(name)}: <b>{_text(value)}</b>" for name, value in facts.items()) + "</p>"


def _table(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    cells = lambda tag, values: "<tr>" + "".join(f"<{tag}>{_text(one)}</{tag}>" for one in values) + "</tr>"  # noqa: E731
    body = "".join(cells("td", line) for line in lines)
    return f"<table><thead>{cells('th', head)}</thead><tbody>{body}</tbody></table>"


def _text(value: Any) -> str:
    if isinstance(value, float | np.floating):
        text = f"{float(value):.4g}"
    elif isinstance(value, np.ndarray):
        text = ", ".join(f"{one:.4g}" for one in value.ravel()[:COLUMNS].tolist())
    else:
        text = str(value)
    return escape(text if len(text) <= CHARACTERS else text[: CHARACTERS - 1] + "…")
