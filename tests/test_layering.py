"""Imports point one way, and importing the package or listing the methods loads nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import llmselect

ROOT = Path(llmselect.__file__).parent
# A module may import its own level and those before it. Place a new top-level module on the lowest level that works.
LEVELS = (
    {"errors", "atomic", "registry", "selection", "store", "arrays", "array_views", "lazy", "notebook", "plain", "plots"},
    {"config", "strict_yaml", "kernels", "pool", "formats", "readers", "decontaminate", "folds", "chat", "token_cache"}
    | {"skeleton"},
    {"engine"},
    {"sae"},
    {"extractors", "selectors"},
    {
        "account",
        "stages",
        "memory",
        "mixing",
        "semdedup",
        "clustering",
        "latents",
        "sources",
        "tasks",
        "color",
        "ensemble",
        "prepare",
        "recipe",
        "refine",
        "refine_steps",
        "refine_stage",
        "judges",
        "train",
        "packing",
        "token_steps",
        "token_batches",
        "token_trainer",
        "dynamic",
        "adapter_card",
        "backends",
        "generate",
        "harness",
        "evaluate",
        "report",
        "hub",
        "compare",
        "comparison",
        "benchmark",
        "estimate",
        "preflight",
        "doctor",
        "heat",
        "speed",
    },
    {"cli", "cli_benchmark", "cli_complete", "cli_doctor", "cli_ensemble", "cli_extension", "cli_help"}
    | {"cli_methods", "cli_models", "cli_push", "cli_refine", "__main__"},
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
APART = {"extractors", "selectors"}
HEAVY = ("torch", "transformers", "datasets", "trl", "peft", "accelerate", "sklearn", "sae_lens", "vllm", "lm_eval")


def component(path: Path) -> str:
    """The top-level module or package that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(source: str) -> set[str]:
    """The top-level modules of llmselect that `source` imports anywhere: at the top, in functions, for types only."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: import by the full name, llmselect.…"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        parts = [name.split(".") for name in names]
        found |= {part[1] for part in parts if part[0] == "llmselect" and len(part) > 1}
    return {name for name in found if name != "__version__"}


def upward(home: str, source: str) -> list[str]:
    """The imports in `source`, a file of `home`, that point up or across."""
    wrong = []
    for name in sorted(imported(source) - {home}):
        assert name in LEVEL, f"llmselect.{name} has no level: add it to LEVELS in {Path(__file__).name}"
        if LEVEL[name] > LEVEL[home] or {home, name} == APART:
            wrong.append(f"{home} (level {LEVEL[home]}) imports {name} (level {LEVEL[name]})")
    return wrong


FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    home = component(path)
    assert home in LEVEL, f"llmselect.{home} has no level: add it to LEVELS in {Path(__file__).name}"
    assert not upward(home, path.read_text("utf-8"))


@pytest.mark.parametrize(
    ("home", "source"),
    [
        ("store", "from llmselect.config import from_dict"),
        ("selection", "def f():\n    from llmselect import config"),
        ("selectors", "import llmselect.extractors.trim"),
        ("extractors", "from llmselect.selectors._base import Selector"),
        ("engine", "if 1:\n    from llmselect import stages"),
        ("train", "from llmselect.cli import main"),
    ],
)
def test_the_check_sees_imports_that_point_up(home, source):
    assert len(upward(home, source)) == 1


@pytest.mark.parametrize("source", ["from . import store", "from llmselect import novelty"])
def test_the_check_refuses_relative_imports_and_unplaced_modules(source):
    with pytest.raises(AssertionError, match=r"full name|add it to LEVELS"):
        upward("stages", source)


@pytest.mark.parametrize(
    "statement",
    [
        "import llmselect",
        "import llmselect; dir(llmselect); llmselect.Budget, llmselect.Selection, llmselect.FeatureStore",
        "import llmselect; llmselect.load_pool",
        "from llmselect import registry; assert registry.selectors.names()",
        "from llmselect import registry; assert registry.extractors.names()",
        "from llmselect.registry import describe, schedules as s; [describe(s.get(name)) for name in s.names()]",
        "import llmselect.dynamic; llmselect.dynamic.Rs2().materialise(2, n=9)",
        "from llmselect.registry import describe, selectors as s; [describe(s.get(name)) for name in s.names()]",
        "from llmselect.registry import describe, extractors as e; [describe(e.get(name)) for name in e.names()]",
        "import llmselect.config, llmselect.recipe",
        "import llmselect.cli",
    ],
)
def test_nothing_heavy_is_imported(statement):
    code = f"{statement}\nimport sys; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
