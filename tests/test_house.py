"""The rules of the house that a machine can check: sizes, names, what never stands in the code, documentation."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

import llmselect
from llmselect import registry

ROOT = Path(__file__).parents[1]
TOP = {
    "llmselect",
    "recipes",
    "eval",
    "tests",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "Makefile",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
}
EMPTY_NAMES = {"utils", "util", "common", "helpers", "helper", "core", "manager", "misc"}
CODE_RUNNERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNTYPED = "reportMissingTypeStubs", "reportUnknownMemberType", "reportUnknownVariableType"  # of libraries without types
OFF = re.compile(rf"# pyright: (?:{'|'.join(UNTYPED)})=false(?:, (?:{'|'.join(UNTYPED)})=false)*")
IGNORED = re.compile(r"# pyright: ignore\[report\w+\] - \w.*")
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def files() -> tuple[str, ...]:
    """What belongs to the project: tracked, or new and not ignored."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return tuple(sorted(name for name in names if name and (ROOT / name).is_file()))


def python(*folders: str) -> list[str]:
    return [name for name in files() if name.endswith(".py") and name.startswith(tuple(f"{f}/" for f in folders))]


@cache
def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text("utf-8"), name)


def length(function: FunctionNode) -> int:
    """Lines of a function from `def` to its end, its docstring not counted."""
    first = function.body[0]
    documented = ast.get_docstring(function) is not None
    assert function.end_lineno is not None and first.end_lineno is not None
    return function.end_lineno - function.lineno + 1 - (first.end_lineno - first.lineno + 1 if documented else 0)


def long_functions(module: ast.Module, limit: int) -> list[str]:
    functions = [node for node in ast.walk(module) if isinstance(node, FunctionNode)]
    return [f"{f.name} has {length(f)} lines" for f in functions if length(f) > limit]


def unsafe(module: ast.Module) -> list[str]:
    """Calls and imports through which data could become code."""
    found = []
    for node in ast.walk(module):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [f"line {node.lineno}: imports {n}" for n in names if n.split(".")[0] in CODE_RUNNERS]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        safe = any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in node.keywords)
        if called == "torch.load" and safe:
            continue  # reads tensors and plain values, refuses anything else
        if called in ("torch.load", "eval", "exec", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"):
            found.append(f"line {node.lineno}: calls {called}")
        for keyword in node.keywords:
            on = not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
            if keyword.arg in ("allow_pickle", "trust_remote_code") and on:
                found.append(f"line {node.lineno}: {keyword.arg}={ast.unparse(keyword.value)}")
    return found


def prints(module: ast.Module) -> list[int]:
    calls = [node for node in ast.walk(module) if isinstance(node, ast.Call)]
    return [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]


def definitions(module: ast.Module) -> list[tuple[str, ast.AST]]:
    """Public functions and classes of a module, and the public methods of its public classes.

    Properties are attributes: the class says what they are.
    """
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found: list[tuple[str, ast.AST]] = []
    for node in module.body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            found.append((node.name, node))
            methods = [m for m in node.body if isinstance(node, ast.ClassDef) and isinstance(m, FunctionNode)]
            called = [m for m in methods if not any("property" in ast.unparse(d) for d in m.decorator_list)]
            found += [(f".{m.name}", m) for m in called if not m.name.startswith("_")]
    return found


def loosened(text: str) -> list[str]:
    """Comments that let pass more than what libraries without types return, or that do not say why."""
    found, before = [], ""
    for number, line in enumerate(text.splitlines(), 1):
        for comment in re.findall(r"#\s*(?:type:\s*ignore|pyright:).*", line):
            whole = OFF.fullmatch(line) and re.fullmatch(r"# (?!pyright:)\w.*\.", before)
            if not whole and not IGNORED.fullmatch(comment):
                found.append(f"line {number}: {comment}")
        before = line
    return found


def documented(node: ast.AST) -> bool:
    return isinstance(node, FunctionNode | ast.ClassDef) and bool(ast.get_docstring(node))


def test_only_the_agreed_names_at_the_top():
    top = {name.split("/")[0] for name in files()}
    assert {name for name in top if not name.startswith(".")} <= TOP


def test_files_fit_on_a_few_screens():
    lines = {name: len((ROOT / name).read_text("utf-8").splitlines()) for name in files() if name.endswith(".py")}
    limits = {name: 120 if name in selector_files() else 320 if name.startswith("tests/") else 300 for name in lines}
    assert lines, "no Python files found"
    assert {name: count for name, count in lines.items() if count > limits[name]} == {}


def selector_files() -> list[str]:
    return [name for name in python("llmselect/selectors") if not Path(name).name.startswith("_")]


@pytest.mark.parametrize("name", python("llmselect", "eval", "recipes"))
def test_functions_fit_on_a_screen(name):
    assert long_functions(tree(name), 40) == []


def test_no_module_has_a_name_that_says_nothing():
    parts = {name: {p for part in Path(name).parts for p in part.removesuffix(".py").split("_")} for name in files()}
    assert [name for name, words in parts.items() if name.endswith(".py") and words & EMPTY_NAMES] == []


@pytest.mark.parametrize("name", python("llmselect"))
def test_no_print_outside_the_command_line(name):
    assert name == "llmselect/cli.py" or prints(tree(name)) == []


@pytest.mark.parametrize("name", python("llmselect", "eval", "recipes"))
def test_data_never_becomes_code(name):
    assert unsafe(tree(name)) == []


@pytest.mark.parametrize("name", python("llmselect"))
def test_nothing_is_left_for_later(name):
    text = (ROOT / name).read_text("utf-8")
    assert [mark for mark in ("TODO", "FIXME", "XXX", "HACK") if mark in text] == []


def test_every_module_is_type_checked_strictly():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["pyright"]
    assert settings["include"] == settings["strict"] == ["llmselect"]
    assert [key for key, value in settings.items() if key in ("exclude", "ignore") or value in (False, "none")] == []
    assert (ROOT / "llmselect" / "py.typed").is_file()


@pytest.mark.parametrize("name", python("llmselect"))
def test_types_are_unknown_only_where_a_library_has_none(name):
    assert loosened((ROOT / name).read_text("utf-8")) == []


@pytest.mark.parametrize("name", python("llmselect"))
def test_public_names_are_documented(name):
    # A method that fills a hook is documented where the hook is declared; a selector's two by its module's sections.
    hooks = {n for other in python("llmselect") for n, node in definitions(tree(other)) if documented(node)}
    hooks |= {".score", ".pick"}
    missing = [n for n, node in definitions(tree(name)) if not documented(node) and not (n[0] == "." and n in hooks)]
    assert missing == []


@pytest.mark.parametrize("kind", [registry.selectors, registry.extractors, registry.schedules], ids=lambda kind: kind.kind)
def test_every_method_documents_itself(kind):
    assert kind.names()
    for name in kind.names():
        about = registry.describe(kind.get(name))
        assert [s for s in registry.SECTIONS if not about.get(s)] == [], f"{kind.kind} '{name}' lacks these sections"
        assert about["title"], f"{kind.kind} '{name}' lacks a first line"


def test_the_public_surface_is_small_and_importable():
    assert len(llmselect.__all__) <= 20
    assert sorted(llmselect.__all__) == dir(llmselect)
    for name in llmselect.__all__:
        assert getattr(llmselect, name) is not None
    with pytest.raises(AttributeError, match=r"no attribute 'load_pol'; it has: .*load_pool"):
        llmselect.load_pol  # noqa: B018


def test_the_guide_to_a_new_method_works_as_printed(tmp_path):
    block = (ROOT / "CONTRIBUTING.md").read_text("utf-8").split("```python\n")[1].split("```")[0]
    (tmp_path / "central.py").write_text(block, "utf-8")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import central, numpy as np\n"
        "from llmselect.registry import SECTIONS, describe, selectors\n"
        "assert selectors.get('central') is central.Central and all(describe(central.Central)[s] for s in SECTIONS)\n"
        "x = np.array([[0.0], [9.0], [4.0], [5.5]])\n"  # mean 4.625: distances 4.625, 4.375, 0.625, 0.875
        "print(*central.Central().select(3, x=x).indices)"
    )
    # In a process of its own, or the other tests would find one method too many.
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["2", "3", "1"], done.stderr


