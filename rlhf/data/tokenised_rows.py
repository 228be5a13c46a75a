"""A tokenised row and the report about it; how it is checked and truncated."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from rlhf.data.batch import IGNORE

# A number, so that limits are compared and subtracted without a special case.
UNLIMITED = 1 << 40  # where max_length is None
# Each completes "dropped 3 of 8 rows ..." in the log.
TOO_LONG = "with too long a prompt"
UNREADABLE = "that cannot be read"
NOTHING_SCORED = "without a scored token"


class Limits(NamedTuple):
    """What every row must fit.

    Args:
        max_length: Tokens of a prompt with one answer; the end of a longer answer is cut off.
        vocab_size: Rows of the model's embeddings; every id must be smaller.
        drop_long_prompts: Whether to leave out rows whose prompt alone reaches ``max_length``, instead of stopping.
    """

    max_length: int
    vocab_size: int
    drop_long_prompts: bool = False


def row_limits(max_length: int | None, vocab_size: int, drop_long_prompts: bool = False) -> Limits:
    """The limits of a trainer, whose ``max_length`` may be None: no limit."""
    return Limits(UNLIMITED if max_length is None else max_length, vocab_size, drop_long_prompts)


@dataclass(frozen=True)
class TokenisedRow:
    """A row for training, and what is counted of it.

    Args:
        columns: What training reads: lists of ids and labels, one or one for each answer, and single values.
        answers: How many of the assistant's turns it has.
        scored: How many of these have a scored token.
        notes: What the chat template leaves out, a line each.
        dropped: Why the row is left out, as the end of "dropped 3 of 8 rows ..."; empty if it is not.
        truncated: How many ids were cut off.
        error: Why the row cannot be read; empty if it can.
    """

    columns: dict[str, Any]
    answers: int = 0
    scored: int = 0
    notes: tuple[str, ...] = ()
    dropped: str = ""
    truncated: int = 0
    error: str = ""

    def report(self, index: int) -> dict[str, Any]:
        """All but the columns as further columns of a table, in the order of :data:`REPORT_COLUMNS`.

        Args:
            index: Which row of the file it was, from 0.

        Returns:
            Column names and values.
        """
        report_values = (self.truncated, self.dropped, self.error, index, self.answers, self.scored, list(self.notes))
        return dict(zip(REPORT_COLUMNS, report_values, strict=True))


# Names in the cache on disk: they stay, or tables of older versions could not be read.
REPORT_COLUMNS = ("_cut", "_drop", "_bad", "_row", "_answers", "_scored", "_notes")


def truncate(row: TokenisedRow, limits: Limits) -> TokenisedRow:
    """Check a row and cut off what is beyond ``max_length``.

    A prompt is never cut, as it belongs to all of the row's answers: they share the rest of the length.

    Args:
        row: A tokenised row.
        limits: What it must fit.

    Returns:
        The row with ``truncated`` and ``dropped`` set.

    Raises:
        ValueError: An id is outside the vocabulary, or the prompt is too long and such rows are not dropped.
    """
    if row.dropped:
        return row
    # Single values, such as a margin, are neither checked nor cut.
    id_columns = {name: column_ids for name, column_ids in row.columns.items() if isinstance(column_ids, list)}
    check_vocabulary(id_columns, limits.vocab_size)
    prompt_length = _prompt_length(id_columns)
    # At the limit itself it is too long as well: no token of the answer would fit.
    is_too_long = prompt_length >= limits.max_length
    if is_too_long and not limits.drop_long_prompts:
        raise ValueError(
            f"the prompt has {prompt_length} tokens and max_length is {limits.max_length}: raise --max_length, or pass "
            "--drop_long_prompts to leave such rows out"
        )
    has_own_prompt = "prompt_ids" in id_columns
    # `input_ids` begin with the prompt, so the whole length is theirs.
    free_space = max(limits.max_length - prompt_length, 0) if has_own_prompt else limits.max_length
    shortened = {
        name: column_ids if name == "prompt_ids" else _shorten(column_ids, free_space)
        for name, column_ids in id_columns.items()
    }
    return replace(
        row,
        columns={**row.columns, **shortened},
        truncated=_count_ids(id_columns) - _count_ids(shortened),
        dropped=TOO_LONG if is_too_long else _reason_to_drop(shortened),
    )


def check_prompt(row: TokenisedRow, limits: Limits) -> TokenisedRow:
    """Check a prompt that a policy is to answer. It is never truncated.

    Args:
        row: A row of ``prompt_ids``.
        limits: What it must fit; ``max_length`` is without the answer.

    Returns:
        The row with ``dropped`` set.

    Raises:
        ValueError: An id is outside the vocabulary, or the prompt is too long and such rows are not dropped.
    """
    prompt_ids = row.columns["prompt_ids"]
    check_vocabulary({"prompt": prompt_ids}, limits.vocab_size)
    if len(prompt_ids) <= limits.max_length:
        return row
    if limits.drop_long_prompts:
        return replace(row, dropped=TOO_LONG)
    raise ValueError(
        f"the prompt has {len(prompt_ids)} tokens, max_length less max_completion_length leaves room for "
        f"{limits.max_length}: raise --max_length, or pass --drop_long_prompts to leave such rows out"
    )


def check_vocabulary(columns: dict[str, list[Any]], vocab_size: int) -> None:
    """Check that the model has an embedding for each id.

    Args:
        columns: Lists of ids, or lists of these; ``labels`` may hold −100.
        vocab_size: Rows of the model's embeddings.

    Raises:
        ValueError: Names the first id that is outside.
    """
    for column_name, column_ids in columns.items():
        for token_id in _flat(column_ids):
            is_ignored = column_name == "labels" and token_id == IGNORE
            if not 0 <= token_id < vocab_size and not is_ignored:
                raise ValueError(
                    f"token {token_id} in {column_name!r} is outside the model's vocabulary of {vocab_size}: "
                    "is this the model's own tokenizer? (--add_tokens enlarges the model for new tokens)"
                )


# A value is a list of ids, or one such list for each answer.


def _is_nested(value: list[Any]) -> bool:
    return bool(value) and isinstance(value[0], list)


def _shorten(value: list[Any], length: int) -> list[Any]:
    return [answer_ids[:length] for answer_ids in value] if _is_nested(value) else value[:length]


def _flat(value: list[Any]) -> list[int]:
    return [token_id for answer_ids in value for token_id in answer_ids] if _is_nested(value) else value


def _count_ids(columns: dict[str, list[Any]]) -> int:
    # Labels mirror the ids and would count each token twice.
    return sum(len(_flat(column_ids)) for column_name, column_ids in columns.items() if column_name != "labels")


def _prompt_length(columns: dict[str, list[Any]]) -> int:
    if "prompt_ids" in columns:
        return len(columns["prompt_ids"])
    # In one sequence, all before the first scored token is the prompt.
    scored_indices = (token_index for token_index, label in enumerate(columns["labels"]) if label != IGNORE)
    return next(scored_indices, 0)


def _reason_to_drop(columns: dict[str, list[Any]]) -> str:
    answer_labels = columns["labels"]
    if "input_ids" in columns:
        answer_labels = [answer_labels[1:]]  # nothing predicts the first token of a text
    # Of several answers each needs a scored token: a pair without one has no margin.
    if any(all(label == IGNORE for label in labels_of_answer) for labels_of_answer in answer_labels):
        return NOTHING_SCORED
    # Answers may differ only behind the place where they are cut.
    if "chosen_ids" in columns and columns["chosen_ids"] == columns["rejected_ids"]:
        return "whose answers are the same once cut"
    return ""
