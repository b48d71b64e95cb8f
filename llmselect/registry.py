"""Names to classes: a decorator, the modules beside it, and entry points of other packages."""

from __future__ import annotations

import importlib
import inspect
import logging
import pkgutil
import re
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import cached_property
from importlib import metadata
from typing import Any, TypeVar

from llmselect.errors import LlmselectError, UsageError, nearest

log = logging.getLogger("llmselect")
C = TypeVar("C", bound=type)
SECTIONS = ("Paper", "Objective", "Inputs", "Cost", "Deviations", "Defaults", "Use")


class Registry:
    """Classes of one kind by name. Adding one is a file in the package, or an entry point elsewhere."""

    kind: str
    package: str
    group: str

    def __init__(self, kind: str, package: str, group: str):
        self.kind, self.package, self.group = kind, package, group
        self._classes: dict[str, type] = {}

    def register(self, name: str) -> Callable[[C], C]:
        """Class decorator: make the class known as `name`."""

        def add(cls: C) -> C:
            other = self._classes.get(name)
            if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
                raise LlmselectError(f"two {self.kind}s are called '{name}': {other.__module__} and {cls.__module__}")
            cls.name = name
            self._classes[name] = cls
            return cls

        return add

    @cached_property
    def _loaded(self) -> dict[str, type]:
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):
                importlib.import_module(f"{self.package}.{module.name}")
        for entry in metadata.entry_points(group=self.group):
            try:
                entry.load()
            except Exception as error:  # one broken package of somebody else must not hide all methods
                log.warning("%s '%s' of %s does not load: %s", self.kind, entry.name, entry.value, error)
        return self._classes

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(self._loaded)

    def get(self, name: str) -> type[Any]:
        """The class called `name`; `UsageError` naming the nearest for an unknown one."""
        if name not in self._loaded:
            told = elsewhere(name) or nearest(name, self.names())
            raise UsageError(f"unknown {self.kind} '{name}'.{told} One of: {', '.join(self.names())}")
        return self._loaded[name]

    def by_class_name(self, class_name: str) -> type[Any]:
        """The class itself called `class_name`, for attribute access on the package."""
        for cls in self._loaded.values():
            if cls.__name__ == class_name:
                return cls
        raise AttributeError(f"{self.package} has no {self.kind} {class_name!r}")


# Methods of papers that are no class of their own: an extractor and a selector that reads it.
_COMBINED = {"less": ("gradient", "similarity"), "rds": ("embedding", "similarity"), "rds+": ("embedding", "similarity"),
             "s2l": ("trajectory", "balanced"), "ltc": ("trajectory", "cld"), "grand": ("gradient", "topk"),
             "aign": ("gradient", "topk"), "color-filter": ("color", "topk"),
             **dict.fromkeys(("ifd", "superfiltering", "perplexity", "entropy", "margin", "el2n"), ("loss", "topk"))}  # fmt: skip


def elsewhere(name: str) -> str:
    """A sentence for who gives the name of an extractor or of a combination where a selector is asked for; else empty."""
    extractor, selector = _COMBINED.get(name.lower(), (name, "topk"))
    if extractor != name:
        return f" '{name}' is the extractor {extractor} read by the selector {selector}; recipes/papers.md has it written out."
    kind = next((one.kind for one in (selectors, extractors, schedules) if name in one.names()), None)
    uses = {"extractor": f"name it under features, {name}: {{extractor: {name}}}, and give a selector that reads it, "
                         f"e.g. {{selector: {selector}, x: {name}}}",
            "schedule": "it takes rows during training: train.schedule", "selector": "it goes under methods"}  # fmt: skip
    return f" '{name}' is {'an' if kind == 'extractor' else 'a'} {kind}: {uses[kind]}." if kind else ""


selectors: Registry = Registry("selector", "llmselect.selectors", "llmselect.selectors")
extractors: Registry = Registry("extractor", "llmselect.extractors", "llmselect.extractors")
schedules: Registry = Registry("schedule", "llmselect.dynamic.schedules", "llmselect.schedules")


def describe(cls: type[Any]) -> dict[str, Any]:
    """What `llmselect show` prints: the sections of the module docstring and the hyper-parameters."""
    text = inspect.cleandoc(sys.modules[cls.__module__].__doc__ or "")
    title, _, body = text.partition("\n")
    found = re.split(rf"^({'|'.join(SECTIONS)}): ?", body, flags=re.MULTILINE)
    sections = {k: " ".join(v.split()) for k, v in zip(found[1::2], found[2::2], strict=True)}
    parameters = [
        {"name": f.name, "type": str(f.type), "default": _default(f), "help": f.metadata.get("help", "")} for f in fields(cls)
    ]
    return {"name": cls.name, "class": cls.__name__, "title": title, **sections, "parameters": parameters}


def _default(f: Any) -> Any:
    if f.default is not MISSING:
        return f.default
    return f.default_factory() if f.default_factory is not MISSING else "required"
