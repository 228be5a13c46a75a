"""Which columns of a file are read, and as what."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = Mapping[str, Any]

CONVERSATIONS = ("messages", "conversations", "conversation", "dialog")
PROMPTS = ("prompt", "query", "question", "instruction", "problem", "input")
CONTEXTS = ("input", "context")  # what an instruction or a question is about
ANSWERS = ("completion", "response", "answer", "output", "solution", "target", "answers")
CHOSEN = ("chosen", "chosen_messages", "chosen_response", "preferred")
REJECTED = ("rejected", "rejected_messages", "rejected_response", "dispreferred")
TOOLS = ("tools", "functions")
SYSTEMS = ("system", "system_prompt")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
BESIDE = (*SYSTEMS, *TOOLS, "chat_template_kwargs")
TURN_COLUMNS = {*PROMPTS, "response"} - {"prompt"}  # columns of this name are turns, not text that is joined as it is
_PAIR_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
_SFT_IDS = ("input_ids", "labels", "completion_mask", "assistant_masks", "attention_mask")


@dataclass(frozen=True)
class RowFormat:
    """How rows are read.

    Args:
        columns: from a column's name to the name that it is read as (``{"question": "prompt"}``).
        roles: from a role's name to the one that the template knows (``{"agent": "assistant"}``).
        template_kwargs: what the chat template gets for every row; a row's ``chat_template_kwargs`` go before it.
        text_field: the column of plain text.
        template: the chat template. Without one, questions and answers are plain text.
        exact: columns whose values are as they were written: their nulls are the user's, not Arrow's.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    text_field: str = "text"
    template: str = ""
    exact: frozenset[str] = frozenset()


# What a file's columns are read as


def renamed(columns: Sequence[str], form: RowFormat) -> list[str]:
    """The columns under the names that they are read as.

    Raises:
        ValueError: a column that is to be renamed is not there.
    """
    missing = [name for name in form.columns if name not in columns]
    if missing:
        raise ValueError(f"--columns: no column {missing[0]!r}; found {', '.join(columns)}")
    return list(under_our_names({name: name for name in columns}, form))


def sft_columns(names: Sequence[str], text_field: str = "text") -> tuple[str, ...]:
    """The columns, under our names, that supervised fine-tuning reads. The first of them names the form.

    Raises:
        ValueError: none of the known forms.
    """
    label = present(names, ("label",))
    if "input_ids" in names or {"prompt_ids", "completion_ids"} <= set(names):
        return ("input_ids", *present(names, (*_SFT_IDS[1:], "prompt_ids", "completion_ids")))
    chosen, rejected = present(names, CHOSEN), present(names, REJECTED)
    conversation = present(names, CONVERSATIONS)
    if "messages" in conversation or (conversation and not (chosen and rejected)):
        return (conversation[0], *label, *present(names, BESIDE))
    if "completion" in names:
        return ("completion", *label, *columns_of_prompt(names))
    if chosen:
        return (chosen[0], *rejected[:1], *columns_of_prompt(names))
    prompt, answer = columns_of_prompt(names), present(names, ANSWERS)
    if text_field in names:
        return (text_field,)
    if answer and set(prompt) & set(PROMPTS):
        return (answer[0], *label, *prompt)
    raise ValueError(
        f"no column to train on: found {', '.join(names)}; expected {text_field!r}, 'messages', 'conversations', "
        "'prompt' + 'completion', 'instruction' + 'output', or 'prompt' + 'chosen'; "
        "--columns question=prompt,answer=completion says what yours are"
    )


def sft_column(columns: Sequence[str], form: RowFormat) -> str:
    """What rows are learned from: ids, a conversation, an answer, ``chosen`` or text; the first that is there.

    Raises:
        ValueError: none of them.
    """
    return sft_columns(renamed(columns, form), form.text_field)[0]


def pair_columns(names: Sequence[str]) -> tuple[str, ...]:
    """The columns, under our names, that pairs are read from.

    Raises:
        ValueError: there are no pairs.
    """
    if set(_PAIR_IDS) <= set(names):
        return _PAIR_IDS
    found = [present(names, known)[:1] for known in (CHOSEN, REJECTED)]
    missing = [known[0] for known, own in zip((CHOSEN, REJECTED), found, strict=True) if not own]
    if missing:
        raise ValueError(
            f"no column {' and '.join(map(repr, missing))}: found {', '.join(names)}; "
            "preference data needs 'chosen' and 'rejected', and a 'prompt' unless both begin with it; "
            "--columns theirs=chosen says what yours are"
        )
    return (*found[0], *found[1], *columns_of_prompt(names))


def check_preference_columns(columns: Sequence[str], form: RowFormat | None = None) -> None:
    """Raise where rows hold no pairs, nor answers with a ``label`` that can be paired."""
    names = renamed(columns, form or RowFormat())
    if "label" in names and not present(names, CHOSEN):
        sft_columns(names)
        return
    pair_columns(names)


def prompt_columns(names: Sequence[str]) -> tuple[str, ...]:
    """The columns, under our names, that a prompt alone is read from.

    Raises:
        ValueError: there is no prompt.
    """
    if present(names, CHOSEN) and present(names, REJECTED):
        return pair_columns(names)
    prompt = columns_of_prompt(names)
    if not set(prompt) & {*PROMPTS, *CONVERSATIONS}:
        if chosen := present(names, CHOSEN):
            return (chosen[0], *prompt)
        raise ValueError(f"no column 'prompt' (nor 'messages'): found {', '.join(names)}; --columns theirs=prompt")
    return prompt


def check_prompt_columns(columns: Sequence[str], form: RowFormat) -> None:
    """Raise where rows hold nothing to answer."""
    prompt_columns(renamed(columns, form))


def check_unpaired_columns(columns: Sequence[str], form: RowFormat) -> bool:
    """Whether rows are pairs, to be taken apart; raises where rows are neither marked nor pairs."""
    names = renamed(columns, form)
    pairs = "chosen" in names or "chosen_ids" in names
    if not pairs and "label" not in names:
        raise ValueError(
            f"no column 'label': found {', '.join(columns)}; KTO needs 'prompt', 'completion' and 'label' (true or "
            "false), or pairs"
        )
    return pairs


def present(names: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in known if name in names)


def columns_of_prompt(names: Sequence[str]) -> tuple[str, ...]:
    """What :func:`_prompt` reads: the prompt's column, then what stands beside it."""
    found = present(names, PROMPTS)[:1]
    if found and found[0] not in ("prompt", "input"):
        found += present(names, (*CONTEXTS, "history"))
    elif not found:
        found = present(names, CONVERSATIONS)[:1]
    return found + present(names, BESIDE)


def under_our_names(row: Row, form: RowFormat) -> dict[str, Any]:
    """A column that is renamed replaces one that has its new name."""
    taken = {ours: row[theirs] for theirs, ours in form.columns.items() if theirs in row}
    return {name: value for name, value in row.items() if name not in form.columns} | taken
