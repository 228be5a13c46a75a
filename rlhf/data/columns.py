"""Which columns of a data file are read, and as what."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = Mapping[str, Any]

# Names that are known for a column, the preferred one first.
CONVERSATIONS = ("messages", "conversations", "conversation", "dialog")
PROMPTS = ("prompt", "query", "question", "instruction", "problem", "input")
CONTEXTS = ("input", "context")  # the text that an instruction or a question refers to
ANSWERS = ("completion", "response", "answer", "output", "solution", "target", "answers")
CHOSEN = ("chosen", "chosen_messages", "chosen_response", "preferred")
REJECTED = ("rejected", "rejected_messages", "rejected_response", "dispreferred")
TOOLS = ("tools", "functions")
SYSTEMS = ("system", "system_prompt")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
TEMPLATE_OPTIONS = "chat_template_kwargs"
ROW_OPTIONS = (*SYSTEMS, *TOOLS, TEMPLATE_OPTIONS)  # apply to the whole conversation of a row
# Text in these columns is a turn of a conversation; in `prompt` and `completion` it is joined as it is.
TURN_COLUMNS = {*PROMPTS, "response"} - {"prompt"}
# Columns of rows that are tokenised already.
PAIR_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
_SFT_IDS = ("input_ids", "labels", "completion_mask", "assistant_masks", "attention_mask")


@dataclass(frozen=True)
class RowFormat:
    """How rows are read.

    Args:
        columns: From a column's name to the name that it is read as (``{"question": "prompt"}``).
        roles: From a role's name to the one that the template knows (``{"agent": "assistant"}``).
        template_kwargs: Options of the chat template for every row; a row's ``chat_template_kwargs`` override them.
        text_field: The column of plain text.
        template: The chat template. Without one, questions and answers are plain text.
        exact: Columns whose nulls were written by the user, not added by Arrow.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    text_field: str = "text"
    template: str = ""
    exact: frozenset[str] = frozenset()


def renamed(columns: Sequence[str], row_format: RowFormat) -> list[str]:
    """Rename columns as the user asked.

    Args:
        columns: Names in the file.
        row_format: Gives the new names.

    Returns:
        The names under which the columns are read.

    Raises:
        ValueError: A column that is to be renamed is not there.
    """
    missing_columns = [column_name for column_name in row_format.columns if column_name not in columns]
    if missing_columns:
        raise ValueError(f"--columns: no column {missing_columns[0]!r}; found {', '.join(columns)}")
    return list(rename_row({column_name: column_name for column_name in columns}, row_format))


def rename_row(row: Row, row_format: RowFormat) -> dict[str, Any]:
    """Give the values of a row their new names; a renamed column replaces one that has its new name already."""
    new_values = {new_name: row[column] for column, new_name in row_format.columns.items() if column in row}
    other_values = {column: value for column, value in row.items() if column not in row_format.columns}
    return other_values | new_values


