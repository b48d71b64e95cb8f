"""The adapters of a run as one model repository: a folder per method and seed, without a folder of this machine in it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llmselect
from llmselect import atomic
from llmselect.errors import LlmselectError, UsageError
from llmselect.hub import card
from llmselect.hub.origin import check_id, clean
from llmselect.recipe import looks_like_path
from llmselect.train import CHECKPOINTS


def base_of(path: str, base_model: str | None) -> str:
    """The Hub id of the model that the adapters belong to. Errors: `UsageError` if it is a folder and none was given."""
    if base_model is not None:
        return check_id(base_model, "--base-model")
    if looks_like_path(path):
        raise UsageError(f"--adapters: the base model is the folder {path}, which nobody else has; "
                         "give its id on the Hub: --base-model OWNER/NAME")  # fmt: skip
    return path


def files(run: Path, methods: Sequence[str] | None, base: str, repo: str, dataset: str, sources: Sequence[str],
          scratch: Path) -> dict[str, Path]:  # fmt: skip
    """The files of the model repository: weights as they are, settings with the public name of the base model, a card.

    Errors: `UsageError` when there are no adapters; `LlmselectError` naming a damaged one.
    """
    found: dict[str, Path] = {}
    told = list[dict[str, Any]]()
    for folder in _folders(run, methods):
        place = f"{folder.parent.name}/{folder.name}"
        made = _public(folder, base, scratch / "adapters" / place)
        found |= {f"{place}/{name}": file for name, file in made.items()}
        about = json.loads(made["train.json"].read_text("utf-8"))
        result = about["result"]
        told.append({"folder": place, "method": folder.parent.name, "rows": about["provenance"].get("rows"),
                     "tokens": result["tokens"], "steps": result["steps"], "epochs": result["epochs"],
                     "loss": round(result["train_loss"], 4), "seed": about["key"]["seed"]})  # fmt: skip
    if not told:
        raise UsageError(f"{run} has no adapters; train them first: llmselect train {run / 'config.yaml'}")
    head = {"base_model": base, "library_name": "peft", "pipeline_tag": "text-generation",
            "datasets": list(dict.fromkeys([dataset, *sources])), "tags": ["llmselect", "lora", "sft"]}  # fmt: skip
    readme = scratch / "adapters" / "README.md"
    atomic.write_text(readme, card.render(card.MODEL, head, name=repo.split("/")[-1], repo=repo, base=base,
                                          adapters=told, version=llmselect.__version__))  # fmt: skip
    pins = {"llmselect": llmselect.__version__, "base_model": base, "dataset": dataset,
            "sha256": {name: atomic.sha256_file(file) for name, file in sorted(found.items())}}  # fmt: skip
    manifest = scratch / "adapters" / "llmselect.json"
    atomic.write_json(manifest, pins)
    return {**found, "llmselect.json": manifest, "README.md": readme}


def _folders(run: Path, methods: Sequence[str] | None) -> Iterator[Path]:
    for file in sorted(run.glob("adapters/*/seed-*/train.json")):
        if methods is None or file.parent.parent.name in methods:
            yield file.parent


def _public(folder: Path, base: str, scratch: Path) -> dict[str, Path]:
    """The files of one adapter that may leave: its own card and checkpoints stay, two settings files are rewritten."""
    about = json.loads((folder / "train.json").read_text("utf-8"))
    kept: dict[str, Path] = {}
    for name, digest in about["sha256"].items():
        if not (folder / name).exists() or atomic.sha256_file(folder / name) != digest:
            raise LlmselectError(f"{folder / name} is damaged or missing; delete {folder} and run again")
        if name.split("/")[0] not in (CHECKPOINTS, "README.md"):
            kept[name] = folder / name
    settings = clean(json.loads((folder / "adapter_config.json").read_text("utf-8")))
    kept["adapter_config.json"] = scratch / "adapter_config.json"
    atomic.write_json(kept["adapter_config.json"], {**settings, "base_model_name_or_path": base})
    told = clean({**about, "sha256": {name: atomic.sha256_file(file) for name, file in sorted(kept.items())}})
    told["key"]["model"] = base
    kept["train.json"] = scratch / "train.json"
    atomic.write_json(kept["train.json"], told)
    return kept
