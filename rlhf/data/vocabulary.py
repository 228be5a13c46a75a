"""Whether two tokenizers mean the same by the same ids."""

import json
from itertools import zip_longest
from typing import Any

from transformers import PreTrainedTokenizerBase


def tokenizer_difference(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> str | None:
    """Find the first difference between two tokenizers: a token, then a rule by which text is split.

    The chat template, padding and the token that ends a text do not count.

    Args:
        student: The tokenizer of the student.
        teacher: The tokenizer of the teacher.

    Returns:
        The difference, for people; None if there is none.
    """
    student_tokens = {token_id: token for token, token_id in student.get_vocab().items()}
    teacher_tokens = {token_id: token for token, token_id in teacher.get_vocab().items()}
    # By id: in one vocabulary an id may be missing.
    for token_id in sorted(student_tokens.keys() | teacher_tokens.keys()):
        if student_tokens.get(token_id) != teacher_tokens.get(token_id):
            of_student = _token_name(student_tokens, token_id)
            of_teacher = _token_name(teacher_tokens, token_id)
            return f"token {token_id} is {of_student} for the student, {of_teacher} for the teacher"
    # The same tokens in another order of merges split text differently.
    for merge_rank, (of_student, of_teacher) in enumerate(zip_longest(_merges(student), _merges(teacher))):
        if of_student != of_teacher:
            return (
                "the tokens are the same, but text is split differently: "
                f"merge {merge_rank} is {of_student} and {of_teacher}"
            )
    return None


def tokenizer_rules(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Collect all that decides how a tokenizer turns text into ids.

    Args:
        tokenizer: Any tokenizer.

    Returns:
        The rules as JSON; of a tokenizer without a Rust backend, its class, vocabulary and arguments.
    """
    if not tokenizer.is_fast:
        class_name = type(tokenizer).__qualname__
        return {"class": class_name, "vocabulary": tokenizer.get_vocab(), "arguments": repr(tokenizer.init_kwargs)}
    backend_rules = json.loads(tokenizer.backend_tokenizer.to_str())
    # Padding and truncation are those of the last call.
    return {name: value for name, value in backend_rules.items() if name not in ("padding", "truncation")}


def _token_name(vocabulary: dict[int, str], index: int) -> str:
    return repr(vocabulary[index]) if index in vocabulary else "missing"


def _merges(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """The merges of a BPE tokenizer, in order; none for any other."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return []
    # Models of other kinds, such as Unigram, have no merges.
    return json.loads(backend.to_str())["model"].get("merges") or []
