"""Marks in a conversation: where its parts come out of a chat template, and what does not come out.

Templates strip, move, quote and leave out what a message holds. So each string of each message is rendered a second
time with a mark in its middle, a character that no text has. Where the marks come out is where the messages are. A mark
that does not come out is a part that the template leaves out.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.data.formats import Dialogue, Message

_FIRST_MARK, _LAST_MARK = 0xF0000, 0xFFFFD  # a private plane of Unicode
MARKS = re.compile(f"[{chr(_FIRST_MARK)}-{chr(_LAST_MARK)}]")
PROBE = chr(_LAST_MARK)  # stands for an answer that is not there yet
THOUGHT_TAG = re.compile(r"</?[\w:]*think\w*>|\[/?THINK\]", re.IGNORECASE)
REASONING = ("reasoning_content", "reasoning", "thinking")


_KNOWN = {
    "role",
    "content",
    "tool_calls",
    "tool_call_id",
    "name",
    "id",
    "weight",
    *REASONING,
}


@dataclass
class Part:
    """A string of a message with a mark behind its first ``before`` characters."""

    name: str
    mark: str
    before: str
    after: str


@dataclass
class Marked:
    """Messages with marks, and the parts of each."""

    messages: list[Message]
    parts: list[list[Part]] = field(default_factory=list)


def mark_messages(messages: list[Message], first: int, prefill: int, names: bool = True) -> Marked:
    """Mark the strings of ``messages``.

    Args:
        prefill: characters of message ``first`` behind which its mark stands.
        names: mark names of functions, at which some templates look.
    """
    marked = Marked([])
    number = iter(range(_FIRST_MARK, _LAST_MARK))
    for index, message in enumerate(messages):
        parts: list[Part] = []
        message = dict(message)
        for key in (*REASONING, "content"):
            if isinstance(message.get(key), str):
                at = prefill if (index, key) == (first, "content") and prefill else None
                message[key] = _mark_text(message[key], key, parts, number, at)
        if isinstance(message.get("tool_calls"), list):
            message["tool_calls"] = [
                _mark_call(call, f"tool_calls[{place}]", parts, number, names)
                for place, call in enumerate(message["tool_calls"])
            ]
        marked.messages.append(message)
        marked.parts.append(parts)
    return marked


def _mark_text(text: str, name: str, parts: list[Part], number: Any, at: int | None) -> str:
    """Text with a mark in the middle of each stretch between the tags of a thought; or one at ``at``."""
    if at is not None:
        parts.append(Part(name, chr(next(number)), text[:at].lstrip(), text[at:].rstrip()))
        return text[:at] + parts[-1].mark + text[at:]
    done, pieces = 0, []
    for end in [*(tag.start() for tag in THOUGHT_TAG.finditer(text)), len(text)]:
        stretch = text[done:end]
        tag = THOUGHT_TAG.match(stretch)
        skipped = tag.end() if tag else 0
        core = stretch[skipped:].strip()
        if not core:
            pieces.append(stretch)
        else:
            lead = stretch.index(core, skipped)
            middle = len(core) // 2
            part = Part(name, chr(next(number)), core[:middle], core[middle:])
            parts.append(part)
            pieces.append(stretch[:lead] + part.before + part.mark + part.after + stretch[lead + len(core) :])
        done = end
    return "".join(pieces)


def _mark_call(call: Any, part_name: str, parts: list[Part], number: Any, names: bool) -> Any:
    """A tool call with marks in the function's name and in the texts of its arguments."""
    if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
        return call

    def marked(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: marked(item) for key, item in value.items()}
        if isinstance(value, list):
            return [marked(item) for item in value]
        return _mark_text(value, part_name, parts, number, None) if isinstance(value, str) else value

    function = {**call["function"]}
    for key in ("name", "arguments") if names else ("arguments",):
        if key in function:
            function[key] = marked(function[key])
    return {**call, "function": function}


def what_is_lost(
    tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue, marked: Marked, whole: str, scored: list[int]
) -> tuple[str, ...]:
    """What the template leaves out: thoughts, turns and calls, keys and tools that it does not know."""
    notes = _unread(str(tokenizer.get_chat_template(tools=dialogue.tools)), dialogue, marked.messages)
    last_scored = scored[-1] if scored else -1
    out = set(MARKS.findall(whole))
    for index, (message, parts) in enumerate(zip(marked.messages, marked.parts, strict=True)):
        missing = [part for part in parts if part.mark not in out]
        shown = {part.name for part in parts if part.mark in out}
        # Reasoning is given under several names, of which a template reads one; of a call, any word shows it.
        if shown & {*REASONING}:
            shown |= {*REASONING}
        lost = [part for part in missing if part.name not in shown or part.name == "content"]
        if not lost:
            continue
        earlier = message["role"] == "assistant" and index < last_scored
        thought = all(_is_thought(part, parts) for part in lost)
        if earlier and thought and shown:
            notes.append("the chat template leaves out the reasoning of earlier answers (--split_turns learns it)")
            continue
        names = ", ".join(repr(name) for name in dict.fromkeys(part.name.split("[")[0] for part in lost))
        notes.append(
            f"the chat template leaves out {names} of the role {message['role']!r}"
            + (" before </think>" if thought and lost[0].name == "content" else "")
            + ", which is lost; "
            + ("--split_turns learns it, " if thought and message["role"] == "assistant" else "")
            + "--chat_template_path takes another template"
        )
    return tuple(dict.fromkeys(notes))


def _unread(template: str, dialogue: Dialogue, messages: list[Message]) -> list[str]:
    """Tools and keys of messages that the template has no word for."""
    notes = []
    if dialogue.tools and "tools" not in template:
        notes.append("the template does not write 'tools'")
    keys = {key for message in messages for key in message} - _KNOWN
    return notes + [f"message key {key!r} is not read" for key in sorted(keys) if key not in template]


def _is_thought(part: Part, parts: list[Part]) -> bool:
    """Reasoning under a key of its own, or what stands before the last stretch of a content with tags."""
    contents = [other for other in parts if other.name == "content"]
    return part.name in REASONING or (len(contents) > 1 and part is not contents[-1])
