"""From a row of a data file, in any of the known forms, to a dialogue: a prompt with its completions.

``columns`` chooses the columns by their names, this file reads their values, ``messages`` brings each message to the
common form, and ``prompts`` decides where the prompt ends and the answer begins.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf.data.columns import (
    ANSWERS,
    CHOSEN,
    CONTEXTS,
    CONVERSATIONS,
    MEDIA,
    PROMPTS,
    REJECTED,
    ROW_OPTIONS,
    SYSTEMS,
    TEMPLATE_OPTIONS,
    TOOLS,
    TURN_COLUMNS,
    Row,
    RowFormat,
    pair_columns,
    present,
    prompt_and_options,
    prompt_columns,
    rename_row,
)
from rlhf.data.messages import (
    ASSISTANT,
    Message,
    Turns,
    as_messages,
    describe_type,
    from_json,
    read_tools,
    without_nulls,
)
from rlhf.data.prompts import common_prompt, last_answer, split_prompt


@dataclass(frozen=True)
class Dialogue:
    """A prompt and its completions, all text or all messages: what is rendered and tokenised.

    Args:
        prompt: Text or messages; may be empty.
        completions: None for a prompt alone, one for fine-tuning, two for a pair. A message of the assistant that is
            not trained has ``"weight": 0``.
        tools: JSON schemas of tools, for the chat template.
        template_kwargs: Further options of the chat template.
    """

    prompt: Turns
    completions: tuple[Turns, ...] = ()
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)


def canonical(row: Row, row_format: RowFormat) -> dict[str, Any]:
    """Rename the columns of a row as ``row_format`` says.

    Args:
        row: A row as it is in the file.
        row_format: How rows are read.

    Returns:
        A new row.

    Raises:
        ValueError: The row holds images, video or audio.
    """
    row = rename_row(row, row_format)
    # The text alone would teach answers about an image that the model never gets.
    for media_column in MEDIA:
        is_note = isinstance(row.get(media_column), str)  # such as a path or an address
        if row.get(media_column) and not is_note:
            raise ValueError(f"{media_column!r} is not empty: only text is supported; leave such rows out")
    return row


# A dialogue for each kind of training. Rows are canonical; errors name the column, and the caller adds file and row.


def sft_dialogue(row: Row, column: str, row_format: RowFormat) -> Dialogue:
    """Read a row for supervised fine-tuning.

    Args:
        row: A canonical row.
        column: The column that holds the text to train on.
        row_format: How rows are read.

    Returns:
        A conversation of which all answers are trained, or a prompt with its completion; for a pair, its chosen one.

    Raises:
        ValueError: The row is malformed.
    """
    row_reader = _RowReader(row, row_format)
    if column in CONVERSATIONS:
        return row_reader.dialogue([], [row_reader.conversation(column)])
    # The prompt that both answers begin with is found by comparing them, exactly as for DPO.
    if column in CHOSEN and present(list(row), REJECTED):
        prompt, chosen, _ = row_reader.pair()
        return row_reader.dialogue(prompt, [chosen])
    prompt, completion = row_reader.prompt_and_completion(column)
    return row_reader.dialogue(prompt, [completion])


def pair_dialogue(row: Row, row_format: RowFormat) -> Dialogue:
    """Read a pair: a prompt with its chosen and its rejected completion.

    Args:
        row: A canonical row. Without a prompt, the text that both answers begin with is the prompt.
        row_format: How rows are read.

    Returns:
        A dialogue with two completions.

    Raises:
        ValueError: The row is malformed, or its answers are identical.
    """
    row_reader = _RowReader(row, row_format)
    prompt, chosen, rejected = row_reader.pair()
    if chosen == rejected:
        raise ValueError("'chosen' and 'rejected' are identical: a pair without a preference teaches nothing")
    return row_reader.dialogue(prompt, [chosen, rejected])


def unpaired_dialogue(row: Row, row_format: RowFormat) -> Dialogue:
    """Read a prompt with one completion.

    Args:
        row: A canonical row. In a conversation without a prompt, the completion is the assistant's last turns.
        row_format: How rows are read.

    Returns:
        A dialogue with one completion.

    Raises:
        ValueError: The row is malformed.
    """
    # In a file of several forms, a row has nulls in the columns of the other forms.
    filled_columns = [column_name for column_name, value in row.items() if value is not None]
    candidates = present(filled_columns, ANSWERS) or present(filled_columns, CONVERSATIONS)
    if not candidates:
        raise ValueError(f"no 'completion' (nor 'messages'): found {', '.join(row)}")
    column = candidates[0]
    if column not in CONVERSATIONS:
        return sft_dialogue(row, column, row_format)
    row_reader = _RowReader(row, row_format)
    prompt, completion = last_answer(row_reader.conversation(column))
    return row_reader.dialogue(prompt, [completion])


def prompt_dialogue(row: Row, row_format: RowFormat) -> Dialogue:
    """Read a prompt that a policy is to answer, exactly as the prompt of a trained row.

    Args:
        row: A canonical row. Of a conversation, the prompt is all before its last answer.
        row_format: How rows are read.

    Returns:
        A dialogue without completions.

    Raises:
        ValueError: The row is malformed, or has no prompt.
    """
    row_reader = _RowReader(row, row_format)
    column = prompt_columns(list(row))[0]
    answer_columns = [name for name in ("completion", "response", *CHOSEN) if row.get(name) is not None]
    prompt: Turns
    if column in CHOSEN and present(list(row), REJECTED):
        prompt, _, _ = row_reader.pair()
    elif answer_columns:
        # An answer may repeat the prompt, or hold it: the split is that of training.
        prompt, _ = row_reader.prompt_and_completion(answer_columns[0])
    elif column in CONVERSATIONS:
        turns = row_reader.conversation(column)
        # A conversation that ends with a question is a prompt as it is.
        prompt = turns if turns[-1]["role"] != ASSISTANT else last_answer(turns)[0]
        if not prompt:
            raise ValueError(f"{column!r} begins with the assistant's answer: there is nothing to answer")
    else:
        prompt = row_reader.prompt(answer_column="") or ""
    return row_reader.dialogue(prompt, [])


# Numbers and labels beside the text


def margin(row: Row) -> float:
    """How far apart the rewards of a pair should be.

    Args:
        row: A canonical row with a ``margin``.

    Returns:
        A finite number.

    Raises:
        ValueError: The value is no finite number.
    """
    margin_value = row["margin"]
    # In Python, true and false are integers; and its JSON parser reads NaN and Infinity as numbers.
    is_number = isinstance(margin_value, int | float) and not isinstance(margin_value, bool)
    if not is_number or not math.isfinite(margin_value):
        description = margin_value if isinstance(margin_value, float) else describe_type(margin_value)
        raise ValueError(
            f"'margin' is {description}, expected a finite number (leave the column out where there is none)"
        )
    return float(margin_value)


def label(row: Row) -> bool:
    """Whether an unpaired answer is a good one.

    Args:
        row: A canonical row with a ``label``: true or false, 1 or 0, or text of these.

    Returns:
        True for a good answer.

    Raises:
        ValueError: The value is none of these.
    """
    label_value = row.get("label")
    is_good = _parse_label(label_value)
    if is_good is None:
        description = label_value if isinstance(label_value, int | float) else describe_type(label_value)
        raise ValueError(f"'label' is {description}, expected true or false")
    return is_good


def is_labelled_bad(row: Row) -> bool:
    """Whether ``label`` marks an answer as bad. A label of another kind, such as a class or a score, does not."""
    label_value = row.get("label")
    # A float is a score, of which 0.0 is not "bad".
    return not isinstance(label_value, float) and _parse_label(label_value) is False


def has_labels(rows: Any, row_format: RowFormat) -> bool:
    """Whether ``label`` marks answers as good or bad in the first hundred rows.

    Args:
        rows: A ``Dataset``.
        row_format: How rows are read.

    Returns:
        True if one of them has such a label.
    """
    # A sample is enough to tell labels from classes or scores, however large the file is.
    first_rows = (rename_row(rows[index], row_format) for index in range(min(len(rows), 100)))
    return any(is_labelled_bad(row) or row.get("label") in (True, "true", "True") for row in first_rows)


def _parse_label(value: Any) -> bool | None:
    if isinstance(value, str):
        return {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower())
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    return None


@dataclass(frozen=True)
class _RowReader:
    """The parts of one canonical row: its turns, prompt, answers, system turn and tools."""

    row: Row
    row_format: RowFormat

    def dialogue(self, prompt: Turns, completions: list[Turns]) -> Dialogue:
        """Add the row's system turn, tools and options of the template."""
        tools = None
        # Plain text has no turns: `prompt` has joined the system text to it, and tools need a template.
        if not isinstance(prompt, str):
            tools = self.tools()
            prompt = self.with_system(prompt) if prompt else prompt
        template_kwargs = {**self.row_format.template_kwargs, **self.template_options()}
        return Dialogue(prompt, tuple(completions), tools, template_kwargs)

    # Text and messages of one column

    def turns(self, column: str) -> Turns:
        """The text or the messages of a column; a list of messages may be JSON text."""
        column_value = self.row.get(column)
        exact = column in self.row_format.exact
        if column_value is None:
            raise ValueError(f"has no {column!r}")
        if isinstance(column_value, str):
            # Nulls in JSON text were never touched by Arrow, so these are the user's.
            messages = _messages_from_json(column_value)  # as in a CSV, whose fields are all text
            if messages is None:
                # A prompt may be empty, but an answer without text has no token to learn.
                if column not in PROMPTS and not column_value.strip():
                    raise ValueError(f"{column!r} is empty")
                return column_value
            column_value, exact = messages, True
        if _is_message(column_value):
            column_value = [column_value]
        if not isinstance(column_value, list):
            raise ValueError(f"{column!r} is {describe_type(column_value)}, expected text or a list of messages")
        if not column_value:
            raise ValueError(f"{column!r} is empty")
        return as_messages(column_value, column, self.row_format.roles, self.row_format.template, exact)

    def conversation(self, column: str) -> list[Message]:
        turns = self.turns(column)
        if isinstance(turns, str):
            raise ValueError(f"{column!r} is text, expected a list of messages")
        return self.with_system(turns)

    def answer(self, column: str) -> Turns:
        """The completion in a column. In ``answers``, a list of objects is the assistant's calls."""
        column_value = self.row[column]
        calls = from_json(column_value) if column == "answers" and isinstance(column_value, str) else None
        are_calls = isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)
        if self.row_format.template and are_calls:
            # ShareGPT's turn for calls: `as_messages` knows every form in which these are written.
            turn = {"role": "function_call", "content": column_value}
            return as_messages([turn], column, self.row_format.roles, self.row_format.template, exact=True)
        return self.turns(column)

    # Prompt and answers

    def prompt(self, answer_column: str) -> Turns | None:
        """The prompt that belongs to the answer in ``answer_column``; None if the row has none."""
        columns = prompt_and_options([column_name for column_name in self.row if column_name != answer_column])
        if not columns or columns[0] in ROW_OPTIONS:
            return None
        column = columns[0]
        if column in CONVERSATIONS:
            return self.conversation(column)
        turns = self.turns(column)
        if not isinstance(turns, str):
            return self.with_system(turns)

        # Text: an instruction or question, with its context behind it.
        context_columns = [column_name for column_name in columns[1:] if column_name in CONTEXTS]
        contexts = [
            self.row[column_name].strip() for column_name in context_columns if isinstance(self.row[column_name], str)
        ]
        prompt_text = "\n\n".join([turns, *filter(None, contexts)])
        # It becomes a turn if a column's name says so, or if the row has a system text or tools beside it.
        is_turn = column in TURN_COLUMNS or answer_column in TURN_COLUMNS
        system_text = self.system()
        if self.row_format.template and (is_turn or system_text or self.tools()):
            return self.with_system([*self.history(), {"role": "user", "content": prompt_text}])
        if self.row.get("history"):
            raise ValueError("'history' needs a chat template: pass --chat_template_path")
        if system_text:
            prompt_text = f"{system_text}\n\n{prompt_text}"
        # Without a template, a line break separates a question from its answer.
        return f"{prompt_text}\n" if is_turn and not prompt_text.endswith("\n") else prompt_text

    def history(self) -> list[Message]:
        """Earlier exchanges, each a question and its answer."""
        turns: list[Message] = []
        for exchange in self.row.get("history") or []:
            question, answer = exchange
            turns.append({"role": "user", "content": str(question)})
            turns.append({"role": ASSISTANT, "content": str(answer)})
        return turns

    def prompt_and_completion(self, column: str) -> tuple[Turns, Turns]:
        """The prompt, and the completion in ``column``: both text or both messages.

        Without a prompt, the last answer of a conversation is the completion, and all before it is the prompt.
        """
        prompt = self.prompt(column)
        completion = self.answer(column)
        if prompt is not None:
            return split_prompt(prompt, completion)
        if isinstance(completion, str):
            return "", completion
        return last_answer(completion)

    def pair(self) -> tuple[Turns, Turns, Turns]:
        """The prompt, the chosen and the rejected answer."""
        chosen_column, rejected_column = pair_columns(list(self.row))[:2]
        chosen = self.turns(chosen_column)
        rejected = self.turns(rejected_column)
        column_names = f"{chosen_column!r} and {rejected_column!r}"
        if type(chosen) is not type(rejected):
            raise ValueError(f"{column_names} must both be text or both be messages")

        prompt = self.prompt(chosen_column)
        # Without a prompt, or with one that is empty, both answers begin with it.
        if prompt is None or (not prompt and not isinstance(chosen, str)):
            if chosen == rejected:
                raise ValueError(f"{column_names} are identical: a pair without a preference teaches nothing")
            prompt = common_prompt(chosen, rejected)
            return prompt, chosen[len(prompt) :], rejected[len(prompt) :]

        chosen_prompt, chosen = split_prompt(prompt, chosen)
        rejected_prompt, rejected = split_prompt(prompt, rejected)
        if chosen_prompt != rejected_prompt:
            raise ValueError(f"the conversations of {column_names} have different prompts")
        return _move_shared_turns(chosen_prompt, chosen, rejected)

    # Options of the whole row

    def system(self) -> str:
        filled_columns = [column_name for column_name in SYSTEMS if self.row.get(column_name) is not None]
        if not filled_columns:
            return ""
        system_text = self.row[filled_columns[0]]
        if not isinstance(system_text, str):
            raise ValueError(f"{filled_columns[0]!r} is {describe_type(system_text)}, expected text")
        return system_text if system_text.strip() else ""

    def with_system(self, turns: list[Message]) -> list[Message]:
        """Put the system turn of the row's own column in front."""
        system_text = self.system()
        if not system_text:
            return turns
        if turns and turns[0]["role"] in ("system", "developer"):
            # Both are there in some data sets, mostly with the same text.
            if str(turns[0]["content"]).strip() != system_text.strip():
                raise ValueError("the column 'system' and the system turn differ: leave one of them out")
            return turns
        return [{"role": "system", "content": system_text}, *turns]

    def tools(self) -> list[Any] | None:
        tool_columns = present(list(self.row), TOOLS)
        if not tool_columns:
            return None
        return read_tools(self.row[tool_columns[0]], tool_columns[0], tool_columns[0] in self.row_format.exact)

    def template_options(self) -> Mapping[str, Any]:
        row_options = self.row.get(TEMPLATE_OPTIONS)
        if isinstance(row_options, str):
            row_options = from_json(row_options) if row_options.strip() else None
        # Arrow gives each row the options of all rows, as nulls, and a template may test for their presence.
        elif TEMPLATE_OPTIONS not in self.row_format.exact:
            row_options = without_nulls(row_options)
        if row_options and not isinstance(row_options, Mapping):
            raise ValueError(f"{TEMPLATE_OPTIONS!r} is {describe_type(row_options)}, expected an object")
        return row_options or {}


def _move_shared_turns(prompt: Turns, chosen: Turns, rejected: Turns) -> tuple[Turns, Turns, Turns]:
    """Move messages that both answers of a pair begin with to the prompt: they hold no preference."""
    if isinstance(prompt, str) or isinstance(chosen, str) or isinstance(rejected, str):
        return prompt, chosen, rejected
    num_shared = 0
    while num_shared < min(len(chosen), len(rejected)) - 1 and chosen[num_shared] == rejected[num_shared]:
        num_shared += 1
    return [*prompt, *chosen[:num_shared]], chosen[num_shared:], rejected[num_shared:]


def _messages_from_json(text: str) -> list[Any] | None:
    """The messages that a text holds as JSON; None for any other text."""
    if not text.lstrip().startswith("["):
        return None
    parsed_value = from_json(text)
    are_messages = isinstance(parsed_value, list) and bool(parsed_value) and all(map(_is_message, parsed_value))
    return parsed_value if are_messages else None


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and (value.get("role") is not None or value.get("from") is not None)
