"""Settings of every test run: no network, two threads, one tiny model shared by all."""

from __future__ import annotations

import os

# Libraries read these when they are imported, so they stand before any other import.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="disabled",
    OMP_NUM_THREADS="2",
    MKL_NUM_THREADS="2",
)

from pathlib import Path

import hypothesis
import pytest

import tiny

# Cores are shared: a slow example is no defect, and a failing one must be the same on the next machine.
hypothesis.settings.register_profile("house", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("house")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny saved causal LM with its tokenizer. Read only: every test shares it."""
    return tiny.save(tmp_path_factory.mktemp("model") / "tiny")
