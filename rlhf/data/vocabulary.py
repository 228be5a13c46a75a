"""Do two tokenizers mean the same by the same ids?"""

import json
from itertools import zip_longest
from typing import Any

from transformers import PreTrainedTokenizerBase


def tokenizer_difference(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> str | None:
    """The first difference, for people: a token, then a rule by which text is split; None where there is none.

    What stands around the tokens (chat template, padding, which token ends a text) does not matter.
    """
    ours, theirs = ({index: token for token, index in t.get_vocab().items()} for t in (student, teacher))
    for index in sorted(ours.keys() | theirs.keys()):
        if ours.get(index) != theirs.get(index):
            return f"token {index} is {_named(ours, index)} for the student, {_named(theirs, index)} for the teacher"
    for rank, (one, other) in enumerate(zip_longest(_merges(student), _merges(teacher))):
        if one != other:
            return f"the tokens are the same, but text is split differently: merge {rank} is {one} and {other}"
    return None


def tokenizer_rules(tokenizer: Any) -> dict[str, Any]:
    """All by which text becomes ids, as JSON; of a tokenizer without Rust, its class, vocabulary and arguments."""
    if not tokenizer.is_fast:
        kind, vocabulary = type(tokenizer).__qualname__, tokenizer.get_vocab()
        return {"class": kind, "vocabulary": vocabulary, "arguments": repr(tokenizer.init_kwargs)}
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    return {name: value for name, value in rules.items() if name not in ("padding", "truncation")}  # of the last call


def _named(vocabulary: dict[int, str], index: int) -> str:
    return repr(vocabulary[index]) if index in vocabulary else "missing"


def _merges(tokenizer: Any) -> list[Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return [] if backend is None else json.loads(backend.to_str())["model"].get("merges") or []
