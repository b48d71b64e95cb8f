"""The outlook of hours and bytes: its counts against formulas written out, and the page on record against the code."""

from __future__ import annotations

import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest

from documents import ROOT
from llmselect.extractors import Embedding, Loss, Ngram, Trim

spec = importlib.util.spec_from_file_location("performance_outlook", ROOT / "eval/performance/outlook.py")
assert spec and spec.loader
outlook = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = outlook  # dataclasses look their module up
spec.loader.exec_module(outlook)


def test_parameters_of_a_body_by_hand():
    d, mlp, blocks, heads, kv = 576, 1536, 30, 9, 3
    attention = 2 * d * d + 2 * d * d * kv // heads  # q and o; k and v of fewer heads
    assert outlook.body("SmolLM2-135M") == blocks * (attention + 3 * d * mlp + 2 * d) + d


def test_bytes_are_those_of_the_declared_arrays():
    model = SimpleNamespace(hidden_size=48, layer=int)
    assert outlook.bytes_of(Embedding(), model, 100) == 2 * 48
    assert outlook.bytes_of(Trim(evidence=4), model, 100) == 3 * (2 + 4 * (3 * 4 + 2))
    assert outlook.bytes_of(Loss(without_prompt=False), model, 100) == 4 * 4
    assert outlook.bytes_of(Ngram(buckets=10_000), model, 100) == 150 * 8
    assert outlook.bytes_of(outlook.PlannedSae(), model, 10) == 320 * 6
    assert outlook.bytes_of(outlook.PlannedSae(), model, 100) == 8 * 48 * 6, "no row has more latents than there are"


def test_spans_and_sizes():
    assert [outlook.span(s) for s in (0, 20, 90, 5400, 86400 * 6)] == ["–", "< 1 min", "2 min", "1.5 h", "6 days"]
    assert [outlook.size(b) for b in (12, 1500, 32.8e9, 5e13)] == ["12 B", "1.5 kB", "32.8 GB", "50 TB"]


def test_the_page_on_record_follows_from_the_code_and_its_own_measurement():
    told = json.loads((ROOT / "eval/results/performance/outlook.json").read_text())
    assert told["cells"] == outlook.cells(told["tokens"]), "python eval/performance/outlook.py --tflops 989 --out …"
    page = (ROOT / "eval/results/performance/outlook.md").read_text("utf-8")
    given = outlook.table(told["cells"], told["tflops"] * 1e12 * told["utilisation"])
    here = outlook.table(told["cells"], told["speed"]["forward"], 2e9)
    assert given in page and here in page
    counts = {one["features"]: one["forwards"] for one in told["cells"]}
    assert list(counts.values()) == pytest.approx([1, 1.6, 1, 12, 3, 9, 17, 0])
