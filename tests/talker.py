"""A tiny model that talks and sometimes stops, an adapter that changes what it says, and a plain loop as oracle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import tiny

END = 3  # <|im_end|>, which ends a turn and is the tokenizer's EOS


def questions(count: int, seed: int = 0) -> list[list[dict[str, str]]]:
    """Conversations that end before the assistant's last turn."""
    return [chat[:-1] for chat in tiny.chats(count, seed)]


def save(folder: Path) -> Path:
    """A tiny model whose logit of the end mark is made larger, so that it ends some of its answers."""
    import torch

    tiny.save(folder, seed=5)
    loaded = load(folder)
    with torch.no_grad():
        loaded.lm_head.weight[END] *= 2.2
    loaded.save_pretrained(folder)
    return folder


def save_adapter(folder: Path, model: Path) -> Path:
    """A LoRA adapter whose B matrices are not zero."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    wrapped = get_peft_model(load(model), LoraConfig(r=4, target_modules="all-linear"))
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    wrapped.save_pretrained(folder)
    return folder


def as_base(model: Path, folder: Path) -> Path:
    """A copy whose tokenizer and settings call another mark the end, as those of base models that know chat marks do."""
    shutil.copytree(model, folder)
    for name, change in [("tokenizer_config.json", {"eos_token": "<|endoftext|>"}), ("config.json", {"eos_token_id": 0}),
                         ("generation_config.json", {"eos_token_id": 0})]:  # fmt: skip
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    return folder


def load(folder: Path | str, adapter: Path | str | None = None) -> Any:
    """The model in float32, its adapter beside the weights and not merged."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if adapter is None:
        return loaded
    from peft import PeftModel

    return PeftModel.from_pretrained(loaded, adapter).eval()


def prompt_ids(folder: Path, messages: list[dict[str, str]]) -> list[int]:
    """A prompt as tokens, its chat marks written out here."""
    from transformers import AutoTokenizer

    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages) + "<|im_start|>assistant\n"
    return AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]


def greedy(loaded: Any, ids: list[int], count: int, ends: tuple[int, ...] = (END,)) -> list[int]:
    """Greedy tokens of one prompt: the whole sequence through the model for every token, no cache, no padding."""
    import torch

    new: list[int] = []
    with torch.no_grad():
        while len(new) < count and not (new and new[-1] in ends):
            new.append(int(loaded(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax()))
    return new