def test_the_checks_see_what_they_are_for():
    body = "\n".join("    x = 1" for _ in range(40))
    assert long_functions(ast.parse(f'def f():\n    """Doc."""\n{body}'), 40) == ["f has 41 lines"]
    assert prints(ast.parse("def f():\n    print(1)")) == [2]
    bad = "import pickle\nfrom dill import load\ntorch.load(p)\nnp.load(p, allow_pickle=x)\nf(trust_remote_code=True)"
    assert len(unsafe(ast.parse(bad))) == 5
    assert unsafe(ast.parse("np.load(p, allow_pickle=False)\nf(trust_remote_code=False)\nmodel.eval()")) == []
    bad = ["# pyright: basic", "x = 1  # type: ignore", "x = 1  # pyright: ignore", "x = 1  # pyright: ignore[reportCallIssue]",
           "# No types.\n# pyright: reportCallIssue=false", "# pyright: reportMissingTypeStubs=false",
           "# No types.\n# pyright: reportMissingTypeStubs=false, reportAttributeAccessIssue=false"]  # fmt: skip
    assert [len(loosened(text)) for text in bad] == [1] * len(bad)
    good = "# scipy has no types.\n# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false\n"
    assert loosened(good + "x = 1  # pyright: ignore[reportCallIssue] - the stubs are older") == []
    shown = definitions(ast.parse("class A:\n    def b(self): ...\n    def _c(self): ...\ndef _d(): ...\ndef e(): ..."))
    assert [name for name, _ in shown] == ["A", ".b", "e"]


def test_each_planted_defect_has_one_place_and_tests_that_are_there():
    spec = importlib.util.spec_from_file_location("mutation", ROOT / "eval" / "mutation.py")
    sys.modules["mutation"] = mutation = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutation)
    assert len({one.what for one in mutation.DEFECTS}) == len(mutation.DEFECTS) >= 10
    for one in mutation.DEFECTS:
        assert mutation.planted(ROOT, one) != (ROOT / one.file).read_text()
        for tests in one.tests.split():
            file, _, name = tests.partition("::")
            assert f"def {name}" in (ROOT / "tests" / f"test_{file}.py").read_text()
