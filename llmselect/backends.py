"""Two engines that answer prompts, transformers and vLLM: the same prompts as token ids in, the same results out."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from llmselect.errors import LlmselectError, UsageError, require
from llmselect.plain import is_sequence

if TYPE_CHECKING:
    from llmselect.engine.backbone import Backbone

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for `max_lora_rank`."""


@dataclass(frozen=True)
class Generation:
    """An answer: its `text` without special tokens and without the stop string, the ids of the `tokens` as they came
    (an end mark included), and `finish`: `stop` (end mark or stop string) or `length` (max_new_tokens)."""

    text: str
    tokens: tuple[int, ...]
    finish: str


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. Temperature 0 is greedy.

    Errors: `UsageError` for a value outside its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens: {self.max_new_tokens} is too few; give at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature: {self.temperature} is not allowed; give 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p: {self.top_p} is not allowed; give a number above 0, at most 1")
        stop: Any = self.stop  # whatever was given
        if isinstance(stop, str) or not all(isinstance(one, str) and one for one in stop):
            raise UsageError(f"stop: {self.stop!r} is not allowed; give a list of non-empty strings")
        object.__setattr__(self, "stop", tuple(self.stop))


@dataclass(frozen=True)
class Prompt:
    """One prompt as token `ids`, the `key` of its random draws, and the `name` that errors call it by.

    The key comes from the ids and from how many equal prompts stand before it: what a prompt draws depends on no
    other prompt, and equal prompts draw different answers.
    """

    ids: list[int]
    key: int
    name: str


