"""The vLLM backend against a stand-in with vLLM's interface, and against vLLM itself where it is installed."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import talker
import tiny
from llmselect.chat import DEFAULT_TEMPLATE
from llmselect.errors import LlmselectError, MissingExtra, UsageError
from llmselect.generate import generate, generate_to


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return talker.save(tmp_path_factory.mktemp("talker") / "model")


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory) -> Path:
    return talker.save_adapter(tmp_path_factory.mktemp("talker") / "lora", model)


class Engine:
    """Takes what `vllm.LLM` takes and answers greedily, one prompt at a time, by the plain loop."""

    def __init__(self, *, model, dtype, max_model_len, load_format, generation_config, enable_lora=False, max_lora_rank=16):
        assert (load_format, generation_config, dtype) == ("safetensors", "vllm", "float32")
        self.path, self.limit, self.lora_rank = model, max_model_len, max_lora_rank if enable_lora else None
        made.append(self)

    def generate(self, prompts, params, *, lora_request=None, use_tqdm=True):
        self.params = params
        loaded = talker.load(self.path, lora_request and lora_request.lora_path)
        return [self.answer(loaded, *pair) for pair in zip(prompts, params, strict=True)]

    def answer(self, loaded, prompt, params):
        ids = talker.greedy(loaded, prompt["prompt_token_ids"], params.max_tokens, tuple(params.stop_token_ids))
        done = ids[-1] in params.stop_token_ids
        reason = self.reason or ("stop" if done else "length")
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(ids), finish_reason=reason, text="not used")])

    reason = None


made: list[Engine] = []


@pytest.fixture
def stand_in(monkeypatch):
    """Put the stand-in where `import vllm` finds it; gives the engines that were made."""
    vllm, lora, request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    params = lambda *, temperature, top_p, max_tokens, stop, stop_token_ids, skip_special_tokens, seed: SimpleNamespace(  # noqa: E731
        **dict(max_tokens=max_tokens, stop=stop, stop_token_ids=stop_token_ids, temperature=temperature, seed=seed)
    )
    vllm.__dict__.update(LLM=Engine, SamplingParams=params)
    request.__dict__["LoRARequest"] = lambda name, number, path: SimpleNamespace(lora_name=name, lora_path=path)
    for one in (vllm, lora, request):
        monkeypatch.setitem(sys.modules, one.__name__, one)
    made.clear()
    return made


def test_a_missing_vllm_names_its_extra(model):
    if importlib.util.find_spec("vllm"):
        pytest.skip("vllm is installed")
    with pytest.raises(MissingExtra, match=r"vllm is not installed; type: pip install 'llmselect\[vllm\]'"):
        generate(str(model), talker.questions(1), backend="vllm")


@pytest.mark.parametrize("with_adapter", [False, True])
def test_both_backends_give_the_same_results(model, adapter, stand_in, with_adapter):
    options = dict(max_new_tokens=14, adapter=str(adapter) if with_adapter else None)
    prompts = talker.questions(8)
    found = generate(str(model), prompts, backend="vllm", **options)
    assert found == generate(str(model), prompts, **options)
    assert {one.finish for one in found} == {"stop", "length"}
    (engine,) = stand_in
    assert (engine.path, engine.limit, engine.lora_rank) == (str(model), 512, 8 if with_adapter else None)


def test_stop_strings_cut_the_text_in_both(model, stand_in):
    stop = generate(str(model), talker.questions(1), max_new_tokens=14)[0].text[4:7]
    found, own = (generate(str(model), talker.questions(8), max_new_tokens=14, stop=[stop], backend=b) for b in ("vllm", "hf"))
    assert [(one.text, one.finish) for one in found] == [(one.text, one.finish) for one in own]
    assert stand_in[0].params[0].stop == [stop]


def test_every_prompt_has_a_seed_that_depends_on_no_other_prompt(model, stand_in):
    prompts = talker.questions(3)
    seeds = []
    for rows, seed in [([*prompts, prompts[0]], 1), (prompts[::-1], 1), (prompts, 2)]:
        generate(str(model), rows, backend="vllm", max_new_tokens=1, temperature=1.0, seed=seed)
        seeds.append([one.seed for one in stand_in[-1].params])
    assert len(set(seeds[0])) == 4, "equal prompts draw different answers"
    assert seeds[1] == seeds[0][2::-1]
    assert not set(seeds[2]) & set(seeds[0])
    assert all(0 <= one < 2**31 for some in seeds for one in some)


def test_an_answer_that_vllm_gave_up_is_an_error(model, stand_in, monkeypatch):
    monkeypatch.setattr(Engine, "reason", "abort")
    with pytest.raises(LlmselectError, match=r"prompts\[0\]: vLLM gave no answer \(finish_reason 'abort'\)"):
        generate(str(model), talker.questions(2), backend="vllm", max_new_tokens=2)


def test_a_rank_that_vllm_cannot_take_is_told(model, adapter, stand_in, tmp_path):
    about = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**about, "rank_pattern": {"q_proj": 600}}))
    with pytest.raises(UsageError, match=r"has rank 600; vLLM takes LoRA of rank 1 to 512; use backend hf"):
        generate(str(model), talker.questions(1), backend="vllm", adapter=str(tmp_path))


def test_a_file_says_which_backend_it_is_from(model, stand_in, tmp_path):
    options = dict(model=str(model), max_new_tokens=4)
    out = generate_to(tmp_path / "out.jsonl", ["a", "b"], talker.questions(2), backend="vllm", **options)
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == ["a", "b"]
    with pytest.raises(LlmselectError, match='backend: "vllm" -> "hf"'):
        generate_to(out, ["a", "b"], talker.questions(2), **options)


def test_lm_eval_gets_the_tokenizer_of_training_and_the_adapter(model, adapter, stand_in, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    from llmselect import harness

    def engine(**given):
        fast = AutoTokenizer.from_pretrained(given["tokenizer"])
        return SimpleNamespace(end=fast.eos_token_id, template=fast.chat_template, given=given)

    def evaluate(model, **_):
        seen.append(model)
        scores = {"acc,none": 0.5, "acc_stderr,none": "N/A"}
        return {"results": {"t": scores}, "n-samples": {"t": {"effective": 2}}, "versions": {}}

    seen = []
    monkeypatch.setattr("lm_eval.api.registry.get_model", {"vllm": engine}.get)
    monkeypatch.setattr(lm_eval, "simple_evaluate", evaluate)
    monkeypatch.setattr(harness, "_manager", lambda *_: None)
    base = talker.as_base(model, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    found = harness.lm_eval(str(base), ["t"], backend="vllm", adapter=str(adapter))
    assert found["tasks"] == {"t": {"acc": {"value": 0.5, "stderr": None}}}
    (lm,) = seen
    assert (lm.end, lm.template) == (0, DEFAULT_TEMPLATE), "that template ends a turn with the tokenizer's own EOS"
    assert (lm.given["pretrained"], lm.given["lora_local_path"], lm.given["max_lora_rank"]) == (str(base), str(adapter), 8)
    assert lm.given["load_format"] == "safetensors" and not Path(lm.given["tokenizer"]).exists()


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_itself_agrees(tmp_path):
    pytest.importorskip("vllm")
    folder = tiny.save(tmp_path / "m")
    wider = AutoConfig.from_pretrained(folder, head_dim=64)  # vLLM's kernels take no narrower heads
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(wider).save_pretrained(folder)
    lora = talker.save_adapter(tmp_path / "lora", folder)
    for adapter in (None, str(lora)):
        options = dict(max_new_tokens=8, adapter=adapter, dtype="float32")
        found = generate(str(folder), talker.questions(4), backend="vllm", **options)
        own = generate(str(folder), talker.questions(4), **options)
        assert [one.tokens for one in found] == [one.tokens for one in own]
        assert found == own
