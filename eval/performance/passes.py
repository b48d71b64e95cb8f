"""How much the feature passes cost beyond a plain forward of the model body over the same batches.

    python eval/performance/passes.py --model DIR --pool FILE --target FILE [--rows 384] [--repeats 9]

Paired in one process, interleaved; the figure is the median of the ratios with its range. The floor of `sae` is the
forward up to the layer it reads; the floor of `trim + rds+ + sae + loss` is the forward of the body and the LM-head loss
of the responses. The SAE has random weights (cost does not depend on them), 8 latents per number of the state.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from llmselect.engine.backbone import Backbone
from llmselect.engine.batch import collate, plan
from llmselect.engine.passes import Pass, fit
from llmselect.extractors import Embedding, Loss, Sae, Trim
from llmselect.pool import load_pool
from llmselect.sae.load import hook_of

TOGETHER = "trim + rds+ + sae + loss"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pool", required=True)
    parser.add_argument("--target", required=True)
    parser.add_argument("--rows", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--depth", type=int, help="random weights with this many blocks instead of the model's own")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    a = arguments()
    pool = load_pool(a.pool, limit=a.rows)
    target = load_pool(a.target, group="target", limit=10)
    a.model = deeper(a.model, a.depth) if a.depth else a.model
    backbone = Backbone(a.model, max_length=512)
    features = {"trim": Trim(model=a.model), "rds+": Embedding(model=a.model), "sae": random_sae(backbone),
                "loss": Loss(model=a.model, without_prompt=False)}  # fmt: skip
    run = Pass(backbone, features, {}, {}, ["target"], a.batch_tokens)
    fit(run, target)
    encoded = backbone.encoder.encode(list(pool["messages"]))
    batches = plan([len(row.ids) for row in encoded], a.batch_tokens)
    layer = int(run.states["sae"]["layer"])

    def plain(layers: tuple[int, ...] = (-1,), head: bool = False) -> None:
        for rows in batches:
            batch = collate(backbone, [encoded[i] for i in rows])
            states = backbone.states(batch.ids, batch.mask, layers)
            if head:
                row, at = batch.response[:, 1:].nonzero(as_tuple=True)
                logits = backbone.causal_lm.get_output_embeddings()(states[backbone.depth][row, at])
                torch.nn.functional.cross_entropy(logits.float(), batch.ids[row, at + 1])

    def with_feature(names: list[str]) -> None:
        for rows in batches:
            wanted = {at for name in names for at in features[name].layers(run.states.get(name, {}))}
            run._rows(collate(backbone, [encoded[i] for i in rows], tuple(sorted(wanted))), names)

    arms = {name: [name] for name in features} | {"trim + rds+": ["trim", "rds+"], TOGETHER: list(features)}
    floors = {"sae": lambda: plain((layer,)), TOGETHER: lambda: plain(head=True)}
    plain()
    work = {name: (floors.get(name, plain), lambda names=names: with_feature(names)) for name, names in arms.items()}
    ratios = paired(work, a.repeats)
    tokens = sum(len(row.ids) for row in encoded)
    padding = sum(len(b) * len(encoded[b[0]].ids) for b in batches) / tokens - 1
    found = {"rows": len(encoded), "tokens": tokens, "threads": torch.get_num_threads(), "device": str(backbone.device),
             "batch_tokens": a.batch_tokens, "repeats": a.repeats, "blocks": backbone.depth, "padding": round(padding, 4),
             "ratio_to_plain_forward": ratios}  # fmt: skip
    report(found, a.out)


def report(found: dict, out: Path | None) -> None:
    """Print what was measured, and keep it where asked."""
    text = json.dumps(found, indent=2)
    print(text)
    if out:
        out.write_text(text + "\n")


def paired(arms: dict, repeats: int) -> dict[str, dict[str, float]]:
    """Median and range of the ratios of (floor, work), each pair timed one after the other."""
    ratios: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, (floor, work) in arms.items():
            base = timed(floor)
            ratios[name].append(timed(work) / base)
    return {name: {"median": round(statistics.median(r), 3), "min": round(min(r), 3), "max": round(max(r), 3)}
            for name, r in ratios.items()}  # fmt: skip


def deeper(model: str, depth: int) -> str:
    """A model of the same widths and tokenizer with `depth` blocks of random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tempfile.mkdtemp()
    config = AutoConfig.from_pretrained(model)
    config.num_hidden_layers, config.layer_types = depth, None
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def random_sae(backbone: Backbone) -> Sae:
    """A TopK SAE of the last block but one."""
    import sae_lens

    config = sae_lens.TopKSAEConfig(d_in=backbone.hidden_size, d_sae=8 * backbone.hidden_size, k=32)
    config.metadata.hook_name, folder = hook_of(backbone.depth - 1), tempfile.mkdtemp()
    sae_lens.TopKSAE(config).save_model(folder)
    return Sae(model=backbone.path, sae=folder, layer=backbone.depth - 1, max_fvu=None)


def timed(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    np.seterr(all="raise")
    main()
