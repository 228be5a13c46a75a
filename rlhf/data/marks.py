"""Marks in a conversation: where its parts stand in a rendering, and which parts the template leaves out.

Templates strip, move, quote and leave out what a message holds, so that the text of an answer cannot be searched for:
it may occur elsewhere, or in another form. Therefore the conversation is rendered a second time, with a mark in the
middle of each string: a character that occurs in no text. The position of a mark is the position of its string. A mark
that is missing belongs to a part that the template leaves out.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from rlhf.data.messages import ASSISTANT, REASONING_KEYS, Message
from rlhf.data.templates import PROBE, ChatTemplate

# PROBE is the last of them: no string gets it as a mark, but it is found and removed like one.
_FIRST_MARK, _LAST_MARK = 0xF0000, ord(PROBE)  # a private plane of Unicode
MARKS = re.compile(f"[{chr(_FIRST_MARK)}-{chr(_LAST_MARK)}]")
THOUGHT_TAG = re.compile(r"</?[\w:]*think\w*>|\[/?THINK\]", re.IGNORECASE)
# Keys that need no word of their own in a template.
_KNOWN_KEYS = {"role", "content", "tool_calls", "tool_call_id", "name", "id", "weight", *REASONING_KEYS}


class Note(NamedTuple):
    """What a template leaves out of a conversation, for people.

    Args:
        text: One line.
        kind: ``"lost reasoning"`` of an answer that is trained; ``"earlier reasoning"``, which a template shows for the
            last answer only, so that it is not lost when each answer is a row of its own; or ``"other"``.
    """

    text: str
    kind: Literal["lost reasoning", "earlier reasoning", "other"] = "other"


@dataclass
class Part:
    """A stretch of a message's text with a mark in it.

    Args:
        name: The key of the message that holds the text.
        mark: One character.
        before: The text of the stretch before the mark.
        after: The text of the stretch after the mark.
    """

    name: str
    mark: str
    before: str
    after: str


@dataclass
class Marked:
    """Messages with marks, and the marked parts of each message."""

    messages: list[Message] = field(default_factory=list)
    parts: list[list[Part]] = field(default_factory=list)


def mark_messages(messages: list[Message], first: int, prefill: int, mark_names: bool = True) -> Marked:
    """Put marks into the strings of messages.

    Args:
        messages: The conversation.
        first: Index of the first message that is answered.
        prefill: Characters of that message's content that belong to the prompt; its mark stands behind them.
        mark_names: Whether to mark the names of called functions. Some templates compare them.

    Returns:
        New messages with marks.
    """
    marked_messages = Marked()
    unused_marks = map(chr, range(_FIRST_MARK, _LAST_MARK))
    for index, message in enumerate(messages):
        message_parts: list[Part] = []
        # A copy, as the same messages are also rendered without marks.
        message = dict(message)
        for message_key in (*REASONING_KEYS, "content"):
            message_text = message.get(message_key)
            if not isinstance(message_text, str):
                continue
            # The mark stands at the border itself, which is what has to be found again.
            if prefill and index == first and message_key == "content":
                message[message_key] = _mark_at(message_text, prefill, message_key, message_parts, unused_marks)
            else:
                message[message_key] = _mark_stretches(message_text, message_key, message_parts, unused_marks)
        if isinstance(message.get("tool_calls"), list):
            message["tool_calls"] = [
                _mark_call(call, f"tool_calls[{number}]", message_parts, unused_marks, mark_names)
                for number, call in enumerate(message["tool_calls"])
            ]
        marked_messages.messages.append(message)
        marked_messages.parts.append(message_parts)
    return marked_messages


def _mark_at(text: str, position: int, name: str, parts: list[Part], marks: Iterator[str]) -> str:
    marked_part = Part(name, next(marks), text[:position].lstrip(), text[position:].rstrip())
    parts.append(marked_part)
    return text[:position] + marked_part.mark + text[position:]


def _mark_stretches(text: str, name: str, parts: list[Part], marks: Iterator[str]) -> str:
    """Mark the middle of each stretch between the tags of a thought.

    A template may write what stands behind ``</think>`` and leave out what stands before it.
    """
    stretch_ends = [tag.start() for tag in THOUGHT_TAG.finditer(text)] + [len(text)]
    marked_stretches = []
    stretch_start = 0
    for stretch_end in stretch_ends:
        marked_stretches.append(_mark_stretch(text[stretch_start:stretch_end], name, parts, marks))
        stretch_start = stretch_end
    return "".join(marked_stretches)


def _mark_stretch(stretch: str, name: str, parts: list[Part], marks: Iterator[str]) -> str:
    """Mark a stretch in the middle of its text, behind the tag that it may begin with."""
    thought_tag = THOUGHT_TAG.match(stretch)
    tag_length = thought_tag.end() if thought_tag else 0
    stripped_text = stretch[tag_length:].strip()
    if not stripped_text:
        return stretch
    # The middle: templates strip white space off the ends, and a border may be found from either side.
    middle = len(stripped_text) // 2
    marked_part = Part(name, next(marks), stripped_text[:middle], stripped_text[middle:])
    parts.append(marked_part)
    position = stretch.index(stripped_text, tag_length) + middle
    return stretch[:position] + marked_part.mark + stretch[position:]


def _mark_call(call: Any, part_name: str, parts: list[Part], marks: Iterator[str], mark_names: bool) -> Any:
    """Mark the function's name and the texts of the arguments of a tool call."""
    if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
        return call

    def mark(value: Any) -> Any:
        if isinstance(value, dict):
            return {argument_key: mark(item) for argument_key, item in value.items()}
        if isinstance(value, list):
            return [mark(item) for item in value]
        return _mark_stretches(value, part_name, parts, marks) if isinstance(value, str) else value

    function = dict(call["function"])
    # Keys of arguments stay: a template may sort or look them up.
    for function_key in ("name", "arguments") if mark_names else ("arguments",):
        if function_key in function:
            function[function_key] = mark(function[function_key])
    return {**call, "function": function}