def present(names: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """Those of the ``known`` columns that are among ``names``, in the order of ``known``."""
    return tuple(name for name in known if name in names)


# Each function below takes the renamed columns of a file and returns those that one kind of training reads.


def sft_columns(names: Sequence[str], text_field: str = "text") -> tuple[str, ...]:
    """Choose the columns that supervised fine-tuning reads.

    Args:
        names: Columns after renaming.
        text_field: The column of plain text.

    Returns:
        The columns; the first holds the text that is trained, and so decides how rows are read.

    Raises:
        ValueError: No known form of rows.
    """
    # Ids come first: text beside them is for people.
    if "input_ids" in names or {"prompt_ids", "completion_ids"} <= set(names):
        return ("input_ids", *present(names, (*_SFT_IDS[1:], "prompt_ids", "completion_ids")))

    label_columns = present(names, ("label",))
    chosen_columns = present(names, CHOSEN)
    rejected_columns = present(names, REJECTED)
    conversation_columns = present(names, CONVERSATIONS)
    # `conversations` beside a pair of answers is their prompt; `messages` is always the text to train on.
    if "messages" in conversation_columns or (conversation_columns and not (chosen_columns and rejected_columns)):
        return (conversation_columns[0], *label_columns, *present(names, ROW_OPTIONS))

    # The preferred name of an answer comes before pairs and text; the others may be columns of another purpose, so that
    # they need a prompt beside them.
    prompt = prompt_and_options(names)
    if "completion" in names:
        return ("completion", *label_columns, *prompt)
    if chosen_columns:
        return (chosen_columns[0], *rejected_columns[:1], *prompt)
    if text_field in names:
        return (text_field,)
    answer_columns = present(names, ANSWERS)
    if answer_columns and set(prompt) & set(PROMPTS):
        return (answer_columns[0], *label_columns, *prompt)
    raise ValueError(
        f"no column to train on: found {', '.join(names)}; expected {text_field!r}, 'messages', 'conversations', "
        "'prompt' + 'completion', 'instruction' + 'output', or 'prompt' + 'chosen'; "
        "--columns question=prompt,answer=completion says what yours are"
    )


def pair_columns(names: Sequence[str]) -> tuple[str, ...]:
    """Choose the columns that preference training reads.

    Args:
        names: Columns after renaming.

    Returns:
        The columns: chosen, rejected, then those of the prompt; or the three columns of ids.

    Raises:
        ValueError: There are no pairs.
    """
    if set(PAIR_IDS) <= set(names):
        return PAIR_IDS
    chosen_columns = present(names, CHOSEN)
    rejected_columns = present(names, REJECTED)
    missing_names = [
        repr(known[0]) for known, columns in ((CHOSEN, chosen_columns), (REJECTED, rejected_columns)) if not columns
    ]
    if missing_names:
        raise ValueError(
            f"no column {' and '.join(missing_names)}: found {', '.join(names)}; "
            "preference data needs 'chosen' and 'rejected', and a 'prompt' unless both begin with it; "
            "--columns theirs=chosen says what yours are"
        )
    return (chosen_columns[0], rejected_columns[0], *prompt_and_options(names))


def prompt_columns(names: Sequence[str]) -> tuple[str, ...]:
    """Choose the columns that a prompt without an answer is read from.

    Args:
        names: Columns after renaming.

    Returns:
        The columns; the first holds the prompt.

    Raises:
        ValueError: There is no prompt.
    """
    chosen_columns = present(names, CHOSEN)
    if chosen_columns and present(names, REJECTED):
        return pair_columns(names)
    prompt = prompt_and_options(names)
    if set(prompt) & {*PROMPTS, *CONVERSATIONS}:
        return prompt
    if chosen_columns:
        return (chosen_columns[0], *prompt)
    raise ValueError(f"no column 'prompt' (nor 'messages'): found {', '.join(names)}; --columns theirs=prompt")


def prompt_and_options(names: Sequence[str]) -> tuple[str, ...]:
    """The prompt's column, if there is one, then those that belong to it: context, history, system, tools."""
    # Of several columns the first known one is the prompt; `input` is one only if there is no other.
    prompt = present(names, PROMPTS)[:1] or present(names, CONVERSATIONS)[:1]
    options = present(names, ROW_OPTIONS)
    if prompt and prompt[0] in PROMPTS and prompt[0] not in ("prompt", "input"):
        return (*prompt, *present(names, (*CONTEXTS, "history")), *options)
    return prompt + options


# Checks before any work; they raise ValueError where a trainer cannot read the columns of a file.


def sft_column(columns: Sequence[str], row_format: RowFormat) -> str:
    """The column that supervised fine-tuning trains on: ids, a conversation, an answer, ``chosen`` or text."""
    return sft_columns(renamed(columns, row_format), row_format.text_field)[0]


def check_preference_columns(columns: Sequence[str], row_format: RowFormat | None = None) -> None:
    """Raise where rows hold neither pairs, nor answers with a ``label`` that can be paired."""
    column_names = renamed(columns, row_format or RowFormat())
    if "label" in column_names and not present(column_names, CHOSEN):
        sft_columns(column_names)
        return
    pair_columns(column_names)


def check_prompt_columns(columns: Sequence[str], row_format: RowFormat) -> None:
    """Raise where rows hold no prompt."""
    prompt_columns(renamed(columns, row_format))


def check_unpaired_columns(columns: Sequence[str], row_format: RowFormat) -> bool:
    """Whether rows are pairs, each of which becomes two rows; raises where rows are neither labelled nor pairs."""
    column_names = renamed(columns, row_format)
    are_pairs = "chosen" in column_names or "chosen_ids" in column_names
    if not are_pairs and "label" not in column_names:
        raise ValueError(
            f"no column 'label': found {', '.join(columns)}; KTO needs 'prompt', 'completion' and 'label' (true or "
            "false), or pairs"
        )
    return are_pairs
