"""What latents of a run's sparse autoencoder fire on."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from llmselect.errors import UsageError
from llmselect.selection import Selection

if TYPE_CHECKING:
    from llmselect.stages import Run


def describe_latents(run: Run, latents: str | None, rows: int) -> list[dict[str, Any]]:
    """What latents of the run's `sae` feature fire on: those named, or the ones that decided most picks."""
    from llmselect.engine.backbone import Backbone
    from llmselect.sae import describe, load

    made: dict[str, Any] = {name: run.recipe.extractor(name) for name in run.recipe.features}
    name = next((name for name, one in made.items() if one.name == "sae"), None)
    if name is None:
        raise UsageError(f"the recipe has no feature with extractor: sae; its features: {list(made)}")
    if latents is None:
        wanted = _deciding(run)
    elif all(part.strip().isdigit() for part in latents.split(",")):
        wanted = [int(part) for part in latents.split(",")]
    else:
        raise UsageError(f"--latents {latents}: give numbers, e.g. --latents 12,845")
    x: Any = run.store[name]
    model = run.recipe.model
    if wrong := [latent for latent in wanted if latent >= x.shape[1]]:
        raise UsageError(f"--latents: {wrong[0]} is not one of 0 … {x.shape[1] - 1}")
    backbone = Backbone(model.path, None, model.dtype, model.max_length)
    layer = int(run.store.fitted(name)["layer"])
    sae = load.load(made[name].sae, made[name].sae_id, str(backbone.device))
    return describe.describe(run.pool, x, sae, backbone, layer, wanted, rows)


def _deciding(run: Run, count: int = 8) -> list[int]:
    """The latents that come first in the evidence of most rows that MONA picked."""
    votes: Counter[int] = Counter()
    for file in sorted((run.folder / "selections").glob("*/*/selection.json")):
        evidence = Selection.load(file.parent).evidence
        if "latent" in evidence:
            votes.update(int(latent) for latent in evidence["latent"][:, 0] if latent >= 0)
    if not votes:
        raise UsageError("this run has no MONA selection yet; run it first, or name --latents")
    return [latent for latent, _ in votes.most_common(count)]
