"""Row formats: what people call instruction data → messages, or the reason why a row is none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from llmselect.errors import UsageError, nearest

ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
         "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
         "tool": "tool", "function": "tool", "observation": "tool"}  # fmt: skip
CONVERSATIONS = ("messages", "conversations", "conversation")
ANSWERS = {"instruction": ("output", "response"), "prompt": ("completion", "response", "answer")}
FIELDS = (*CONVERSATIONS, "instruction", "input", "output", "prompt", "completion", "response", "answer", "text",
          "system", "source", "dataset")  # fmt: skip
RECOGNISED = "messages; conversations (ShareGPT); instruction, input, output (Alpaca); prompt, completion; text"
_BESIDE = ("system", "source", "dataset")  # fields that say something about a row, whatever holds its conversation

Message = dict[str, str]


class Invalid(Exception):
    """A row that cannot be used. `reason` is a short code that reports count by; `detail` is a sentence for a person."""

    def __init__(self, reason: str, detail: str, excerpt: str = ""):
        super().__init__(detail)
        self.reason, self.detail, self.excerpt = reason, detail, excerpt


def check_columns(columns: Mapping[str, str] | None) -> None:
    """Refuse a column map with fields that do not exist."""
    for name in columns or {}:
        if name not in FIELDS:
            raise UsageError(f"pool.columns.{name}: not a field.{nearest(name, FIELDS)} Allowed: {', '.join(FIELDS)}")


def check_found(found: Iterable[str], where: str, columns: Mapping[str, str] | None) -> None:
    """Refuse a table whose columns hold no conversation, before its rows are read.

    Errors: `UsageError` with the columns found, what is recognised and what to type.
    """
    names = [str(name) for name in found]
    for ours, theirs in (columns or {}).items():
        if theirs not in names:
            raise UsageError(f"pool.columns.{ours}: {where} has no column {theirs!r}.{nearest(theirs, names)} It has: {names}")
    if _kind(_renamed(dict.fromkeys(names), columns)) is None:
        raise UsageError(f"{where}: no conversation in its columns {names}. Recognised: {RECOGNISED}. "
                         'Name them otherwise: columns={"prompt": "question", "response": "answer"}')  # fmt: skip


def wanted(found: Iterable[str], columns: Mapping[str, str] | None) -> list[str]:
    """The columns of a table that can matter: images and vectors beside them need not be decoded."""
    mapped = set((columns or {}).values())
    return [name for name in found if name in FIELDS or name in mapped]


def to_messages(row: Any, columns: Mapping[str, str] | None = None) -> list[Message]:
    """The conversation in a row of any recognised format, checked.

    `messages` and `conversations` hold turns with `role`/`content` or `from`/`value`; other keys of a turn are not kept.
    A `system` field comes before a conversation that has no system turn. A `text` row becomes one assistant turn: all of
    its text is supervised. Valid conversations end with an assistant turn, and no user or assistant turn is blank.

    Errors: `Invalid` with the reason: not_an_object, missing_column, unknown_format, wrong_type, null_content,
    empty_messages, unknown_role, nul_byte, lone_surrogate, no_assistant_turn, last_turn_not_assistant, empty_response,
    empty_prompt.
    """
    if not isinstance(row, Mapping):
        raise Invalid("not_an_object", f"a row is an object with named fields, this is {type(row).__name__}")
    for theirs in (columns or {}).values():
        if theirs not in row:
            raise Invalid("missing_column", f"the row has no field {theirs!r}; it has {_names(row)}")
    return _checked(_turns(_renamed(row, columns)))


def origin_of(row: Mapping[str, Any], columns: Mapping[str, str] | None = None) -> str | None:
    """The data set that a row says it is from: its `source` or `dataset`.

    Errors: `Invalid` for one that is no text.
    """
    renamed = _renamed(row, columns)
    value = next((renamed[name] for name in ("source", "dataset") if renamed.get(name) not in (None, "")), None)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    return value if value is None else _text(value, "the source")


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str] | None) -> Mapping[str, Any]:
    """The row under our names. A map that names a conversation is the only place where one is looked for."""
    if not columns:
        return row
    mapped = {ours: row.get(theirs) for ours, theirs in columns.items()}
    if set(columns) <= set(_BESIDE):
        return {**row, **mapped}
    return {**{name: row[name] for name in _BESIDE if name in row}, **mapped}


def _kind(row: Mapping[str, Any], filled: bool = False) -> str | None:
    """The field that makes a row one of the recognised formats; with `filled`, one that is not null."""

    def has(name: str) -> bool:
        return name in row and (not filled or row[name] is not None)

    for name in (*CONVERSATIONS, *ANSWERS, "text"):
        if has(name) and (name not in ANSWERS or any(has(answer) for answer in ANSWERS[name])):
            return name
    return None


def _turns(row: Mapping[str, Any]) -> list[Any]:
    kind = _kind(row, filled=True) or _kind(row)
    if kind is None:
        raise Invalid("unknown_format", f"fields {_names(row)}; recognised: {RECOGNISED}; or give columns")
    if row[kind] is None:
        raise Invalid("null_content", f"{kind} is null")
    if kind == "text":
        return [_turn("assistant", row[kind])]
    if kind in CONVERSATIONS:
        turns = _list(row[kind], kind)
    else:
        asked, answer = row[kind], next((row[name] for name in ANSWERS[kind] if row.get(name) is not None), None)
        if kind == "instruction":
            parts = [_text(asked, kind), _text(row["input"], "input") if row.get("input") is not None else ""]
            asked = "\n\n".join(part for part in parts if part.strip())
        turns = [*(asked if isinstance(asked, list) else [_turn("user", asked)]),
                 *(answer if isinstance(answer, list) else [_turn("assistant", answer)])]  # fmt: skip
    system = row.get("system")
    begun = (
        bool(turns) and isinstance(turns[0], Mapping) and turns[0].get("role", turns[0].get("from")) in ("system", "developer")
    )
    return turns if begun or not system else [_turn("system", system), *turns]


def _names(row: Mapping[str, Any]) -> list[str]:
    return sorted(str(name)[:40] for name in row)[:8]


def _turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise Invalid("wrong_type", f"{name} must be a list of turns, this is {type(value).__name__}")
    return list(value)


def _text(value: Any, name: str) -> str:
    if value is None:
        raise Invalid("null_content", f"{name} is null")
    if not isinstance(value, str):
        raise Invalid("wrong_type", f"{name} must be text, this is {type(value).__name__}")
    if "\0" in value:
        raise Invalid("nul_byte", f"{name} contains a NUL byte")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise Invalid("lone_surrogate", f"{name} contains half of a surrogate pair: no Unicode text") from None
    return value


def _checked(turns: list[Any]) -> list[Message]:
    if not turns:
        raise Invalid("empty_messages", "the conversation has no turns")
    messages = [_message(turn, i) for i, turn in enumerate(turns)]
    if not any(m["role"] == "assistant" for m in messages):
        raise Invalid("no_assistant_turn", "nothing to learn: no turn of the assistant")
    if messages[-1]["role"] != "assistant":
        raise Invalid("last_turn_not_assistant", f"the conversation ends with a {messages[-1]['role']} turn")
    for i, message in enumerate(messages):
        if message["role"] in ("user", "assistant") and not message["content"].strip():
            reason = "empty_response" if message["role"] == "assistant" else "empty_prompt"
            raise Invalid(reason, f"turn {i}, of the {message['role']}, is blank")
    return messages


def _message(turn: Any, index: int) -> Message:
    if not isinstance(turn, Mapping):
        raise Invalid("wrong_type", f"turn {index} must be an object with role and content, this is {type(turn).__name__}")
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise Invalid("unknown_role", f"turn {index} has role {str(role)[:40]!r}; known: {', '.join(ROLES)}")
    return {"role": ROLES[role.lower()], "content": _text(turn.get("content", turn.get("value")), f"the content of turn {index}")}
