"""How probable a model finds the answers of a data set, row by row; the forward passes are those of ``SFTTrainer``."""

import tempfile
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf.data import Reading
from rlhf.data.batch import IGNORE
from rlhf.data.columns import renamed
from rlhf.data.encoding import PairEncoder, RowEncoder, SftEncoder
from rlhf.evaluation.comparison import Likelihoods
from rlhf.trainers import SFTConfig, SFTTrainer

# Ids and labels of a row: one sequence, or two for a pair (chosen, then rejected).
Sequences = list[dict[str, list[int]]]


def reference_rows(
    rows: Dataset, tokenizers: Sequence[PreTrainedTokenizerBase], reading: Reading, max_length: int
) -> tuple[list[list[Sequences]], int]:
    """Encode the answers of the data set for each model.

    Args:
        rows: Rows as they are in the file.
        tokenizers: One for each model.
        reading: How rows are read.
        max_length: Longer rows are left out, so that all models read the same text.

    Returns:
        For each tokenizer, the rows that all of them can read; and how many rows were left out. Both are empty if the
        data set has no answers.
    """
    encoder = _encoder_for(rows.column_names, reading)
    encoded_rows: list[list[Sequences]] = [[] for _ in tokenizers]
    if encoder is None:
        return encoded_rows, 0
    left_out = 0
    for row in rows:
        encodings = [_encode(encoder, row, tokenizer, max_length) for tokenizer in tokenizers]
        if any(sequences is None for sequences in encodings):
            left_out += 1
            continue
        for model_rows, sequences in zip(encoded_rows, encodings, strict=True):
            model_rows.append(sequences or [])
    return encoded_rows, left_out


def _encoder_for(names: list[str], reading: Reading) -> RowEncoder | None:
    """How rows with these columns are read; None without answers."""
    column_names = renamed(names, reading.form)
    for encoder_class in (PairEncoder, SftEncoder):
        try:
            return encoder_class.for_columns(column_names, reading)
        except ValueError:  # not of this form
            continue
    return None


def _encode(encoder: RowEncoder, row: Any, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Sequences | None:
    """The sequences of a row; None if it cannot be read or is too long."""
    try:
        encoded = encoder.encode(row, tokenizer)
    except ValueError:
        return None
    if len(encoded) != 1 or encoded[0].dropped:
        return None
    columns = encoded[0].columns
    if "input_ids" in columns:
        sequences = [{"input_ids": columns["input_ids"], "labels": columns["labels"]}]
    else:
        prompt_ids, not_scored = columns["prompt_ids"], [IGNORE] * len(columns["prompt_ids"])
        answer_ids = (columns["chosen_ids"], columns["rejected_ids"])
        sequences = [
            {"input_ids": prompt_ids + ids, "labels": not_scored + labels}
            for ids, labels in zip(answer_ids, columns["labels"], strict=True)
        ]
    fits = all(len(sequence["input_ids"]) <= max_length and scored_tokens(sequence) for sequence in sequences)
    return sequences if fits else None


def scored_tokens(sequence: dict[str, list[int]]) -> int:
    """Count the tokens whose probability is measured.

    Args:
        sequence: Ids and labels.

    Returns:
        The number; nothing predicts the first token.
    """
    return sum(label != IGNORE for label in sequence["labels"][1:])


def answer_bytes(rows: Sequence[Sequences], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The length of each row's answer in UTF-8, without special tokens.

    Args:
        rows: As :func:`reference_rows` returns them.
        tokenizer: That made the ids.

    Returns:
        Bytes of the (chosen) answer of each row.
    """
    sizes = []
    for sequences in rows:
        scored_ids = [label for label in sequences[0]["labels"][1:] if label != IGNORE]
        text = tokenizer.decode(scored_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        sizes.append(len(str(text).encode()))
    return sizes


def likelihoods_of(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequences], batch_size: int
) -> Likelihoods:
    """Measure the negative log-likelihood of each answer.

    Args:
        model: A causal LM.
        tokenizer: The tokenizer of the model.
        rows: As :func:`reference_rows` returns them.
        batch_size: Sequences in one forward pass.

    Returns:
        Sums of each row.
    """
    sequences = Dataset.from_list([sequence for row in rows for sequence in row])
    # A trainer wants a folder, and evaluation leaves nothing in it.
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = dict(per_device_eval_batch_size=batch_size, report_to="none", max_length=None)
        config = SFTConfig(folder, disable_dropout=True, **settings)
        trainer = SFTTrainer(model, config, eval_dataset=sequences, processing_class=tokenizer)
        means = trainer.predict(sequences).predictions["loss"]  # type: ignore[call-overload]
    counts = [scored_tokens(sequence) for row in rows for sequence in row]
    sums = [float(mean) * count for mean, count in zip(means, counts, strict=True)]
    is_pair = len(rows[0]) == 2
    step = 2 if is_pair else 1
    return Likelihoods(
        nll=sums[::step],
        tokens=counts[::step],
        rejected_nll=sums[1::2] if is_pair else [],
        rejected_tokens=counts[1::2] if is_pair else [],
    )
