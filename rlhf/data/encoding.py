"""One row of a data file to tokenised rows: an encoder for each kind of training.

An encoder knows which columns it reads, what a row says as a dialogue, and what it becomes as ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from datasets import Json
from transformers import PreTrainedTokenizerBase

from rlhf.data.batch import IGNORE
from rlhf.data.chat import Encoded, encode, encode_prompt, split_turns
from rlhf.data.columns import (
    PAIR_IDS,
    Row,
    RowFormat,
    check_unpaired_columns,
    pair_columns,
    prompt_columns,
    sft_columns,
)
from rlhf.data.formats import (
    Dialogue,
    canonical,
    is_labelled_bad,
    label,
    margin,
    pair_dialogue,
    prompt_dialogue,
    sft_dialogue,
    unpaired_dialogue,
)
from rlhf.data.messages import ASSISTANT, describe_type, is_trained
from rlhf.data.prompts import roles_of
from rlhf.data.tables import JsonText
from rlhf.data.tokenised_rows import NOTHING_SCORED, TokenisedRow

_MASKS = ("completion_mask", "assistant_masks", "attention_mask")


@dataclass(frozen=True)
class Reading:
    """How a trainer reads rows, apart from their length.

    Args:
        form: Names of columns and roles, and options of the template.
        split_turns: Whether each answer of a conversation is a separate row, after all earlier turns.
        bad_rows: File that lists the rows that cannot be read; these are left out. None stops at the first.
    """

    form: RowFormat = field(default_factory=RowFormat)
    split_turns: bool = False
    bad_rows: str | None = None

    def for_tokenizer(
        self, tokenizer: PreTrainedTokenizerBase, text_field: str = "text", rows: Any = None
    ) -> "Reading":
        """Add what a tokenizer and a data set decide.

        Args:
            tokenizer: Its chat template is added.
            text_field: The column of plain text.
            rows: The data set. Its columns of JSON hold no nulls of Arrow's.

        Returns:
            A new object.
        """
        templates = tokenizer.chat_template  # one, several by name, or None
        # The template is only searched for words, such as `tool_calls`, so that several may be joined.
        template = templates if isinstance(templates, str) else " ".join((templates or {}).values())
        features = getattr(rows, "features", None) or {}
        json_columns = [column for column, feature in features.items() if isinstance(feature, JsonText | Json)]
        exact_columns = frozenset(self.form.columns.get(column, column) for column in json_columns)
        return replace(self, form=replace(self.form, template=template, text_field=text_field, exact=exact_columns))


class RowEncoder(Protocol):
    """How one kind of training reads rows."""

    @property
    def reading(self) -> Reading:
        """Names of columns and roles, options of the template, and what happens to bad rows."""

    @property
    def read(self) -> tuple[str, ...]:
        """The columns that are read, after renaming."""

    @property
    def blank(self) -> dict[str, Any]:
        """A row of the right columns, in the place of one that cannot be read."""

    def dialogue(self, row: Row) -> Dialogue | None:
        """What a canonical row says; None for ids and for plain text. Raises ValueError if it is malformed."""

    def encode(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> list[TokenisedRow]:
        """The tokenised rows that a row of the file becomes. Raises ValueError if it cannot be read or rendered."""


@dataclass(frozen=True)
class SftEncoder:
    """Supervised fine-tuning: ``input_ids``, and ``labels`` that are −100 where nothing is learned.

    Args:
        reading: How rows are read.
        read: The columns that are read; the first holds the text to train on.
    """

    reading: Reading
    read: tuple[str, ...]

    @classmethod
    def for_columns(cls, names: Sequence[str], reading: Reading) -> "SftEncoder":
        return cls(reading, sft_columns(names, reading.form.text_field))

    @property
    def column(self) -> str:
        return self.read[0]

    @property
    def blank(self) -> dict[str, Any]:
        # One id, not none: Arrow cannot tell the type of an empty list.
        return {"input_ids": [0], "labels": [IGNORE]}

    @property
    def _is_text(self) -> bool:
        # A `completion` without a prompt is text as well, but may be a conversation.
        return self.column == self.reading.form.text_field and self.column != "completion"

    def dialogue(self, row: Row) -> Dialogue | None:
        if self.column == "input_ids" or self._is_text:
            return None
        return sft_dialogue(row, self.column, self.reading.form)

    def encode(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> list[TokenisedRow]:
        row = canonical(row, self.reading.form)
        if self.column == "input_ids":
            return [TokenisedRow(_ready_sft_columns(row))]
        if self._is_text:
            return [_sft_row(encode(tokenizer, Dialogue("", (self._text(row),))))]
        if is_labelled_bad(row):  # rows for KTO train here too, without their bad answers
            return [TokenisedRow(self.blank, dropped="with label false")]
        dialogue = sft_dialogue(row, self.column, self.reading.form)
        if reason := _nothing_to_learn(dialogue):
            return [TokenisedRow(self.blank, dropped=reason)]
        if not self.reading.split_turns:
            return [_sft_row(encode(tokenizer, dialogue))]
        # Each answer behind all that comes before it, as the model meets it in a conversation.
        answer_rows = [_sft_row(encode(tokenizer, answer, split=True)) for answer in split_turns(dialogue)]
        return answer_rows or [TokenisedRow(self.blank, dropped=NOTHING_SCORED)]

    def _text(self, row: Row) -> str:
        plain_text = row[self.column]
        if not isinstance(plain_text, str):
            raise ValueError(f"{self.column!r} is {describe_type(plain_text)}, expected text")
        if not plain_text.strip():
            raise ValueError(f"{self.column!r} is empty, expected text")
        return plain_text


@dataclass(frozen=True)
class PairEncoder:
    """Preference training: ``prompt_ids``, ``chosen_ids``, ``rejected_ids``, and ``labels`` of both answers.

    Args:
        reading: How rows are read.
        read: The columns that are read.
        with_margin: Whether to keep the column ``margin``.
    """

    reading: Reading
    read: tuple[str, ...]
    with_margin: bool = False

    @classmethod
    def for_columns(cls, names: Sequence[str], reading: Reading, margin: bool = False) -> "PairEncoder":
        # The option may be on for a mixture of which only some files have margins.
        with_margin = margin and "margin" in names
        read = pair_columns(names)
        return cls(reading, (*read, "margin") if with_margin else read, with_margin)

    @property
    def has_ids(self) -> bool:
        return "chosen_ids" in self.read

    @property
    def blank(self) -> dict[str, Any]:
        id_columns = {"prompt_ids": [0], "chosen_ids": [0], "rejected_ids": [0], "labels": [[IGNORE], [IGNORE]]}
        return {**id_columns, "margin": 0.0} if self.with_margin else {**id_columns}

    def dialogue(self, row: Row) -> Dialogue | None:
        return None if self.has_ids else pair_dialogue(row, self.reading.form)

    def encode(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> list[TokenisedRow]:
        row = canonical(row, self.reading.form)
        extra_columns = {"margin": margin(row)} if self.with_margin else {}
        if self.has_ids:
            return [TokenisedRow({**_ready_pair_columns(row), **extra_columns})]
        encoded = encode(tokenizer, pair_dialogue(row, self.reading.form))
        (chosen_ids, _), (rejected_ids, _) = encoded.completions
        id_columns = {"prompt_ids": encoded.prompt_ids, "chosen_ids": chosen_ids, "rejected_ids": rejected_ids}
        return [_counted({**id_columns, "labels": _answer_labels(encoded), **extra_columns}, encoded)]


@dataclass(frozen=True)
class UnpairedEncoder:
    """KTO: ``prompt_ids``, ``completions`` (one), ``labels`` (of its tokens) and ``desirable``.

    A pair becomes two rows.

    Args:
        reading: How rows are read.
        read: The columns that are read.
        pairs: Reads rows that are pairs; None for rows with a ``label``.
    """

    reading: Reading
    read: tuple[str, ...]
    pairs: PairEncoder | None = None

    @classmethod
    def for_columns(cls, names: Sequence[str], reading: Reading) -> "UnpairedEncoder":
        # The names are the new ones already, so nothing is renamed in this check.
        if check_unpaired_columns(names, replace(reading.form, columns={})):
            pairs = PairEncoder.for_columns(names, reading)
            return cls(reading, pairs.read, pairs)
        # The label is required, so it is read even from rows whose form does not name it.
        return cls(reading, (*sft_columns(names), "label"))

    @property
    def blank(self) -> dict[str, Any]:
        return {"prompt_ids": [0], "completions": [[0]], "labels": [[IGNORE]], "desirable": False}

    def dialogue(self, row: Row) -> Dialogue | None:
        if self.pairs is not None:
            return self.pairs.dialogue(row)
        return None if "completion_ids" in row else unpaired_dialogue(row, self.reading.form)

    def encode(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> list[TokenisedRow]:
        if self.pairs is not None:
            return [answer for pair in self.pairs.encode(row, tokenizer) for answer in self._split(pair)]
        row = canonical(row, self.reading.form)
        is_good = label(row)
        if "completion_ids" in row:
            answer_ids = list(row["completion_ids"])
            # Ready ids come without a mask: all of them are scored, so they are their own labels.
            return [TokenisedRow(self._columns(list(row["prompt_ids"]), answer_ids, answer_ids, is_good))]
        encoded = encode(tokenizer, unpaired_dialogue(row, self.reading.form))
        ((answer_ids, _),) = encoded.completions
        (answer_labels,) = _answer_labels(encoded)
        return [_counted(self._columns(encoded.prompt_ids, answer_ids, answer_labels, is_good), encoded)]

    def _split(self, pair: TokenisedRow) -> list[TokenisedRow]:
        """The two rows of a pair, the chosen one first. Each has the counts of the whole pair."""
        columns = pair.columns
        chosen_labels, rejected_labels = columns["labels"]
        chosen_columns = self._columns(columns["prompt_ids"], columns["chosen_ids"], chosen_labels, True)
        rejected_columns = self._columns(columns["prompt_ids"], columns["rejected_ids"], rejected_labels, False)
        # Both are told what the template left out of the pair.
        return [replace(pair, columns=chosen_columns), replace(pair, columns=rejected_columns)]

    def _columns(self, prompt: list[int], ids: list[int], labels: list[int], is_good: bool) -> dict[str, Any]:
        return {"prompt_ids": prompt, "completions": [ids], "labels": [labels], "desirable": is_good}


@dataclass(frozen=True)
class PromptEncoder:
    """On-policy training: ``prompt_ids`` alone.

    Args:
        reading: How rows are read.
        read: The columns that are read.
    """

    reading: Reading
    read: tuple[str, ...]

    @classmethod
    def for_columns(cls, names: Sequence[str], reading: Reading) -> "PromptEncoder":
        return cls(reading, prompt_columns(names))

    @property
    def blank(self) -> dict[str, Any]:
        return {"prompt_ids": [0]}

    def dialogue(self, row: Row) -> Dialogue | None:
        return prompt_dialogue(row, self.reading.form)

    def encode(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> list[TokenisedRow]:
        row = canonical(row, self.reading.form)
        prompt_ids = encode_prompt(tokenizer, prompt_dialogue(row, self.reading.form))
        # Generation has to begin with at least one id.
        if not prompt_ids:
            raise ValueError("'prompt' is empty")
        return [TokenisedRow({"prompt_ids": prompt_ids})]


# Columns of a tokenised row


def _counted(columns: dict[str, Any], encoded: Encoded) -> TokenisedRow:
    return TokenisedRow(columns, encoded.answers, encoded.scored, encoded.notes)


def _sft_row(encoded: Encoded) -> TokenisedRow:
    ((answer_ids, _),) = encoded.completions
    (answer_labels,) = _answer_labels(encoded)
    # A prompt of its own serves pairs, which share it. Supervised rows are one sequence.
    prompt_ids = encoded.prompt_ids
    return _counted(
        {"input_ids": prompt_ids + answer_ids, "labels": [IGNORE] * len(prompt_ids) + answer_labels}, encoded
    )


def _answer_labels(encoded: Encoded) -> list[list[int]]:
    """The labels of each completion: its ids, −100 for those that are not scored."""
    return [
        [token_id if is_scored else IGNORE for token_id, is_scored in zip(answer_ids, scored, strict=True)]
        for answer_ids, scored in encoded.completions
    ]


def _nothing_to_learn(dialogue: Dialogue) -> str | None:
    """Why a conversation has no answer to learn; None if it has one."""
    (turns,) = dialogue.completions
    if isinstance(turns, str):
        return None
    if any(is_trained(message) for message in turns):
        return None
    if any(message["role"] == ASSISTANT for message in turns):
        return "whose answers are all marked not to be learned"
    return f"without an assistant's turn (roles: {roles_of(turns)}; --roles theirs=assistant says which it is)"


# Rows that are tokenised already


def _ids(row: Row, column_name: str) -> list[Any]:
    """The token ids in a column; whether they are in the vocabulary is checked later."""
    column_value = row[column_name]
    if column_value is None or isinstance(column_value, str | bytes | dict | int | float):
        raise ValueError(f"{column_name!r} is a {type(column_value).__name__}, expected a list of token ids")
    token_ids = list(column_value)
    for kind in set(map(type, token_ids)):  # few types, many ids
        if kind in (bool, str, bytes, dict, list, type(None)):
            raise ValueError(f"{column_name!r} has a {kind.__name__} in it, expected token ids only")
    return token_ids


def _ready_sft_columns(row: Row) -> dict[str, Any]:
    """Ids and labels from ``labels``, from masks, or from a prompt and its completion."""
    if "input_ids" not in row:
        prompt_ids, completion_ids = (_ids(row, column_name) for column_name in ("prompt_ids", "completion_ids"))
        return {"input_ids": prompt_ids + completion_ids, "labels": [IGNORE] * len(prompt_ids) + completion_ids}
    token_ids = _ids(row, "input_ids")
    # Labels and masks may be given together: a token is scored if all of them say so.
    labels = token_ids if row.get("labels") is None else _ids(row, "labels")
    token_masks = {column_name: row[column_name] for column_name in _MASKS if row.get(column_name) is not None}
    for column_name, column_values in {"labels": labels, **token_masks}.items():
        if len(column_values) != len(token_ids):
            raise ValueError(f"{column_name!r} has {len(column_values)} entries, 'input_ids' {len(token_ids)}")
    for token_mask in token_masks.values():
        labels = [token_id if is_scored else IGNORE for token_id, is_scored in zip(labels, token_mask, strict=True)]
    # Padding is no text, so it must not count towards max_length.
    if "attention_mask" in token_masks:  # remove padding: batches are padded anew
        is_not_padding = token_masks["attention_mask"]
        token_ids = [token_id for token_id, is_token in zip(token_ids, is_not_padding, strict=True) if is_token]
        labels = [token_id for token_id, is_token in zip(labels, is_not_padding, strict=True) if is_token]
    return {"input_ids": token_ids, "labels": labels}


def _ready_pair_columns(row: Row) -> dict[str, Any]:
    id_columns = {column_name: _ids(row, column_name) for column_name in PAIR_IDS}
    # An answer without ids has no log-prob that could be compared.
    answer_columns = ("chosen_ids", "rejected_ids")
    for column_name in answer_columns:
        if not id_columns[column_name]:
            raise ValueError(f"{column_name!r} is empty")
    return {**id_columns, "labels": [id_columns[column_name] for column_name in answer_columns]}
