"""What plain values are (those of JSON, YAML and rows of data), asked so that a type checker follows the answer.

After `isinstance(value, list)` the entries are of an unknown type, which strict checking refuses; here they are of any.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard


def is_mapping(value: Any) -> TypeGuard[Mapping[Any, Any]]:
    """Whether `value` has keys and values."""
    return isinstance(value, Mapping)


def is_list(value: Any) -> TypeGuard[list[Any]]:
    """Whether `value` is a list."""
    return isinstance(value, list)


def is_sequence(value: Any) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    """Whether `value` is a list or a tuple; a text is neither."""
    return isinstance(value, list | tuple)
