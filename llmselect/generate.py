"""A model's answers to prompts, as a list or as a file that a killed run continues."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmselect import atomic
from llmselect.backends import BACKENDS, Backend, Generation, Prompt, Sampling, digest
from llmselect.errors import LlmselectError, UsageError, nearest, require
from llmselect.readers import means_file

if TYPE_CHECKING:
    from llmselect.engine.backbone import Backbone

log = logging.getLogger("llmselect")

CHUNK = 256
DTYPES = ("auto", "bfloat16", "float16", "float32")
Message = dict[str, str]


def generate(model: str, prompts: Sequence[Sequence[Message]], *, backend: str = "hf", adapter: str | None = None,
             max_new_tokens: int = 256, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
             stop: Sequence[str] = (), batch_tokens: int | None = None, dtype: str = "auto",
             max_length: int | None = None) -> list[Generation]:  # fmt: skip
    """One answer to each prompt, in the order given.

    Args:
        model: folder or Hub id (safetensors only).
        prompts: conversations of `{"role", "content"}` that end before the assistant is to speak; rendered by the
            tokenizer's chat template, else by `chat.DEFAULT_TEMPLATE`.
        backend: `hf` (transformers) or `vllm` (needs the extra of that name).
        adapter: a PEFT adapter; merged by `hf`, a LoRA request for `vllm`.
        temperature: 0 is greedy. Else a prompt's draws depend on `seed`, its own tokens and how many equal prompts
            stand before it: not on the other prompts.
        stop: strings that end an answer, which does not hold them; a special token is allowed.
        batch_tokens: padded tokens of a batch with its answers (`hf` only; vLLM makes its own batches).
        dtype: `auto` is bfloat16 on a GPU and float32 on a CPU. In bfloat16 a near tie may fall otherwise in another
            batch.
        max_length: tokens of prompt and answer together; None: the model's own limit, at most 2048.

    Errors: `UsageError` for wrong settings, and for a prompt that is empty, ends with the assistant or is too long (it
        names the row), all before weights load; `MissingExtra` without vllm.
    """
    sampling = Sampling(max_new_tokens, temperature, top_p, seed, stop)
    check(backend, adapter)
    if not len(prompts):
        return []
    backbone = open_model(model, backend, adapter, dtype, max_length)
    rows = encode(backbone, prompts, sampling)
    return _engine(backend, backbone, batch_tokens).generate(rows, sampling)


def generate_to(path: Path | str, ids: Sequence[str], prompts: Sequence[Sequence[Message]], *, model: str,
                backend: str = "hf", adapter: str | None = None, batch_tokens: int | None = None, dtype: str = "auto",
                max_length: int | None = None, chunk: int = CHUNK, **sampling: Any) -> Path:  # fmt: skip
    """`generate` into a JSONL file of `{"id", "text", "tokens" (how many), "finish"}`, one line a prompt in order.

    Rows go chunk by chunk to `PATH.part`, which takes its place when it is complete; `PATH.meta.json` says what they
    were made from. The same call after a kill goes on after the last whole chunk and ends with the same bytes; on a
    complete file it loads no weights and changes nothing.

    Args:
        ids: one a prompt, all different.
        chunk: rows that are generated and written at once.
        sampling: `max_new_tokens`, `temperature`, `top_p`, `seed`, `stop`.

    Errors: those of `generate`; `LlmselectError` when the file was made from something else.
    """
    path, settings, ids = Path(path), Sampling(**sampling), [str(one) for one in ids]
    check(backend, adapter)
    _check_ids(ids, len(prompts))
    if chunk < 1:
        raise UsageError(f"chunk: {chunk} is too few rows; give at least 1")
    backbone = open_model(model, backend, adapter, dtype, max_length)
    rows = encode(backbone, prompts, settings, ids)
    if not _claim(path, _meta(backbone, backend, settings, rows, ids)):
        return path
    part = _part(path)
    part.parent.mkdir(parents=True, exist_ok=True)
    done = _resume(part, ids, chunk)
    engine = _engine(backend, backbone, batch_tokens) if done < len(rows) else None
    for start in range(done, len(rows), chunk):
        assert engine is not None
        answers = engine.generate(rows[start : start + chunk], settings)
        _append(part, [_line(name, one) for name, one in zip(ids[start:], answers, strict=False)])
        log.info("%s: %d of %d answers", path.name, min(start + chunk, len(rows)), len(rows))
    if not rows:
        _append(part, [])
    atomic.move(part, path)
    return path


def check(backend: str, adapter: str | None) -> None:
    """Refuse a backend that does not exist or is not installed, and an adapter folder that is none.

    Errors: `UsageError`, `MissingExtra`.
    """
    if backend not in BACKENDS:
        raise UsageError(f"backend: no '{backend}'.{nearest(backend, BACKENDS)} One of: {', '.join(BACKENDS)}")
    if adapter and (Path(adapter).is_dir() or means_file(adapter)) and not (Path(adapter) / "adapter_config.json").is_file():
        raise UsageError(f"adapter: {adapter} is no folder with an adapter_config.json; give what PEFT saved, or a Hub id")
    if backend == "vllm":
        require("vllm", "vllm")


def encode(backbone: Backbone, prompts: Sequence[Sequence[Message]], sampling: Sampling,
           ids: Sequence[str] | None = None) -> list[Prompt]:  # fmt: skip
    """Conversations as token ids, up to where the assistant is to speak.

    Errors: `UsageError` naming the row that is empty, ends with the assistant, or leaves no room for its answer.
    """
    names = [f"prompts[{i}]" + (f" ({ids[i]})" if ids else "") for i in range(len(prompts))]
    texts: list[str] = []
    for name, messages in zip(names, prompts, strict=True):
        if not messages or messages[-1]["role"] == "assistant":
            what = "ends with a turn of the assistant" if messages else "has no turns"
            raise UsageError(f"{name} {what}; end it with the turn that is to be answered")
        texts.append(backbone.encoder.render(messages, add_generation_prompt=True))
    found: list[list[int]] = backbone.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    room, seen, out = backbone.encoder.max_length - sampling.max_new_tokens, Counter[int](), list[Prompt]()
    for name, tokens in zip(names, found, strict=True):
        if len(tokens) > room:
            raise UsageError(
                f"{name} has {len(tokens)} tokens; with max_new_tokens={sampling.max_new_tokens} that is more than "
                f"max_length={backbone.encoder.max_length}; shorten it, lower max_new_tokens or raise max_length"
            )
        text = digest(*tokens)
        out.append(Prompt(tokens, digest(text, seen[text]), name))
        seen[text] += 1
    return out


def open_model(model: str, backend: str, adapter: str | None, dtype: str, max_length: int | None) -> Backbone:
    """Config, tokenizer and chat template of a model; weights load later, if at all.

    Errors: `UsageError` for a model that cannot be read and for a dtype that does not exist.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype: {dtype!r} is not allowed.{nearest(dtype, DTYPES)} One of: {', '.join(DTYPES)}")
    import torch

    from llmselect.engine.backbone import Backbone

    if dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    # vLLM starts its own process for the device: this one must not hold it.
    return Backbone(model, adapter, dtype, max_length, device="cpu" if backend == "vllm" else None)


