"""The columns that people have, brought to one form: a dialogue, a prompt with its completions."""

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from rlhf.data.messages import ASSISTANT, Message, as_message, as_object, kind, without_nulls

Turns = str | list[Message]  # plain text, or a conversation

_CONVERSATION = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat")
_INSTRUCTION = ("instruction", "query", "question", "problem")
_INPUT = ("input", "context")
_ANSWER = ("completion", "response", "output", "answer", "solution", "target")
_CHOSEN = ("chosen", "chosen_messages", "chosen_response", "preferred")
_REJECTED = ("rejected", "rejected_messages", "rejected_response", "dispreferred")
_TOOLS = ("tools", "functions")
_SYSTEM = ("system", "system_prompt")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")


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


@dataclass(frozen=True)
class RowFormat:
    """How rows are read.

    Args:
        columns: from a column's name to the name that it is read as (``{"question": "prompt"}``).
        roles: from a role's name to the one that the template knows (``{"agent": "assistant"}``).
        template_kwargs: what the chat template gets for every row; a row's ``chat_template_kwargs`` go before it.
        text_field: the column of plain text.
        has_template: whether there is a chat template; columns such as ``instruction`` are a conversation then.
        template: the chat template, to know whether it reads tool calls.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    text_field: str = "text"
    template: str = ""

    @property
    def has_template(self) -> bool:
        return bool(self.template)


# What a file's columns are read as


def renamed(columns: list[str], form: RowFormat) -> list[str]:
    """The columns under the names that they are read as; raises for a name that is not there."""
    missing = [name for name in form.columns if name not in columns]
    if missing:
        raise ValueError(f"--columns: no column {missing[0]!r}; found {', '.join(columns)}")
    return [form.columns.get(name, name) for name in columns]


def sft_column(columns: list[str], form: RowFormat) -> str:
    """What rows are learned from: ids, a conversation, an answer, ``chosen`` or text; the first that is there.

    Raises:
        ValueError: none of them.
    """
    names = renamed(columns, form)
    if "input_ids" in names or {"prompt_ids", "completion_ids"} <= set(names):
        return "input_ids"
    conversation = _first(_CONVERSATION, names)
    if conversation and _first(_CHOSEN, names) and _first(_REJECTED, names):
        conversation = None  # the prompt of a pair
    answer = _first(_ANSWER, names) if _first(("prompt", *_INSTRUCTION), names) or "completion" in names else None
    # A text column beats an answer that only reward functions read.
    if answer and answer != "completion" and form.text_field in names and "prompt" not in names:
        answer = None
    found = conversation or answer or _first(_CHOSEN, names)
    if found is None and form.text_field in names:
        found = form.text_field
    if found is None:
        raise ValueError(
            f"no column to train on: found {', '.join(columns)}; expected {form.text_field!r}, 'messages', "
            "'conversations', 'prompt' + 'completion', 'instruction' + 'output', or 'prompt' + 'chosen'; "
            "--columns question=prompt,answer=completion says what yours are"
        )
    return found


def check_preference_columns(columns: list[str], form: RowFormat | None = None) -> None:
    """Raise where rows hold no pairs."""
    names = renamed(columns, form or RowFormat())
    missing = [names_[0] for names_ in (_CHOSEN, _REJECTED) if _first(names_, names) is None]
    if missing and not {"prompt_ids", "chosen_ids", "rejected_ids"} <= set(names):
        raise ValueError(
            f"no column {' and '.join(map(repr, missing))}: found {', '.join(columns)}; "
            "preference data needs 'chosen' and 'rejected', and a 'prompt' unless both begin with it"
        )


def columns_read(names: list[str], form: RowFormat, extra: tuple[str, ...] = ()) -> set[str]:
    """Those of the (renamed) columns that a command may read."""
    known = {*_CONVERSATION, *_INSTRUCTION, *_INPUT, *_ANSWER, *_CHOSEN, *_REJECTED, *_TOOLS, *_SYSTEM, *_MEDIA}
    known |= {"prompt", "chat_template_kwargs", "history", *extra}
    return known & set(names)


def _first(wanted: tuple[str, ...], names: Any) -> str | None:
    return next((name for name in wanted if name in names), None)


# Rows


def canonical(row: Mapping[str, Any], form: RowFormat) -> dict[str, Any]:
    """The row under the names that its columns are read as; media are refused."""
    row = {form.columns.get(name, name): value for name, value in row.items()}
    for name in _MEDIA:
        if row.get(name):
            raise ValueError(f"{name!r} is not empty: only text is supported; leave such rows out")
    return row


def sft_dialogue(row: Mapping[str, Any], column: str, form: RowFormat) -> Dialogue:
    """A conversation, all of whose answers are learned, or a prompt with its completion; ``column`` holds them."""
    if column in _CONVERSATION:
        turns = _turns(row, column, form)
        if isinstance(turns, str):
            raise ValueError(f"{column!r} is text, expected a list of messages")
        return _dialogue(row, [], [turns], form)
    completion = _turns(row, column, form)
    prompt, completion = _prompt_of(row, completion, form)
    return _dialogue(row, prompt, [completion], form)


def pair_dialogue(row: Mapping[str, Any], form: RowFormat) -> Dialogue:
    """A prompt with its chosen and rejected completion; without a prompt, what both begin with is the prompt."""
    first, second = (_first(names, row) or names[0] for names in (_CHOSEN, _REJECTED))
    chosen, rejected = _turns(row, first, form), _turns(row, second, form)
    if type(chosen) is not type(rejected):
        raise ValueError(f"{first!r} and {second!r} must both be text or both be messages")
    if chosen == rejected:
        raise ValueError(f"{first!r} and {second!r} are identical: a pair without a preference teaches nothing")
    if _prompt_column(row) is None:
        prompt = _common_prompt(chosen, rejected)
        return _dialogue(row, prompt, [chosen[len(prompt) :], rejected[len(prompt) :]], form)
    prompt, one = _prompt_of(row, chosen, form)
    other_prompt, other = _prompt_of(row, rejected, form)
    if other_prompt != prompt:
        raise ValueError(f"the conversations of {first!r} and {second!r} have different prompts")
    return _dialogue(row, prompt, [one, other], form)


def unpaired_dialogue(row: Mapping[str, Any], form: RowFormat) -> Dialogue:
    """A prompt with one completion, the last assistant's turns of a conversation where there is no prompt."""
    names = [name for name in row if row[name] is not None]
    column = _first(_ANSWER, names) or _first(_CONVERSATION, names)
    if column is None:
        raise ValueError(f"no 'completion' (nor 'messages'): found {', '.join(row)}")
    if column in _CONVERSATION:
        turns = _turns(row, column, form)
        prompt, completion = _last_answer(turns if isinstance(turns, list) else [])
        return _dialogue(row, prompt, [completion], form)
    return sft_dialogue(row, column, form)


