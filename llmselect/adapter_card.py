"""The README of an adapter: what was trained, on what, how; no licence is claimed, since that of the data decides."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmselect import atomic
from llmselect.plain import is_list, is_mapping, is_sequence


def card(key: Mapping[str, Any], settings: Mapping[str, Any], result: Mapping[str, Any], provenance: Mapping[str, Any],
         versions: Mapping[str, str]) -> str:  # fmt: skip
    """A Hub model card: YAML front matter and a table. Folders of this machine are named by their last part."""
    import yaml

    base = public(key["model"])
    head = yaml.safe_dump({"base_model": base, "library_name": "peft", "tags": ["llmselect", "lora", "sft"]})
    train = {k: v for k, v in key["train"].items() if k not in ("sft", "lora")}
    told = {
        "base model": base, "base weights": key["weights"], **provenance, "pool digest of the rows": key["rows"],
        "supervised tokens": result["tokens"], "steps": result["steps"], "epochs": result["epochs"],
        "training loss": round(result["train_loss"], 4), "seed": key["seed"], "dtype": key["dtype"],
        "max_length": key["max_length"], "train": train, **settings, "versions": versions,
    }  # fmt: skip
    values = {name: json.dumps(public(value), ensure_ascii=False) for name, value in told.items()}
    lines = [f"| {_cell(name)} | `{_cell(value)}` |" for name, value in values.items()]
    text = "Fine-tuned on the responses of rows chosen by llmselect. The licences of the base model and of the data apply."
    table = "\n".join(["| | |", "|---|---|", *lines])
    return f"---\n{head}---\n\n# LoRA adapter of {_cell(base)}\n\n{text}\n\n{table}\n"


def public(value: Any) -> Any:
    """`value` with every absolute or existing path in it cut to its last part."""
    if is_mapping(value):
        return {name: public(one) for name, one in value.items()}
    if is_sequence(value):
        return [public(one) for one in value]
    if not isinstance(value, str):
        return value
    local = value.startswith(("/", "~", "./", "../")) or ("/" in value and Path(value).exists())
    return Path(value).name if local else value


def _cell(text: object) -> str:
    """Text that can neither end a table cell or a code span, nor start HTML."""
    for old, new in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("`", "'"), ("\n", " "), ("\r", " ")):
        text = str(text).replace(old, new)
    return str(text)


def sort_modules(folder: Path) -> None:
    """Put the module names of `adapter_config.json` in order: PEFT writes a set, whose order changes between runs."""
    file = folder / "adapter_config.json"
    plain = json.loads(file.read_text("utf-8"))
    for name, value in plain.items():
        if is_list(value) and all(isinstance(one, str) for one in value):
            plain[name] = sorted(value)
    atomic.write_json(file, plain)
