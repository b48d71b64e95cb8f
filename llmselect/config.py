"""Strict configuration: plain dict ⇄ frozen dataclass, YAML, `key=value` overrides, fingerprints."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import re
import reprlib
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from llmselect.errors import LlmselectError, UsageError, nearest
from llmselect.plain import is_list, is_mapping, is_sequence
from llmselect.strict_yaml import dump_yaml, load_yaml, parse_yaml

__all__ = [
    "apply_overrides", "difference", "dump_yaml", "fields_help", "fingerprint", "from_dict", "load_yaml", "substitute",
    "to_dict",
]  # fmt: skip

if typing.TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
_WORDS: dict[Any, str] = {
    int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path", type(None): "null",
}  # fmt: skip
_VARIABLE = re.compile(r"\$\{([^}]*)\}?")
_MISSING: Any = object()


def from_dict(cls: type[T], data: Any, where: str = "") -> T:
    """Build dataclass `cls` from a mapping, refusing what it does not declare.

    Errors: `UsageError` with the key's path: an unknown key (names the nearest), a missing one, a wrong type, or what
    the class's own `__post_init__` refuses.
    """
    if not is_mapping(data):
        raise _wrong(where, cls, data)
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in data:
        if key not in known:
            allowed = ", ".join(known) or "none"
            raise UsageError(f"{_join(where, key)}: unknown key.{nearest(key, known)} Allowed: {allowed}")
    for name, f in known.items():
        if name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UsageError(f"{_join(where, name)}: missing; it has no default; expected {_spell(hints[name])}")
    values = {key: _convert(hints[key], value, _join(where, key)) for key, value in data.items()}
    try:
        return cls(**values)
    except (UsageError, ValueError) as error:
        raise UsageError(f"{where}: {error}" if where else str(error)) from error


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _wrong(where: str, hint: Any, value: Any) -> UsageError:
    options = [str(a) for h in (hint, *get_args(hint)) if get_origin(h) is Literal for a in get_args(h)]
    close = nearest(value, options)
    got = f"{reprlib.repr(value)} ({type(value).__name__})"
    short = isinstance(value, int | float) or (isinstance(value, str) and len(value) < 100)
    one = f"; for one value type [{value}]" if _spell(hint) == "a list" and short else ""
    return UsageError(f"{where or 'recipe'}: expected {_spell(hint)}, got {got}{one}{'.' if close else ''}{close}")


def _spell(hint: Any) -> str:
    """What a user may write for `hint`, in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return "any value"
    if origin in (Union, types.UnionType):
        return " or ".join(_spell(a) for a in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    kind = origin or hint
    if kind is dict or dataclasses.is_dataclass(kind):
        return "a mapping of keys"
    if kind in (list, tuple):
        return f"a list of {len(arguments)} values" if _fixed(kind, arguments) else "a list"
    return _WORDS.get(kind, getattr(kind, "__name__", str(kind)))


def _fixed(kind: Any, arguments: Sequence[Any]) -> bool:
    """Whether a tuple of so many values is meant, not one of any length."""
    return kind is tuple and len(arguments) > 0 and arguments[-1] is not Ellipsis


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    kind = origin or hint
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(hint, arguments, value, where)
    if origin is Literal:
        if any(value == a and type(value) is type(a) for a in arguments):
            return value
        raise _wrong(where, hint, value)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, where)
    if kind in (list, tuple):
        return _convert_sequence(hint, kind, arguments, value, where)
    if kind is dict:
        if not is_mapping(value):
            raise _wrong(where, hint, value)
        inner = arguments[1] if arguments else Any
        for key in value:
            if not isinstance(key, str):
                raise UsageError(f"{where}: the key {key!r} is not text; put it in quotes")
        return {key: _convert(inner, one, _join(where, key)) for key, one in value.items()}
    return _convert_scalar(hint, value, where)


def _convert_union(hint: Any, arguments: Sequence[Any], value: Any, where: str) -> Any:
    deeper: list[UsageError] = []
    # The value's own type first, else `int | str` would turn the text "1e5" into a number.
    for member in sorted(arguments, key=lambda a: a is not type(value)):
        try:
            return _convert(member, value, where)
        except UsageError as error:
            if _spell(member).startswith("a mapping" if isinstance(value, Mapping) else "a list"):
                deeper.append(error)
    # Only a member of the value's shape can say which key or entry inside it is wrong.
    shaped = is_mapping(value) or is_sequence(value)
    raise deeper[0] if shaped and len(deeper) == 1 else _wrong(where, hint, value)


def _convert_sequence(hint: Any, kind: Any, arguments: Sequence[Any], value: Any, where: str) -> Any:
    if not is_sequence(value):
        raise _wrong(where, hint, value)
    if _fixed(kind, arguments):
        if len(value) != len(arguments):
            raise _wrong(where, hint, value)
        inner = list(arguments)
    else:
        inner = [arguments[0] if arguments else Any] * len(value)
    return kind(_convert(one, v, f"{where}[{i}]") for i, (one, v) in enumerate(zip(inner, value, strict=True)))


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    if hint in (int, float) and not isinstance(value, bool):
        number = _number(value)
        if number is not None and (hint is float or number == int(number)):
            return hint(number)
    elif hint in (bool, str, type(None)) and isinstance(value, hint):
        return value
    raise _wrong(where, hint, value)