def _engine(backend: str, backbone: Backbone, batch_tokens: int | None) -> Backend:
    return BACKENDS[backend](backbone, batch_tokens)


def _check_ids(ids: Sequence[str], count: int) -> None:
    if len(ids) != count:
        raise UsageError(f"ids: {len(ids)} for {count} prompts; give one id a prompt")
    if twice := [one for one, times in Counter(ids).items() if times > 1]:
        raise UsageError(f"ids: {twice[0]!r} stands for several prompts; give every prompt an id of its own")


def _meta(backbone: Backbone, backend: str, sampling: Sampling, rows: Sequence[Prompt], ids: Sequence[str]) -> dict[str, Any]:
    """What the rows of a file depend on."""
    total = hashlib.sha256()
    for name, one in zip(ids, rows, strict=True):
        total.update(f"{json.dumps(name)}:{one.ids};".encode())
    return {
        "model": backbone.digest(), "template": backbone.encoder.fingerprint, "backend": backend,
        "dtype": str(backbone.dtype).removeprefix("torch."), "sampling": {**asdict(sampling), "stop": list(sampling.stop)},
        "prompts": {"rows": len(rows), "sha256": total.hexdigest()},
    }  # fmt: skip


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _claim(path: Path, meta: dict[str, Any]) -> bool:
    """Whether there is something left to do for `path`; a file of other origin is an error."""
    from llmselect.config import difference

    about = path.with_name(f"{path.name}.meta.json")
    if about.exists():
        if lines := difference(json.loads(about.read_text("utf-8")), meta):
            told = "\n  ".join(lines)
            raise LlmselectError(f"{path} was made from something else:\n  {told}\nDelete {about.name}, or write elsewhere.")
        return not path.exists()
    if path.exists() or _part(path).exists():
        raise LlmselectError(f"{path} exists and {about.name}, which says what from, does not; delete it or write elsewhere")
    atomic.write_json(about, meta)
    return True


def _resume(part: Path, ids: Sequence[str], chunk: int) -> int:
    """Rows that `part` holds in whole chunks; what follows them is cut off.

    A cut chunk is made again as a whole: its batches, and with them the last bits of its logits, stay the same.
    """
    if not part.exists():
        return 0
    lines = part.read_bytes().split(b"\n")[:-1]
    count = len(ids) if len(lines) == len(ids) else len(lines) // chunk * chunk
    for name, line in zip(ids, lines[:count], strict=False):
        if json.loads(line)["id"] != name:
            raise LlmselectError(f"{part} holds an answer to {json.loads(line)['id']!r} in place of {name!r}; delete it")
    with part.open("r+b") as file:
        file.truncate(sum(len(line) + 1 for line in lines[:count]))
    return count


def _line(name: str, answer: Generation) -> bytes:
    row = {"id": name, "text": answer.text, "tokens": len(answer.tokens), "finish": answer.finish}
    return json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n"


def _append(part: Path, lines: Sequence[bytes]) -> None:
    with part.open("ab") as file:
        file.write(b"".join(lines))
        file.flush()
        os.fsync(file.fileno())
