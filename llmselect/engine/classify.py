"""The outputs of sequence-classification models (reward models, quality and topic classifiers) on tokenised rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from llmselect.engine.backbone import default_device, from_pretrained
from llmselect.engine.batch import plan
from llmselect.engine.memory import BackOff
from llmselect.errors import UsageError

NO_LIMIT = 1 << 20


def described(model: str) -> tuple[Any, Any, int]:
    """Configuration, tokenizer and the tokens that the model reads; no weights.

    Errors: `UsageError` for what cannot be read.
    """
    config, tokenizer = from_pretrained("AutoConfig", model), from_pretrained("AutoTokenizer", model)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or NO_LIMIT
    return config, tokenizer, min(limit, tokenizer.model_max_length)


def load(model: str, dtype: str, key: str, purpose: str) -> Any:
    """The model ready to score. `key` and `purpose` are for errors: the setting that names the model, and what a model of that
    setting does.

    Errors: `UsageError` for a model whose head is not in its file.
    """
    device = torch.device(default_device())
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    kwargs = dict(dtype=auto if dtype == "auto" else getattr(torch, dtype), use_safetensors=True, output_loading_info=True)
    loaded, info = from_pretrained("AutoModelForSequenceClassification", model, **kwargs)
    if absent := sorted(info["missing_keys"]):
        raise UsageError(f"{key}: {model} was not trained to {purpose}: its file lacks {absent[0]}; give a model that was")
    return loaded.to(device).eval().requires_grad_(False)


def outputs(loaded: Any, ids: Sequence[list[int]], limit: int, batch_tokens: int) -> np.ndarray:
    """Logits `[n, labels]` float64 of every row; NaN for rows of more than `limit` tokens."""
    out = np.full((len(ids), loaded.config.num_labels), np.nan)
    pad = loaded.config.get_text_config().pad_token_id
    held = np.array([i for i, row in enumerate(ids) if len(row) <= limit], np.int64)

    def step(part: np.ndarray) -> np.ndarray:
        rows = [ids[int(i)] for i in part]
        longest, fill = max(map(len, rows)), pad if pad is not None else 0
        padded = torch.tensor([row + [fill] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        with torch.inference_mode():
            logits = loaded(input_ids=padded.to(loaded.device), attention_mask=mask.to(loaded.device)).logits
        return logits.float().cpu().numpy()

    # Without a padding token the model cannot tell where a row ends: then one row at a time.
    batches = plan([len(ids[int(i)]) for i in held], batch_tokens if pad is not None else 1)
    back_off, names = BackOff(), [str(i) for i in range(len(ids))]
    for batch in batches:
        for part, found in back_off.run(held[batch], step, names):
            out[part] = found
    return out
