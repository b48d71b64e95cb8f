"""The base of every extractor: hyper-parameters as fields, one hook that turns a batch into rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    import numpy as np
    import torch

    from llmselect.engine.backbone import Backbone
    from llmselect.engine.batch import Batch

Arrays = dict[str, tuple[str, tuple[int, ...]]]  # name → (dtype, shape of one row); dtype "csr:float16" is stored sparse
State = Mapping[str, "torch.Tensor"]


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """One feature of every row, computed by a causal LM.

    Extractors with the same `model`, `adapter`, `dtype` and `max_length` share one forward pass.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1  # raise it when the numbers change: stored features of the old version are then refused
    fits: ClassVar[bool] = False  # whether the target rows are needed before the pool pass
    by_group: ClassVar[bool] = False  # whether the first axis after the rows of its arrays is that of the target groups
    alone: ClassVar[bool] = False  # whether it needs a pass and a model of its own: it runs backward, or changes the model

    model: str = field(default="", metadata={"help": "the causal LM: a folder or a Hub id; a recipe fills it in"})
    adapter: str | None = field(default=None, metadata={"help": "a PEFT adapter merged into the model (warm-up)"})
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata={"help": "auto: bfloat16 on a GPU, float32 on a CPU"}
    )
    max_length: int | None = field(default=None, metadata={"help": "tokens a row may have; None: the model's, at most 2048"})

    @property
    def sample_rows(self) -> int:
        """How many pool rows `fit` wants to see besides the target's; it then takes them as `sample=`."""
        return 0

    def views(self) -> tuple[str, ...]:
        """The token sequences to pass: `row` (the whole chat), `response` (assistant turns without their prompts). None
        of them for an extractor of `texts`."""
        return ("row",)

    def layers(self, state: State = MappingProxyType({})) -> tuple[int, ...]:
        """The hidden states to keep, numbered as in Hugging Face: 0 embeddings, -1 after the last norm. What `fit`
        learned may narrow them."""
        return (-1,)

    def arrays(self, backbone: Backbone, groups: Sequence[str]) -> Arrays:
        """Name, dtype and row shape of what `rows` returns."""
        raise NotImplementedError(f"{type(self).__name__} must declare its arrays")

    def fit(self, backbone: Backbone, batches: Mapping[str, list[Batch]]) -> dict[str, torch.Tensor]:
        """Learn a state from the target rows, one list of (not yet passed) batches per group."""
        return {}

    def rows(self, batch: Batch, state: State) -> dict[str, torch.Tensor]:
        """The feature of each row of the batch, `[B, …]` per declared array (a view may give some of them)."""
        raise NotImplementedError(f"{type(self).__name__} must define rows")

    def texts(self, messages: Sequence[list[dict[str, str]]]) -> dict[str, Any]:
        """The feature of rows as text, without tokenizer or model: `[rows, …]` or `Csr` per declared array."""
        raise NotImplementedError(f"{type(self).__name__} has no views, so it must define texts")

    def derive(self, arrays: dict[str, np.ndarray]) -> None:
        """Fill, in place, arrays that follow from those of all views (IFD from two losses)."""

    def settings(self) -> dict[str, Any]:
        """The fields that shape the numbers; the model is identified by its weights instead of its path."""
        apart = {f.name for f in fields(Extractor)}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}
