"""Rows as people have them, brought to one form: a dialogue, a prompt with its completions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf.data.columns import (
    ANSWERS,
    BESIDE,
    CHOSEN,
    CONTEXTS,
    CONVERSATIONS,
    MEDIA,
    PROMPTS,
    REJECTED,
    SYSTEMS,
    TOOLS,
    TURN_COLUMNS,
    Row,
    RowFormat,
    columns_of_prompt,
    pair_columns,
    present,
    prompt_columns,
    under_our_names,
)
from rlhf.data.messages import ASSISTANT, Message, Turns, as_messages, from_json, kind, read_tools, without_nulls
from rlhf.data.prompts import common_prompt, last_answer, split_prompt


@dataclass(frozen=True)
class Dialogue:
    """A row in the one form that rendering takes: a prompt and its completions, all text or all messages.

    ``completions`` are none for a prompt alone, one for fine-tuning, two for a pair. ``tools`` and ``template_kwargs``
    go to the chat template. A message whose answer must not be learned has ``"weight": 0``.
    """

    prompt: Turns
    completions: tuple[Turns, ...] = ()
    tools: list[Any] | None = None  # JSON schemas
    template_kwargs: dict[str, Any] = field(default_factory=dict)


# Rows


def canonical(row: Row, form: RowFormat) -> dict[str, Any]:
    """The row under the names that its columns are read as.

    Raises:
        ValueError: it holds images or the like.
    """
    row = under_our_names(row, form)
    for name in MEDIA:
        if row.get(name) and not isinstance(row[name], str):  # a path or an address may be a note
            raise ValueError(f"{name!r} is not empty: only text is supported; leave such rows out")
    return row


def sft_dialogue(row: Row, column: str, form: RowFormat) -> Dialogue:
    """A conversation, all of whose answers are learned, or a prompt with its completion; ``column`` holds them.

    Of a preference row, the chosen answer.

    Raises:
        ValueError: what is wrong, without file and row.
    """
    if column in CONVERSATIONS:
        return _dialogue(row, [], [_conversation(row, column, form)], form)
    if column in CHOSEN and present(list(row), REJECTED):
        prompt, chosen, _ = _pair(row, form)
        return _dialogue(row, prompt, [chosen], form)
    prompt, completion = _prompt_and_completion(row, column, form)
    return _dialogue(row, prompt, [completion], form)


def pair_dialogue(row: Row, form: RowFormat) -> Dialogue:
    """A prompt with its chosen and rejected completion; without a prompt, what both begin with is the prompt.

    Raises:
        ValueError: what is wrong, without file and row.
    """
    prompt, chosen, rejected = _pair(row, form)
    if chosen == rejected:
        raise ValueError("'chosen' and 'rejected' are identical: a pair without a preference teaches nothing")
    return _dialogue(row, prompt, [chosen, rejected], form)


def unpaired_dialogue(row: Row, form: RowFormat) -> Dialogue:
    """A prompt with one completion, the last assistant's turns of a conversation where there is no prompt.

    Raises:
        ValueError: what is wrong, without file and row.
    """
    names = [name for name in row if row[name] is not None]
    column = next(iter(present(names, ANSWERS) or present(names, CONVERSATIONS)), None)
    if column is None:
        raise ValueError(f"no 'completion' (nor 'messages'): found {', '.join(row)}")
    if column in CONVERSATIONS:
        prompt, completion = last_answer(_conversation(row, column, form))
        return _dialogue(row, prompt, [completion], form)
    return sft_dialogue(row, column, form)


def prompt_dialogue(row: Row, form: RowFormat) -> Dialogue:
    """What a policy is to answer: the prompt as it is trained, or a conversation up to its last answer.

    Raises:
        ValueError: what is wrong, without file and row.
    """
    column = prompt_columns(list(row))[0]
    answers = [name for name in ("completion", "response", *CHOSEN) if row.get(name) is not None]
    if column in CHOSEN and present(list(row), REJECTED):
        prompt: Turns = _pair(row, form)[0]
    elif answers:
        prompt = _prompt_and_completion(row, answers[0], form)[0]
    elif column in CONVERSATIONS:
        turns = _conversation(row, column, form)
        prompt = turns if turns[-1]["role"] != ASSISTANT else last_answer(turns)[0]
        if not prompt:
            raise ValueError(f"{column!r} begins with the assistant's answer: there is nothing to answer")
    else:
        prompt = _prompt(row, "", form) or ""
    return _dialogue(row, prompt, [], form)


def margin(row: Mapping[str, Any]) -> float:
    """How far apart the rewards of a pair should be."""
    value = row["margin"]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        seen = value if isinstance(value, float) else kind(value)
        raise ValueError(f"'margin' is {seen}, expected a finite number (leave the column out where there is none)")
    return float(value)


def label(row: Mapping[str, Any]) -> bool:
    """Whether an unpaired answer is a good one."""
    value = row.get("label")
    if isinstance(value, str) and value.strip().lower() in ("true", "false", "1", "0"):
        return value.strip().lower() in ("true", "1")
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise ValueError(
            f"'label' is {value if isinstance(value, int | float) else kind(value)}, expected true or false"
        )
    return bool(value)


def is_labelled_bad(row: Row) -> bool:
    """Whether ``label`` says that an unpaired answer is a bad one; a label of another kind says nothing."""
    value = row.get("label")
    return str(value).strip().lower() in ("false", "0") if isinstance(value, bool | int | str) else False


def has_labels(rows: Any, form: RowFormat) -> bool:
    """Whether ``label`` says of the first rows whether their answers are good."""
    return any(
        is_labelled_bad(row) or row.get("label") in (True, "true", "True")
        for row in (under_our_names(rows[i], form) for i in range(min(len(rows), 100)))
    )


# Prompts


def _prompt(row: Row, answer: str, form: RowFormat) -> Turns | None:
    """The prompt beside the column ``answer``; None where there is none."""
    names = columns_of_prompt([name for name in row if name != answer])
    if not names or names[0] in BESIDE:
        return None
    column = names[0]
    if column in CONVERSATIONS:
        return _conversation(row, column, form)
    text = _turns(row, column, form)
    if not isinstance(text, str):
        return _with_system(text, row)
    more = [row[name].strip() for name in names[1:] if name in CONTEXTS and isinstance(row[name], str)]
    text = "\n\n".join([text, *filter(None, more)])
    turns = column in TURN_COLUMNS or answer in TURN_COLUMNS
    system = _system(row)
    if form.template and (turns or system or _tools(row, form)):
        past = [turn for exchange in row.get("history") or [] for turn in _exchange(exchange)]
        return _with_system([*past, {"role": "user", "content": text}], row)
    if row.get("history"):
        raise ValueError("'history' needs a chat template: pass --chat_template_path")
    text = f"{system}\n\n{text}" if system else text
    return f"{text}\n" if turns and not text.endswith("\n") else text


def _exchange(pair: Any) -> list[Message]:
    return [{"role": role, "content": str(text)} for role, text in zip(("user", ASSISTANT), pair, strict=True)]


def _prompt_and_completion(row: Row, column: str, form: RowFormat) -> tuple[Turns, Turns]:
    """A prompt and what follows it, both plain or both conversational; ``column`` names the completion.

    Without a prompt, a conversation's last answer is the completion and the rest its prompt.
    """
    prompt = _prompt(row, column, form)
    completion = _answer(row, column, form)
    if prompt is not None:
        return split_prompt(prompt, completion)
    return ("", completion) if isinstance(completion, str) else last_answer(completion)


def _answer(row: Row, column: str, form: RowFormat) -> Turns:
    calls = from_json(row[column]) if column == "answers" and isinstance(row[column], str) else None
    if form.template and isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls):
        turn = {"role": "function_call", "content": row[column]}
        return as_messages([turn], column, form.roles, form.template, exact=True)
    return _turns(row, column, form)


def _pair(row: Row, form: RowFormat) -> tuple[Turns, Turns, Turns]:
    """The prompt, chosen and rejected."""
    first, second = pair_columns(list(row))[:2]
    chosen, rejected = _turns(row, first, form), _turns(row, second, form)
    if type(chosen) is not type(rejected):
        raise ValueError(f"{first!r} and {second!r} must both be text or both be messages")
    prompt = _prompt(row, first, form)
    if prompt is None or (not prompt and not isinstance(chosen, str)):
        if chosen == rejected:
            raise ValueError(f"{first!r} and {second!r} are identical: a pair without a preference teaches nothing")
        prompt = common_prompt(chosen, rejected)
        return prompt, chosen[len(prompt) :], rejected[len(prompt) :]
    (prompt, chosen), (other, rejected) = split_prompt(prompt, chosen), split_prompt(prompt, rejected)
    if other != prompt:
        raise ValueError(f"the conversations of {first!r} and {second!r} have different prompts")
    while not isinstance(prompt, str) and min(len(chosen), len(rejected)) > 1 and chosen[0] == rejected[0]:
        prompt, chosen, rejected = [*prompt, chosen[0]], chosen[1:], rejected[1:]  # type: ignore[list-item]
    return prompt, chosen, rejected


# Turns


def _dialogue(row: Row, prompt: Turns, completions: list[Turns], form: RowFormat) -> Dialogue:
    """With the row's tools and options of the template."""
    tools = None if isinstance(prompt, str) else _tools(row, form)
    if not isinstance(prompt, str) and prompt:
        prompt = _with_system(prompt, row)
    own = row.get("chat_template_kwargs")
    own = from_json(own) if isinstance(own, str) and own.strip() else own
    own = (
        own
        if "chat_template_kwargs" in form.exact or isinstance(row.get("chat_template_kwargs"), str)
        else without_nulls(own)
    )
    if own and not isinstance(own, Mapping):
        raise ValueError(f"'chat_template_kwargs' is {kind(own)}, expected an object")
    return Dialogue(prompt, tuple(completions), tools, {**form.template_kwargs, **(own or {})})


