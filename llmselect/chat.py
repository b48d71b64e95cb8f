"""Conversations to tokens: chat template, response mask for every assistant turn, truncation that says what it cut."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from llmselect.errors import LlmselectError, UsageError

if TYPE_CHECKING:
    from llmselect.token_cache import TokenCache

log = logging.getLogger("llmselect")

RULES = 1  # part of the fingerprint: raise it when the same row would give other tokens or masks
PROMPT, RESPONSE = 1, 2
MOST_TEXT = 1_000_000  # characters that a template may add by itself
DEFAULT_TEMPLATE = (
    "{{ bos_token if bos_token else '' }}"
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""Tülu's format, for tokenizers without a chat template: its marks are plain text, so no vocabulary grows."""

Message = dict[str, str]


@dataclass(frozen=True)
class Encoded:
    """One row as tokens.

    `ids [T]` int32; `response [T]` bool, the supervised tokens: every assistant turn with its end mark;
    `content [T]` int8: 0 template or special, 1 prompt text, 2 response text; `prompt_cut` and `response_cut` tokens
    that the length limit removed.
    """

    ids: np.ndarray
    response: np.ndarray
    content: np.ndarray
    prompt_cut: int = 0
    response_cut: int = 0


@dataclass(frozen=True)
class Layout:
    """Where things stand in a rendered chat: per message its text span, and per assistant turn its supervised span."""

    text: str
    contents: list[tuple[int, int]]
    supervised: list[tuple[int, int]]


@dataclass(frozen=True)
class Skeleton:
    """A template's own text around the messages of one sequence of roles.

    `pieces[i]` precedes message i; `ends[i] = (before, after)`: how many characters of template around an assistant
    message are supervised with it, None for other roles.
    """

    pieces: tuple[str, ...]
    ends: tuple[tuple[int, int] | None, ...]

    def layout(self, contents: Sequence[str]) -> Layout:
        """Put message texts into the template."""
        parts, at = list[str](), 0
        spans, supervised = list[tuple[int, int]](), list[tuple[int, int]]()
        for piece, content, end in zip(self.pieces, contents, self.ends, strict=False):
            start = at + len(piece)
            at = start + len(content)
            parts += [piece, content]
            spans.append((start, at))
            if end is not None:
                supervised.append((start - end[0], at + end[1]))
        return Layout("".join([*parts, self.pieces[-1]]), spans, supervised)