def prompt_dialogue(row: Mapping[str, Any], form: RowFormat) -> Dialogue:
    """What a policy is to answer: the prompt, or a conversation up to its last answer."""
    if _prompt_column(row) is not None and _prompt_column(row) not in _CONVERSATION:
        return _dialogue(row, _own_prompt(row, form), [], form)
    column = _first((*_CONVERSATION, *_CHOSEN), row)
    if column is None:
        raise ValueError(f"no column 'prompt' (nor 'messages'): found {', '.join(row)}")
    turns = _turns(row, column, form)
    if isinstance(turns, str):
        if column in _CHOSEN and "rejected" in row:
            return Dialogue(pair_dialogue(row, form).prompt)
        raise ValueError(f"{column!r} is text, expected a list of messages")
    prompt = turns if turns[-1]["role"] != ASSISTANT else _last_answer(turns)[0]
    if not prompt:
        raise ValueError(f"{column!r} begins with the assistant's answer: there is nothing to answer")
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


# Prompts


def _prompt_column(row: Mapping[str, Any]) -> str | None:
    if "prompt" in row:
        return "prompt"
    if (name := _first(_INSTRUCTION, row)) is not None:
        return name
    return _first(_CONVERSATION, row)


def _own_prompt(row: Mapping[str, Any], form: RowFormat) -> Turns:
    """The prompt as it is; an instruction is the user's turn where there is a chat template."""
    column = str(_prompt_column(row))
    if column not in _INSTRUCTION:
        return _turns(row, column, form)
    text = _turns(row, column, form)
    if not isinstance(text, str):
        return text
    further = _first(_INPUT, row)
    if further is not None and isinstance(row[further], str) and row[further].strip():
        text = f"{text}\n\n{row[further]}"
    if not form.has_template:
        return text + "\n"
    earlier = row.get("history") or []
    turns = [
        {"role": role, "content": str(said)}
        for pair in earlier
        for role, said in zip(("user", ASSISTANT), pair, strict=True)
    ]
    return [*turns, {"role": "user", "content": text}]


def _prompt_of(row: Mapping[str, Any], completion: Turns, form: RowFormat) -> tuple[Turns, Turns]:
    """The prompt of a completion and what of the completion comes after it, both text or both messages."""
    column = _prompt_column(row)
    if column is None:
        return ("", completion) if isinstance(completion, str) else _last_answer(completion)
    if row[column] is None:
        raise ValueError(f"has no {column!r}")
    prompt = _own_prompt(row, form)
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt, completion
    if isinstance(completion, str):
        return prompt, [{"role": ASSISTANT, "content": completion}]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}] if prompt.strip() else []
    return _without_repeated(prompt, completion)


