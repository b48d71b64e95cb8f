"""The model's own rating of a row, less where it is unsure: SelectIT.

Paper: Liu et al., "SelectIT: Selective Instruction Tuning for LLMs via Uncertainty-Aware Self-Reflection", arXiv 2402.16705,
    section 3.
Objective: with p_k, k = 1 … K, the probabilities of the ratings as the next token after a rating prompt, scaled to sum 1:
    token level, `token_i` of prompt i: S = s · Σ_k |p_k - p_s| / (K - 1), s the most probable rating; sentence level: `value` =
    mean_i(token_i) / (1 + alpha · std_i(token_i)). `expected_i` = Σ_k k·p_k, `expected` their mean. Model level: the mean of
    `value` over models, weighted by their parameters: one feature per model and `topk` with `x: [a, b]`, `reduce: mean`,
    `weights: [1.1, 7]`.
Inputs: a causal LM that follows instructions; rows as text. No target.
Cost: a forward per rating prompt over the row's text in the prompt; the LM head on one token a row.
Deviations: the prompts are ours. The ratings' own probabilities are scaled to sum 1, the standard deviation is that of the
    prompts given (divided by their number). What precedes the last answer is the instruction; turns of a longer chat are told by
    role. Where the prompt does not fit into `max_length`, the end of the answer is cut, then that of the instruction.
    `expected` is ours: as finely graded a rating without the penalties.
Defaults: five prompts, ratings 1 to 5, alpha 0.2, as in the paper.
Use: a model that follows instructions and no target; ratings are only as good as that model.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from llmselect.engine.extractor import Arrays, Extractor, State
from llmselect.errors import LlmselectError, UsageError
from llmselect.registry import extractors

if TYPE_CHECKING:
    import torch

    from llmselect.chat import Encoded
    from llmselect.engine.backbone import Backbone
    from llmselect.engine.batch import Batch

ROW = "[Instruction]\n{instruction}\n\n[Answer]\n{response}\n\n"
SCALE = "Rate on a scale from 1 (worst) to {ratings} (best) and reply with the number only."
PROMPTS = (
    f"Below are an instruction and an answer to it.\n\n{ROW}How good is this answer as an example to learn from? {SCALE}",
    f"You check training data for an assistant.\n\n{ROW}Does the answer do what the instruction asks? {SCALE}",
    f"Read the instruction and the answer.\n\n{ROW}How correct and complete is the answer? {SCALE}",
    f"Judge the quality of this pair of instruction and answer.\n\n{ROW}Consider clarity, accuracy and use. {SCALE}",
    f"Somebody gave an assistant the following instruction.\n\n{ROW}How satisfied should they be with the answer? {SCALE}",
)
_PLACE = re.compile(r"\{(instruction|response)\}")


@extractors.register("selectit")
@dataclass(frozen=True, kw_only=True)
class SelectIT(Extractor):
    """Arrays `[n]` float32: `value` (sentence level), `expected`, and `token_0` …, `expected_0` … of each prompt."""

    prompts: tuple[str, ...] = field(
        default=PROMPTS, metadata={"help": "texts with {instruction} and {response} in them, and {ratings} for K"}
    )
    ratings: int = field(default=5, metadata={"help": "K: the ratings are the numbers 1 … K, at most 9"})
    alpha: float = field(default=0.2, metadata={"help": "weight of the spread over prompts"})

    def __post_init__(self) -> None:
        if not 2 <= self.ratings <= 9:
            raise UsageError(f"ratings: {self.ratings} must be between 2 and 9, one digit each")
        if self.alpha < 0:
            raise UsageError(f"alpha: {self.alpha} must not be negative")
        if not self.prompts or len(set(self.prompts)) != len(self.prompts):
            raise UsageError("prompts: give one or more, each once")
        for prompt in self.prompts:
            if sorted(_PLACE.findall(prompt)) != ["instruction", "response"]:
                raise UsageError(f"prompts: {prompt[:60]!r}… must have {{instruction}} and {{response}} once each")

    def views(self) -> tuple[str, ...]:
        return tuple(hashlib.sha256(f"{self.ratings}/{one}".encode()).hexdigest() for one in self.prompts)

    def arrays(self, backbone: Backbone, groups: Sequence[str]) -> Arrays:
        names = [f"{kind}_{i}" for kind in ("token", "expected") for i in range(len(self.prompts))]
        return dict.fromkeys(("value", "expected", *names), ("float32", ()))

    def encode(self, backbone: Backbone, messages: list[list[dict[str, str]]], view: str) -> list[Encoded]:
        asked = self.prompts[self.views().index(view)].replace("{ratings}", str(self.ratings))
        places = _PLACE.findall(asked)
        pieces = _rendered(backbone, _PLACE.split(asked)[::2])
        filled = [_filled(pieces, places, dict(zip(("instruction", "response"), split(row), strict=True))) for row in messages]
        made = backbone.tokenizer(
            [text for text, _ in filled], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        rows = zip(made["input_ids"], made["offset_mapping"], filled, strict=True)
        return [_cut(ids, offsets, spans, backbone.encoder.max_length) for ids, offsets, (_, spans) in rows]

    def rows(self, batch: Batch, state: State) -> dict[str, torch.Tensor]:
        import torch

        from llmselect.engine.head import check_head, logits

        check_head(batch.backbone)
        last = batch.mask.long().cumsum(1).argmax(1)  # the first place with all tokens counted: also with padding on the left
        hidden = batch.hidden(-1)[torch.arange(len(last), device=last.device), last]
        i = self.views().index(batch.view)
        p = logits(batch.backbone, hidden)[:, rating_tokens(batch.backbone, self.ratings)].double().softmax(-1)
        best = p.argmax(1)
        spread = (p - p.gather(1, best[:, None])).abs().sum(1) / (self.ratings - 1)
        steps = torch.arange(1, self.ratings + 1, device=p.device, dtype=p.dtype)
        return {f"token_{i}": ((best + 1) * spread).float(), f"expected_{i}": (p @ steps).float()}

    def derive(self, arrays: dict[str, np.ndarray]) -> None:
        token, expected = (np.stack([arrays[f"{kind}_{i}"] for i in range(len(self.prompts))]).astype(np.float64)
                           for kind in ("token", "expected"))  # fmt: skip
        arrays["value"][:] = token.mean(0) / (1 + self.alpha * token.std(0))
        arrays["expected"][:] = expected.mean(0)


def split(messages: Sequence[dict[str, str]]) -> tuple[str, str]:
    """The instruction and the answer of a chat: what precedes the last turn of the assistant, and that turn."""
    at = max((i for i, one in enumerate(messages) if one["role"] == "assistant"), default=len(messages))
    before, answer = messages[:at], messages[at]["content"] if at < len(messages) else ""
    told = len([one for one in before if one["role"] != "system"]) > 1
    return "\n\n".join(f"{one['role']}: {one['content']}" if told else one["content"] for one in before), answer


def _rendered(backbone: Backbone, pieces: Sequence[str]) -> list[str]:
    """The chat template around the prompt, cut where the row's texts come in: no template sees those."""
    mark = "\u241eTEXT\u241e"
    text = backbone.encoder.render([{"role": "user", "content": mark.join(pieces)}], add_generation_prompt=True)
    found = text.split(mark)
    if len(found) != len(pieces):
        raise LlmselectError(f"{backbone.path}: its chat template changes the text of a message; no rating prompt fits into it")
    return found


