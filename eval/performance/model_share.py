"""The share of a run's wall time that the models compute, stage by stage: the rest is what llmselect itself costs.

    python eval/performance/model_share.py RECIPE [key=value …] [--out FILE]

Runs the recipe in a temporary folder. Counted as the model's: everything inside the outermost call of a torch module, which
includes the statistics that are taken there, and backward passes and gradients. Not counted: reading, tokenising, hashing,
batching, projections and sums after a pass, writing, the optimizer, and loading the model.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules import module as hooks

from llmselect import atomic
from llmselect.comparison import evaluate_stage, train_stage
from llmselect.prepare import prepare
from llmselect.recipe import load_recipe
from llmselect.stages import Run, extract_stage, select_stage

STAGES = {"prepare": prepare, "extract": extract_stage, "select": select_stage, "train": train_stage, "evaluate": evaluate_stage}


class Clock:
    """Seconds inside the outermost of nested blocks."""

    def __init__(self) -> None:
        self.depth, self.begun, self.seconds = 0, 0.0, 0.0

    def enter(self, *_: Any) -> None:
        if not self.depth:
            self.begun = time.perf_counter()
        self.depth += 1

    def leave(self, *_: Any) -> None:
        self.depth -= 1
        if not self.depth:
            self.seconds += time.perf_counter() - self.begun

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, counted."""

        def counted(*args: Any, **options: Any) -> Any:
            self.enter()
            try:
                return call(*args, **options)
            finally:
                self.leave()

        return counted


@contextmanager
def counting(clock: Clock) -> Iterator[None]:
    """Count the calls of modules and of autograd in the block."""
    handles = [hooks.register_module_forward_pre_hook(clock.enter),
               hooks.register_module_forward_hook(clock.leave, always_call=True)]  # fmt: skip
    kept = torch.autograd.backward, torch.autograd.grad
    torch.autograd.backward, torch.autograd.grad = (clock.around(call) for call in kept)
    try:
        yield
    finally:
        torch.autograd.backward, torch.autograd.grad = kept
        for handle in handles:
            handle.remove()


def measured(recipe: Any) -> dict[str, dict[str, float]]:
    """Stage → wall seconds and seconds of models."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    run = Run(recipe)
    for name, stage in STAGES.items():
        clock = Clock()
        start = time.perf_counter()
        with counting(clock):
            stage(run)
        found[name] = {"wall": round(time.perf_counter() - start, 2), "model": round(clock.seconds, 2)}
    found["all"] = {key: round(sum(one[key] for one in found.values()), 2) for key in ("wall", "model")}
    return dict(found)


def table(found: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    lines = ["| stage | wall s | model s | share |", "|---|---:|---:|---:|"]
    for name, one in found.items():
        lines.append(f"| {name} | {one['wall']:.1f} | {one['model']:.1f} | {one['model'] / max(one['wall'], 1e-9):.0%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--out", type=Path, help="JSON of the figures")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="llmselect-model-share-") as scratch:
        found = measured(replace(load_recipe(a.recipe, a.overrides), out=scratch))
    print(table(found))
    if a.out:
        atomic.write_text(a.out, json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
