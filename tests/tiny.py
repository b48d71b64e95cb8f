"""Tiny tokenizers and models built from configs: the tests need no download and no shipped weights."""

from __future__ import annotations

from pathlib import Path

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TEXTS = [
    "What is three plus four? The answer is seven.",
    "Write a function that returns the sum of two numbers. def add(a, b): return a + b",
    "Translate good morning into French. Bonjour. 0123456789 !?.,;:-'\"()[]{}<>#*/=+",
    "The quick brown fox jumps over the lazy dog while the capital of France is Paris.",
]


def tokenizer(template: str | None = CHATML, vocab: int = 384):
    """A byte-level BPE tokenizer trained on `TEXTS`, with ChatML special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(TEXTS * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        extra_special_tokens=["<|im_start|>"],
        model_max_length=512,
    )
    fast.chat_template = template
    return fast


def model(seed: int = 0, *, layers: int = 3, window: int | None = None, vocab: int = 384):
    """A randomly initialised grouped-query causal LM in fp32; with `window`, Mistral's sliding-window attention."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    shape = dict(
        vocab_size=vocab,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=512,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=3,
        initializer_range=0.2,
        attn_implementation="sdpa",
    )
    torch.manual_seed(seed)
    if window:
        return MistralForCausalLM(MistralConfig(**shape, sliding_window=window)).eval()
    return LlamaForCausalLM(LlamaConfig(**shape)).eval()


def save(folder: Path, seed: int = 0, template: str | None = CHATML, **shape) -> Path:
    """Save a tiny model and its tokenizer to `folder`; returns it."""
    fast = tokenizer(template)
    model(seed, vocab=len(fast), **shape).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def chats(count: int, seed: int = 0) -> list[list[dict[str, str]]]:
    """`count` distinct conversations of varied length; one in five has two assistant turns, one in seven a system turn."""
    import random

    rng = random.Random(seed)
    words = " ".join(TEXTS).split()
    say = lambda low, high: " ".join(rng.choice(words) for _ in range(rng.randint(low, high)))  # noqa: E731
    rows = []
    for i in range(count):
        turns = [{"role": "user", "content": f"{i}: {say(3, 20)}"}, {"role": "assistant", "content": say(2, 25)}]
        if i % 5 == 4:
            turns += [{"role": "user", "content": say(2, 8)}, {"role": "assistant", "content": say(2, 12)}]
        if i % 7 == 6:
            turns.insert(0, {"role": "system", "content": say(2, 6)})
        rows.append(turns)
    return rows
