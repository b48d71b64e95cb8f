"""Make what the quickstart ships: a small causal LM trained on text that comes with Python, a mixed pool, two targets.

    python recipes/quickstart/make_assets.py --out recipes/quickstart/assets

The skills are generated (`skills.py`), the rest is taken from the running Python's standard library, so another Python
version gives another pool. The model never sees the skills: fine-tuning has something to teach.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import sys
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parent))
import library_text
import skills

SEED = 20
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write(path: Path, rows: list[dict]) -> None:
    """Rows as JSON lines, gzip without a time stamp: the same bytes each time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def generated(rng: Random) -> tuple[list[dict], dict[str, list[dict]]]:
    """Pool rows of the generated skills, and 12 dev and 160 test rows of each target; no prompt is in two places."""
    seen: set[str] = set()

    def fresh(make) -> list[dict[str, str]]:
        while (chat := make(rng))[0]["content"] + chat[-1]["content"] in seen or chat[-2]["content"] in seen:
            pass
        seen.update((chat[-2]["content"], chat[0]["content"] + chat[-1]["content"]))
        return chat

    targets = {name: [{"source": name, "messages": fresh(make)} for _ in range(172)] for name, make in skills.TARGETS.items()}
    pool = [{"source": name, "messages": fresh(make)} for name, (make, count) in skills.GENERATED.items() for _ in range(count)]
    return pool, targets


def make_rows(out: Path) -> None:
    rng = Random(SEED)
    pool, targets = generated(rng)
    pool += [{"source": skill, "messages": chat} for skill, chat in library_text.chats(rng, 350)]
    rng.shuffle(pool)
    write(out / "pool.jsonl.gz", [{"id": f"row-{i}", **row} for i, row in enumerate(pool)])
    for name, rows in targets.items():
        numbered = [{"id": f"{name}-{i}", **row} for i, row in enumerate(rows)]
        write(out / "targets" / name / "dev.jsonl.gz", numbered[:12])
        write(out / "targets" / name / "test.jsonl.gz", numbered[12:])


def make_tokenizer(text: str):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    raw.train_from_iterator(
        text.split("\n\n"),
        trainers.BpeTrainer(
            vocab_size=2048, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=special[0],
        pad_token=special[1],
        eos_token=special[3],
        extra_special_tokens=[special[2]],
        model_max_length=512,
    )
    fast.chat_template = CHATML
    return fast


def make_model(vocabulary: int):
    """An untrained Llama of about a million parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=0,
            pad_token_id=1,
            eos_token_id=3,
        )
    )


def train_model(out: Path, steps: int, window: int = 192, batch: int = 12) -> float:
    """Next-token training on the corpus; returns the loss on its held-out last twentieth, nats per token."""
    import torch

    text = library_text.corpus()
    tokenizer = make_tokenizer(text)
    ids = torch.tensor([i for part in text.split("\n\n") for i in [*tokenizer(part)["input_ids"], 0]])
    train, held = ids[: -len(ids) // 20], ids[-len(ids) // 20 :]
    torch.manual_seed(SEED)
    model = make_model(len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1)
    warm = lambda s: min(1.0, (s + 1) / 50) * (0.05 + 0.475 * (1 + math.cos(math.pi * s / steps)))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm)
    for step in range(steps):
        at = torch.randint(0, len(train) - window, (batch,))
        rows = torch.stack([train[i : i + window] for i in at])
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    model.eval()
    with torch.no_grad():
        parts = held[: len(held) // window * window].view(-1, window)[:200]
        loss = torch.stack([model(input_ids=p[None], labels=p[None]).loss for p in parts]).mean().item()
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "assets")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--rows-only", action="store_true", help="make pool and targets, keep the model")
    arguments = parser.parse_args()
    make_rows(arguments.out)
    if not arguments.rows_only:
        loss = train_model(arguments.out, arguments.steps)
        report = {"held_out_loss": round(loss, 4), "steps": arguments.steps, "python": sys.version.split()[0]}
        (arguments.out / "model" / "training.json").write_text(json.dumps(report, indent=2) + "\n")
        print(report)


if __name__ == "__main__":
    main()
