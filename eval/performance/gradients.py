"""Speed of gradient features, as ratios measured in one process.

    python eval/performance/gradients.py --model DIR [--length 128] [--batch 16] [--repeats 7]

Random token ids, half of each row prompt, half response. Each arm is timed against, just before it:

- `training`: forward and backward of the same batch as a trainer runs it (logits everywhere): of all weights for mode
  base, of the adapter (on q, k, v, o) for mode lora;
- `activations`: forward and backward to activations only with logits at responses: the floor of any such method;
- `one by one` (lora r = 128 only): a row at a time, gradient flattened and projected densely to `dim`, as in the
  published code of LESS; the random matrix is made once and not counted.

A ratio is speed (rows a second) relative to that floor. Memory: the growth of the peak over the loaded model, relative
to that of training; on a CPU each in a fresh process (resident memory), with four times the rows so that it shows.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmselect.engine import gradients, moments
from llmselect.engine.backbone import Backbone
from llmselect.engine.batch import Batch
from llmselect.engine.projection import Projection


def synthetic(backbone: Backbone, rows: int, length: int) -> Batch:
    """Rows of random tokens, the second half supervised."""
    ids = torch.from_numpy(np.random.default_rng(0).integers(5, backbone.text_config.vocab_size, (rows, length)))
    response = torch.zeros(rows, length, dtype=torch.bool)
    response[:, length // 2 :] = True
    whole = torch.ones_like(response)
    tensors = [t.to(backbone.device) for t in (ids, whole, response, whole.to(torch.int8), torch.zeros(rows, 2).long())]
    return Batch(backbone, *tensors)


class Arm:
    """One way of computing features and the floors beside it."""

    def __init__(self, model: str, mode: str, size: int, dim: int, rows: int, length: int):
        self.backbone = Backbone(model, max_length=length)
        self.batch = synthetic(self.backbone, rows, length)
        pattern, k = ".", size
        if mode == "lora":
            moments.activate(self.backbone, moments.fresh(self.backbone, size, 0, "q_proj|k_proj|v_proj|o_proj")[0])
            for name, parameter in self.backbone.causal_lm.named_parameters():
                if "lora_B" in name:  # as after a warm-up: a zero B would spare work
                    torch.nn.init.normal_(parameter, std=0.01)
            pattern, k = r"lora_[AB]\.", None
        self.layers = gradients.choose(self.backbone, pattern)
        self.trained = list({id(p): p for layer in self.layers.values() for p in layer.parameters()}.values())
        self.projection = Projection(self.layers, k=k, dim=dim, seed=0, device=self.backbone.device)
        self.moments = self._state() if mode == "lora" else None

    def _state(self) -> moments.Moments:
        shapes = {self.projection.known[name]: layer.weight for name, layer in self.layers.items()}
        first = {name: torch.randn_like(w) * 1e-3 for name, w in shapes.items()}
        return moments.Moments(first, {name: m.square() + 1e-8 for name, m in first.items()}, 100)

    def features(self) -> None:
        self.projection.start(len(self.batch.ids), self.moments)
        gradients.row_gradients(self.backbone, self.batch, self.layers, self.projection.reduce, self.projection.sink)

    def activations(self) -> None:
        gradients.row_gradients(self.backbone, self.batch, self.layers, lambda name, a: a, lambda name, a, g: None)

    def training(self, rows: slice = slice(None), parameters: Any = None) -> torch.Tensor | None:
        for p in self.trained:
            p.requires_grad_(True)
        labels = self.batch.ids[rows].masked_fill(~self.batch.response[rows], -100)
        loss = self.backbone.causal_lm(input_ids=self.batch.ids[rows], labels=labels, use_cache=False).loss
        found = torch.autograd.grad(loss, self.trained)
        for p in self.trained:
            p.requires_grad_(False)
        return torch.cat([g.flatten() for g in found]) if parameters else None

    def one_by_one(self, dim: int, block: torch.Tensor) -> None:
        for i in range(len(self.batch.ids)):
            flat = self.training(slice(i, i + 1), parameters=True)
            assert flat is not None
            out = torch.zeros(dim, device=flat.device)
            for start in range(0, len(flat), len(block)):
                part = flat[start : start + len(block)]
                out += part @ block[: len(part)]


def memory(a: argparse.Namespace, mode: str, size: int) -> float:
    """Growth of the peak while features are made, over that of training."""
    grown = {}
    for what in ("features", "training"):
        shape = [a.model, mode, size, a.dim, 4 * a.batch, a.length, what]
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import gradients; gradients.growth(*{shape!r})"
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        grown[what] = int(done.stdout.split()[-1])
    return round(grown["features"] / grown["training"], 3)


def growth(model: str, mode: str, size: int, dim: int, rows: int, length: int, what: str) -> None:
    """Print by how many bytes the peak memory grows, in a process that does nothing else."""
    arm = Arm(model, mode, size, dim, rows, length)
    assert arm.backbone.causal_lm is not None
    cuda = arm.backbone.device.type == "cuda"
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    before = torch.cuda.memory_allocated() if cuda else resident
    getattr(arm, what)()
    after = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(after - before)


def timed(arm: Arm, work: Any) -> float:
    def wait() -> None:
        if arm.backbone.device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def measure(arm: Arm, floors: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Speed relative to each floor: median and range of paired ratios."""
    found = {}
    for name, floor in floors.items():
        floor(), arm.features()
        ratios = [timed(arm, floor) / timed(arm, arm.features) for _ in range(repeats)]
        found[name] = {"median": round(statistics.median(ratios), 2), "min": round(min(ratios), 2), "max": round(max(ratios), 2)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    for name, default in (("length", 128), ("batch", 16), ("repeats", 7), ("dim", 8192)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    found: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "length": a.length,
                             "batch": a.batch, "dim": a.dim, "repeats": a.repeats, "speed": {}}  # fmt: skip
    for mode, size in (("base", 64), ("base", 16), ("lora", 8), ("lora", 128)):
        arm = Arm(a.model, mode, size, a.dim, a.batch, a.length)
        floors = {"training": arm.training, "activations": arm.activations}
        name = f"{mode} {'k' if mode == 'base' else 'r'} = {size}"
        found["speed"][name] = measure(arm, floors, a.repeats) | {"memory": memory(a, mode, size)}
        if (mode, size) == ("lora", 128):
            block = torch.randint(0, 2, (4096, a.dim), device=arm.backbone.device).float() * 2 - 1
            found["speed"][name] |= measure(arm, {"one by one": lambda arm=arm, b=block: arm.one_by_one(a.dim, b)}, 1)
        found["device"] = str(arm.backbone.device)
    print(json.dumps(found, indent=2))
    if a.out:
        a.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
