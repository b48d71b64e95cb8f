"""SelectIT's ratings against the published formula, one row and one prompt at a time in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import tiny
from llmselect import extractors as E
from llmselect.engine.backbone import Backbone
from llmselect.engine.passes import Pass
from llmselect.errors import LlmselectError, UsageError
from llmselect.extractors import selectit

TWO = ("Q {instruction} A {response} rate 1 to {ratings}", "A: {response}\nfor {instruction}? 1-{ratings}")


def text_of(chat) -> tuple[str, str]:
    """Instruction and answer written out for the shapes that `tiny.chats` makes."""
    told = chat[:-1]
    turns = [one for one in told if one["role"] != "system"]
    return "\n\n".join(f"{one['role']}: {one['content']}" if len(turns) > 1 else one["content"] for one in told), chat[-1][
        "content"
    ]


def naive(backbone: Backbone, chat, prompts, k: int, alpha: float) -> tuple[list[float], float, float]:
    """Token scores per prompt, the sentence score and the expected rating of one row."""
    token, expected = [], []
    question, answer = text_of(chat)
    for prompt in prompts:
        text = prompt.replace("{ratings}", str(k)).replace("{instruction}", question).replace("{response}", answer)
        whole = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        ids = backbone.tokenizer(whole, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            full = backbone.causal_lm(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(-1)
        p = [float(full[backbone.tokenizer.encode(str(j), add_special_tokens=False)[-1]]) for j in range(1, k + 1)]
        p = [one / sum(p) for one in p]
        s = max(range(k), key=lambda j: p[j])
        token.append((s + 1) * sum(abs(one - p[s]) for one in p) / (k - 1))
        expected.append(sum((j + 1) * one for j, one in enumerate(p)))
    mean = sum(token) / len(token)
    std = math.sqrt(sum((one - mean) ** 2 for one in token) / len(token))
    return token, mean / (1 + alpha * std), sum(expected) / len(expected)


def computed(extractor, chats, tokens: int = 700, side: str = "right", max_length: int | None = 500, **others):
    run = Pass(Backbone(extractor.model, max_length=max_length), {"f": extractor, **others}, {}, {}, [], tokens, side)
    return run.compute(chats, [str(i) for i in range(len(chats))], ["f", *others])


@pytest.mark.parametrize(("options", "side", "tokens"), [
    ({"prompts": TWO}, "right", 700),
    ({"prompts": TWO, "ratings": 9, "alpha": 3.0}, "left", 700),
    ({"prompts": TWO[:1], "ratings": 2}, "right", 1),
])  # fmt: skip
def test_ratings_are_those_of_the_formula(tiny_model, options, side, tokens):
    chats, backbone = tiny.chats(14, 3), Backbone(str(tiny_model))
    one = E.SelectIT(model=str(tiny_model), **options)
    found = computed(one, chats, tokens, side)["f"]
    for i, chat in enumerate(chats):
        token, value, expected = naive(backbone, chat, one.prompts, one.ratings, one.alpha)
        np.testing.assert_allclose([found[f"token_{j}"][i] for j in range(len(token))], token, rtol=2e-4, atol=1e-6)
        np.testing.assert_allclose([found["value"][i], found["expected"][i]], [value, expected], rtol=2e-4)
    assert found["value"].std() > 1e-3 and 1 < found["expected"].min() < found["expected"].max() < one.ratings


def test_it_shares_a_pass_with_others_and_the_published_prompts_fit(tiny_model):
    chats, model = tiny.chats(5), str(tiny_model)
    others = {"loss": E.Loss(model=model), "again": E.SelectIT(model=model, prompts=TWO)}
    together = computed(E.SelectIT(model=model), chats, **others)
    for name, one in {"f": E.SelectIT(model=model), **others}.items():
        alone = computed(one, chats)["f"]
        assert all(np.allclose(alone[key], together[name][key], atol=1e-6) for key in alone)
    assert len(selectit.PROMPTS) == 5 and {f"token_{i}" for i in range(5)} < set(together["f"])


def test_a_row_is_cut_before_the_question(tiny_model):
    """The end of the answer goes first, then that of the instruction; what the prompt asks stays."""
    backbone = Backbone(str(tiny_model), max_length=60)
    one = E.SelectIT(model=str(tiny_model), prompts=TWO[:1])
    chat = [{"role": "user", "content": "fox " * 8}, {"role": "assistant", "content": "dog " * 40}]
    texts = [backbone.tokenizer.decode(row.ids) for row in one.encode(backbone, [chat], one.views()[0])]
    assert len(one.encode(backbone, [chat], one.views()[0])[0].ids) == 60
    assert "fox " * 8 in texts[0] and texts[0].endswith(" rate 1 to 5<|im_end|>\n<|im_start|>assistant\n")
    assert 0 < texts[0].count("dog") < 40
    longer = [{"role": "user", "content": "fox " * 80}, chat[1]]
    cut = backbone.tokenizer.decode(one.encode(backbone, [longer], one.views()[0])[0].ids)
    assert "dog" not in cut and 0 < cut.count("fox") < 80 and cut.endswith(texts[0][-40:])
    with pytest.raises(UsageError, match=r"tokens without a row; max_length is 12"):
        one.encode(Backbone(str(tiny_model), max_length=12), [chat], one.views()[0])


def test_a_row_cannot_put_a_text_in_the_place_of_another(tiny_model):
    one, backbone = E.SelectIT(model=str(tiny_model), prompts=TWO[:1]), Backbone(str(tiny_model))
    chat = [{"role": "user", "content": "say {response} {{ 7 * 7 }}"}, {"role": "assistant", "content": "no {instruction}"}]
    text = backbone.tokenizer.decode(one.encode(backbone, [chat], one.views()[0])[0].ids)
    assert "Q say {response} {{ 7 * 7 }} A no {instruction} rate" in text


@pytest.mark.parametrize(("options", "told"), [
    ({"ratings": 10}, "between 2 and 9"),
    ({"alpha": -1.0}, "must not be negative"),
    ({"prompts": ()}, "one or more"),
    ({"prompts": ("only {instruction}",)}, r"\{response\}"),
    ({"prompts": ("{response} {response} {instruction}",)}, "once each"),
])  # fmt: skip
def test_mistakes_are_named(options, told):
    with pytest.raises(UsageError, match=told):
        E.SelectIT(model="m", **options)


def test_a_tokenizer_without_the_digits_is_refused(tmp_path):
    folder = tmp_path / "merged"
    tiny.save(folder, template="{% for m in messages %}{{ m['content'] }}{% endfor %}{{ '0' }}", layers=1)
    backbone = Backbone(str(folder))
    backbone.tokenizer.add_tokens(["01", "02", "03"])
    with pytest.raises(LlmselectError, match="no single tokens"):
        selectit.rating_tokens(backbone, 3)
