"""What the rows of a file become before anything is trained."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.data import Dialogue, Reading, encode_prompt
from rlhf.data.batch import IGNORE, sequences
from rlhf.data.columns import pair_columns, prompt_columns, renamed, sft_columns
from rlhf.data.encoding import TOO_LONG, Row, cut, encode_pair, encode_sft, encode_unpaired
from rlhf.data.formats import (
    canonical,
    has_labels,
    is_labelled_bad,
    pair_dialogue,
    prompt_dialogue,
    sft_dialogue,
    unpaired_dialogue,
)
from rlhf.data.tokenizing import pairs_of_labelled

TASKS = {
    "sft": ("sft", "distill", "teacher"),
    "pairs": ("dpo", "reward"),
    "kto": ("kto",),
    "prompts": ("grpo", "rloo", "ppo", "online-dpo", "best-of-n"),
}
_WINDOW = 8  # tokens before one, from which its text is told


@dataclass(frozen=True)
class Piece:
    """A stretch of text, mostly one token, and whether it is learned."""

    text: str
    learned: bool
    special: bool = False


@dataclass
class Audit:
    """What was found. Rows are numbered from 1, as in the file.

    ``lengths`` are in tokens, or in characters without a tokenizer; one for each sequence that is trained on.
    ``dropped``, ``notes`` and ``errors`` say which rows; ``samples`` are the first rows, each a list of sequences.
    """

    name: str
    command: str
    rows: int
    columns: dict[str, str]  # each column of the file, and what it is read as; "" where it is not read
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


def command_for(rows: Any, reading: Reading) -> str:
    """The command that these rows are for, by their columns."""
    names = renamed(rows.column_names, reading.form)
    if "label" in names and has_labels(rows, reading.form) and reading.form.text_field not in names:
        return "kto"
    for command, known in (("dpo", pair_columns), ("sft", sft_columns), ("grpo", prompt_columns)):
        try:
            known(names)
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
    """Read, render and tokenise every row as ``command`` does.

    Args:
        rows: a ``Dataset``. name: of the file. tokenizer: without one, rows are read and nothing is tokenised.
        samples: how many of the first rows are kept as text. progress: wraps the loop over rows.
    Raises:
        ValueError: an unknown command, or columns that the command cannot read.
    """
    task = next((task for task, commands in TASKS.items() if command in commands), None)
    if task is None:
        raise ValueError(f"--command {command!r} trains on no rows; one of {', '.join(sum(TASKS.values(), ()))}")
    reading = reading or Reading()
    if tokenizer is not None:
        reading = reading.for_tokenizer(tokenizer, text_field, rows)
    if task == "pairs" and "label" in renamed(rows.column_names, reading.form) and "chosen" not in rows.column_names:
        rows, reading = pairs_of_labelled(rows, reading.form), replace(reading, form=replace(reading.form, columns={}))
    found = Audit(name, command, len(rows), {}, "tokens" if tokenizer is not None else "characters", max_length)
    names = renamed(rows.column_names, reading.form)
    read = _columns(task, names, text_field)
    found.columns = {theirs: (ours if ours in read else "") for theirs, ours in _renames(rows.column_names, reading)}
    for number, row in enumerate(progress(rows), start=1):
        try:
            row = canonical(row, reading.form)
            dialogue = _dialogue(row, task, read, reading)
            encoded = [] if tokenizer is None else _encode(row, task, read, tokenizer, reading)
            done = [cut(one, max_length or 1 << 40, len(tokenizer), True) for one in encoded]  # type: ignore[arg-type]
        except ValueError as error:
            found.errors.append((number, str(error)))
            continue
        _count_roles(found, dialogue)
        if tokenizer is None:
            _add_text(found, number, dialogue, is_labelled_bad(row) and task == "sft", samples)
        else:
            _add_tokens(found, number, done, tokenizer, samples)
    return found


def _columns(task: str, names: list[str], text_field: str) -> tuple[str, ...]:
    if task == "pairs":
        return pair_columns(names)
    if task == "prompts":
        return prompt_columns(names)
    if task == "kto" and "rejected" in names:
        return pair_columns(names)
    return (*sft_columns(names, text_field), *(["label"] if task == "kto" else []))


def _renames(columns: list[str], reading: Reading) -> list[tuple[str, str]]:
    replaced = set(reading.form.columns.values())
    return [(name, reading.form.columns.get(name, "" if name in replaced else name)) for name in columns]


def _dialogue(row: Row, task: str, read: tuple[str, ...], reading: Reading) -> Dialogue | None:
    """None for rows of ids and of plain text."""
    if any(name.endswith("_ids") for name in read) or (read[0] == reading.form.text_field and len(read) == 1):
        return None
    if task == "prompts":
        return prompt_dialogue(row, reading.form)
    if task == "pairs" or (task == "kto" and "rejected" in read):
        return pair_dialogue(row, reading.form)
    if task == "kto":
        return unpaired_dialogue(row, reading.form)
    return sft_dialogue(row, read[0], reading.form)


def _encode(
    row: Row, task: str, read: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, reading: Reading
) -> list[Row]:
    if task == "prompts":
        ids = (
            list(row["prompt_ids"])
            if "prompt_ids" in row
            else encode_prompt(tokenizer, prompt_dialogue(row, reading.form))
        )
        return [
            {"input_ids": ids, "labels": [IGNORE] * len(ids), "_drop": "", "_answers": 0, "_scored": 0, "_notes": []}
        ]
    if task == "pairs":
        return encode_pair(row, tokenizer, "chosen_ids" in read, False, reading.form)
    if task == "kto":
        return encode_unpaired(row, tokenizer, "rejected" in read or "chosen_ids" in read, reading.form)
    return encode_sft(row, tokenizer, read[0], reading)


def _count_roles(found: Audit, dialogue: Dialogue | None) -> None:
    if dialogue is None:
        return
    turns = [turn for part in (dialogue.prompt, *dialogue.completions) if not isinstance(part, str) for turn in part]
    found.roles.update(str(turn["role"]) for turn in turns)


# With a tokenizer


def _add_tokens(found: Audit, number: int, done: list[Row], tokenizer: PreTrainedTokenizerBase, samples: int) -> None:
    prompts_alone = found.command in TASKS["prompts"]
    shown: list[list[Piece]] = []
    for row in done:
        found.answers += row["_answers"]
        found.scored_answers += row["_scored"]
        for note in row["_notes"]:
            found.notes.setdefault(note, []).append(number)
        if row["_drop"] and not prompts_alone:
            found.dropped.setdefault(row["_drop"], []).append(number)
            continue
        found.trained += 1
        found.cut_rows += row["_cut"] > 0
        found.cut_tokens += row["_cut"]
        for sequence in _whole(row):
            found.lengths.append(len(sequence[0]))
            found.tokens += len(sequence[0])
            found.scored_tokens += sum(label != IGNORE for label in sequence[1])
            if len(found.samples) < samples:
                shown.append(pieces(tokenizer, *sequence))
    if shown:
        found.samples.append((number, shown))


def _whole(row: Row) -> list[tuple[list[int], list[int]]]:
    """Each sequence of a tokenised row with its prompt: ids and labels."""
    first, *others = sequences(row)
    prompt = len(row.get("prompt_ids", []))
    return [(first.ids, first.labels)] + [
        (first.ids[:prompt] + other.ids, [IGNORE] * prompt + other.labels) for other in others
    ]


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int], labels: list[int]) -> list[Piece]:
    """The text of each token; tokens that share a character are one piece.

    A token's text is what it adds behind the tokens before it, as some tokenizers drop a space at the beginning.
    """
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    found: list[Piece] = []
    start = 0
    for stop in range(1, len(ids) + 1):
        before = max(0, start - _WINDOW)
        text = _decode(tokenizer, ids[before:stop])[len(_decode(tokenizer, ids[before:start])) :]
        if text.endswith("\N{REPLACEMENT CHARACTER}") and stop - start < 4 and stop < len(ids):
            continue  # the rest of the character is in the next token
        learned = any(label != IGNORE for label in labels[start:stop])
        found.append(Piece(text, learned, stop == start + 1 and ids[start] in special))
        start = stop
    return found


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)) if ids else ""


# Without one


def _add_text(found: Audit, number: int, dialogue: Dialogue | None, labelled_bad: bool, samples: int) -> None:
    if labelled_bad:
        found.dropped.setdefault("with label false", []).append(number)
        return
    found.trained += 1
    if dialogue is None:
        return
    shown = [_text_pieces(dialogue.prompt, completion) for completion in dialogue.completions or ("",)]
    for own in shown:
        size, learned = sum(len(piece.text) for piece in own), sum(len(piece.text) for piece in own if piece.learned)
        found.lengths.append(size)
        found.tokens += size
        found.scored_tokens += learned
    found.answers += sum(_answers(completion) for completion in dialogue.completions)
    found.scored_answers += sum(piece.learned for own in shown for piece in own)
    if len(found.samples) < samples:
        found.samples.append((number, shown))


def _answers(completion: Any) -> int:
    return 1 if isinstance(completion, str) else sum(turn["role"] == "assistant" for turn in completion)


def _text_pieces(prompt: Any, completion: Any) -> list[Piece]:
    parts = [(prompt, False), (completion, True)]
    return [piece for turns, answer in parts for piece in _turn_pieces(turns, answer)]


def _turn_pieces(turns: Any, answer: bool) -> list[Piece]:
    if isinstance(turns, str):
        return [Piece(turns, answer)] if turns else []
    found = []
    for turn in turns:
        learned = answer and turn["role"] == "assistant" and bool(turn.get("weight", 1))
        extra = [str(turn[key]) for key in ("reasoning_content", "content", "tool_calls") if turn.get(key)]
        found += [Piece(f"{turn['role']}: ", False, special=True), Piece("\n".join(extra) + "\n", learned)]
    return found


# For people


def facts(found: Audit) -> list[tuple[str, str]]:
    """The figures, each with its name."""
    lines = [("rows", f"{found.rows:,}")]
    if found.command not in TASKS["prompts"]:
        lines.append(("trained on", f"{found.trained:,}"))
    for reason, numbers in found.dropped.items():
        remedy = "; training stops there without --drop_long_prompts" if reason == TOO_LONG else ""
        lines.append((f"dropped {reason}", _rows(numbers) + remedy))
    if found.errors:
        lines.append(("cannot be read", _rows([number for number, _ in found.errors])))
    if found.answers:
        share = found.scored_answers / found.answers
        lines.append(("answers scored", f"{found.scored_answers:,} of {found.answers:,} ({share:.0%})"))
    if found.tokens and found.command not in TASKS["prompts"]:
        share = found.scored_tokens / found.tokens
        lines.append((f"{found.unit} scored", f"{found.scored_tokens:,} of {found.tokens:,} ({share:.1%})"))
    if found.cut_rows:
        lines.append(("cut", f"{found.cut_rows:,} rows to {found.max_length:,} tokens, losing {found.cut_tokens:,}"))
    lines += [(note, _rows(numbers)) for note, numbers in found.notes.items()]
    return lines


def _rows(numbers: list[int], shown: int = 5) -> str:
    listed = ", ".join(str(number) for number in dict.fromkeys(numbers[: shown + 1]))
    return f"{len(numbers):,} (row {listed}{', …' if len(numbers) > shown + 1 else ''})"


def histogram(lengths: list[int], bins: int = 12) -> list[tuple[int, int, int]]:
    """Equal stretches [low, high) of lengths and how many fall into each.

    Example:
        >>> histogram([1, 2, 2, 9], bins=3)
        [(1, 4, 3), (4, 7, 0), (7, 10, 1)]
    """
    if not lengths:
        return []
    low, high = min(lengths), max(lengths) + 1
    width = -(-(high - low) // bins)
    counts = Counter((length - low) // width for length in lengths)
    return [(low + i * width, low + (i + 1) * width, counts[i]) for i in range(max(counts) + 1)]
