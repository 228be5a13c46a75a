"""What a teacher said of a data set, kept on disk: memory-mapped, written row by row, and sure of what it belongs to.

A folder with ``teacher.json``, the key of everything that determines the rest, and flat arrays over all scored tokens,
row after row: ``ids.npy`` [N, k] and ``logps.npy`` [N, k + 1] (the last column is the log of the mass of all other
tokens). ``offsets.npy`` [rows + 1] says where each row's tokens begin, ``done.npy`` [rows] which rows are there.
With k = 32 and a vocabulary of at most 65,536 a token takes 130 bytes.

Log-probs are float16. Rounding moves a log-prob by at most 1/2048 of itself, and likely tokens have small ones; read
back, the k + 1 outcomes are normalised again. `docs/teacher-cache.md` says what that costs.
"""

import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from datasets import Dataset
from numpy.lib.format import open_memmap
from transformers import PreTrainedTokenizerBase

from rlhf.data.batch import IGNORE, Row
from rlhf.data.collate import Collator
from rlhf.data.packing import hash_of_tokens
from rlhf.data.vocabulary import tokenizer_rules
from rlhf.logprobs import TopK

logger = logging.getLogger(__name__)

FORMAT = 1  # raise it when what is stored, or how it is computed, changes
HEADER = "teacher.json"
TEACHER_ROW = "teacher_row"  # column: the number of a row in the folder

Key = dict[str, Any]

_OTHER = {  # parts of a key that are hashes, which say nothing to a reader
    "teacher": "the teacher is another (its weights, configuration, precision, or the version of transformers)",
    "tokenizer": "the tokenizer is another",
    "template": "the chat template is another",
    "data": "the rows are others, or were tokenised otherwise (max_length, columns)",
}


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> Key:
    """Hashes of the vocabulary with its rules, and of the chat template."""
    parts = {
        "tokenizer": [tokenizer_rules(tokenizer), tokenizer.special_tokens_map],
        "template": tokenizer.chat_template,
    }
    return {name: _hash(part) for name, part in parts.items()}


def data_key(rows: Dataset) -> Key:
    """A hash of tokenised rows (``input_ids`` and ``labels``), and how many there are."""
    columns = ("input_ids", "labels")
    return {"data": hash_of_tokens(rows, columns), "rows": len(rows), "tokens": int(scored_tokens(rows).sum())}


def scored_tokens(rows: Dataset) -> np.ndarray:
    """Of each tokenised row, how many of its tokens are scored: int64 [rows]. The first has nothing before it."""
    labels = rows.with_format("arrow")[:]["labels"].combine_chunks()
    scored = labels.flatten().to_numpy() != IGNORE
    ends = np.cumsum(labels.value_lengths().to_numpy().astype(np.int64))
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    scored[starts[starts < ends]] = False
    total = np.concatenate([[0], np.cumsum(scored)])
    return total[ends] - total[starts]


class TeacherFile:
    """The folder, opened.

    Args:
        folder: written by `rlhf teacher` or :func:`create_teacher_file`. writable: open it to add rows.
    Raises:
        FileNotFoundError: there is none.
        ValueError: it is of another format, or one of its arrays is cut short.
    """

    def __init__(self, folder: str | Path, writable: bool = False) -> None:
        self.folder = Path(folder)
        self.key = read_key(self.folder)
        if self.key["k"] == 0:
            raise ValueError(f"{folder}: holds completions, not log-probs (--k 0): train on them with `rlhf sft`")
        k, rows, tokens = (self.key[name] for name in ("k", "rows", "tokens"))
        mode: Literal["r", "r+"] = "r+" if writable else "r"
        narrow = _narrow(self.key["vocabulary"])
        self.offsets = self._open("offsets", (rows + 1,), np.dtype(np.int64), mode)
        self.done = self._open("done", (rows,), np.dtype(np.uint8), mode)
        self.ids = self._open("ids", (tokens, k), narrow, mode)
        self.logps = self._open("logps", (tokens, k + 1), np.dtype(self.key["dtype"]), mode)
        if self.key.get("samples"):
            logger.warning("%s: samples.npy is no longer read: delete it", folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return TeacherFile, (self.folder,)  # for a worker that is spawned: not the arrays, but where they are

    def _open(self, name: str, shape: tuple[int, ...], dtype: np.dtype, mode: Literal["r", "r+"]) -> np.ndarray:
        path = self.folder / f"{name}.npy"
        try:
            array = open_memmap(path, mode="r")  # first: opened to be written, a short file is filled up with zeros
        except FileNotFoundError:
            raise ValueError(f"{path}: missing; write the folder again (rlhf teacher --overwrite)") from None
        except (ValueError, EOFError) as error:
            size, want = path.stat().st_size, int(np.prod(shape)) * dtype.itemsize
            raise ValueError(
                f"{path}: cut short, {size} bytes of more than {want}: copy it again, or write the folder again "
                "(rlhf teacher --overwrite)"
            ) from error
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(
                f"{path}: holds {array.dtype} {array.shape}, {HEADER} says {dtype} {shape}: it is of another folder"
            )
        return array if mode == "r" else open_memmap(path, mode=mode)

    def missing(self) -> np.ndarray:
        """Rows that are not written yet."""
        return np.flatnonzero(self.done == 0)

    def write(self, rows: Sequence[int], kept: TopK) -> None:
        """Store what was kept of ``rows``, their tokens one after another.

        Raises:
            ValueError: a log-prob is NaN.
        """
        if bool(kept.logps.isnan().any()):
            raise ValueError(f"row {rows[0]} and those beside it: the teacher's log-probs are NaN; check its weights")
        places = self._places(rows)
        self.ids[places] = kept.ids.cpu().numpy()
        self.logps[places] = torch.cat([kept.logps, kept.rest[:, None]], 1).cpu().numpy()
        for array in (self.ids, self.logps):
            if isinstance(array, np.memmap):
                array.flush()
        self.done[list(rows)] = 1  # after what it speaks of
        self.done.flush()  # type: ignore[attr-defined]

    def take(self, rows: Iterable[int]) -> TopK:
        """What was kept of ``rows``, in the order of the targets of a batch of them: [N, k], [N, k], [N].

        Float32; the k + 1 outcomes are normalised.
        """
        places = self._places(rows)
        logps = torch.from_numpy(self.logps[places].astype(np.float32)).log_softmax(-1)
        ids = torch.from_numpy(self.ids[places].astype(np.int64))
        return TopK(ids, logps[:, :-1].contiguous(), logps[:, -1].contiguous())

    def of_examples(self, examples: list[Row], collate: Collator) -> TopK | None:
        """The entry ``"teacher"`` of a batch's extras; None where the examples are none of the folder's rows."""
        if TEACHER_ROW not in examples[0]:
            return None
        return self.take([example[TEACHER_ROW] for example in examples])

    def _places(self, rows: Iterable[int]) -> np.ndarray:
        return np.concatenate([np.arange(self.offsets[row], self.offsets[row + 1]) for row in rows])


def read_key(folder: Path) -> Key:
    """Of a folder that a teacher was kept in.

    Raises:
        FileNotFoundError: no such folder, or none of ours. ValueError: of another format.
    """
    path = folder / HEADER
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: holds no {HEADER}; write it with `rlhf teacher`")
    try:
        key = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path}: not valid JSON ({error}); write the folder again (rlhf teacher --overwrite)"
        ) from error
    if key.get("format") != FORMAT:
        raise ValueError(f"{path}: format {key.get('format')}, this version reads {FORMAT}: write the folder again")
    return key


