"""Share of the device's arithmetic that the passes use, on a model of 1B shape with random weights.

    python eval/performance/utilisation.py [--rows 64] [--length 512] [--batch-tokens 32768] [--repeats 5] [--peak TFLOPS]
    python eval/performance/utilisation.py --blocks 2 --rows 4 --length 256 --batch-tokens 1024    # on a CPU

Utilisation is the model's FLOPs over seconds, over the peak. FLOPs: 2 a weight and token in a forward, as many again in a
backward to activations (weights are frozen), causal attention over half of T², the LM head at responses. The peak is that of
the fastest square product of the model's dtype, measured in the same run, or `--peak`, what the vendor states. A feature's own
products (statistics, projection) do not count as useful: its figure is below its floor's by what it costs.

Shape: width 2048, 16 blocks, 32 heads of which 8 keys, inner width 8192, vocabulary 128256, as Llama 3.2 1B; `--blocks` takes
fewer. Token ids are random, the second half of a row is response.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gradients import synthetic

from llmselect.engine import gradients
from llmselect.engine.backbone import Backbone
from llmselect.engine.batch import Batch
from llmselect.engine.passes import Pass
from llmselect.engine.projection import Projection
from llmselect.extractors import Embedding, Loss

SHAPE = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8,
         "head_dim": 64, "vocab_size": 128_256, "tie_word_embeddings": True, "max_position_embeddings": 4096}  # fmt: skip
SIZES = (1024, 2048, 4096, 8192, 16384)
Work = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"rows": 64, "length": 512, "batch-tokens": 32_768, "blocks": 16, "repeats": 5, "dim": 8192}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device; measured where not given")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        backbone = random_model(Path(folder), a.blocks)
        step = max(1, a.batch_tokens // a.length)
        batches = [synthetic(backbone, min(step, a.rows - start), a.length) for start in range(0, a.rows, step)]
        peak = a.peak * 1e12 if a.peak else fastest_product(backbone)
        found = {"device": device(backbone), "dtype": str(backbone.dtype), "torch": torch.__version__, "blocks": a.blocks,
                 "parameters": sum(p.numel() for p in backbone.causal_lm.parameters()), "tokens": a.rows * a.length,
                 "length": a.length, "batch_tokens": a.batch_tokens, "repeats": a.repeats,
                 "peak_tflops": round(peak / 1e12, 3), "peak": "stated" if a.peak else "measured"}  # fmt: skip
        found["utilisation"] = {**forward(backbone, batches, peak, a.repeats), **backward(backbone, batches, peak, a)}
    print(json.dumps(found, indent=2))
    if a.out:
        a.out.write_text(json.dumps(found, indent=2) + "\n")


def random_model(folder: Path, blocks: int) -> Backbone:
    """A Llama of `SHAPE`, saved with a tokenizer of a few words: nothing here reads text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    config: Any = LlamaConfig(**SHAPE, num_hidden_layers=blocks)
    torch.manual_seed(0)
    made: Any = LlamaForCausalLM(config)
    made.to(torch.bfloat16).save_pretrained(folder)
    return Backbone(str(folder))


def forward(backbone: Backbone, batches: list[Batch], peak: float, repeats: int) -> dict[str, Any]:
    """The body alone, RDS+, and the loss with its LM head over responses."""
    path = backbone.path
    run = Pass(backbone, {"rds+": Embedding(model=path), "loss": Loss(model=path, without_prompt=False)}, {}, {})

    def body() -> None:
        for batch in batches:
            backbone.states(batch.ids, batch.mask, (-1,))

    def feature(name: str) -> Work:
        def work() -> None:
            for batch in batches:
                run._rows(fresh(batch), [name])

        return work

    linear, attention, head = flops_of(backbone, batches)
    found = {"forward of the body": share(body, linear + attention, peak, repeats)}
    found["rds+"] = share(feature("rds+"), linear + attention, peak, repeats)
    return {**found, "loss": share(feature("loss"), linear + attention + head, peak, repeats)}


def backward(backbone: Backbone, batches: list[Batch], peak: float, a: argparse.Namespace) -> dict[str, Any]:
    """Backward to activations, and per-row gradient features of all linear layers."""
    layers = gradients.choose(backbone, ".")
    projection = Projection(layers, k=16, dim=a.dim, seed=0, device=backbone.device)

    def activations() -> None:
        for batch in batches:
            gradients.row_gradients(backbone, fresh(batch), layers, lambda name, a: a, lambda name, a, g: None)

    def features() -> None:
        for batch in batches:
            projection.start(len(batch.ids), None)
            gradients.row_gradients(backbone, fresh(batch), layers, projection.reduce, projection.sink)

    linear, attention, head = flops_of(backbone, batches)
    flops = 2 * linear + 3 * attention + 2 * head
    return {"backward to activations": share(activations, flops, peak, a.repeats),
            "gradient features, k = 16": share(features, flops, peak, a.repeats)}  # fmt: skip


def fresh(batch: Batch) -> Batch:
    """The batch without what was computed from it."""
    return Batch(batch.backbone, batch.ids, batch.mask, batch.response, batch.content, batch.cut)


def flops_of(backbone: Backbone, batches: list[Batch]) -> tuple[float, float, float]:
    """FLOPs of a forward: of the weights in blocks, of causal attention, of the LM head at responses."""
    weights = sum(p.numel() for module in backbone.blocks.modules() if isinstance(module, torch.nn.Linear)
                  for p in module.parameters(recurse=False))  # fmt: skip
    tokens = sum(batch.ids.numel() for batch in batches)
    pairs = sum(batch.ids.shape[0] * batch.ids.shape[1] ** 2 / 2 for batch in batches)
    width = SHAPE["num_attention_heads"] * SHAPE["head_dim"]
    responses = sum(int(batch.response.sum()) for batch in batches)
    head = 2 * SHAPE["vocab_size"] * SHAPE["hidden_size"] * responses
    return 2.0 * weights * tokens, 4.0 * width * pairs * backbone.depth, float(head)


def share(work: Work, flops: float, peak: float, repeats: int) -> dict[str, float]:
    """FLOPs a second over the peak: median and range."""
    work()
    rates = [flops / timed(work) / peak for _ in range(repeats)]
    return {"median": round(statistics.median(rates), 3), "min": round(min(rates), 3), "max": round(max(rates), 3),
            "tflop": round(flops / 1e12, 3)}  # fmt: skip


def fastest_product(backbone: Backbone) -> float:
    """FLOPs a second of the fastest square product of the model's dtype."""
    best = 0.0
    for size in SIZES if backbone.device.type == "cuda" else SIZES[:3]:
        x, y = (torch.randn(size, size, device=backbone.device, dtype=backbone.dtype) for _ in range(2))
        torch.mm(x, y)
        best = max(best, *(2 * size**3 / timed(lambda x=x, y=y: torch.mm(x, y)) for _ in range(10)))
    return best


def timed(work: Work) -> float:
    """Seconds, with what a GPU was asked for done."""
    sync = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    sync()
    start = time.perf_counter()
    work()
    sync()
    return time.perf_counter() - start


def device(backbone: Backbone) -> str:
    """Its name, and on a CPU the number of threads."""
    if backbone.device.type == "cuda":
        return torch.cuda.get_device_name(backbone.device)
    return f"CPU, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
