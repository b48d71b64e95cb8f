"""Text that comes with Python: language reference topics, docstrings and sources of the standard library."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

SKIP = ("test", "idlelib", "lib2to3", "turtledemo", "encodings", "site-packages", "__pycache__", "ensurepip")


def topics() -> dict[str, str]:
    """Sections of the language reference that `help()` shows."""
    return dict(importlib.import_module("pydoc_data.topics").topics)


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Parsed standard-library modules in a fixed order."""
    root = Path(inspect.getfile(ast)).parent
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if (
            not any(p in SKIP or p.startswith("test") for p in parts)
            and ".".join(parts)[:-3].split(".")[0] in sys.stdlib_module_names
        ):
            try:
                yield ".".join(parts)[:-3].removesuffix(".__init__"), ast.parse(file.read_text("utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue


def documented() -> list[tuple[str, str, str]]:
    """(qualified name, docstring, source) of public functions of the standard library."""
    found = []
    for name, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and (doc := ast.get_docstring(node)):
                found.append((f"{name}.{node.name}", doc, ast.unparse(node)))
    return found


def corpus() -> str:
    """All of it as plain text for pretraining, in a fixed order."""
    parts = [*topics().values()]
    for name, tree in modules():
        docs = [
            d
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (d := ast.get_docstring(node))
        ]
        parts.append(f"{name}\n\n" + "\n\n".join(docs))
    return "\n\n".join(parts)


def chats(rng: Random, each: int) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """(skill, conversation): explain a function, write one, explain a topic of the language."""

    def turn(prompt: str, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]

    functions = [f for f in documented() if 40 < len(f[1]) < 700]
    for name, doc, _ in rng.sample(functions, each):
        yield "docstring", turn(rng.choice([f"What does {name} do?", f"Explain {name}.", f"Describe the function {name}."]), doc)
    short = [f for f in functions if 80 < len(f[2]) < 900]
    for name, _, source in rng.sample(short, each):
        yield "code", turn(f"Write the function {name.rsplit('.', 1)[1]} from the module {name.rsplit('.', 1)[0]}.", source)
    paragraphs = [
        (topic, p.strip()) for topic, text in sorted(topics().items()) for p in text.split("\n\n") if 150 < len(p) < 900
    ]
    for topic, paragraph in rng.sample(paragraphs, each):
        yield "reference", turn(f"Tell me something about {topic.lower()} in Python.", paragraph)