def check_key(folder: Path, found: Key, wanted: Key, remedy: str) -> None:
    """Raise a ValueError that names each part of ``wanted`` in which the key ``found`` in ``folder`` differs."""
    differences = [_difference(name, found.get(name), value) for name, value in wanted.items()]
    if told := [difference for difference in differences if difference]:
        raise ValueError(f"{folder}: kept for something else: {'; '.join(told)}; {remedy}")


def write_key(folder: Path, key: Key) -> None:
    """At once or not at all: an interruption leaves the one before."""
    path, draft = folder / HEADER, folder / f"{HEADER}.new"
    draft.write_text(json.dumps({"format": FORMAT, **key}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(draft, path)


def create_teacher_file(folder: str | Path, rows: Dataset, key: Key) -> TeacherFile:
    """An empty folder for tokenised rows; ``key`` names teacher, tokenizer, template, k, vocabulary, …"""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    key = {**key, **data_key(rows), "dtype": "float16"}
    offsets = np.concatenate([[0], np.cumsum(scored_tokens(rows))]).astype(np.int64)
    narrow, tokens = _narrow(key["vocabulary"]), key["tokens"]
    open_memmap(folder / "offsets.npy", mode="w+", dtype=np.int64, shape=offsets.shape)[:] = offsets
    open_memmap(folder / "done.npy", mode="w+", dtype=np.uint8, shape=(len(rows),))
    open_memmap(folder / "ids.npy", mode="w+", dtype=narrow, shape=(tokens, key["k"]))
    open_memmap(folder / "logps.npy", mode="w+", dtype=np.float16, shape=(tokens, key["k"] + 1))
    write_key(folder, key)  # last: what has a header is whole
    return TeacherFile(folder, writable=True)


def open_teacher_file(
    folder: str | Path, rows: Dataset, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, TeacherFile]:  # fmt: skip
    """Open the folder to train on ``rows``, tokenised as they were for the teacher.

    Returns:
        The rows with a column that says which of the folder's rows each is, and the folder. With
        ``Collator(..., extras={"teacher": file.of_examples})`` batches of these rows, in any order and selection, hold
        ``batch.extras["teacher"]``.
    Raises:
        FileNotFoundError: no such folder.
        ValueError: it was kept for another tokenizer, template or data set (which part is said), is not finished, or
            cut short.
    """
    file = TeacherFile(folder)
    check_key(file.folder, file.key, {**tokenizer_key(tokenizer), **data_key(rows)}, "run `rlhf teacher` on these rows")
    if left := len(file.missing()):
        raise ValueError(
            f"{folder}: not finished, {left} of {len(rows)} rows are missing: run the same `rlhf teacher` again, "
            "it goes on where it stopped"
        )
    return rows.add_column(TEACHER_ROW, np.arange(len(rows))), file


def _narrow(vocabulary: int) -> np.dtype:
    return np.dtype(np.uint16 if vocabulary <= 2**16 else np.uint32)


def _hash(value: Any) -> str:
    return xxhash.xxh3_128(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _difference(name: str, found: Any, wanted: Any) -> str:
    if found == wanted:
        return ""
    return _OTHER.get(name, f"{name} is {found}, not {wanted}")
