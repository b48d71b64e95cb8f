"""The outputs of a sequence-classification model for a row: a quality score, a reward, or tags.

Paper: none; the quality scorers of Deita (arXiv 2312.15685), the tags of InsTag (arXiv 2308.07074) and reward models (arXiv
    2409.11378) are such models.
Objective: logits z [L] of the model for the row's text; `value` = z, softmax(z) or sigmoid(z), all L or the one of `label`.
Inputs: a Hugging Face model with a trained sequence-classification head and a tokenizer, a folder or a Hub id; the messages
    of a row.
Cost: one forward of that model over the pool; 4·L bytes a row.
Deviations: a model with a chat template gets the row as a chat; one without, the texts of the messages with an empty line
    between them. Rows of more tokens than the model reads are cut at their end.
Defaults: all labels, logits.
Use: a reward model, a quality scorer or a tagger for this kind of rows exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llmselect.engine.extractor import Arrays, Extractor, State
from llmselect.errors import UsageError, nearest
from llmselect.registry import extractors

if TYPE_CHECKING:
    from llmselect.engine.backbone import Backbone


@extractors.register("classifier")
@dataclass(frozen=True, kw_only=True)
class Classifier(Extractor):
    """Array `value` float32: `[n]` of a model with one output or with `label`, else `[n, L]`."""

    classifier: str = field(metadata={"help": "the classification model: a folder or a Hub id"})
    label: str | None = field(default=None, metadata={"help": "name or number of the output to keep; null: all"})
    scale: Literal["logit", "softmax", "sigmoid"] = field(default="logit", metadata={"help": "what is stored of the logits"})
    tokens: int | None = field(default=None, metadata={"help": "tokens of a row that it reads; null: its limit"})

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise UsageError(f"tokens: {self.tokens} must be at least 1")

    def views(self) -> tuple[str, ...]:
        return ()

    def layers(self, state: State = MappingProxyType({})) -> tuple[int, ...]:
        return ()

    def settings(self) -> dict[str, Any]:
        from llmselect.engine.backbone import weights_digest

        config, tokenizer, _ = _described(self.classifier)
        told = {**super().settings(), "classifier": weights_digest(self.classifier, config), "dtype": self.dtype}
        return {**told, "template": tokenizer.chat_template, "vocabulary": len(tokenizer)}

    def arrays(self, backbone: Backbone, groups: Sequence[str]) -> Arrays:
        self._column()
        labels = _described(self.classifier)[0].num_labels
        return {"value": ("float32", () if labels == 1 or self.label is not None else (labels,))}

    def _column(self) -> int | None:
        """The output that is kept; None: all."""
        names = {int(i): str(name) for i, name in _described(self.classifier)[0].id2label.items()}
        if self.label is None:
            return 0 if len(names) == 1 else None
        found = [i for i, name in names.items() if self.label in (name, str(i))]
        if not found:
            raise UsageError(f"label: {self.classifier} has no output {self.label!r}.{nearest(self.label, names.values())} "
                             f"It has: {', '.join(names.values())}")  # fmt: skip
        return found[0]

    def texts(self, messages: Sequence[list[dict[str, str]]]) -> dict[str, Any]:
        from llmselect.engine import classify
        from llmselect.engine.passes import default_batch_tokens

        _, tokenizer, limit = _described(self.classifier)
        limit, chat = min(limit, self.tokens or limit), isinstance(tokenizer.chat_template, str)
        rows = [tokenizer.apply_chat_template(row, tokenize=False) if chat else "\n\n".join(one["content"] for one in row)
                for row in messages]  # fmt: skip
        cut = {"truncation": True, "max_length": limit} if limit < classify.NO_LIMIT else {}
        ids = tokenizer(rows, add_special_tokens=not chat, verbose=False, **cut)["input_ids"]
        z = classify.outputs(_loaded(self.classifier, self.dtype), ids, limit, default_batch_tokens())
        if self.scale == "sigmoid":
            z = 1 / (1 + np.exp(-z))
        elif self.scale == "softmax":
            z = np.exp(z - z.max(1, keepdims=True))
            z /= z.sum(1, keepdims=True)
        column = self._column()
        return {"value": (z if column is None else z[:, column]).astype(np.float32)}


@lru_cache(maxsize=4)
def _described(model: str) -> tuple[Any, Any, int]:
    from llmselect.engine import classify

    return classify.described(model)


@lru_cache(maxsize=1)
def _loaded(model: str, dtype: str) -> Any:
    """Kept from shard to shard: a pool has many."""
    from llmselect.engine import classify

    return classify.load(model, dtype, "classifier", "classify")
