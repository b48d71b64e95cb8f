"""Outputs of classification models against one row at a time, and as the quality of a method in a recipe."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_refine_models import save_judge, written
from test_stages import recipe_of
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, LlamaForSequenceClassification

import tiny
from llmselect import extractors as E
from llmselect.benchmark.costs import forwards
from llmselect.errors import LlmselectError, UsageError
from llmselect.prepare import prepare
from llmselect.selection import Selection
from llmselect.stages import Run, extract_stage, select_stage


def save_bert(folder: Path, labels: int) -> Path:
    """A tiny encoder that classifies, without a chat template, reading 40 tokens."""
    fast = tiny.tokenizer(None)
    fast.model_max_length = 40
    shape = dict(vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 max_position_embeddings=64, initializer_range=0.3, pad_token_id=1)  # fmt: skip
    torch.manual_seed(3)
    BertForSequenceClassification(BertConfig(**shape, num_labels=labels)).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def by_hand(folder: Path, kind, texts: list[str], most: int) -> np.ndarray:
    loaded, fast = kind.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    rows = [fast(text, add_special_tokens=False)["input_ids"][:most] for text in texts]
    with torch.no_grad():
        return np.stack([loaded(input_ids=torch.tensor([row])).logits[0].double().numpy() for row in rows])


@pytest.mark.parametrize("scale", ["logit", "softmax", "sigmoid"])
def test_outputs_are_those_of_the_model(tmp_path, scale):
    chats = tiny.chats(12, 8)
    folder = save_bert(tmp_path / "tags", 5)
    z = by_hand(folder, BertForSequenceClassification, ["\n\n".join(m["content"] for m in chat) for chat in chats], 40)
    expected = {"logit": z, "softmax": np.exp(z) / np.exp(z).sum(1, keepdims=True), "sigmoid": 1 / (1 + np.exp(-z))}[scale]
    found = E.Classifier(classifier=str(folder), scale=scale).texts(chats)["value"]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    one = E.Classifier(classifier=str(folder), scale=scale, label="LABEL_3")
    np.testing.assert_allclose(one.texts(chats)["value"], expected[:, 3], atol=1e-5)
    np.testing.assert_array_equal(E.Classifier(classifier=str(folder), scale=scale, label="3").texts(chats)["value"],
                                  one.texts(chats)["value"])  # fmt: skip
    assert expected.std(0).min() > 1e-3


def test_a_reward_model_reads_the_chat(tmp_path):
    chats, folder = tiny.chats(9, 8), save_judge(tmp_path / "judge")
    expected = by_hand(folder, LlamaForSequenceClassification, [written(chat) for chat in chats], 512)[:, 0]
    np.testing.assert_allclose(E.Classifier(classifier=str(folder)).texts(chats)["value"], expected, atol=1e-4)
    short = by_hand(folder, LlamaForSequenceClassification, [written(chat) for chat in chats], 20)[:, 0]
    np.testing.assert_allclose(E.Classifier(classifier=str(folder), tokens=20).texts(chats)["value"], short, atol=1e-4)


def test_a_named_model_gives_quality_and_tags_in_a_recipe(tmp_path, tiny_model):
    judge, tags = save_judge(tmp_path / "judge"), save_bert(tmp_path / "tags", 6)
    features = {"good": {"extractor": "classifier", "classifier": str(judge)},
                "tags": {"extractor": "classifier", "classifier": str(tags), "scale": "sigmoid"}}  # fmt: skip
    methods = {"best": {"selector": "topk", "x": "good"}, "mig": {"selector": "mig", "x": "tags", "quality": "good"}}
    run = Run(recipe_of(tmp_path, tiny_model, tiny.chats(30), features=features, methods=methods))
    for stage in (prepare, extract_stage, select_stage):
        stage(run)
    value = run.store["good"][:]
    expected = E.Classifier(classifier=str(judge)).texts(list(run.pool["messages"]))["value"]
    np.testing.assert_allclose(value, expected, atol=1e-5)
    made = Selection.load(run.folder / "selections" / "best" / "seed-0").indices
    assert made.tolist() == np.argsort(-value, kind="stable")[: len(made)].tolist()
    assert run.store["tags"].shape == (len(run.pool), 6) and run.store["tags@target"].shape == (8, 6)
    assert forwards(run, "good") == 1.0
    save_judge(judge, labels=1, template="{{ messages[0]['content'] }}")
    E.classifier._described.cache_clear()
    with pytest.raises(LlmselectError, match="settings"):
        extract_stage(run)


def test_mistakes_are_named(tmp_path, tiny_model):
    tags = save_bert(tmp_path / "tags", 2)
    with pytest.raises(UsageError, match=r"no output 'LABEL_4'\..*LABEL_0, LABEL_1"):
        E.Classifier(classifier=str(tags), label="LABEL_4").texts(tiny.chats(2))
    with pytest.raises(UsageError, match="cannot read"):
        E.Classifier(classifier=str(tmp_path)).settings()
    with pytest.raises(UsageError, match="tokens: 0"):
        E.Classifier(classifier="m", tokens=0)
    with pytest.raises(UsageError, match=r"classifier: missing"):
        recipe_of(tmp_path, tiny_model, tiny.chats(3), features={"f": {"extractor": "classifier"}})
