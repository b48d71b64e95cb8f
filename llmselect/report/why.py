"""Why a row was picked, as plain entries for the page: token heat, latents, the nearest target example, groups, numbers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from llmselect.errors import UsageError
from llmselect.heat import TOPS, parts
from llmselect.recipe import features_in
from llmselect.report.views import View
from llmselect.stages import Run

log = logging.getLogger("llmselect")
MOST = 8  # numbers shown of an array that nothing is known about
_TARGET_ROWS = ("nearest", "query")


class Explainer:
    """Turns the evidence of selections into entries. Texts of tokens need the run's tokenizer."""

    def __init__(self, run: Run):
        self.run = run
        self.named: list[str] = [*run.target["group"]]
        self.groups = list(dict.fromkeys(self.named))
        self._encoders: dict[tuple[str, Any], Any] = {}

    def _encoder(self, view: View) -> Any:
        """What made the tokens of a method's feature (no weights); None when the model is no longer where it was."""
        from llmselect.engine.backbone import Backbone

        model, own = self.run.recipe.model, self.run.recipe.features.get(self._feature(view) or "", {})
        key = (own.get("model", model.path), own.get("max_length", model.max_length))
        if key not in self._encoders:
            try:
                self._encoders[key] = Backbone(key[0], max_length=key[1]).encoder
            except UsageError as error:  # the model may have moved: a report must not need it
                log.info("tokens are shown as numbers: %s", error)
                self._encoders[key] = None
        return self._encoders[key]

    def of_selected(self, view: View, ranks: np.ndarray, messages: Sequence[Any]) -> list[list[dict[str, Any]]]:
        """Entries of the rows at `ranks` of a selection, whose chats are `messages`."""
        evidence = {name: values[ranks] for name, values in view.selection.evidence.items()}
        tops = {name: evidence.pop(name) for name in TOPS if name in evidence}
        groups, quotas = self._groups(view, evidence, len(ranks)), "quota" in evidence
        evidence = {name: values for name, values in evidence.items() if name not in ("group", "quota")}
        heat = self._heat(view, tops, messages, groups)
        rows = [{name: values[i] for name, values in evidence.items()} for i in range(len(ranks))]
        return [[*self._entries(one, groups[i], quotas), *heat[i]] for i, one in enumerate(rows)]

    def of_rejects(self, view: View, rows: np.ndarray, messages: Sequence[Any]) -> list[list[dict[str, Any]]]:
        """Entries of rows that were not selected: the token heat, where the feature still tells it."""
        feature = self._feature(view)
        none: list[list[dict[str, Any]]] = [[] for _ in rows]
        if feature is None or not len(rows) or feature not in self.run.store.names():
            return none
        arrays = self.run.store.open(feature).spec["arrays"]
        if not all(name in arrays for name in TOPS):
            return none
        tops = {name: self.run.store[f"{feature}.{name}"][rows] for name in TOPS}
        return self._heat(view, tops, messages, [None] * len(rows))

    def _feature(self, view: View) -> str | None:
        reads = view.selection.provenance.get("key", {}).get("reads", {})
        return features_in(reads["x"])[0].partition(".")[0] if "x" in reads else None

    def _columns(self, view: View) -> list[str]:
        """What the columns of a method's feature stand for: the groups it was fitted on."""
        feature = self._feature(view)
        known = self.run.store.open(feature).spec.get("groups") if feature in self.run.store.names() else None
        reads = view.selection.provenance.get("key", {}).get("reads", {})
        # Columns of several features side by side are no groups.
        return [] if len(features_in(reads.get("x", ""))) > 1 else list(known or self.groups)

    def _groups(self, view: View, evidence: dict[str, np.ndarray], count: int) -> list[str | None]:
        """The name of the target group, or source, that picked each row."""
        group = evidence.get("quota", evidence.get("group"))
        if group is None:
            return [None] * count
        if group.dtype.kind not in "iu":
            return [str(one) for one in group]
        # `topk` counts columns of a feature; selectors that read targets count the sorted names of their groups.
        names = self._columns(view) if view.selection.provenance.get("selector") == "topk" else sorted(self.groups)
        return [names[int(g)] if 0 <= int(g) < len(names) else str(g) for g in group]

    def _entries(self, evidence: dict[str, Any], group: str | None, quotas: bool) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = [] if group is None else [{"kind": "text", "name": "group", "value": group}]
        if "latent" in evidence and np.ndim(evidence["latent"]) == 1:
            found.append(_latents(evidence))
            evidence = {k: v for k, v in evidence.items() if k not in ("latent", "value", "target_value")}
        for name, value in evidence.items():
            if name in _TARGET_ROWS and np.ndim(value) == 0:
                row = self._target_row(int(value), group if quotas else None)
                found.append({"kind": "target", "name": name, "row": row})
            else:
                found.append(_plain(name, value))
        return found

    def _target_row(self, row: int, quota: str | None) -> int:
        """A target row's number among all; a quota's are counted from the first of its group."""
        rows = self._rows_of_group.get(quota, np.zeros(0, np.int64)) if quota else np.arange(len(self.run.target))
        return int(rows[row]) if 0 <= row < len(rows) else -1

    @cached_property
    def _rows_of_group(self) -> dict[str, np.ndarray]:
        named = np.asarray(self.named)
        return {group: np.flatnonzero(named == group) for group in self.groups}

    def _heat(self, view: View, tops: dict[str, np.ndarray], messages: Sequence[Any],
              groups: Sequence[str | None]) -> list[list[dict[str, Any]]]:  # fmt: skip
        """Token heat of each row, for the group that picked it, else the group that scores it highest."""
        if not all(name in tops for name in TOPS):
            return [[] for _ in messages]
        names = self._columns(view)
        encoder = self._encoder(view)
        rows = None if encoder is None else encoder.encode(list(messages))
        found = list[list[dict[str, Any]]]()
        for i in range(len(messages)):
            at = names.index(group) if (group := groups[i]) in names and group else int(tops["top_score"][i].max(1).argmax())
            top = {name: values[i][min(at, len(values[i]) - 1)] for name, values in tops.items()}
            entry = {"kind": "heat", "name": "tokens", "group": names[at] if at < len(names) else str(at)}
            found.append([{**entry, "parts": parts(top, None if rows is None else rows[i].ids, encoder)}])
        return found


def _latents(evidence: dict[str, Any]) -> dict[str, Any]:
    """Latents with the row's value and the target's."""
    value, theirs = evidence.get("value"), evidence.get("target_value")
    rows = list[list[int | float | None]]()
    for i, latent in enumerate(evidence["latent"]):
        if latent >= 0:
            rows.append([int(latent), *(None if one is None else round(float(one[i]), 4) for one in (value, theirs))])
    return {"kind": "latents", "name": "latents", "rows": rows}


def _plain(name: str, value: Any) -> dict[str, Any]:
    flat = np.ravel(np.asarray(value))
    if flat.dtype.kind in "iufb":
        numbers = [number(one) for one in flat[:MOST]]
        if np.ndim(value) == 0:
            return {"kind": "number", "name": name, "value": numbers[0]}
        return {"kind": "list", "name": name, "value": numbers, "more": len(flat) - len(numbers)}
    return {"kind": "text", "name": name, "value": ", ".join(str(one) for one in flat[:MOST])}


def number(value: Any) -> int | float | None:
    """A NumPy number as JSON has it: whole, or six digits; None when it is not finite."""
    if np.asarray(value).dtype.kind in "iub":
        return int(value)
    return float(f"{float(value):.6g}") if np.isfinite(value) else None
