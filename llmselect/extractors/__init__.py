"""The extractors: one file per method. `llmselect.extractors.ClassName` finds any of them, third parties' too."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    from llmselect import registry

    if name.startswith("_"):
        raise AttributeError(name)
    return registry.extractors.by_class_name(name)


def __dir__() -> list[str]:
    from llmselect import registry

    return [registry.extractors.get(name).__name__ for name in registry.extractors.names()]
