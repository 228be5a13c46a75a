"""The columns that people have, brought to two forms: a conversation, or a prompt with completions."""

import math
import os
from collections.abc import Mapping
from typing import Any

Message = dict[str, Any]
Turns = str | list[Message]  # plain text, or a conversation

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def completion_columns(columns: list[str], text_field: str = "text") -> str:
    """How to read rows for supervised fine-tuning: ``input_ids``, ``messages``, ``conversations``, ``completion``,
    ``chosen`` or the text field; the first that is there."""
    for key in ("input_ids", "messages", "conversations", "completion", "chosen", text_field):
        if key in columns:
            return key
    raise ValueError(
        f"no column to train on: found {', '.join(columns)}; expected {text_field!r}, 'messages', 'conversations', "
        "'prompt' + 'completion', or 'prompt' + 'chosen'"
    )


def check_preference_columns(columns: list[str]) -> None:
    missing = [key for key in ("chosen", "rejected") if key not in columns]
    if missing and not {"prompt_ids", "chosen_ids", "rejected_ids"} <= set(columns):
        raise ValueError(
            f"no column {' and '.join(map(repr, missing))}: found {', '.join(columns)}; "
            "preference data needs 'chosen' and 'rejected', and a 'prompt' unless both begin with it"
        )


def conversation(row: Mapping[str, Any], column: str) -> list[Message]:
    """The messages of a row, ShareGPT's ``from``/``value`` included."""
    turns = _turns(row, column)
    if isinstance(turns, str):
        raise ValueError(f"{column!r} is text, expected a list of messages")
    return turns


def prompt_and_completion(row: Mapping[str, Any], column: str) -> tuple[Turns, Turns]:
    """A prompt and what follows it, both plain or both conversational; ``column`` names the completion.

    Without a ``prompt`` column, a conversation's last turn is the completion and the rest its prompt.
    """
    completion = _turns(row, column)
    if row.get("prompt") is None and "prompt" in row:
        raise ValueError("has no 'prompt'")
    if "prompt" not in row:
        if isinstance(completion, str):
            return "", completion
        return completion[:-1], completion[-1:]
    return _alike(_turns(row, "prompt"), completion)


def prompt_alone(row: Mapping[str, Any]) -> Turns:
    """What a policy is to answer: the ``prompt``, or a conversation up to its last answer."""
    if "prompt" in row:
        return _turns(row, "prompt")
    column = next((name for name in ("messages", "conversations") if name in row), None)
    if column is None:
        raise ValueError(f"no column 'prompt' (nor 'messages'): found {', '.join(row)}")
    turns = conversation(row, column)
    answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    turns = turns[: answers[-1]] if answers else turns
    if not turns:
        raise ValueError(f"{column!r} begins with the assistant's answer: there is nothing to answer")
    return turns


def prompt_and_pair(row: Mapping[str, Any]) -> tuple[Turns, Turns, Turns]:
    """A prompt and its chosen and rejected completion; without a prompt column, what both begin with is the prompt."""
    chosen, rejected = _turns(row, "chosen"), _turns(row, "rejected")
    if type(chosen) is not type(rejected):
        raise ValueError("'chosen' and 'rejected' must both be text or both be messages")
    if chosen == rejected:
        raise ValueError("'chosen' and 'rejected' are identical: a pair without a preference teaches nothing")
    if "prompt" not in row:
        prompt = _common_prompt(chosen, rejected)
        return prompt, chosen[len(prompt) :], rejected[len(prompt) :]
    if row["prompt"] is None:
        raise ValueError("has no 'prompt'")
    prompt, chosen = _alike(_turns(row, "prompt"), chosen)
    return prompt, chosen, _alike(prompt, rejected)[1]


def margin(row: Mapping[str, Any]) -> float:
    """How far apart the rewards of a pair should be."""
    value = row["margin"]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        seen = value if isinstance(value, float) else kind(value)
        raise ValueError(f"'margin' is {seen}, expected a finite number (leave the column out where there is none)")
    return float(value)


def _common_prompt(chosen: Turns, rejected: Turns) -> Turns:
    if isinstance(chosen, str) and isinstance(rejected, str):
        common = os.path.commonprefix([chosen, rejected])  # noqa: RUF071  # characters are meant
        # Cut at white space: a word that both answers begin alike belongs to the answers.
        return common[: max(common.rfind(" "), common.rfind("\n")) + 1].rstrip(" ")
    same = 0
    while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
        same += 1
    if same == 0:
        raise ValueError("'chosen' and 'rejected' begin with different messages: add a 'prompt' column")
    return chosen[:same]


def _alike(prompt: Turns, completion: Turns) -> tuple[Turns, Turns]:
    """Bring both to the same form, and drop a prompt that the completion repeats."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt, completion
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if len(completion) > len(prompt) and completion[: len(prompt)] == prompt:
        completion = completion[len(prompt) :]
    return prompt, completion


def _turns(row: Mapping[str, Any], column: str) -> Turns:
    value = row.get(column)
    if value is None:
        raise ValueError(f"has no {column!r}")
    if isinstance(value, str):
        if column != "prompt" and not value.strip():
            raise ValueError(f"{column!r} is empty")
        return value
    if not isinstance(value, list):
        raise ValueError(f"{column!r} is {kind(value)}, expected text or a list of messages")
    if not value:
        raise ValueError(f"{column!r} is empty")
    return [_message(turn, column, number) for number, turn in enumerate(value, start=1)]


def _message(turn: Any, column: str, number: int) -> Message:
    where = f"{column!r}, message {number}"
    if not isinstance(turn, dict):
        raise ValueError(f"{where} is {kind(turn)}, expected an object with 'role' and 'content'")
    message = {key: value for key, value in turn.items() if value is not None}
    if "from" in message:  # ShareGPT
        role = message.pop("from")
        message = {"role": _ROLES.get(role, role), "content": message.pop("value", None), **message}
    if not isinstance(message.get("role"), str):
        raise ValueError(f"{where} has no 'role'")
    content = message.get("content")
    if not isinstance(content, str) and "tool_calls" not in message:
        raise ValueError(f"{where}: 'content' is {kind(content)}, expected text")
    if message["role"] == "assistant" and "tool_calls" not in message and not str(content).strip():
        raise ValueError(f"{where}: the assistant's answer is empty")
    return message


_KINDS = {int: "a number", float: "a number", bool: "true or false", str: "text", list: "a list", dict: "an object"}


def kind(value: Any) -> str:
    """What a value is, in the words of a data file."""
    return "missing" if value is None else _KINDS.get(type(value), f"a {type(value).__name__}")
