"""Parts of an answer: reasoning, text and tool calls."""

import json
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

Kind = Literal["text", "reasoning", "call"]


class Part(NamedTuple):
    """A piece of an answer.

    Attributes:
        kind: ``"text"``, ``"reasoning"``, or ``"call"`` for the text of a tool call.
        text: without the marks around it.
    """

    kind: Kind
    text: str


class _Mark(NamedTuple):
    kind: Kind
    start: str
    end: str


_MARKS = (
    _Mark("reasoning", "<think>", "</think>"),
    _Mark("reasoning", "[THINK]", "[/THINK]"),
    _Mark("call", "<tool_call>", "</tool_call>"),
)


class PartStream:
    """Split the text of an answer into parts while it arrives.

    Args:
        prompt: the rendered text before the answer. Some chat templates begin the reasoning themselves.
    """

    def __init__(self, prompt: str = "") -> None:
        prompt = prompt.rstrip()
        self._open_mark = next((mark for mark in _MARKS if prompt.endswith(mark.start)), None)
        self._buffer = ""

    def feed(self, text: str) -> list[Part]:
        """Add text.

        Args:
            text: the next piece of the answer.

        Returns:
            The parts that are certain now. Neighbours of one kind belong together.
        """
        self._buffer += text
        parts = []
        while True:
            position, mark_text, next_mark = self._next_mark()
            if position < 0:
                break
            parts.append(self._take(position))
            self._buffer = self._buffer[len(mark_text) :]
            self._open_mark = next_mark
        # The end of the text may be the beginning of a mark.
        parts.append(self._take(len(self._buffer) - self._length_of_begun_mark()))
        return [part for part in parts if part.text]

    def finish(self) -> list[Part]:
        """End the answer.

        Returns:
            What was held back.
        """
        rest = self._take(len(self._buffer))
        return [rest] if rest.text else []

    def _next_mark(self) -> tuple[int, str, _Mark | None]:
        """Position and text of the next mark, -1 without one, and the mark that is open behind it."""
        if self._open_mark is not None:
            return self._buffer.find(self._open_mark.end), self._open_mark.end, None
        found = [(self._buffer.find(mark.start), mark.start, mark) for mark in _MARKS if mark.start in self._buffer]
        return min(found, default=(-1, "", None), key=lambda item: item[0])

    def _length_of_begun_mark(self) -> int:
        marks = [self._open_mark.end] if self._open_mark is not None else [mark.start for mark in _MARKS]
        lengths = [length for mark in marks for length in range(1, len(mark)) if self._buffer.endswith(mark[:length])]
        return max(lengths, default=0)

    def _take(self, length: int) -> Part:
        kind: Kind = "text" if self._open_mark is None else self._open_mark.kind
        part, self._buffer = Part(kind, self._buffer[:length]), self._buffer[length:]
        return part


def answer_message(text: str, parts: Iterable[Part], template: str) -> dict[str, Any]:
    """Write an answer as a message of the conversation.

    Reasoning and tool calls get keys of their own where the chat template reads these keys. Elsewhere the content is
    the text as the model wrote it.

    Args:
        text: the whole answer.
        parts: of the answer.
        template: the chat template.

    Returns:
        The message.
    """
    by_kind: dict[str, list[str]] = {"text": [], "reasoning": [], "call": []}
    for part in joined(parts):
        by_kind[part.kind].append(part.text)
    message: dict[str, Any] = {"role": "assistant", "content": text}
    has_keys = (not by_kind["reasoning"] or "reasoning_content" in template) and (
        not by_kind["call"] or "tool_calls" in template
    )
    calls = [_read_call(call) for call in by_kind["call"]]
    if not has_keys or None in calls:
        return message
    message["content"] = "".join(by_kind["text"])
    if by_kind["reasoning"] or calls:
        # The template writes the line breaks around the parts.
        message["content"] = message["content"].strip()
    if by_kind["reasoning"]:
        message["reasoning_content"] = "".join(by_kind["reasoning"]).strip()
    if calls:
        message["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return message


def joined(parts: Iterable[Part]) -> list[Part]:
    """Join neighbours of one kind.

    Args:
        parts: as they arrived.

    Returns:
        New parts.
    """
    result: list[Part] = []
    for part in parts:
        if result and part.kind == result[-1].kind:
            result[-1] = Part(part.kind, result[-1].text + part.text)
        else:
            result.append(part)
    return result


def _read_call(text: str) -> dict[str, Any] | None:
    """Name and arguments of a call in JSON; None for another form."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_call = isinstance(call, dict) and isinstance(call.get("name"), str)
    return {"name": call["name"], "arguments": call.get("arguments", {})} if is_call else None
