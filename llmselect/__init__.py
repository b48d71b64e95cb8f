"""llmselect: choose the rows of a data pool that a language model should be fine-tuned on.

An extractor runs a causal LM over a pool and writes named arrays into a feature store; a selector reads arrays and
returns a selection; everything after that is ordinary Hugging Face.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmselect import extractors, selectors
    from llmselect.errors import LlmselectError, UsageError
    from llmselect.pool import load_pool
    from llmselect.selection import Budget, Selection
    from llmselect.stages import extract
    from llmselect.store import FeatureStore

__version__ = "0.1.0"

# Each name is imported on first use, so that `import llmselect` and listing the methods load no torch.
_HOME = {
    "Budget": "selection",
    "FeatureStore": "store",
    "LlmselectError": "errors",
    "Selection": "selection",
    "UsageError": "errors",
    "extract": "stages",
    "load_pool": "pool",
}
_PACKAGES = ("extractors", "selectors")

__all__ = [
    "Budget",
    "FeatureStore",
    "LlmselectError",
    "Selection",
    "UsageError",
    "__version__",
    "extract",
    "extractors",
    "load_pool",
    "selectors",
]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"llmselect.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'llmselect' has no attribute {name!r}; it has: {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"llmselect.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
