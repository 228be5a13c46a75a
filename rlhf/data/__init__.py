"""Data: reading files, chat templates, tokenising, batches."""

from rlhf.data.batching import Batch, Collator
from rlhf.data.chat import encode_prompt
from rlhf.data.packing import Packed, best_fit_decreasing
from rlhf.data.reading import load_data
from rlhf.data.tokenizing import tokenize_preferences, tokenize_prompts, tokenize_sft
from rlhf.data.vocabulary import tokenizer_difference

__all__ = [
    "Batch",
    "Collator",
    "Packed",
    "best_fit_decreasing",
    "encode_prompt",
    "load_data",
    "tokenize_preferences",
    "tokenize_prompts",
    "tokenize_sft",
    "tokenizer_difference",
]
