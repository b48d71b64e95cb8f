"""How selections and feature stores show themselves in a notebook: small tables, every text escaped, nothing loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from llmselect.errors import UsageError
from llmselect.plain import is_mapping

if TYPE_CHECKING:
    from llmselect.selection import Selection
    from llmselect.store import FeatureStore

ROWS, COLUMNS, CHARACTERS = 8, 6, 80
TEXT = 240  # characters of a prompt or an answer


@dataclass(frozen=True)
class Table:
    """A small table for a notebook: `Table({"source": names, "rows": counts})`. Every text is escaped, long ones are cut.

    Errors: `UsageError` for columns of unequal length.
    """

    columns: Mapping[str, Sequence[Any]]
    characters: int = CHARACTERS

    def __post_init__(self) -> None:
        lengths = {name: len(values) for name, values in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise UsageError(f"the columns of a table have one length; given: {lengths}")

    def _repr_html_(self) -> str:
        lines = list(zip(*self.columns.values(), strict=True))
        return f"<div>{_table(list(self.columns), lines, self.characters)}</div>"

    def __repr__(self) -> str:
        lines = [[" ".join(plain_text(one).split()) for one in line] for line in zip(*self.columns.values(), strict=True)]
        widths = [max(len(line[i]) for line in [list(self.columns), *lines]) for i in range(len(self.columns))]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in [list(self.columns), *lines])


@dataclass(frozen=True)
class Heat:
    """Texts whose pieces are marked by scores in [0, 1]: for each text its `[piece, score]`, the score None for the rest."""

    texts: Sequence[Sequence[Sequence[Any]]]

    def _repr_html_(self) -> str:
        lines = ("".join(map(_marked, one)) for one in self.texts)
        return "<div>" + "".join(f"<p style='white-space:pre-wrap'>{line}</p>" for line in lines) + "</div>"

    def __repr__(self) -> str:
        def marked(text: str, score: float | None) -> str:
            return text if score is None else f"[{text}]{score:.2f}"

        return "\n".join("".join(marked(*piece) for piece in one) for one in self.texts)


def _marked(piece: Sequence[Any]) -> str:
    text, score = piece
    if score is None:
        return escape(text)
    shade = min(1.0, max(0.0, float(score))) * 0.7
    return f"<mark style='background:rgba(255,150,0,{shade:.2f});color:inherit' title='{float(score):.3f}'>{escape(text)}</mark>"


def rows_table(selection: Selection, pool: Any, rows: int = 5, start: int = 0) -> Table:
    """The texts of the rows at ranks `start` to `start + rows` of a selection, with scores and evidence of one number each.

    Errors: `LlmselectError` when `pool` is not the pool selected from.
    """
    part = slice(start, start + rows)
    chosen: Any = selection.to_dataset(pool)
    chosen = chosen.select(range(*part.indices(len(selection))))
    columns: dict[str, Sequence[Any]] = {"rank": list(range(start + 1, start + 1 + len(chosen)))}
    if "source" in chosen.column_names:
        columns["source"] = list(chosen["source"])
    turns = list(chosen["messages"])
    columns["prompt"] = [" / ".join(one["content"] for one in chat[:-1]) for chat in turns]
    columns["answer"] = [chat[-1]["content"] for chat in turns]
    return Table(columns | _why(selection, part), TEXT)


def _why(selection: Selection, part: slice) -> dict[str, list[Any]]:
    """Score, weight and the evidence of one number a row, of the ranks in `part`."""
    columns: dict[str, list[Any]] = {}
    if selection.scores is not None:
        columns["score"] = list(selection.scores[selection.indices[part]])
    if selection.weights is not None:
        columns["weight"] = selection.weights[part].tolist()
    plain = [name for name, values in selection.evidence.items() if values.ndim == 1 and name not in columns]
    return columns | {name: list(selection.evidence[name][part]) for name in plain[:COLUMNS]}


def selection_html(selection: Selection) -> str:
    """What made a selection, and its first rows with their scores and evidence."""
    told = selection.provenance
    facts: dict[str, Any] = {"rows": f"{len(selection):,} of {selection.n:,}", "selector": told.get("selector", "by hand"),
             **{key: told[key] for key in ("method", "seed") if key in told}}  # fmt: skip
    if is_mapping(budget := told.get("budget")):
        facts["budget"] = ", ".join(_amount(kind, value) for kind, value in budget.items())
    first, columns = slice(0, ROWS), dict[str, list[Any]]()
    columns["rank"] = list(range(1, len(selection.indices[first]) + 1))
    columns["row"] = selection.indices[first].tolist()
    if selection.ids is not None:
        columns["id"] = list(selection.ids[first])
    columns |= _why(selection, first)
    lines = list(zip(*columns.values(), strict=True))
    more = f"<p>… and {len(selection) - ROWS:,} more</p>" if len(selection) > ROWS else ""
    return f"<div>{_facts(facts)}{_table(list(columns), lines)}{more}</div>"


def _amount(kind: str, value: Any) -> str:
    return f"{value:.4g} of the rows" if kind == "fraction" else f"{value:,} {kind}"


def store_html(store: FeatureStore) -> str:
    """The features of a store: extractor, rows, arrays, and whether they are complete."""
    lines = list[tuple[str, ...]]()
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


def _table(head: Sequence[str], lines: Sequence[Sequence[Any]], characters: int = CHARACTERS) -> str:
    # Notebooks align cells to the right, which is for numbers; a heading stands as its column does.
    def left(value: Any) -> str:
        return "" if isinstance(value, int | float | np.number) else " style='text-align:left'"

    def row(line: Sequence[Any]) -> str:
        return "<tr>" + "".join(f"<td{left(one)}>{_text(one, characters)}</td>" for one in line) + "</tr>"

    columns = lines[0] if lines else head
    top = "".join(f"<th{left(one)}>{_text(name)}</th>" for name, one in zip(head, columns, strict=True))
    return f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(map(row, lines))}</tbody></table>"


def _text(value: Any, characters: int = CHARACTERS) -> str:
    return escape(plain_text(value, characters))


def plain_text(value: Any, characters: int = CHARACTERS) -> str:
    """A value in few words: four digits of a number, the first numbers of an array, the beginning of a text."""
    if isinstance(value, float | np.floating):
        text = f"{value:.4g}"
    elif isinstance(value, np.ndarray):
        text = ", ".join(f"{one:.4g}" for one in value.ravel()[:COLUMNS].tolist())
    else:
        text = str(value)
    return text if len(text) <= characters else text[: characters - 1] + "…"