def _tools(row: Row, form: RowFormat) -> list[Any] | None:
    column = next(iter(present(list(row), TOOLS)), None)
    return None if column is None else read_tools(row[column], column, column in form.exact)


def _system(row: Row) -> str:
    column = next((name for name in SYSTEMS if row.get(name) is not None), None)
    said = "" if column is None else row[column]
    if not isinstance(said, str):
        raise ValueError(f"{column!r} is {kind(said)}, expected text")
    return said if said.strip() else ""


def _with_system(turns: list[Message], row: Row) -> list[Message]:
    """With the system turn of the row's own column in front.

    Raises:
        ValueError: the turns begin with another one.
    """
    system = _system(row)
    if not system:
        return turns
    if turns and turns[0]["role"] in ("system", "developer"):
        if str(turns[0]["content"]).strip() != system.strip():
            raise ValueError("the column 'system' and the system turn differ: leave one of them out")
        return turns
    return [{"role": "system", "content": system}, *turns]


def _conversation(row: Row, column: str, form: RowFormat) -> list[Message]:
    turns = _turns(row, column, form)
    if isinstance(turns, str):
        raise ValueError(f"{column!r} is text, expected a list of messages")
    return _with_system(turns, row)


def _turns(row: Row, column: str, form: RowFormat) -> Turns:
    """Text, or messages; a list of messages may be JSON text."""
    value = row.get(column)
    exact = column in form.exact
    if value is None:
        raise ValueError(f"has no {column!r}")
    if isinstance(value, str):
        found = from_json(value) if value.lstrip()[:1] == "[" else None
        if not (isinstance(found, list) and found and all(_is_message(turn) for turn in found)):
            if column not in PROMPTS and not value.strip():
                raise ValueError(f"{column!r} is empty")
            return value
        value, exact = found, True
    if _is_message(value):
        value = [value]
    if not isinstance(value, list):
        raise ValueError(f"{column!r} is {kind(value)}, expected text or a list of messages")
    if not value:
        raise ValueError(f"{column!r} is empty")
    return as_messages(value, column, form.roles, form.template, exact)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and (value.get("role") is not None or value.get("from") is not None)
