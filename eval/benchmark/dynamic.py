"""Schedules that choose other rows every epoch, against all rows and a fixed half, on one model and pool.

    python eval/benchmark/dynamic.py --model DIR --pool FILE --targets DIR [--rows 300] [--epochs 6] [--seeds 0 1 2]

Fine-tunes LoRA adapters on random rows of the pool for the same number of epochs, the learning rate planned for what each
schedule sees. A seed draws the rows, their order and the adapter's first values; all arms of a seed train on the same rows.
Reported are the rows and supervised tokens trained on as a share of `full`, the loss of other rows of the pool, and the mean
loss of the tasks in `--targets` (folders with test.jsonl.gz, of which the first `--test-rows` count). One file per arm and seed
is kept under `--out`: type the same to continue.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from llmselect import atomic, load_pool
from llmselect.dynamic import InfoBatch, Rs2, SeTa, Static, attach
from llmselect.evaluate import row_losses

ARMS: dict[str, Any] = {
    "full": lambda n, rng: Static(tuple(range(n))),
    "static 50 %": lambda n, rng: Static(tuple(sorted(rng.permutation(n)[: n // 2].tolist()))),
    "rs2 50 %": lambda n, rng: Rs2("50%"),
    "rs2 75 %": lambda n, rng: Rs2("75%"),
    "infobatch": lambda n, rng: InfoBatch(),
    "seta": lambda n, rng: SeTa(),
}
SETTINGS = ("tasks", "rows", "test_rows", "epochs", "batch", "learning_rate", "max_length")
RESULTS = Path(__file__).parents[1] / "results" / "dynamic"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--targets", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=["gsm8k", "nl2bash", "wikisql", "csqa", "mbpp", "translate_en_fr"])
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--test-rows", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch", type=int, default=8, help="rows of an optimizer step")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--out", type=Path, default=RESULTS)
    a = parser.parse_args()
    settings = {name: getattr(a, name) for name in SETTINGS}
    pool = load_pool(a.pool)
    tasks = {name: load_pool(a.targets / name / "test.jsonl.gz") for name in a.tasks}
    tests = {name: data.select(range(min(len(data), a.test_rows))) for name, data in tasks.items()}
    for seed in a.seeds:
        mixed = np.random.default_rng(seed).permutation(len(pool))
        held_out = pool.select(mixed[a.rows : a.rows + 3 * a.test_rows])
        for name, schedule in ARMS.items():
            file = a.out / "cells" / f"{name.replace(' ', '').replace('%', '')}-{seed}.json"
            if file.exists():
                if (kept := json.loads(file.read_text())["settings"]) != settings:
                    raise SystemExit(f"{file} was made with {kept}; give another --out")
            else:
                made = schedule(a.rows, np.random.default_rng([seed, 1]))
                found = trained(a, pool.select(mixed[: a.rows]), made, seed, {"pool": held_out, **tests})
                file.parent.mkdir(parents=True, exist_ok=True)
                atomic.write_json(file, {"arm": name, "seed": seed, "settings": settings, **found})
                print(file.stem, json.dumps(found), flush=True)
    print(markdown([json.loads(f.read_text()) for f in sorted((a.out / "cells").glob("*.json"))]))


def trained(a: argparse.Namespace, rows: Any, schedule: Any, seed: int, tests: dict[str, Any]) -> dict[str, Any]:
    """Train one arm; what it saw, and its loss on each test."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments, set_seed

    from llmselect.engine.backbone import Backbone
    from llmselect.packing import padded

    backbone = Backbone(a.model, None, "float32", a.max_length, "cpu")
    items = encoded(backbone, rows)
    set_seed(seed)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as scratch:
        settings = TrainingArguments(output_dir=scratch, num_train_epochs=a.epochs, per_device_train_batch_size=a.batch,
                                     learning_rate=a.learning_rate, lr_scheduler_type="cosine", use_cpu=True, seed=seed,
                                     report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no")  # fmt: skip
        trainer = Trainer(model=get_peft_model(backbone.causal_lm, lora), args=settings, train_dataset=items,
                          data_collator=padded(backbone.pad))  # fmt: skip
        callback = attach(trainer, schedule, ids=items["id"], seed=seed)
        trainer.train()
        trainer.model.save_pretrained(scratch)
        nll = row_losses(a.model, scratch, tests, max_length=a.max_length)
    size = np.array([sum(t >= 0 for t in labels[1:]) for labels in items["labels"]])
    seen = np.concatenate([indices for indices, _ in callback.history])
    share = {"rows_seen": len(seen) / (a.epochs * len(rows)), "tokens_seen": float(size[seen].sum() / (a.epochs * size.sum()))}
    return {**share, "nll": {name: float(values.mean()) for name, values in nll.items()}}


def encoded(backbone: Any, rows: Any) -> Any:
    """Tokens and labels; a prompt has none."""
    from datasets import Dataset

    found = {"id": list(rows["id"]), "input_ids": [], "labels": []}
    for one in backbone.encoder.encode(rows["messages"]):
        found["input_ids"].append(list(map(int, one.ids)))
        found["labels"].append([int(t) if told else -100 for t, told in zip(one.ids, one.response, strict=True)])
    return Dataset.from_dict(found)


def markdown(cells: list[dict[str, Any]]) -> str:
    """Means over seeds; a difference to `full` is of the same seed, ± its standard deviation."""
    head = ["arm", "seeds", "rows seen", "tokens seen", "loss, rows of the pool", "Δ full", "loss, mean of tasks", "Δ full"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    full = {c["seed"]: c for c in cells if c["arm"] == "full"}
    for arm in ARMS:
        mine = [c for c in cells if c["arm"] == arm]
        shown = [arm, str(len(mine)), *(f"{np.mean([c[k] for c in mine]):.0%}" for k in ("rows_seen", "tokens_seen"))]
        for loss in (of_pool, of_tasks):
            delta = [loss(c) - loss(full[c["seed"]]) for c in mine if c["seed"] in full]
            spread = f" ± {np.std(delta, ddof=1):.3f}" if len(delta) > 1 else ""
            shown += [f"{np.mean([loss(c) for c in mine]):.3f}", f"{np.mean(delta):+.3f}{spread}" if arm != "full" else ""]
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def of_pool(cell: dict[str, Any]) -> float:
    return float(cell["nll"]["pool"])


def of_tasks(cell: dict[str, Any]) -> float:
    return float(np.mean([value for name, value in cell["nll"].items() if name != "pool"]))


if __name__ == "__main__":
    main()