def _filled(pieces: Sequence[str], places: Sequence[str], texts: dict[str, str]) -> tuple[str, dict[str, tuple[int, int]]]:
    """The prompt with a row's texts, and where they stand in it."""
    whole, spans = pieces[0], dict[str, tuple[int, int]]()
    for place, piece in zip(places, pieces[1:], strict=True):
        spans[place] = len(whole), len(whole) + len(texts[place])
        whole += texts[place] + piece
    return whole, spans


def _cut(ids: list[int], offsets: list[tuple[int, int]], spans: dict[str, tuple[int, int]], limit: int) -> Encoded:
    """At most `limit` tokens: the last ones of the answer are left out, then those of the instruction."""
    from llmselect.chat import Encoded

    start, stop = np.asarray(offsets, np.int64).reshape(-1, 2).T
    inside = {place: np.flatnonzero((start >= low) & (stop <= high)) for place, (low, high) in spans.items()}
    spare = np.concatenate([inside["response"][::-1], inside["instruction"][::-1]])
    excess = max(0, len(ids) - limit)
    if excess > len(spare):
        raise UsageError(f"selectit: a rating prompt has {len(ids) - len(spare)} tokens without a row; max_length is {limit}: "
                         "give the feature a larger max_length, or shorter prompts")  # fmt: skip
    kept = np.delete(np.asarray(ids, np.int32), spare[:excess])
    none = np.zeros(len(kept), bool)
    return Encoded(kept, none, none.astype(np.int8), prompt_cut=excess)


def rating_tokens(backbone: Backbone, ratings: int) -> list[int]:
    """The token of each rating 1 … K where the assistant is to speak.

    Errors: `LlmselectError` when a rating is no single token there.
    """
    before = backbone.encoder.render([{"role": "user", "content": "Rate."}], add_generation_prompt=True)
    texts = [before, *(f"{before}{k}" for k in range(1, ratings + 1))]
    asked, *rated = backbone.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    found = [row[len(asked)] for row in rated if row[:-1] == asked]
    if len(set(found)) != ratings:
        raise LlmselectError(f"{backbone.path}: its tokenizer has no single tokens for the ratings 1 … {ratings}")
    return found
