"""YAML as a recipe may use it: plain values only, each key once, no aliases, errors with line and column."""

from __future__ import annotations

import re
import reprlib
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.reader import ReaderError

from llmselect.errors import UsageError
from llmselect.plain import is_mapping

MAX_BYTES = 1_000_000


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without repeated keys, keys that are not text, aliases, dates, sets and bytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        parser: Any = self  # its methods have no types
        if parser.check_event(yaml.AliasEvent):  # nine lines of aliases can expand to gigabytes
            mark = parser.peek_event().start_mark
            raise ComposerError(None, None, "aliases (*name) are not allowed; quote a text with a *", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """The mapping of `node`, once its keys are known to be distinct texts."""
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            problem = ""
            if key.tag != "tag:yaml.org,2002:str":
                problem = f"the key {reprlib.repr(key.value)} is not text; put it in quotes"
            elif key.value in seen:
                problem = f"the key '{key.value}' stands here twice"
            if problem:
                raise ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")
_Loader.yaml_constructors = {
    tag: make
    for tag, make in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.removeprefix("tag:yaml.org,2002:") in _PLAIN
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag.removeprefix("tag:yaml.org,2002:") in _PLAIN]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True  # a list that stands in two places would be written as an alias, which `load_yaml` refuses


# YAML 1.1 wants 2.0e-3; people, and YAML 1.2, write 2e-3, which would silently become text in free-form sections.
# Writing has to know it too: the text "2e-3" needs quotes then.
_EXPONENT = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+\Z", re.ASCII)
_classes: list[Any] = [_Loader, _Dumper]
for _class in _classes:
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def parse_yaml(text: str, where: str) -> Any:
    """The plain values that `text` stands for: mappings, lists, text, numbers, true/false, null.

    Errors: `UsageError` that begins with `where` and gives line and column.
    """
    try:
        return yaml.load(text, _Loader)
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UsageError(f"{where}: line {line}: the character {error.character!r} is not allowed in YAML") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UsageError(f"{where}: {at}{error.problem or error.context}") from None
    except RecursionError:
        raise UsageError(f"{where}: nested too deeply") from None
    except ValueError as error:  # a number of 5,000 digits
        raise UsageError(f"{where}: {error}") from None


def load_yaml(path: Path | str) -> dict[str, Any]:
    """The mapping in a YAML file of at most 1 MB.

    Errors: `UsageError` that names the file, and line and column of bad YAML.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); give a YAML file") from None
    if len(raw) > MAX_BYTES:
        raise UsageError(f"{path}: more than the {MAX_BYTES:,} bytes a YAML file may have here")
    try:
        data = parse_yaml(raw.decode("utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not is_mapping(data):
        found = "it is empty" if data is None else f"its top level is {type(data).__name__}"
        raise UsageError(f"{path}: expected a mapping of keys (lines of key: value); {found}")
    return dict(data)


def dump_yaml(data: dict[str, Any]) -> str:
    """The YAML text of plain values in the order given; `load_yaml` reads the same values back."""
    # Escapes for everything beyond ASCII: PyYAML's allow_unicode writes U+0085 so that it is read as a space.
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=False, default_flow_style=False, width=120)
