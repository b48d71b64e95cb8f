"""Strict configuration: plain dict ⇄ frozen dataclass, YAML, `key=value` overrides, fingerprints."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from llmselect.errors import UsageError, nearest

T = TypeVar("T")
MAX_YAML_BYTES = 1_000_000


def from_dict(cls: type[T], data: Any, where: str = "") -> T:
    """Build dataclass `cls` from a mapping, refusing what it does not declare.

    Errors: `UsageError` with the key's path: an unknown key (names the nearest), a missing one, a wrong type.
    """
    if not isinstance(data, Mapping):
        raise _wrong(where, "a mapping of keys", data)
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in data:
        if key not in known:
            raise UsageError(f"{_join(where, key)}: unknown key.{nearest(key, known)} Allowed: {', '.join(known)}")
    for name, f in known.items():
        if name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UsageError(f"{_join(where, name)}: missing; it has no default")
    values = {key: _convert(hints[key], value, _join(where, key)) for key, value in data.items()}
    try:
        return cls(**values)
    except (UsageError, ValueError) as error:
        raise UsageError(f"{where}: {error}" if where else str(error)) from error


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _wrong(where: str, expected: str, value: Any) -> UsageError:
    return UsageError(f"{where or 'recipe'}: expected {expected}, got {value!r} ({type(value).__name__})")


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is Literal:
        if value in arguments and type(value) in {type(a) for a in arguments}:
            return value
        raise UsageError(f"{where}: {value!r} is not allowed.{nearest(value, map(str, arguments))} One of: {_names(arguments)}")
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, where)  # type: ignore[arg-type]
    if origin is list or hint is list or origin is tuple or hint is tuple:
        return _convert_sequence(hint, arguments, value, where)
    if origin is dict or hint is dict:
        if not isinstance(value, Mapping):
            raise _wrong(where, "a mapping of keys", value)
        inner = arguments[1] if arguments else Any
        return {str(key): _convert(inner, one, _join(where, key)) for key, one in value.items()}
    return _convert_scalar(hint, value, where)


def _convert_union(arguments: Sequence[Any], value: Any, where: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    members = [a for a in arguments if a is not type(None)]
    errors = []
    for member in members:
        try:
            return _convert(member, value, where)
        except UsageError as error:
            errors.append(error)
    if len(members) == 1:
        raise errors[0]
    raise _wrong(where, " or ".join(getattr(m, "__name__", str(m)) for m in members), value)


def _convert_sequence(hint: Any, arguments: Sequence[Any], value: Any, where: str) -> Any:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise _wrong(where, "a list", value)
    inner = arguments[0] if arguments else Any
    made = [_convert(inner, one, f"{where}[{i}]") for i, one in enumerate(value)]
    return tuple(made) if (get_origin(hint) or hint) is tuple else made


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    if hint in (int, float) and not isinstance(value, bool):
        number = _number(value)  # YAML 1.1 reads 1e5 as text
        if number is not None and (hint is float or number == int(number)):
            return hint(number)
    elif hint in (bool, str, type(None)) and isinstance(value, hint):
        return value
    expected = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    raise _wrong(where, expected.get(hint, getattr(hint, "__name__", str(hint))), value)


def _number(value: Any) -> float | int | None:
    if isinstance(value, int | float):
        return value if value == value and abs(value) != float("inf") else None
    if not isinstance(value, str) or "e" not in value.lower():
        return None
    try:
        return _number(float(value))
    except ValueError:
        return None


def _names(arguments: Sequence[Any]) -> str:
    return ", ".join(map(str, arguments))


def to_dict(value: Any) -> Any:
    """Plain JSON types of a dataclass (or of any value inside one); `from_dict` builds it again."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_dict(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [to_dict(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def fingerprint(value: Any) -> str:
    """SHA-256 of the canonical JSON of `to_dict(value)`."""
    text = json.dumps(to_dict(value), sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def difference(old: Any, new: Any, at: str = "") -> list[str]:
    """Readable lines `train.tokens: 1000 → 2000` for what differs between two plain trees."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = sorted(old.keys() | new.keys())
        return [line for key in keys for line in difference(old.get(key), new.get(key), _join(at, key))]
    return [] if old == new else [f"{at}: {old} → {new}"]


def apply_overrides(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `data` with dotted `key=value` settings; values are read as YAML."""
    out = json.loads(json.dumps(data))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key or any(not part for part in key.split(".")):
            raise UsageError(f"{text!r} is not an override; type key=value, for example train.tokens=100000")
        place = out
        *path, last = key.split(".")
        for part in path:
            if not isinstance(place.setdefault(part, {}), dict):
                place[part] = {}
            place = place[part]
        place[last] = _yaml(value, f"override {key}")
    return out


def substitute(data: Any, values: Mapping[str, Any], where: str = "") -> Any:
    """Replace `${name}` in every text by `values[name]`.

    Errors: `UsageError` naming the variable to set when it has no value.
    """
    if isinstance(data, Mapping):
        return {k: v if where == "" and k == "vars" else substitute(v, values, _join(where, k)) for k, v in data.items()}
    if isinstance(data, list):
        return [substitute(one, values, f"{where}[{i}]") for i, one in enumerate(data)]
    if not isinstance(data, str) or "${" not in data:
        return data
    for name in Template(data).get_identifiers():
        if values.get(name) is None:
            raise UsageError(f"{where}: {data} needs a value; type vars.{name}=…")
    return Template(data).safe_substitute({k: str(v) for k, v in values.items()})


def load_yaml(path: Path | str) -> dict[str, Any]:
    """A YAML mapping: no duplicate keys, no aliases (a few lines of them can expand to gigabytes), at most 1 MB."""
    path = Path(path)
    if path.stat().st_size > MAX_YAML_BYTES:
        raise UsageError(f"{path}: {path.stat().st_size} bytes is more than the {MAX_YAML_BYTES} a recipe may have")
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    data = _yaml(text, str(path))
    if not isinstance(data, dict):
        raise UsageError(f"{path}: a recipe is a mapping of keys, this is {type(data).__name__}")
    return data


def _yaml(text: str, where: str) -> Any:
    import yaml

    class Strict(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.composer.ComposerError(None, None, "aliases are not allowed", self.peek_event().start_mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            seen = set()
            for key, _ in node.value:
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"duplicate key '{key.value}'", key.start_mark)
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Strict)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        at = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UsageError(f"{where}:{at} {getattr(error, 'problem', None) or error}") from None