class Backend(Protocol):
    """What turns prompts into answers."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Generation]:
        """One answer a prompt, in the order given."""
        ...


class HFBackend:
    """`transformers` with a KV cache, in batches of like length, padded on the left; the adapter is merged.

    Args:
        batch_tokens: padded tokens a batch may have, answers included; None: by the device.
    """

    def __init__(self, backbone: Backbone, batch_tokens: int | None = None):
        from llmselect.engine.memory import BackOff
        from llmselect.engine.passes import default_batch_tokens

        self.backbone, self.batch_tokens = backbone, batch_tokens or default_batch_tokens()
        self.back_off = BackOff()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Generation]:
        """One answer a prompt. Out of memory shrinks the batches and goes on."""
        from llmselect.engine.batch import plan

        found: dict[int, Generation] = {}
        names = [one.name for one in prompts]
        lengths = [len(one.ids) + sampling.max_new_tokens for one in prompts]

        def step(rows: np.ndarray) -> list[Generation]:
            return self._batch([prompts[int(i)] for i in rows], sampling)

        for batch in plan(lengths, self.batch_tokens):
            for rows, answers in self.back_off.run(batch, step, names):
                found.update(zip(rows.tolist(), answers, strict=True))
        return [found[i] for i in range(len(prompts))]

    def _batch(self, prompts: list[Prompt], sampling: Sampling) -> list[Generation]:
        import torch
        from transformers import GenerationConfig

        from llmselect.engine.decoding import Choose, StopStrings
        from llmselect.kernels.keyed import Keyed

        ends, start = end_tokens(self.backbone, sampling.stop), max(len(one.ids) for one in prompts)
        pad = self.backbone.pad
        ids = torch.tensor([[pad] * (start - len(one.ids)) + one.ids for one in prompts])
        mask = torch.tensor([[0] * (start - len(one.ids)) + [1] * len(one.ids) for one in prompts])
        keyed = Keyed(sampling.seed, np.array([one.key for one in prompts], np.uint64))
        choose = Choose(keyed, sampling.temperature, sampling.top_p, start, [one.name for one in prompts])
        stops = StopStrings(sampling.stop, self._decode, start, len(prompts)) if sampling.stop else None
        settings = GenerationConfig(max_new_tokens=sampling.max_new_tokens, do_sample=False, use_cache=True,
                                    pad_token_id=pad, eos_token_id=sorted(ends) or None)  # fmt: skip
        model = self.backbone.causal_lm
        model.generation_config = GenerationConfig()  # or the repetition penalties and the like of the checkpoint join in
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids.to(self.backbone.device), attention_mask=mask.to(self.backbone.device),
                generation_config=settings, logits_processor=[choose], stopping_criteria=[stops] if stops else None,
            )  # fmt: skip
        new = out[:, start:].tolist()
        if stops:
            new = [row[:ended] if ended else row for row, ended in zip(new, stops.ended, strict=True)]
        return [_answer(self.backbone.tokenizer, row, ends, sampling.stop) for row in new]

    def _decode(self, ids: list[int]) -> str:
        return _text(self.backbone.tokenizer, ids)


class VLLMBackend:
    """vLLM, with the adapter as a LoRA request; it makes its own batches.

    Errors: `MissingExtra` when vllm is not installed.
    """

    def __init__(self, backbone: Backbone, batch_tokens: int | None = None):
        vllm: Any = require("vllm", "vllm")
        self.backbone, self.params, self.lora = backbone, vllm.SamplingParams, None
        more: dict[str, Any] = {}
        if backbone.adapter:
            more = dict(enable_lora=True, max_lora_rank=lora_rank(backbone.adapter))
            request: Any = require("vllm.lora.request", "vllm")
            self.lora = request.LoRARequest("adapter", 1, backbone.adapter)
        self.llm = vllm.LLM(
            model=backbone.path, dtype=str(backbone.dtype).removeprefix("torch."), max_model_len=backbone.encoder.max_length,
            load_format="safetensors", generation_config="vllm", **more,
        )  # fmt: skip

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Generation]:
        """One answer a prompt; each has a seed of its own, so that its draws depend on no other prompt."""
        if not prompts:
            return []
        ends = end_tokens(self.backbone, sampling.stop)
        params = [
            self.params(
                temperature=sampling.temperature, top_p=sampling.top_p, max_tokens=sampling.max_new_tokens,
                stop=list(sampling.stop), stop_token_ids=sorted(ends), skip_special_tokens=True,
                seed=digest(sampling.seed, one.key) >> 33,
            )
            for one in prompts
        ]  # fmt: skip
        ids = [{"prompt_token_ids": one.ids} for one in prompts]
        outputs = self.llm.generate(ids, params, lora_request=self.lora, use_tqdm=False)
        for one, out in zip(prompts, outputs, strict=True):
            if (reason := out.outputs[0].finish_reason) not in ("stop", "length"):
                raise LlmselectError(f"{one.name}: vLLM gave no answer (finish_reason {reason!r})")
        return [_answer(self.backbone.tokenizer, list(out.outputs[0].token_ids), ends, sampling.stop) for out in outputs]


BACKENDS: dict[str, Callable[[Backbone, int | None], Backend]] = {"hf": HFBackend, "vllm": VLLMBackend}


def digest(*parts: Any) -> int:
    """A 64-bit number that stands for `parts`."""
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def lora_rank(adapter: str) -> int:
    """The least `max_lora_rank` of vLLM that fits the adapter.

    Errors: `UsageError` when none does.
    """
    from peft import PeftConfig

    peft: Any = PeftConfig
    config = peft.from_pretrained(adapter)
    ranks: dict[str, int] = getattr(config, "rank_pattern", None) or {}
    rank = max([getattr(config, "r", 0) or 0, *ranks.values()])
    if not 0 < rank <= RANKS[-1]:
        raise UsageError(f"adapter: {adapter} has rank {rank}; vLLM takes LoRA of rank 1 to {RANKS[-1]}; use backend hf")
    return next(one for one in RANKS if one >= rank)


def _text(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _answer(tokenizer: Any, ids: list[int], ends: set[int], stop: Sequence[str]) -> Generation:
    """New tokens as an answer: cut after the first end mark, its text before the first stop string."""
    end = next((i + 1 for i, token in enumerate(ids) if token in ends), None)
    ids, text = ids[:end], _text(tokenizer, ids[:end])
    cuts = [at for one in stop if (at := text.find(one)) >= 0]
    return Generation(text[: min(cuts)] if cuts else text, tuple(ids), "stop" if end or cuts else "length")


def end_tokens(backbone: Backbone, stop: Sequence[str] = ()) -> set[int]:
    """Ids that end an answer: those that model and tokenizer name, the mark with which the chat template ends a turn
    of the assistant (a base model fine-tuned on chats has learnt that one), added tokens among `stop`."""
    from transformers import GenerationConfig

    settings: Any = GenerationConfig
    tokenizer, found = backbone.tokenizer, [backbone.tokenizer.eos_token_id, backbone.text_config.eos_token_id]
    with contextlib.suppress(OSError, ValueError):  # many models have no such file
        found.append(settings.from_pretrained(backbone.path).eos_token_id)
    ends = {int(one) for some in found for one in (some if is_sequence(some) else [some]) if one is not None}
    added = tokenizer.get_added_vocab()
    ends |= {added[one] for one in stop if one in added}
    mark = backbone.encoder.turn_end()
    return ends if mark is None else ends | {mark}
