"""Data: reading files, chat templates, tokenising, batches."""

from rlhf.data.batching import Batch, Collator
from rlhf.data.chat import encode_prompt
from rlhf.data.packing import Packed, best_fit_decreasing
from rlhf.data.reading import load_data
from rlhf.data.teacher_file import TeacherFile, create_teacher_file, open_teacher_file
from rlhf.data.tokenizing import tokenize_preferences, tokenize_prompts, tokenize_sft
from rlhf.data.vocabulary import tokenizer_difference

__all__ = [
    "Batch",
    "Collator",
    "Packed",
    "TeacherFile",
    "best_fit_decreasing",
    "create_teacher_file",
    "encode_prompt",
    "load_data",
    "open_teacher_file",
    "tokenize_preferences",
    "tokenize_prompts",
    "tokenize_sft",
    "tokenizer_difference",
]
