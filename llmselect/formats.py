"""Row formats: what people call instruction data → messages, or the reason why a row is none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmselect.errors import UsageError, nearest
from llmselect.plain import is_list, is_mapping, is_sequence

ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
         "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
         "tool": "tool", "function": "tool", "observation": "tool"}  # fmt: skip
FIELDS = ("messages", "conversations", "instruction", "input", "output", "prompt", "completion", "text", "source", "system",
          "license")  # fmt: skip
RECOGNISED = "messages; conversations (ShareGPT); instruction, input, output (Alpaca); prompt, completion; text"

Message = dict[str, str]


class Invalid(Exception):
    """A row that cannot be used. `reason` is a short code that reports count by; the message is for a person."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason, self.detail = reason, detail


def check_columns(columns: Mapping[str, str] | None) -> None:
    """Refuse a column map with fields that do not exist. `response` and `answer` are names for `completion`."""
    for name in columns or {}:
        if name not in FIELDS and name not in ("response", "answer"):
            raise UsageError(f"pool.columns.{name}: not a field.{nearest(name, FIELDS)} Allowed: {', '.join(FIELDS)}")


def to_messages(row: Any, columns: Mapping[str, str] | None = None) -> list[Message]:
    """The conversation in a row of any recognised format, checked.

    `text` rows become one assistant turn: all of their text is supervised.

    Errors: `Invalid` with the reason.
    """
    if not is_mapping(row):
        raise Invalid("not_an_object", f"a row is an object with named fields, this is {type(row).__name__}")
    if columns:
        absent = [theirs for theirs in columns.values() if theirs not in row]
        if absent:
            raise Invalid("missing_column", f"the row has no field {absent[0]!r}")
        row = {("completion" if ours in ("response", "answer") else ours): row[theirs] for ours, theirs in columns.items()}
    return _checked(_turns(row))


def to_prompt(row: Any) -> list[Message]:
    """The turns of a row that a model is to answer: its conversation without the assistant's turns that end it.

    Errors: `Invalid` with the reason.
    """
    if not is_mapping(row):
        raise Invalid("not_an_object", f"a row is an object with named fields, this is {type(row).__name__}")
    turns = _turns(row)
    while turns and is_mapping(turns[-1]) and _role(turns[-1]) == "assistant":
        turns.pop()  # what is there is the reference: the model must not see it
    if not turns:
        raise Invalid("no_prompt", "there is no turn before the assistant's to answer")
    return [_message(turn, i) for i, turn in enumerate(turns)]


def _role(turn: Mapping[str, Any]) -> str | None:
    return ROLES.get(str(turn.get("role", turn.get("from"))).lower())


def _turns(row: Mapping[str, Any]) -> list[Any]:
    for name in ("messages", "conversations", "conversation"):
        if row.get(name) is not None:
            return _list(row[name], name)
    if row.get("instruction") is not None:
        asked = _text(row["instruction"], "instruction")
        more = _text(row["input"], "input") if row.get("input") else ""
        answer = row.get("output") if row.get("output") is not None else row.get("response")
        return [*_system(row), _turn("user", f"{asked}\n\n{more}" if more.strip() else asked), _turn("assistant", answer)]
    if row.get("prompt") is not None:
        answer = next((row[k] for k in ("completion", "response", "answer") if row.get(k) is not None), None)
        before = row["prompt"] if is_list(row["prompt"]) else [*_system(row), _turn("user", row["prompt"])]
        return [*before, *(answer if is_list(answer) else [_turn("assistant", answer)])]
    if row.get("text") is not None:
        return [_turn("assistant", row["text"])]
    if any(name in row for name in ("messages", "conversations", "prompt", "instruction", "text")):
        raise Invalid("null_content", "the field that should hold the conversation is null")
    raise Invalid("unknown_format", f"fields {sorted(map(str, row))[:8]}; recognised: {RECOGNISED}; or give pool.columns")


def _turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _system(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [_turn("system", row["system"])] if row.get("system") else []


def _list(value: Any, name: str) -> list[Any]:
    if not is_sequence(value):
        raise Invalid("wrong_type", f"{name} must be a list of turns, this is {type(value).__name__}")
    return list(value)


def _text(value: Any, name: str) -> str:
    if value is None:
        raise Invalid("null_content", f"{name} is null")
    if not isinstance(value, str):
        raise Invalid("wrong_type", f"{name} must be text, this is {type(value).__name__}")
    return value


def _checked(turns: list[Any]) -> list[Message]:
    if not turns:
        raise Invalid("empty_messages", "the conversation has no turns")
    messages = [_message(turn, i) for i, turn in enumerate(turns)]
    if not any(m["role"] == "assistant" for m in messages):
        raise Invalid("no_assistant_turn", "nothing to learn: no turn of the assistant")
    if messages[-1]["role"] != "assistant":
        raise Invalid("last_turn_not_assistant", f"the conversation ends with a {messages[-1]['role']} turn")
    if not any(m["content"].strip() for m in messages if m["role"] == "assistant"):
        raise Invalid("empty_response", "every assistant turn is blank")
    return messages


def _message(turn: Any, index: int) -> Message:
    if not is_mapping(turn):
        raise Invalid("wrong_type", f"turn {index} must be an object with role and content, this is {type(turn).__name__}")
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise Invalid("unknown_role", f"turn {index} has role {role!r}; known: {', '.join(ROLES)}")
    content = _text(turn.get("content", turn.get("value")), f"the content of turn {index}")
    if "\0" in content:
        raise Invalid("nul_byte", f"turn {index} contains a NUL byte")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        raise Invalid("invalid_utf8", f"turn {index} contains half of a surrogate pair") from None
    return {"role": ROLES[role.lower()], "content": content}