class ChatEncoder:
    """Renders conversations through a tokenizer's chat template and marks the response of every assistant turn.

    Args:
        tokenizer: a fast Hugging Face tokenizer; templates run only in its sandbox.
        max_length: tokens a row may have.
        template: overrides the tokenizer's; without either `DEFAULT_TEMPLATE` is used and said so.

    The supervised span of a turn is what the template marks with `{% generation %}`, else the content and the special
    token that ends the turn. Spans come from where the template puts a message, never from searching the text: a
    message that contains `<|im_start|>assistant` forges no turn.
    """

    tokenizer: Any
    max_length: int
    template: str
    cache: TokenCache | None = None  # where tokens are kept, and looked for first

    def __init__(self, tokenizer: Any, max_length: int, template: str | None = None):
        if not getattr(tokenizer, "is_fast", False):
            raise UsageError(f"{type(tokenizer).__name__} gives no character offsets; a fast tokenizer is needed")
        if max_length < 8:
            raise UsageError(f"max_length: {max_length} is too short for a chat; give at least 8")
        self.tokenizer, self.max_length = tokenizer, max_length
        known: Any = template or tokenizer.chat_template
        if known is None:
            log.info("%s has no chat template; using llmselect's default", getattr(tokenizer, "name_or_path", "tokenizer"))
            known = DEFAULT_TEMPLATE
        if not isinstance(known, str):
            raise UsageError("the tokenizer has several chat templates; give template= with the one to use")
        self.template = known
        self._skeletons: dict[tuple[str, ...], Skeleton] = {}
        self._special = np.array(sorted(tokenizer.all_special_ids), np.int32)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what decides tokens and masks: vocabulary, template, special tokens, length limit, rules."""
        special = (self.tokenizer.special_tokens_map, self._special.tolist(), bool(self.tokenizer.split_special_tokens))
        parts = (self.tokenizer.backend_tokenizer.to_str(), self.template, str(special), str(self.max_length), str(RULES))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The chat as text; with `add_generation_prompt` it ends where the assistant is to go on.

        Errors: `LlmselectError` when the template refuses the conversation (roles that must alternate, say).
        """
        try:
            text = self.tokenizer.apply_chat_template(list(messages), chat_template=self.template, tokenize=False,
                                                      add_generation_prompt=add_generation_prompt)  # fmt: skip
        except Exception as error:
            raise _refused(messages, error) from error
        if not isinstance(text, str) or len(text) > MOST_TEXT + 1000 * sum(len(m["content"]) for m in messages):
            raise _refused(messages, ValueError("it makes far more text than it was given"))
        return text

    def turn_end(self) -> int | None:
        """Id of the added token with which the template ends a turn of the assistant; None when there is none."""
        try:
            layout = self._layout([{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}])
        except LlmselectError:
            return None
        mark = layout.text[layout.contents[-1][1] : layout.supervised[-1][1]].strip()
        # A base model's tokenizer may hold the mark among its added tokens and yet not call it special.
        return self.tokenizer.get_added_vocab().get(mark)

    def encode(self, conversations: Sequence[Sequence[Message]]) -> list[Encoded]:
        """Tokens and masks of each conversation, cut to `max_length`."""
        return self._encode(conversations) if self.cache is None else self.cache.encode(conversations, self._encode)

    def _encode(self, conversations: Sequence[Sequence[Message]]) -> list[Encoded]:
        if not len(conversations):
            return []
        layouts = [self._layout(messages) for messages in conversations]
        batch = self.tokenizer([one.text for one in layouts], add_special_tokens=False, return_offsets_mapping=True,
                               return_attention_mask=False, verbose=False)  # fmt: skip
        rows = zip(batch["input_ids"], batch["offset_mapping"], layouts, conversations, strict=True)
        return [self._truncate(self._mark(ids, offsets, layout, messages)) for ids, offsets, layout, messages in rows]

    def _mark(self, ids: list[int], offsets: list[tuple[int, int]], layout: Layout, messages: Sequence[Message]) -> Encoded:
        tokens = np.asarray(ids, np.int32)
        start, stop = np.asarray(offsets, np.int64).reshape(-1, 2).T
        content, response = np.zeros(len(tokens), np.int8), np.zeros(len(tokens), bool)
        for (low, high), message in zip(layout.contents, messages, strict=True):
            # A token that straddles template and text counts as text: its state depends on what was said.
            content[(start < high) & (stop > low)] = RESPONSE if message["role"] == "assistant" else PROMPT
        for low, high in layout.supervised:
            response[(start < high) & (stop > low)] = True
        content[np.isin(tokens, self._special)] = 0
        return Encoded(tokens, response, content)

    def _layout(self, messages: Sequence[Message]) -> Layout:
        roles = tuple(m["role"] for m in messages)
        if roles not in self._skeletons:
            self._skeletons[roles] = self._skeleton(roles)
        text, contents = self.render(messages), [m["content"] for m in messages]
        for texts in (contents, [c.strip() for c in contents]):  # many templates trim
            layout = self._skeletons[roles].layout(texts)
            if layout.text == text:
                return layout
        return self._by_prefixes(messages, text)

    def _skeleton(self, roles: tuple[str, ...]) -> Skeleton:
        """Render with stand-ins for the messages; what is between them is the template's own."""
        marks = [f"\u241eMESSAGE{i}\u241e" for i in range(len(roles))]
        stand_ins = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        text, tagged = self.render(stand_ins), self._tagged(stand_ins)
        pieces, starts, at = list[str](), list[int](), 0
        for mark in marks:
            found = text.find(mark, at)
            if found < 0:  # the template hides this message: no skeleton fits, rows go the slow way
                return Skeleton(("\u241e",) * (len(roles) + 1), (None,) * len(roles))
            pieces.append(text[at:found])
            starts.append(found)
            at = found + len(mark)
        pieces.append(text[at:])
        ends: list[tuple[int, int] | None] = []
        for i, (role, start, mark) in enumerate(zip(roles, starts, marks, strict=True)):
            stop = start + len(mark)
            span = next(((low, high) for low, high in tagged if low <= start < high), None)
            if role != "assistant":
                ends.append(None)
            elif span:
                ends.append((start - span[0], span[1] - stop))
            else:
                ends.append((0, 0) if tagged else (0, self._end_mark(pieces[i + 1])))
        return Skeleton(tuple(pieces), tuple(ends))

    def _tagged(self, messages: list[Message]) -> list[tuple[int, int]]:
        """Character spans that the template itself marks as generated; none when it has no such tags."""
        if "generation" not in self.template or "{%" not in self.template.replace("add_generation_prompt", ""):
            return []
        from transformers.utils import chat_template_utils

        untyped: Any = chat_template_utils
        try:
            _, spans = untyped.render_jinja_template(
                [messages], chat_template=self.template, return_assistant_tokens_mask=True, add_generation_prompt=False,
                **self.tokenizer.special_tokens_map,
            )  # fmt: skip
        except Exception as error:
            raise _refused(messages, error) from error
        return [(int(low), int(high)) for low, high in spans[0]]

    def _end_mark(self, piece: str) -> int:
        """Length of the special token (after blanks) that ends a turn, if the template's next text opens with one."""
        body = piece.lstrip()
        fitting = [t for t in self.tokenizer.all_special_tokens if body.startswith(t)]
        return len(piece) - len(body) + len(max(fitting, key=len)) if fitting else 0

    def _by_prefixes(self, messages: Sequence[Message], text: str) -> Layout:
        """For templates that rewrite messages: find each turn by rendering the conversation up to it."""
        contents, supervised = list[tuple[int, int]](), list[tuple[int, int]]()
        for i, message in enumerate(messages):
            before = self.render(messages[:i]) if i else ""
            after = self.render(messages[: i + 1])
            said = message["content"].strip()
            at = after.find(said, len(_common(before, after)))
            if not said or at < 0 or not text.startswith(after[: at + len(said)]):
                raise LlmselectError(
                    f"the chat template rewrites message {i} ({message['role']}) so that its place cannot be told; "
                    "give a template that keeps messages as they are (with {% generation %} tags)"
                )
            contents.append((at, at + len(said)))
            if message["role"] == "assistant":
                stop = at + len(said)
                supervised.append((at, stop + self._end_mark(text[stop:])))
        return Layout(text, contents, supervised)

    def _truncate(self, row: Encoded) -> Encoded:
        """Cut to `max_length`: what follows the last response, then the start of the prompt, then the end."""
        marked = np.flatnonzero(row.response)
        if len(row.ids) <= self.max_length or not len(marked):
            return _part(row, np.arange(min(len(row.ids), self.max_length)))
        keep = np.arange(marked[-1] + 1 if marked[-1] + 1 >= self.max_length else self.max_length)
        excess = len(keep) - self.max_length
        first = int(marked[0])
        bos = int(row.ids[0] == self.tokenizer.bos_token_id) if first else 0
        least = min(first, max(8, self.max_length // 4), self.max_length // 2)
        cut = max(0, min(excess, first - least))
        keep = np.concatenate([keep[:bos], keep[bos + cut :]])[: self.max_length]
        return _part(row, keep)


def _refused(messages: Sequence[Message], error: Exception) -> LlmselectError:
    """A template is a program of others: beside refusing it may divide by zero, recurse, or fill the memory."""
    roles = ", ".join(m["role"] for m in messages)
    told = str(error) if isinstance(error, TypeError | ValueError) or "jinja2" in type(error).__module__ else repr(error)
    return LlmselectError(f"the chat template refuses a conversation of roles [{roles}]: {told}")


def _common(a: str, b: str) -> str:
    size = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:size]


def _part(row: Encoded, keep: np.ndarray) -> Encoded:
    lost = int(row.response.sum() - row.response[keep].sum())
    return replace(row, ids=row.ids[keep], response=row.response[keep], content=row.content[keep],
                   prompt_cut=len(row.ids) - len(keep) - lost, response_cut=lost)  # fmt: skip


def without_prompt(row: Encoded, tokenizer: Any) -> Encoded:
    """The assistant turns alone: each with the one token before it, so that the same tokens are predicted.

    A turn that opens the row is preceded by the tokenizer's BOS (or EOS) token.
    """
    starts = np.flatnonzero(row.response & ~np.concatenate([[False], row.response[:-1]]))
    keep = row.response.copy()
    keep[starts[starts > 0] - 1] = True
    ids, response, content = row.ids[keep], row.response[keep], row.content[keep]
    if len(starts) and starts[0] == 0:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        ids, response, content = np.insert(ids, 0, first), np.insert(response, 0, False), np.insert(content, 0, 0)
    return Encoded(ids, response, np.where(response, content, 0).astype(np.int8), row.prompt_cut, row.response_cut)
