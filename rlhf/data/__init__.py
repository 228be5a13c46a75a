"""Data: reading files, chat templates, tokenising, batches."""

from rlhf.data.batch import Batch
from rlhf.data.chat import answer_end_ids, answer_ends, encode, encode_prompt, encode_reply
from rlhf.data.collate import Collator
from rlhf.data.columns import RowFormat
from rlhf.data.encoding import Reading
from rlhf.data.formats import Dialogue
from rlhf.data.given import as_rows
from rlhf.data.mixing import Mixture, load_datasets, shuffled
from rlhf.data.packing import Packed, best_fit_decreasing
from rlhf.data.pairing import add_mismatched
from rlhf.data.reading import load_data
from rlhf.data.streams import Endless, in_memory, sample
from rlhf.data.tokenizing import (
    is_tokenised,
    tokenize_preferences,
    tokenize_prompts,
    tokenize_sft,
    tokenize_unpaired,
)
from rlhf.data.vocabulary import tokenizer_difference

__all__ = [
    "Batch",
    "Collator",
    "Dialogue",
    "Endless",
    "Mixture",
    "Packed",
    "Reading",
    "RowFormat",
    "answer_end_ids",
    "add_mismatched",
    "as_rows",
    "answer_ends",
    "best_fit_decreasing",
    "encode",
    "encode_prompt",
    "encode_reply",
    "is_tokenised",
    "in_memory",
    "load_data",
    "load_datasets",
    "sample",
    "shuffled",
    "tokenize_preferences",
    "tokenize_prompts",
    "tokenize_sft",
    "tokenize_unpaired",
    "tokenizer_difference",
]
