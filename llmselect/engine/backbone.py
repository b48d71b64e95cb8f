"""A causal LM ready to score rows: its tokenizer, its body, hidden states at chosen layers, its LM head."""

from __future__ import annotations

# accelerate has no types.
# pyright: reportMissingTypeStubs=false
import hashlib
import logging
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from llmselect import atomic
from llmselect.chat import ChatEncoder
from llmselect.engine.memory import is_out_of_memory
from llmselect.errors import LlmselectError, UsageError, of_the_disk
from llmselect.token_cache import TokenCache

log = logging.getLogger("llmselect")


class _DeepEnough(Exception):
    """Raised by a hook once the deepest wanted layer is there: later blocks are not computed."""


class Backbone:
    """The model behind a pass. Weights load on first use, so token counts need none.

    Args:
        model: folder or Hub id (safetensors only: other formats can run code when read).
        adapter: optional PEFT adapter, merged into the weights.
        dtype: `auto` is bfloat16 on a GPU and float32 on a CPU.
        max_length: tokens per row; None takes the model's own limit, at most 2048.
        tokens: a folder where the rows' tokens are kept (`FeatureStore.tokens`).
    """

    path: str
    adapter: str | None
    device: torch.device
    dtype: torch.dtype
    config: Any
    text_config: Any
    tokenizer: Any
    encoder: ChatEncoder
    hidden_size: int
    depth: int  # blocks
    pad: int  # the id that fills rows up
    head_checked: bool = False  # see `engine.head.check_head`

    def __init__(self, model: str, adapter: str | None = None, dtype: str = "auto", max_length: int | None = None,
                 device: str | None = None, tokens: Path | None = None):  # fmt: skip
        self.path, self.adapter = model, adapter
        self.device = torch.device(device or default_device())
        auto = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.dtype = auto if dtype == "auto" else getattr(torch, dtype)
        self.config = from_pretrained("AutoConfig", model)
        self.tokenizer = from_pretrained("AutoTokenizer", model)
        self.text_config = self.config.get_text_config()
        limit = getattr(self.text_config, "max_position_embeddings", None) or 2048
        stated = self.tokenizer.model_max_length
        if isinstance(stated, bool) or not isinstance(stated, int | float) or not stated >= 1:
            raise UsageError(f"model: {model!r}: model_max_length of its tokenizer is {stated!r}, not a number of tokens")
        limit = min(limit, int(min(stated, limit)))
        if max_length is not None and max_length > limit:
            raise UsageError(f"max_length: {max_length} is more than the {limit} tokens that {model} reads")
        self.encoder = ChatEncoder(self.tokenizer, max_length or min(limit, 2048))
        if tokens is not None:  # each encoder's apart: another length cuts otherwise
            self.encoder.cache = TokenCache(tokens / self.encoder.fingerprint[:32])
        self.hidden_size, self.depth = self.text_config.hidden_size, self.text_config.num_hidden_layers
        self.pad = next((t for t in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if t is not None), 0)

    @cached_property
    def causal_lm(self) -> Any:
        """The loaded model, in evaluation mode, its adapter merged."""
        kwargs = dict(dtype=self.dtype, attn_implementation="sdpa", use_safetensors=True)
        model = from_pretrained("AutoModelForCausalLM", self.path, **kwargs)
        if self.adapter:
            from peft import PeftModel

            peft: Any = PeftModel
            try:
                model = peft.from_pretrained(model, self.adapter).merge_and_unload()
            except Exception as error:  # as for models: what damaged files raise
                raise unreadable("adapter", self.adapter, error) from error
        model = model.to(self.device).eval().requires_grad_(False)
        model.config.use_cache = False
        return model

    @property
    def body(self) -> Any:
        """The transformer without its LM head."""
        return self.causal_lm.base_model

    @cached_property
    def blocks(self) -> torch.nn.ModuleList:
        """The decoder blocks in order."""
        for module in self.body.modules():
            if isinstance(module, torch.nn.ModuleList) and len(module) == self.depth:
                return module
        raise LlmselectError(f"{self.path}: found no list of {self.depth} decoder blocks in {type(self.body).__name__}")

    def layer(self, index: int) -> int:
        """A Hugging Face hidden-state number as 0 … depth; depth is the state after the last norm."""
        if not -self.depth - 1 <= index <= self.depth:
            raise UsageError(f"layer: {index} is outside -{self.depth + 1} … {self.depth} of {self.path}")
        return index % (self.depth + 1)

    def digest(self) -> str:
        """Identity of the weights (and adapter): what was read, wherever it lies."""
        return weights_digest(self.path, self.config) + (f"+{weights_digest(self.adapter)}" if self.adapter else "")

    @torch.inference_mode()
    def states(self, ids: torch.Tensor, mask: torch.Tensor, layers: Sequence[int]) -> dict[int, torch.Tensor]:
        """Hidden states `[B, T, d]` at `layers`; the forward stops after the deepest and computes no logits."""
        wanted = {self.layer(layer) for layer in layers}
        kept: dict[int, torch.Tensor] = {}
        with self._taps(wanted, kept):
            try:
                last = self.forward(ids, mask)
                if self.depth in wanted:
                    kept[self.depth] = last
            except _DeepEnough:
                pass
        return kept

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, packed: bool = False) -> torch.Tensor:
        """Final states `[B, T, d]` of the body, after its last norm; `packed` runs the rows as one sequence without padding."""
        # Padding on the left shifts absolute positions unless they are counted from the first real token.
        position = (mask.long().cumsum(-1) - 1).clamp_min(0)
        if packed:
            # Positions that start again keep the rows apart, but only without a mask and without a cache.
            line = dict(input_ids=ids[mask][None], attention_mask=None, position_ids=position[mask][None])
            return unpack(self.body(**line, use_cache=False).last_hidden_state, mask)
        # A mask of ones only slows attention down: without one the fused causal kernel runs.
        attention = None if bool(mask.all()) else mask.long()
        return self.body(input_ids=ids, attention_mask=attention, position_ids=position, use_cache=False).last_hidden_state

    @contextmanager
    def _taps(self, wanted: set[int], kept: dict[int, torch.Tensor]) -> Generator[None]:
        deepest, handles = max(wanted), list[Any]()

        def keep(layer: int, value: Any) -> None:
            kept[layer] = value[0] if isinstance(value, tuple) else value
            if layer == deepest:
                raise _DeepEnough

        for layer in wanted - {self.depth}:
            if layer == 0:
                hook = self.blocks[0].register_forward_pre_hook(
                    lambda _, args, kw: keep(0, args[0] if args else kw["hidden_states"]), with_kwargs=True
                )
            else:
                hook = self.blocks[layer - 1].register_forward_hook(lambda _, __, out, at=layer: keep(at, out))
            handles.append(hook)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def unpack(line: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Values `[1, N, d]` of a packed line as padded rows `[B, T, d]`, 0 where `mask [B, T]` has no token."""
    return line.new_zeros(*mask.shape, line.shape[-1]).masked_scatter(mask[..., None], line)


def default_device() -> str:
    """This process's accelerator, or the CPU."""
    from accelerate import PartialState

    state: Any = PartialState(cpu=not torch.cuda.is_available())
    return str(state.device)


def from_pretrained(kind: str, path: str, **kwargs: Any) -> Any:
    """What transformers' auto class `kind` reads at `path`. Errors: `UsageError` when it cannot."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        # False, not the default: at None transformers asks on the terminal whether to run the code of a model.
        return getattr(transformers, kind).from_pretrained(path, trust_remote_code=False, **kwargs)
    except Exception as error:  # damaged files raise what their readers like: SafetensorError, KeyError, TypeError
        raise unreadable("model", path, error, f" ({kind})") from error


def unreadable(what: str, path: str, error: Exception, how: str = "") -> Exception:
    """`UsageError` that says why `what` cannot be read at `path`; an error of memory or of the disk itself when it is one."""
    if is_out_of_memory(error):
        return error
    if refused := of_the_disk(error):
        return OSError(refused.errno, refused.strerror, refused.filename or path)
    told = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return UsageError(f"{what}: cannot read {path!r}{how}: {told[0].strip()}")


def weights_digest(path: str, config: Any = None) -> str:
    """SHA-256 of a local model's weights and config, or `id@commit` of a Hub model."""
    folder = Path(path)
    if not folder.is_dir():
        commit = getattr(config, "_commit_hash", None)
        if commit is None:
            raise UsageError(f"model: {path!r} is neither a folder nor a Hub model with a known revision")
        return f"{path}@{commit}"
    total = hashlib.sha256()
    for file in sorted(folder.glob("*")):
        if file.suffix == ".safetensors" or file.name in ("config.json", "adapter_config.json"):
            total.update(f"{file.name}:{atomic.sha256_file(file)};".encode())
    return total.hexdigest()
