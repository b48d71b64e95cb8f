"""Rows that depend on their batch are found: none in fp32, little in bfloat16, much when attention leaks between rows."""

from __future__ import annotations

import logging

import pytest
import rows
import torch

import tiny
from llmselect import extractors as E
from llmselect.engine.backbone import Backbone
from llmselect.engine.extraction import extract
from llmselect.engine.passes import Pass
from llmselect.engine.selfcheck import TOLERANCE, batch_dependence
from llmselect.store import FeatureStore


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("model")))


def features(folder: str) -> dict:
    return {"emb": E.Embedding(model=folder), "grad": E.Gradient(model=folder, dim=256, k=8, store="float32")}


@pytest.mark.parametrize("dtype,least,most", [("float32", 0.0, 1e-4), ("bfloat16", 1e-4, TOLERANCE)])
def test_a_sound_model_depends_on_rounding_alone(folder, dtype, least, most):
    pool = rows.pool(6)
    found = batch_dependence(Pass(Backbone(folder, dtype=dtype), features(folder), {}, {}), list(pool["messages"]), pool["id"])
    assert found.keys() == {"emb", "grad"}
    assert least <= max(found.values()) < most


def test_a_model_whose_rows_see_each_other_is_reported(folder, tmp_path, caplog, monkeypatch):
    honest = Backbone.forward

    def leaking(self, ids, mask, packed=False):
        states = honest(self, ids, mask, packed)
        return states + 0.3 * (states.mean(0, keepdim=True) - states)  # nothing for a row alone

    monkeypatch.setattr(Backbone, "forward", leaking)
    only = {"grad": E.Gradient(model=folder, dtype="bfloat16", dim=256, k=8)}
    with caplog.at_level(logging.WARNING):
        extract(rows.pool(6), FeatureStore(tmp_path), only, target=rows.target(4))
    (told,) = [r.getMessage() for r in caplog.records if "beside them in a batch" in r.getMessage()]
    assert told.startswith("grad: rows change by up to") and "dtype: float32" in told
    assert torch.get_default_dtype() == torch.float32
