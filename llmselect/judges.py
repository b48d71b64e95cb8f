"""Scorers of iterative refinement: what a model has still to learn from a row, by perplexity or by a reward model.

Paper: Yu et al., arXiv 2409.11378, section 4: S(x) = score(x ⊕ gold) − score(x ⊕ answer).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from llmselect.errors import UsageError

if TYPE_CHECKING:
    from llmselect.chat import Encoded
    from llmselect.engine.backbone import Backbone

log = logging.getLogger("llmselect")
Message = dict[str, str]


def perplexity(prompts: Sequence[list[Message]], gold: Sequence[str], answers: Sequence[str], *, model: str,
               adapter: str | None = None, dtype: str = "auto", max_length: int | None = None,
               batch_tokens: int | None = None) -> np.ndarray:  # fmt: skip
    """S `[m]` = −log(PPL(answer) / PPL(gold)) = nll(gold) − nll(answer) under `model` with `adapter`.

    nll is the mean −log p in nats over the tokens of the last turn alone, its end mark included, after the prompt. S is
    large where the model finds the gold answer unlikely beside its own; that holds for a gold answer that is noise as well.

    NaN where prompt with gold or prompt with answer does not fit into `max_length`, or where an answer has no tokens.
    """
    from llmselect.engine.backbone import Backbone
    from llmselect.engine.passes import default_batch_tokens

    backbone = Backbone(model, adapter, dtype, max_length)
    rows = [_last_turn(backbone, ask, text) for side in (gold, answers) for ask, text in zip(prompts, side, strict=True)]
    nll = _nll(backbone, rows, batch_tokens or default_batch_tokens())
    return nll[: len(gold)] - nll[len(gold) :]


def _last_turn(backbone: Backbone, prompt: list[Message], text: str) -> Encoded | None:
    """A conversation in which the tokens of its last turn alone are supervised; None when it does not fit."""
    from dataclasses import replace

    before, row = backbone.encoder.encode([prompt, [*prompt, {"role": "assistant", "content": text}]])
    response = row.response.copy()
    response[np.flatnonzero(response)[: int(before.response.sum())]] = False  # earlier turns
    whole = not row.prompt_cut and not row.response_cut and response[1:].any()
    return replace(row, response=response) if whole else None


def _nll(backbone: Backbone, rows: Sequence[Encoded | None], batch_tokens: int) -> np.ndarray:
    from llmselect.engine.batch import collate, plan
    from llmselect.engine.memory import BackOff

    out = np.full(len(rows), np.nan)
    held = np.array([i for i, row in enumerate(rows) if row is not None], np.int64)

    def step(part: np.ndarray) -> np.ndarray:
        batch = collate(backbone, [row for i in part if (row := rows[int(i)]) is not None])
        return batch.stats.mean(batch.stats.nll, len(part)).cpu().numpy()

    back_off, names = BackOff(), [str(i) for i in range(len(rows))]
    for batch in plan([len(row.ids) for row in rows if row is not None], batch_tokens):
        for part, found in back_off.run(held[batch], step, names):
            out[part] = found
    return out


def reward(prompts: Sequence[list[Message]], gold: Sequence[str], answers: Sequence[str], *, model: str,
           dtype: str = "auto", max_length: int | None = None, batch_tokens: int | None = None) -> np.ndarray:  # fmt: skip
    """S `[m]` = r(prompt ⊕ gold) − r(prompt ⊕ answer), r the one logit of a sequence-classification model.

    Conversations go through the chat template of that model; NaN where one is longer than the model reads.

    Args:
        model: folder or Hub id (safetensors only).
        max_length: tokens of a conversation; None: the model's limit.

    Errors: `UsageError` for a model without a chat template, with several outputs, or without a trained head.
    """
    from llmselect.engine import classify
    from llmselect.engine.passes import default_batch_tokens

    config, tokenizer, limit = classify.described(model)
    if not isinstance(tokenizer.chat_template, str):
        raise UsageError(f"judge: {model} has no chat template (or several); give a reward model with one")
    if config.num_labels != 1:
        raise UsageError(f"judge: {model} has {config.num_labels} outputs; give a reward model, which has 1")
    loaded, limit = classify.load(model, dtype, "judge", "give rewards"), min(limit, max_length or limit)
    chats = [[*ask, {"role": "assistant", "content": text}] for side in (gold, answers)
             for ask, text in zip(prompts, side, strict=True)]  # fmt: skip
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    found = classify.outputs(loaded, ids, limit, batch_tokens or default_batch_tokens())[:, 0]
    if len(lost := np.flatnonzero(np.isnan(found))):
        log.warning("%d of %d conversations are longer than %s reads and are not scored", len(lost), len(found), model)
    return found[: len(gold)] - found[len(gold) :]
