"""Hours and bytes to expect, by pool and model size: what the passes take on this machine, and on one of given TFLOP/s.

    python eval/performance/outlook.py [--tflops 989] [--utilisation 0.4] [--tokens 400] [--out eval/results/performance]

A forward pass is taken as 2 FLOP per parameter of the model's body (embedding and LM head not counted) and token; attention
scores are left out, which at some hundred tokens a row are a few per cent. Features are counted in forwards as the benchmark
counts them (`llmselect.benchmark.costs`): forward and backward 3, times the checkpoints; influence 3 per target. Hours are
those of one GPU: n processes take n-ths. Bytes are what the extractors declare per row (`Extractor.arrays`). Measured here: one
matrix product and a plain forward of a small model, the floor of every pass.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from llmselect import atomic
from llmselect.benchmark import costs
from llmselect.engine.backbone import Backbone
from llmselect.extractors import Embedding, Gradient, Influence, Loss, Ngram, Sae, Trajectory, Trim

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "recipes/quickstart/assets/model"
MODELS = {  # published configurations; only their sizes are used
    "SmolLM2-135M": ("llama", 576, 1536, 30, 9, 3, 49152),
    "Qwen2.5-1.5B": ("qwen2", 1536, 8960, 28, 12, 2, 151936),
    "Llama-3.1-8B": ("llama", 4096, 14336, 32, 32, 8, 128256),
    "Llama-3.1-70B": ("llama", 8192, 28672, 80, 64, 8, 128256),
}
POOLS = (15_000, 100_000, 1_000_000)
GROUPS = ["a", "b", "c"]  # targets
SHARE = 0.6  # of a row's tokens that are response
EXPANSION, FIRING = 8, 32  # of the SAE, the defaults of `sae:`


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    tflops: float | None
    utilisation: float
    tokens: int
    out: Path | None


class PlannedSae(Sae):
    """An SAE feature whose SAE has not been trained yet: its width follows from `sae:`."""

    def _sae(self) -> Any:
        return SimpleNamespace(cfg=SimpleNamespace(d_in=self.max_length, d_sae=EXPANSION * (self.max_length or 0)))


def arguments() -> Arguments:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, help="dense peak of the GPU in the dtype used, e.g. 989 for an H100 in bfloat16")
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of it that a pass reaches; an assumption")
    parser.add_argument("--tokens", type=int, default=400, help="tokens of a row, mean")
    parser.add_argument("--out", type=Path, help="folder for outlook.md and outlook.json")
    return Arguments(**vars(parser.parse_args()))


def body(name: str) -> int:
    """Parameters of a model's blocks and norms, counted on a model without storage."""
    from transformers import AutoConfig, AutoModel

    kind, width, mlp, blocks, heads, kv, vocabulary = MODELS[name]
    config = AutoConfig.for_model(kind, hidden_size=width, intermediate_size=mlp, num_hidden_layers=blocks, vocab_size=vocabulary,
                                  num_attention_heads=heads, num_key_value_heads=kv)  # fmt: skip
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    return sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()


def features(folder: Path) -> dict[str, list[Any]]:
    """What is counted together: the features of a pass."""
    for step in range(16):
        place = folder / f"checkpoints/{step:05d}"
        place.mkdir(parents=True)
        (place / "adapter_config.json").write_text("{}")
    return {
        "rds+ and trim (one pass)": [Embedding(), Trim()],
        "loss, with and without prompt": [Loss()],
        "sae": [PlannedSae()],
        "LESS: gradient, 4 checkpoints": [Gradient(mode="base")] * 4,
        "gradient, no warm-up": [Gradient(mode="base")],
        "influence, 3 targets": [Influence()],
        "trajectory, 16 checkpoints": [Trajectory(checkpoints=str(folder))],
        "ngram": [Ngram()],
    }


def bytes_of(made: Any, backbone: Any, tokens: int) -> float:
    """Bytes per row from the arrays that an extractor declares; of sparse ones the most that a row can hold."""
    if isinstance(made, Sae):
        made = PlannedSae(max_length=backbone.hidden_size)
    total = 0.0
    for dtype, shape in made.arrays(backbone, GROUPS).values():
        if dtype.startswith("csr:"):
            held = 1.5 * tokens if made.name == "ngram" else FIRING * tokens  # two n-grams a word of 4/3 tokens
            total += min(shape[0], held) * (4 + np.dtype(dtype[4:]).itemsize)
        else:
            total += math.prod(shape) * np.dtype(dtype).itemsize
    return total


def forwards(members: list[Any]) -> float:
    """Forward passes over the pool, as the benchmark counts them; features of one pass share their forwards."""
    sizes = {"tokens.supervised": np.array([SHARE]), "tokens.total": np.array([1.0])}
    made = members[0]
    warmup = SimpleNamespace(train=SimpleNamespace(checkpoints=16))
    recipe = SimpleNamespace(warmup=warmup, extractor=lambda name: made)
    one = costs.forwards(SimpleNamespace(recipe=recipe, store=sizes), "x") if made.views() else 0.0  # type: ignore[arg-type]
    if isinstance(made, Influence):
        one *= len(GROUPS)  # a derivative along each target
    return one * (len(members) if made.alone else 1)