def _without_repeated(prompt: list[Message], completion: list[Message]) -> tuple[list[Message], list[Message]]:
    """Drop a prompt that the completion repeats, up to white space and system turns."""
    system = [turn for turn in completion[:1] if turn["role"] == "system"]
    asked = [turn for turn in prompt if turn["role"] != "system"]
    said = completion[len(system) :]
    if not asked or len(said) <= len(asked):
        return prompt, completion
    same = all(_alike(one, other) for one, other in zip(asked, said, strict=False))
    if same:
        return [*system, *said[: len(asked)]] if system else prompt, said[len(asked) :]
    # The prompt is the last question of a longer conversation.
    before, answer = _last_answer(completion)
    if len(asked) == 1 and before and _alike(asked[0], before[-1]):
        return before, answer
    return prompt, completion


def _alike(one: Message, other: Message) -> bool:
    return one["role"] == other["role"] and str(one.get("content")).strip() == str(other.get("content")).strip()


def _last_answer(turns: list[Message]) -> tuple[list[Message], list[Message]]:
    """A conversation before and from its last answer: the assistant's turns since the user spoke, tools' included."""
    last = next((i for i in range(len(turns) - 1, -1, -1) if turns[i]["role"] == ASSISTANT), None)
    if last is None:
        raise ValueError(f"no turn of the assistant: the roles are {', '.join(sorted({t['role'] for t in turns}))}")
    start = last
    while start and turns[start - 1]["role"] in (ASSISTANT, "tool"):
        start -= 1
    return turns[:start], turns[start : last + 1]


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


# Turns


def _dialogue(row: Mapping[str, Any], prompt: Turns, completions: list[Turns], form: RowFormat) -> Dialogue:
    """With the row's system turn, tools and options of the template."""
    system = _first(_SYSTEM, row)
    said = row[system] if system is not None else None
    if isinstance(said, str) and said.strip():
        if isinstance(prompt, str) and form.has_template:
            prompt = [{"role": "user", "content": prompt}] if prompt else []
            completions = [[{"role": ASSISTANT, "content": str(c)}] if isinstance(c, str) else c for c in completions]
        if isinstance(prompt, str):
            prompt = f"{said}\n\n{prompt}"
        else:
            first = prompt or next((c for c in completions if isinstance(c, list)), [])
            if not (first and first[0]["role"] in ("system", "developer")):
                turn: Message = {"role": "system", "content": said}
                if prompt or not completions:
                    prompt = [turn, *prompt]
                else:
                    completions = [[turn, *c] for c in completions if isinstance(c, list)]
    return Dialogue(prompt, tuple(completions), _tools(row), _template_kwargs(row, form))


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    column = _first(_TOOLS, row)
    tools = as_object(row[column], str(column)) if column is not None else None
    if isinstance(tools, dict):
        tools = [tools]
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list):
        raise ValueError(f"{column!r} is {kind(tools)}, expected a list of tools")
    found = []
    for tool in tools:
        tool = without_nulls(as_object(tool, str(column)))
        if not isinstance(tool, dict):
            raise ValueError(f"{column!r} holds {kind(tool)}, expected objects with 'name' and 'parameters'")
        if "function" not in tool and "name" in tool:
            tool = {"type": "function", "function": tool}
        inner = tool.get("function")
        if isinstance(inner, dict) and isinstance(inner.get("parameters"), str):
            tool = {**tool, "function": {**inner, "parameters": as_object(inner["parameters"], "parameters")}}
        found.append(tool)
    return found


def _template_kwargs(row: Mapping[str, Any], form: RowFormat) -> dict[str, Any]:
    own = as_object(row.get("chat_template_kwargs"), "chat_template_kwargs")
    if own is not None and not isinstance(own, dict):
        raise ValueError(f"'chat_template_kwargs' is {kind(own)}, expected an object")
    return {**form.template_kwargs, **without_nulls(own or {})}


def _turns(row: Mapping[str, Any], column: str, form: RowFormat) -> Turns:
    value = row.get(column)
    if value is None:
        raise ValueError(f"has no {column!r}")
    if isinstance(value, str) and value.lstrip().startswith("[{"):  # messages as JSON text
        with suppress(json.JSONDecodeError):
            value = json.loads(value)
    if isinstance(value, str):
        if column not in ("prompt", *_INSTRUCTION) and not value.strip():
            raise ValueError(f"{column!r} is empty")
        return value
    if isinstance(value, dict) and ("role" in value or "from" in value):
        value = [value]
    if not isinstance(value, list):
        raise ValueError(f"{column!r} is {kind(value)}, expected text or a list of messages")
    if not value:
        raise ValueError(f"{column!r} is empty")
    return [
        as_message(turn, f"{column!r}, message {number}", form.roles, "tool_calls" in form.template)
        for number, turn in enumerate(value, start=1)
    ]
