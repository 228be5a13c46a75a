"""Rows of text to rows of token ids: checked, truncated and counted, with a progress bar and a cache."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from rlhf.data import chat, formats
from rlhf.data.batching import IGNORE

logger = logging.getLogger(__name__)

Row = dict[str, Any]
_VERSION = 1  # part of the cache key: raise it when the meaning of a tokenised row changes


def tokenize_sft(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    vocab_size: int,
    text_field: str = "text",
    drop_long_prompts: bool = False,
    num_proc: int | None = None,
) -> Dataset:
    """Rows of ``input_ids`` and ``labels`` (−100 where nothing is learned) from any of the known columns.

    A row longer than ``max_length`` loses its end; a row left without a scored token is dropped; both are reported.

    Raises:
        ValueError: names the data set, the row and the remedy.
    """
    with prefixed(_name(dataset)):
        column = formats.completion_columns(dataset.column_names, text_field)
    if column == "chosen":
        logger.info("%s: preference rows; their chosen answers are scored", _name(dataset))
    encode = partial(_encode_sft, tokenizer=tokenizer, column=column)
    return _tokenize(
        dataset, tokenizer, encode, ("sft", column), max_length, vocab_size, drop_long_prompts, num_proc
    )  # fmt: skip


def tokenize_preferences(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    vocab_size: int,
    drop_long_prompts: bool = False,
    num_proc: int | None = None,
    margin: bool = False,
) -> Dataset:
    """Rows of ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``; truncation cuts the answers, never the prompt.

    Args:
        margin: keep the column ``margin``, where there is one.
    Raises:
        ValueError: names the data set, the row and the remedy.
    """
    with prefixed(_name(dataset)):
        formats.check_preference_columns(dataset.column_names)
    margin = margin and "margin" in dataset.column_names
    encode = partial(_encode_pair, tokenizer=tokenizer, ready="chosen_ids" in dataset.column_names, margin=margin)
    kind = ("pair", "margin") if margin else ("pair",)
    return _tokenize(dataset, tokenizer, encode, kind, max_length, vocab_size, drop_long_prompts, num_proc)


def tokenize_prompts(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int,
    vocab_size: int,
    drop_long_prompts: bool = False,
    num_proc: int | None = None,
) -> Dataset:
    """The rows as they are, which reward functions read, with ``prompt_ids`` added.

    Raises:
        ValueError: names the data set, the row and the remedy.
    """
    name = _name(dataset)
    if len(dataset) == 0:
        raise ValueError(f"{name}: no rows")
    template = (tokenizer.chat_template, tokenizer.special_tokens_map, tokenizer.backend_tokenizer.to_str())
    key = (_VERSION, dataset._fingerprint, "prompt", template, name, max_prompt_length, vocab_size, drop_long_prompts)
    mapped = dataset.map(
        partial(
            _encode_prompt,
            tokenizer=tokenizer, name=name, longest=max_prompt_length, vocab_size=vocab_size, drop=drop_long_prompts,
        ),
        with_indices=True,
        new_fingerprint=Hasher.hash(key),
        num_proc=num_proc,
        desc=f"Tokenising {name}",
    )  # fmt: skip
    kept = [index for index, ids in enumerate(mapped["prompt_ids"]) if len(ids) <= max_prompt_length]
    if len(kept) == len(mapped):
        return mapped
    logger.warning("%s: dropped %d of %d rows with too long a prompt", name, len(mapped) - len(kept), len(mapped))
    if not kept:
        raise ValueError(f"{name}: no row is left; raise --max_length, or lower --max_completion_length")
    return mapped.select(kept)


def _encode_prompt(
    row: Row, index: int, *, tokenizer: PreTrainedTokenizerBase, name: str, longest: int, vocab_size: int, drop: bool
) -> Row:
    try:
        ids = chat.encode_prompt(tokenizer, formats.prompt_alone(row))
        if not ids:
            raise ValueError("'prompt' is empty")
        _check_vocabulary({"prompt": ids}, vocab_size)
        if len(ids) > longest and not drop:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, max_length less max_completion_length leaves room for {longest}: "
                "raise --max_length, or pass --drop_long_prompts to leave such rows out"
            )
    except ValueError as error:
        raise ValueError(f"{name}, row {index + 1}: {error}") from error
    return {"prompt_ids": ids}


def _encode_sft(row: Row, tokenizer: PreTrainedTokenizerBase, column: str) -> Row:
    if column == "input_ids":
        ids = list(row["input_ids"])
        labels = list(row["labels"]) if row.get("labels") is not None else ids
        if len(labels) != len(ids):
            raise ValueError(f"'labels' has {len(labels)} entries, 'input_ids' {len(ids)}")
        return {"input_ids": ids, "labels": labels}
    if column in ("messages", "conversations"):
        ids, scored = chat.encode_conversation(tokenizer, formats.conversation(row, column))
        return {"input_ids": ids, "labels": [i if s else IGNORE for i, s in zip(ids, scored, strict=True)]}
    if column in ("completion", "chosen"):
        prompt, completion = formats.prompt_and_completion(row, column)
        prompt_ids, (completion_ids,) = chat.encode_completions(tokenizer, prompt, [completion])
        return {"input_ids": prompt_ids + completion_ids, "labels": [IGNORE] * len(prompt_ids) + completion_ids}
    text = row[column]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{column!r} is {'empty' if isinstance(text, str) else formats.kind(text)}, expected text")
    ids = chat.encode_text(tokenizer, text)
    return {"input_ids": ids, "labels": ids}


def _encode_pair(row: Row, tokenizer: PreTrainedTokenizerBase, ready: bool, margin: bool) -> Row:
    own = {"margin": formats.margin(row)} if margin else {}
    if ready:
        encoded = {key: list(row[key]) for key in ("prompt_ids", "chosen_ids", "rejected_ids")}
        for key in ("chosen_ids", "rejected_ids"):
            if not encoded[key]:
                raise ValueError(f"{key!r} is empty")
        return encoded | own
    prompt, chosen, rejected = formats.prompt_and_pair(row)
    prompt_ids, (chosen_ids, rejected_ids) = chat.encode_completions(tokenizer, prompt, [chosen, rejected])
    return {"prompt_ids": prompt_ids, "chosen_ids": chosen_ids, "rejected_ids": rejected_ids} | own


def _process(
    row: Row, index: int, *, encode: Callable[[Row], Row], name: str, max_length: int, vocab_size: int, drop: bool
) -> Row:
    with prefixed(f"{name}, row {index + 1}"):
        return cut(encode(row), max_length, vocab_size, drop)


def cut(encoded: Row, max_length: int, vocab_size: int, drop: bool) -> Row:
    """A row of ids, checked, without its end beyond ``max_length``; ``_cut`` says how many ids that took, ``_drop`` why
    the row is to be left out, if it is."""
    own = {"margin": encoded.pop("margin")} if "margin" in encoded else {}
    _check_vocabulary(encoded, vocab_size)
    prompt = _prompt_length(encoded)
    too_long = prompt >= max_length
    if too_long and not drop:
        raise ValueError(
            f"the prompt has {prompt} tokens and max_length is {max_length}: raise --max_length, or pass "
            "--drop_long_prompts to leave such rows out"
        )
    before = _size(encoded)
    # A prompt belongs to both answers: it is kept whole, and the answers share what is left of max_length.
    room = max_length - prompt if "prompt_ids" in encoded else max_length
    encoded = {key: ids if key == "prompt_ids" else ids[: max(room, 0)] for key, ids in encoded.items()}
    return encoded | own | {"_cut": before - _size(encoded), "_drop": _reason_to_drop(encoded, too_long)}


def _size(encoded: Row) -> int:
    return sum(len(ids) for key, ids in encoded.items() if key != "labels")


def _prompt_length(encoded: Row) -> int:
    if "prompt_ids" in encoded:
        return len(encoded["prompt_ids"])
    return next((i for i, label in enumerate(encoded["labels"]) if label != IGNORE), 0)


def _check_vocabulary(encoded: Row, vocab_size: int) -> None:
    for key, ids in encoded.items():
        wrong = next((i for i in ids if not 0 <= i < vocab_size and not (key == "labels" and i == IGNORE)), None)
        if wrong is not None:
            raise ValueError(
                f"token {wrong} in {key!r} is outside the model's vocabulary of {vocab_size}: "
                "is this the model's own tokenizer?"
            )


def _reason_to_drop(encoded: Row, too_long: bool) -> str:
    if too_long:
        return "with too long a prompt"
    if "labels" in encoded:
        return "" if any(label != IGNORE for label in encoded["labels"][1:]) else "without a scored token"
    if encoded["chosen_ids"] == encoded["rejected_ids"]:
        return "whose answers are the same once cut"
    return ""


def _tokenize(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    encode: Callable[[Row], Row],
    kind: tuple[str, ...],
    max_length: int,
    vocab_size: int,
    drop: bool,
    num_proc: int | None,
) -> Dataset:
    name = _name(dataset)
    key = (_VERSION, dataset._fingerprint, kind, identity(tokenizer), name, max_length, vocab_size, drop)
    process = partial(_process, encode=encode, name=name, max_length=max_length, vocab_size=vocab_size, drop=drop)
    return map_rows(dataset, process, key, max_length, num_proc)


def identity(tokenizer: PreTrainedTokenizerBase) -> Any:
    """All of a tokenizer that decides what a row becomes."""
    return tokenizer.chat_template, tokenizer.special_tokens_map, tokenizer.backend_tokenizer.to_str()


def map_rows(
    dataset: Dataset, process: Callable[[Row, int], Row], key: tuple[Any, ...], max_length: int, num_proc: int | None
) -> Dataset:
    """Rows by ``process``, which gives what :func:`cut` does; ``key`` is all that they depend on."""
    name = _name(dataset)
    if len(dataset) == 0:
        raise ValueError(f"{name}: no rows")
    mapped = dataset.map(
        process,
        with_indices=True,
        remove_columns=dataset.column_names,
        new_fingerprint=Hasher.hash(key),
        num_proc=num_proc,
        desc=f"Tokenising {name}",
    )
    reasons, cuts = mapped["_drop"][:], mapped["_cut"][:]
    kept = [index for index, reason in enumerate(reasons) if not reason]
    for reason in sorted(set(reasons) - {""}):
        logger.warning("%s: dropped %d of %d rows %s", name, reasons.count(reason), len(mapped), reason)
    if any(cuts):
        logger.warning(
            "%s: %d of %d rows cut to max_length %d, losing %d tokens in all",
            name, sum(cut > 0 for cut in cuts), len(cuts), max_length, sum(cuts),
        )  # fmt: skip
    if not kept:
        raise ValueError(f"{name}: no row is left to train on ({reasons[0]}); check the columns and max_length")
    mapped = mapped.remove_columns(["_cut", "_drop"])
    return mapped if len(kept) == len(mapped) else mapped.select(kept)


def _name(dataset: Dataset) -> str:
    return dataset.info.dataset_name or "dataset"


@contextmanager
def prefixed(where: str) -> Iterator[None]:
    """Begin a ValueError with where it was found."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