def measured() -> dict[str, float]:
    """FLOP/s of a matrix product, and of a forward by the formula above, on this machine's first device."""
    from transformers import LlamaConfig, LlamaModel

    cuda = torch.cuda.is_available()
    device, dtype, n, rows = ("cuda", torch.bfloat16, 8192, 64) if cuda else ("cpu", torch.float32, 1536, 4)
    a = torch.randn(n, n, device=device, dtype=dtype)
    gemm = 2 * n**3 / timed(lambda: a @ a, cuda)
    config = LlamaConfig(hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12,
                         num_key_value_heads=12, vocab_size=256, attn_implementation="sdpa")  # fmt: skip
    model = LlamaModel(config).to(device, dtype).eval()
    ids = torch.randint(256, (rows, 256), device=device)
    size = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    with torch.inference_mode():
        forward = 2 * size * ids.numel() / timed(lambda: model(ids, use_cache=False), cuda)
    return {"gemm": gemm, "forward": forward}


def timed(work: Any, cuda: bool, repeats: int = 5) -> float:
    """Median seconds, after one run that is not counted."""
    spent = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - start)
    return statistics.median(spent[1:])


def cells(tokens: int) -> list[dict[str, Any]]:
    """FLOP and bytes of every feature set, pool and model."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        sets = features(Path(folder))
        quick = Backbone(str(QUICKSTART))
        for model, (_, width, *_) in MODELS.items():
            size = body(model)
            for name, members in sets.items():
                stand_in = quick if isinstance(members[0], Gradient) else SimpleNamespace(hidden_size=width, layer=int)
                room = sum(bytes_of(made, stand_in, tokens) for made in members)
                flop = forwards(members) * 2 * size * tokens
                found += [{"model": model, "body": size, "features": name, "forwards": forwards(members), "rows": rows,
                           "flop": flop * rows, "bytes": room * rows} for rows in POOLS]  # fmt: skip
    return found


def table(found: list[dict[str, Any]], speed: float, largest: float = math.inf) -> str:
    """Markdown: features and pools down, models of a body up to `largest` across."""
    models = list(dict.fromkeys(one["model"] for one in found if one["body"] <= largest))
    lines = ["| features | forwards | rows | " + " | ".join(models) + " |", "|---|---|---|" + "---|" * len(models)]
    keyed = {(one["features"], one["rows"], one["model"]): one for one in found}
    for name in dict.fromkeys(one["features"] for one in found):
        for rows in POOLS:
            across = [keyed[name, rows, model] for model in models]
            told = " | ".join(f"{span(one['flop'] / speed)} · {size(one['bytes'])}" for one in across)
            lines.append(f"| {name} | {across[0]['forwards']:g} | {rows:,} | {told} |")
    return "\n".join(lines)


def span(seconds: float) -> str:
    """Minutes, hours or days; a dash for no pass of a model."""
    if seconds < 60:
        return "–" if seconds == 0 else "< 1 min"
    if seconds < 3600:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h" if seconds < 100 * 3600 else f"{seconds / 86400:,.0f} days"


def size(count: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            break
        count, unit = count / 1000, {"B": "kB", "kB": "MB", "MB": "GB", "GB": "TB"}[unit]
    return f"{count:.3g} {unit}"


def document(found: list[dict[str, Any]], speed: dict[str, float], a: Arguments) -> str:
    """The page."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads, float32"
    ratio = speed["forward"] / speed["gemm"]
    parts = [
        "# Hours and bytes to expect\n",
        "Written by `python eval/performance/outlook.py --tflops T --out eval/results/performance`. **Arithmetic from a measured "
        "or given speed, not runs of these models.** `llmselect run RECIPE --dry-run` measures your pool on your machine.\n",
        f"Assumed: rows of {a.tokens} tokens, {SHARE:.0%} of them response; a forward is 2 FLOP per parameter of the body and "
        "token; no time for loading, tokenising or padding. Forward and backward count 3, as in the benchmark, an upper bound "
        "for `gradient`, which makes no weight gradients. Hours are of one device: n processes take n-ths. Bytes are those that "
        f"the extractors declare; of sparse features the most a row can hold ({FIRING} latents a token of an SAE of {EXPANSION} "
        "× the width; 1.5 n-grams a token). Warm-ups and the training of an SAE are not counted.\n",
        f"Measured on {device}: a matrix product {speed['gemm'] / 1e9:,.0f} GFLOP/s, a plain forward of a small model "
        f"{speed['forward'] / 1e9:,.0f} GFLOP/s ({ratio:.0%} of it).\n",
    ]
    if a.tflops:
        parts += [f"## {a.tflops:g} TFLOP/s at {a.utilisation:.0%}\n", "The peak is given, the utilisation assumed.\n",
                  table(found, a.tflops * 1e12 * a.utilisation) + "\n"]  # fmt: skip
    parts += ["## This machine\n", "At the measured speed of the forward; models of up to 2 · 10⁹ parameters.\n",
              table(found, speed["forward"], 2e9) + "\n"]  # fmt: skip
    return "\n".join(parts)


def main() -> None:
    a = arguments()
    found, speed = cells(a.tokens), measured()
    text = document(found, speed, a)
    print(text)
    if a.out:
        told = {"speed": speed, "tokens": a.tokens, "tflops": a.tflops, "utilisation": a.utilisation, "cells": found}
        atomic.write_text(a.out / "outlook.md", text)
        atomic.write_json(a.out / "outlook.json", told)


if __name__ == "__main__":
    main()
