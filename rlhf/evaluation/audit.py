"""What the rows of a file become before anything is trained."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.data import Dialogue, Reading
from rlhf.data.batch import IGNORE, sequences
from rlhf.data.columns import pair_columns, prompt_columns, renamed, sft_columns
from rlhf.data.encoding import PairEncoder, PromptEncoder, RowEncoder, SftEncoder, UnpairedEncoder
from rlhf.data.formats import canonical, has_labels, is_labelled_bad
from rlhf.data.messages import ASSISTANT
from rlhf.data.pairing import pairs_of_labelled
from rlhf.data.tokenised_rows import TokenisedRow, row_limits, truncate
from rlhf.evaluation.pieces import Piece, pieces, text_pieces

EncoderFactory = Callable[[Sequence[str], Reading], RowEncoder]

PROMPT_COMMANDS = ("grpo", "rloo", "ppo", "online-dpo", "best-of-n")
# How each command reads rows. `distill` and `teacher` read those of `sft`: a student learns the same answers, scored by
# its teacher.
ENCODERS: dict[str, EncoderFactory] = {
    **dict.fromkeys(("sft", "distill", "teacher"), SftEncoder.for_columns),
    **dict.fromkeys(("dpo", "reward"), PairEncoder.for_columns),
    "kto": UnpairedEncoder.for_columns,
    **dict.fromkeys(PROMPT_COMMANDS, PromptEncoder.for_columns),
}


@dataclass
class Audit:
    """What was found in a file. Rows are numbered from 1, as in the file.

    Args:
        name: The file.
        command: What the rows are for.
        rows: How many there are.
        columns: Each column of the file, and the name it is read as; empty if it is not read.
        unit: Of lengths: ``"tokens"``, or ``"characters"`` without a tokenizer.
        max_length: Longest sequence in tokens; None for no limit.
        roles: How many turns each role has.
        trained: How many rows are trained on.
        answers: How many answers these have.
        scored_answers: How many of the answers have a scored token.
        tokens: How many tokens they have.
        scored_tokens: How many of the tokens are scored.
        cut_rows: How many rows are longer than ``max_length``.
        cut_tokens: How many tokens they lose.
        lengths: Of each sequence that is trained on.
        dropped: From a reason to the rows that are left out for it.
        notes: From what a template leaves out to the rows.
        errors: Each row that cannot be read, and why.
        samples: The first rows, each a list of sequences.
    """

    name: str
    command: str
    rows: int
    columns: dict[str, str]
    unit: str
    max_length: int | None = None
    roles: Counter[str] = field(default_factory=Counter)
    trained: int = 0
    answers: int = 0
    scored_answers: int = 0
    tokens: int = 0
    scored_tokens: int = 0
    cut_rows: int = 0
    cut_tokens: int = 0
    lengths: list[int] = field(default_factory=list)
    dropped: dict[str, list[int]] = field(default_factory=dict)
    notes: dict[str, list[int]] = field(default_factory=dict)
    errors: list[tuple[int, str]] = field(default_factory=list)
    samples: list[tuple[int, list[list[Piece]]]] = field(default_factory=list)

    @property
    def is_of_prompts(self) -> bool:
        """Whether the rows are prompts, of which nothing is learned."""
        return self.command in PROMPT_COMMANDS


def command_for(rows: Any, reading: Reading) -> str:
    """Choose the command that rows are for by their columns.

    Args:
        rows: A ``Dataset``.
        reading: How rows are read.

    Returns:
        ``"kto"``, ``"dpo"``, ``"sft"`` or ``"grpo"``.
    """
    column_names = renamed(rows.column_names, reading.form)
    # Beside plain text, 0 and 1 are mostly classes of the text, as in data for classifiers, and judge no answer.
    if "label" in column_names and has_labels(rows, reading.form) and reading.form.text_field not in column_names:
        return "kto"
    # The first that can read the columns: pairs are also rows for SFT, and both have prompts.
    for command, columns_for in (("dpo", pair_columns), ("sft", sft_columns), ("grpo", prompt_columns)):
        try:
            columns_for(column_names)
        except ValueError:
            continue
        return command
    return "sft"


def audit(
    rows: Any,
    name: str,
    command: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    reading: Reading | None = None,
    *,
    max_length: int | None = None,
    text_field: str = "text",
    samples: int = 3,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Audit:
    """Read, render and tokenise every row as a command does.

    Args:
        rows: A ``Dataset``.
        name: Of the file.
        command: ``"sft"``, ``"dpo"`` or another.
        tokenizer: Without one, rows are read and nothing is tokenised.
        reading: How rows are read.
        max_length: Longest sequence in tokens; None for no limit.
        text_field: The column of plain text.
        samples: How many of the first rows are kept as text.
        progress: Wraps the loop over rows.

    Returns:
        The figures and the first rows.

    Raises:
        ValueError: The command is unknown, or cannot read the columns.
    """
    if command not in ENCODERS:
        raise ValueError(f"--command {command!r} trains on no rows; one of {', '.join(ENCODERS)}")
    reading = reading or Reading()
    if tokenizer is not None:
        reading = reading.for_tokenizer(tokenizer, text_field, rows)
    column_names = renamed(rows.column_names, reading.form)
    if command in ("dpo", "reward") and "label" in column_names and "chosen" not in rows.column_names:
        # Both commands make pairs of such rows before they train, so an audit has to count pairs.
        rows = pairs_of_labelled(rows, reading.form)
        # The pairs have the new names already; to rename once more would fail on the old ones.
        reading = replace(reading, form=replace(reading.form, columns={}))
        column_names = list(rows.column_names)
    # The same encoder as in training, so that an audit cannot differ from it.
    form = replace(reading.form, text_field=text_field)
    encoder = ENCODERS[command](column_names, replace(reading, form=form))

    columns = _columns_read(rows.column_names, reading, encoder.read)
    findings = Audit(name, command, len(rows), columns, "characters" if tokenizer is None else "tokens", max_length)
    for row_number, row in enumerate(progress(rows), start=1):
        try:
            renamed_row = canonical(row, reading.form)
            dialogue = encoder.dialogue(renamed_row)
            tokenised = [] if tokenizer is None else _tokenise(row, encoder, tokenizer, findings)
        # Training stops at such a row or leaves it out; an audit goes on, so that one pass finds all of them.
        except ValueError as error:
            findings.errors.append((row_number, str(error)))
            continue
        _count_roles(findings, dialogue)
        if tokenizer is not None:
            _add_tokens(findings, row_number, tokenised, tokenizer, samples)
        # With a tokenizer, the encoder itself drops these rows.
        elif isinstance(encoder, SftEncoder) and is_labelled_bad(renamed_row):
            findings.dropped.setdefault("with label false", []).append(row_number)
        else:
            _add_text(findings, row_number, dialogue, samples)
    return findings


def _columns_read(columns: Sequence[str], reading: Reading, read: Sequence[str]) -> dict[str, str]:
    """Each column of the file with the name that it is read as; empty if it is not read."""
    new_names = reading.form.columns
    read_names = {}
    for column_name in columns:
        # Another column may get the name of this one, and takes its place.
        is_replaced = column_name in new_names.values() and column_name not in new_names
        read_as = "" if is_replaced else new_names.get(column_name, column_name)
        read_names[column_name] = read_as if read_as in read else ""
    return read_names


def _tokenise(row: Any, encoder: RowEncoder, tokenizer: PreTrainedTokenizerBase, result: Audit) -> list[TokenisedRow]:
    encoded = encoder.encode(row, tokenizer)
    if result.is_of_prompts:
        return encoded  # their limit depends on the length of completions
    # No model is loaded, so the tokenizer's size stands for the rows of the embeddings.
    # Training may stop at a long prompt; an audit counts it as dropped and goes on.
    limits = row_limits(result.max_length, len(tokenizer), drop_long_prompts=True)
    return [truncate(tokenised_row, limits) for tokenised_row in encoded]


def _count_roles(result: Audit, dialogue: Dialogue | None) -> None:
    turns_or_text = () if dialogue is None else (dialogue.prompt, *dialogue.completions)
    for turns in turns_or_text:
        if not isinstance(turns, str):
            result.roles.update(str(message["role"]) for message in turns)


def _add_tokens(
    result: Audit, number: int, rows: list[TokenisedRow], tokenizer: PreTrainedTokenizerBase, samples: int
) -> None:
    """Count the tokenised rows of row ``number``."""
    shown_sequences: list[list[Piece]] = []
    for row in rows:
        # Answers of dropped rows count here too, as in the log of training.
        result.answers += row.answers
        result.scored_answers += row.scored
        for template_note in row.notes:
            result.notes.setdefault(template_note, []).append(number)
        if row.dropped:
            result.dropped.setdefault(row.dropped, []).append(number)
            continue
        result.trained += 1
        result.cut_rows += row.truncated > 0
        result.cut_tokens += row.truncated
        for token_ids, token_labels in _whole_sequences(row.columns):
            result.lengths.append(len(token_ids))
            result.tokens += len(token_ids)
            result.scored_tokens += sum(label != IGNORE for label in token_labels)
            if len(result.samples) < samples:
                shown_sequences.append(pieces(tokenizer, token_ids, token_labels))
    if shown_sequences:
        result.samples.append((number, shown_sequences))


def _whole_sequences(columns: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each sequence of a tokenised row, with its prompt."""
    prompt_ids = columns.get("prompt_ids", [])
    # A prompt for on-policy training has no answer yet, and nothing of it is scored.
    if set(columns) == {"prompt_ids"}:
        return [(prompt_ids, [IGNORE] * len(prompt_ids))]
    first_answer, *other_answers = sequences(columns)
    # A pair stores its prompt once, but the model reads it before each answer.
    prompt_labels = [IGNORE] * len(prompt_ids)
    return [
        (first_answer.ids, first_answer.labels),
        *((prompt_ids + other_answer.ids, prompt_labels + other_answer.labels) for other_answer in other_answers),
    ]


def _add_text(result: Audit, number: int, dialogue: Dialogue | None, samples: int) -> None:
    """Count a row without a tokenizer."""
    result.trained += 1
    if dialogue is None:
        return
    # A prompt without an answer is shown as well, behind it an empty answer.
    shown_sequences = [text_pieces(dialogue.prompt, completion) for completion in dialogue.completions or ("",)]
    for row_pieces in shown_sequences:
        length = sum(len(piece.text) for piece in row_pieces)
        result.lengths.append(length)
        result.tokens += length
        result.scored_tokens += sum(len(piece.text) for piece in row_pieces if piece.learned)
        result.scored_answers += sum(piece.learned for piece in row_pieces)
    for completion in dialogue.completions:
        is_text = isinstance(completion, str)
        result.answers += 1 if is_text else sum(message["role"] == ASSISTANT for message in completion)  # type: ignore[index]
    if len(result.samples) < samples:
        result.samples.append((number, shown_sequences))