def _number(value: Any) -> float | int | None:
    """A finite number, or text that YAML 1.1 should have read as one (`1e5`); None for anything else."""
    if isinstance(value, int | float):
        return value if abs(value) <= sys.float_info.max else None
    if not isinstance(value, str) or not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value):
        return None
    return _number(float(value))


def fields_help(cls: type) -> list[dict[str, Any]]:
    """One row per field that a user may set, for `llmselect show`: its name, type in words, default and help text.

    A field without a default has the default `"required"`; nested dataclasses give rows with dotted names.
    """
    rows: list[dict[str, Any]] = []
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if not f.init:
            continue
        if dataclasses.is_dataclass(hints[f.name]):
            rows += [{**row, "name": _join(f.name, row["name"])} for row in fields_help(hints[f.name])]
            continue
        default: Any = "required" if f.default is dataclasses.MISSING else to_dict(f.default)
        if f.default_factory is not dataclasses.MISSING:
            default = to_dict(f.default_factory())
        text = f.metadata.get("help", "")
        rows.append({"name": f.name, "type": _spell(hints[f.name]), "default": default, "help": text})
    return rows


def to_dict(value: Any) -> Any:
    """Plain JSON types of a dataclass (or of any value inside one); `from_dict` builds it again.

    Errors: `LlmselectError` for a value that JSON does not have (a set, an array, NaN).
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if is_mapping(value):
        return {str(key): to_dict(one) for key, one in value.items()}
    if is_sequence(value):
        return [to_dict(one) for one in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise LlmselectError(f"{reprlib.repr(value)} ({type(value).__name__}) is no plain value; give text or numbers")


def fingerprint(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of `to_dict(value)`: a dataclass or plain values."""
    return hashlib.sha256(_canonical(to_dict(value)).encode("ascii")).hexdigest()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":"))


def difference(old: Any, new: Any, at: str = "") -> list[str]:
    """Readable lines `train.tokens: 1000 -> 2000`, one per key in which two plain trees differ, sorted by key.

    There is none exactly when the fingerprints are equal.
    """
    if is_mapping(old) and is_mapping(new):
        keys = sorted(old.keys() | new.keys(), key=str)
        pairs = ((old.get(key, _MISSING), new.get(key, _MISSING), _join(at, key)) for key in keys)
        return [line for pair in pairs for line in difference(*pair)]
    shown = ["absent" if one is _MISSING else _canonical(to_dict(one)) for one in (old, new)]
    return [] if shown[0] == shown[1] else [f"{at or 'all'}: {shown[0]} -> {shown[1]}"]


def apply_overrides(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `data` with dotted `key=value` settings; values are read as YAML, missing levels are made.

    Errors: `UsageError` for what is no `key=value`, for a value that is no YAML, and for a key inside a list.
    """
    out = copy.deepcopy(dict(data))
    for text in overrides:
        key, equals, value = text.partition("=")
        path = key.strip().split(".")
        if not equals or not all(re.fullmatch(r"[^\s\[\]]+", part) for part in path):
            raise UsageError(f"{text!r} is not an override; type key=value, for example train.tokens=100000")
        place = out
        for depth, part in enumerate(path[:-1]):
            inner = place.get(part)
            if isinstance(inner, list):
                at = ".".join(path[: depth + 1])
                raise UsageError(f"{text!r}: {at} is a list; give all of it, for example {at}=[0,1]")
            if not isinstance(inner, dict):  # a shorthand such as budget: 5% gives way to budget.rows=100
                place[part] = {}
            place = place[part]
        try:
            place[path[-1]] = parse_yaml(value, f"override {text!r}")
        except UsageError as error:
            raise UsageError(f"{error}; text with such signs is given as {key.strip()}='\"…\"'") from None
    return out


def substitute(data: Any, values: Mapping[str, Any], where: str = "") -> Any:
    """Replace `${name}` in every text by `values[name]`; the environment is never read, `vars` itself stays as it is.

    Errors: `UsageError` naming the variable to set when it is absent or null.
    """
    if is_mapping(data):
        as_is = ("vars",) if where == "" else ()
        return {k: v if k in as_is else substitute(v, values, _join(where, k)) for k, v in data.items()}
    if is_list(data):
        return [substitute(one, values, f"{where}[{i}]") for i, one in enumerate(data)]
    if not isinstance(data, str):
        return data

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if not re.fullmatch(r"\w+", name) or not match[0].endswith("}"):
            raise UsageError(f"{where}: {match[0]} names no variable; type ${{name}} with letters, digits and '_'")
        if values.get(name) is None:
            raise UsageError(f"{where}: {data} needs a value for '{name}'; set it: vars.{name}=PATH")
        if isinstance(values[name], Mapping | list):
            raise UsageError(f"vars.{name}: expected text or a number, got {reprlib.repr(values[name])}")
        return str(values[name])

    return _VARIABLE.sub(fill, data)