# What is lost


def lost_parts(template: ChatTemplate, marked: Marked, rendering: str, scored: list[int]) -> tuple[Note, ...]:
    """Find what the template leaves out: reasoning, turns and calls, and keys and tools that it does not know.

    Args:
        template: Rendered the conversation.
        marked: The conversation with marks.
        rendering: Its text, with the marks that came out.
        scored: Indices of the messages that are trained.

    Returns:
        Different notes, in order.
    """
    notes = _unknown_keys(template, marked.messages)
    last_scored = scored[-1] if scored else -1
    written_marks = set(MARKS.findall(rendering))
    for index, (message, parts) in enumerate(zip(marked.messages, marked.parts, strict=True)):
        parts_lost, written_names = _split_lost(parts, written_marks)
        if not parts_lost:
            continue
        is_reasoning = all(_is_reasoning(part, parts) for part in parts_lost)
        is_earlier = message["role"] == ASSISTANT and index < last_scored
        # Templates of models that think write the reasoning of the last answer only. That is meant so, and no loss if
        # each answer is a row of its own.
        if is_earlier and is_reasoning and written_names:
            note_text = "the chat template leaves out the reasoning of earlier answers (--split_turns learns it)"
            notes.append(Note(note_text, "earlier reasoning"))
        else:
            notes.append(_lost_note(message, parts_lost, is_reasoning))
    return tuple(dict.fromkeys(notes))


def _split_lost(parts: list[Part], written_marks: set[str]) -> tuple[list[Part], set[str]]:
    """The parts of a message that are lost, and the keys of those that are written."""
    written_names = {part.name for part in parts if part.mark in written_marks}
    # Reasoning may be given under several keys, of which a template reads one.
    if written_names & set(REASONING_KEYS):
        written_names |= set(REASONING_KEYS)
    unwritten_parts = [part for part in parts if part.mark not in written_marks]
    # One written word shows that a call is there; of a content, each stretch counts.
    parts_lost = [part for part in unwritten_parts if part.name == "content" or part.name not in written_names]
    return parts_lost, written_names


def _lost_note(message: Message, lost: list[Part], is_reasoning: bool) -> Note:
    lost_keys = dict.fromkeys(part.name.split("[")[0] for part in lost)
    key_names = ", ".join(map(repr, lost_keys))
    location = " before </think>" if is_reasoning and lost[0].name == "content" else ""
    remedy = "--split_turns learns it, " if is_reasoning and message["role"] == ASSISTANT else ""
    note_text = (
        f"the chat template leaves out {key_names} of the role {message['role']!r}{location}, which is lost; "
        f"{remedy}--chat_template_path takes another template"
    )
    # A whole turn that is left out may hold reasoning beside its content.
    holds_reasoning = is_reasoning or bool(lost_keys.keys() & set(REASONING_KEYS))
    return Note(note_text, "lost reasoning" if holds_reasoning else "other")


def _unknown_keys(template: ChatTemplate, messages: list[Message]) -> list[Note]:
    """Tools, and keys of messages, that do not occur in the template."""
    source = template.source
    notes = []
    if template.tools and "tools" not in source:
        notes.append(Note("the template does not write 'tools'"))
    unknown_keys = {key for message in messages for key in message} - _KNOWN_KEYS
    # A search for the word, not a parse: at worst a note is missing, and none is wrong.
    notes += [Note(f"message key {key!r} is not read") for key in sorted(unknown_keys) if key not in source]
    return notes


def _is_reasoning(part: Part, parts: list[Part]) -> bool:
    """Whether a part is reasoning: under a key of its own, or before the last stretch of a content with tags."""
    content_parts = [other for other in parts if other.name == "content"]
    return part.name in REASONING_KEYS or (len(content_parts) > 1 and part is not content_parts[-1])
