"""A teacher's most likely tokens for a data set, stored in a memory-mapped folder that records how it was made.

The folder holds ``teacher.json``, the key of everything that determines the rest, and flat arrays over all scored
tokens, row after row:

    ids.npy      [N, k]      the most likely tokens, the most likely first
    logps.npy    [N, k + 1]  their log-probs; the last column is the log of the mass of all other tokens
    offsets.npy  [rows + 1]  where the tokens of each row begin
    done.npy     [rows]      1 for a row that is written

With k = 32 and a vocabulary of at most 65,536 a token takes 130 bytes. Log-probs are float16: rounding moves one by at
most 1/2048 of itself, and likely tokens have small ones. When they are read, the k + 1 outcomes are normalised again.
`docs/teacher-cache.md` has what that costs.
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

from rlhf.data.array_files import create_array
from rlhf.data.batch import IGNORE, Row
from rlhf.data.collate import Collator
from rlhf.data.packing import hash_of_tokens
from rlhf.data.vocabulary import tokenizer_rules
from rlhf.logprobs import TopK
from rlhf.rollouts.server_calls import LARGEST_LOGP
from rlhf.trainers.checkpoint_files import writing

logger = logging.getLogger(__name__)

FORMAT = 1  # raise it when what is stored, or how it is computed, changes
HEADER = "teacher.json"
ARRAYS = ("ids", "logps", "offsets", "done")
NEW_HEADER = f"{HEADER}.new"  # until it is renamed
UNFINISHED = "unfinished"  # in the header of a folder that does not have all of its arrays yet
TEACHER_ROW = "teacher_row"  # column: the number of a row in the folder

Key = dict[str, Any]
Mode = Literal["r", "r+"]

# Parts of a key that are hashes, which mean nothing to a reader.
_DIFFERENT_PART = {
    "teacher": "the teacher is another (its weights, configuration, precision, or the version of transformers)",
    "tokenizer": "the tokenizer is another",
    "template": "the chat template is another",
    "data": "the rows are others, or were tokenised otherwise (max_length, columns)",
}


class TeacherFile:
    """An opened folder.

    Args:
        folder: written by `rlhf teacher` or :func:`create_teacher_file`.
        writable: open it to add rows.
    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has another format, or one of its arrays is cut short or missing.
    """

    def __init__(self, folder: str | Path, writable: bool = False) -> None:
        self.folder = Path(folder)
        self.key = read_key(self.folder)
        if self.key.get("k") == 0:
            raise ValueError(f"{folder}: holds completions, not log-probs (--k 0): train on them with `rlhf sft`")
        if self.key.get(UNFINISHED):
            raise ValueError(f"{folder}: its arrays are not all there yet: run the same `rlhf teacher` again")
        # Earlier versions also kept tokens sampled from the teacher.
        if self.key.get("samples"):
            logger.warning("%s: samples.npy is no longer read: delete it", folder)
        mode: Mode = "r+" if writable else "r"
        arrays = {
            name: _open_array(self.folder / f"{name}.npy", shape, dtype, mode)
            for name, (shape, dtype) in _layout_of(self.key).items()
        }
        self.ids, self.logps = arrays["ids"], arrays["logps"]
        self.offsets, self.done = arrays["offsets"], arrays["done"]
        _check_offsets(self.folder, self.offsets, self.key["tokens"])

    def __reduce__(self) -> tuple[Any, ...]:
        # A data loader's worker that is spawned opens the folder again, rather than being sent all the arrays.
        return TeacherFile, (self.folder,)

    def missing(self) -> np.ndarray:
        """Find the rows that are not written yet.

        Returns:
            Their numbers, int64.
        """
        return np.flatnonzero(self.done == 0)

    def write(self, rows: Sequence[int], top_k: TopK) -> None:
        """Store the teacher's predictions for rows.

        Args:
            rows: numbers of the rows.
            top_k: of the scored tokens of these rows, one row after another.
        Raises:
            ValueError: a number that cannot be a log-prob.
        """
        tokens = self._tokens_of(rows)
        self._check_logps(top_k.logps.float().cpu().numpy(), tokens, "check the teacher's weights")
        self.ids[tokens] = top_k.ids.cpu().numpy()
        self.logps[tokens] = torch.cat([top_k.logps, top_k.rest[:, None]], 1).cpu().numpy()
        _flush(self.ids, self.logps)
        # Marked only once the predictions are on disk, so that an interruption loses work but never lies.
        self.done[list(rows)] = 1
        _flush(self.done)

    def take(self, rows: Iterable[int]) -> TopK:
        """Read the predictions for rows.

        Args:
            rows: numbers of the rows.
        Returns:
            Float32, of the scored tokens of these rows one row after another, which is the order of a batch's targets.
            The k + 1 outcomes are normalised.
        Raises:
            ValueError: the folder holds numbers that cannot be log-probs.
        """
        tokens = self._tokens_of(rows)
        stored = self.logps[tokens].astype(np.float32)
        # The mass of all other tokens may be 0, and its log -inf.
        self._check_logps(stored[:, :-1], tokens, "write the folder again (rlhf teacher --overwrite)")
        # Float16 rounds each outcome, so together they are only nearly 1: normalised again, no loss is below 0.
        outcomes = torch.from_numpy(stored).log_softmax(-1)
        ids = torch.from_numpy(self.ids[tokens].astype(np.int64))
        vocabulary = self.key["vocabulary"]
        if ids.numel() and int(ids.max()) >= vocabulary:
            raise ValueError(
                f"{self.folder}: token {int(ids.max())} is outside the teacher's vocabulary of {vocabulary}: damaged; "
                "write the folder again (rlhf teacher --overwrite)"
            )
        return TopK(ids, outcomes[:, :-1].contiguous(), outcomes[:, -1].contiguous())

    def of_examples(self, examples: list[Row], collate: Collator) -> TopK | None:
        """Make an entry of a batch's extras.

        Args:
            examples: of the batch.
            collate: of the batch; not needed.
        Returns:
            The predictions for the examples; None where they are not rows of the folder.
        """
        if TEACHER_ROW not in examples[0]:
            return None
        return self.take([example[TEACHER_ROW] for example in examples])

    def _check_logps(self, logps: np.ndarray, tokens: np.ndarray, remedy: str) -> None:
        """Raise for the first number that cannot be a log-prob, before it spreads into a loss."""
        # NaN is not less than anything.
        is_wrong = ~((logps > -np.inf) & (logps <= LARGEST_LOGP))
        if not is_wrong.any():
            return
        place, candidate = np.argwhere(is_wrong)[0]
        token = tokens[place]
        row = int(np.searchsorted(self.offsets, token, side="right")) - 1
        raise ValueError(
            f"{self.folder}: row {row}, scored token {token - self.offsets[row]}: a log-prob is "
            f"{logps[place, candidate]}, expected at most 0; {remedy}"
        )

    def _tokens_of(self, rows: Iterable[int]) -> np.ndarray:
        """Positions of the rows' tokens in the flat arrays."""
        return np.concatenate([np.arange(self.offsets[row], self.offsets[row + 1]) for row in rows])


def create_teacher_file(folder: str | Path, rows: Dataset, key: Key) -> TeacherFile:
    """Create an empty folder for tokenised rows.

    Args:
        folder: to create.
        rows: tokenised, with ``input_ids`` and ``labels``.
        key: what determines the predictions besides the rows: ``teacher``, ``tokenizer``, ``template``, ``k``,
            ``temperature``, ``vocabulary``.
    Returns:
        The folder, opened to be written.
    Raises:
        OSError: it cannot be written, as on a full disk.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    key = {**key, **data_key(rows), "dtype": "float16"}
    # The header comes first too, so that a folder whose making was interrupted is known as a teacher's.
    write_key(folder, {**key, UNFINISHED: True})
    # Zeros: no row is done.
    for name, (shape, dtype) in _layout_of(key).items():
        create_array(folder / f"{name}.npy", shape, dtype)
    offsets = open_memmap(folder / "offsets.npy", mode="r+")
    offsets[1:] = np.cumsum(scored_tokens(rows))
    _flush(offsets)
    write_key(folder, key)
    return TeacherFile(folder, writable=True)


def open_teacher_file(
    folder: str | Path, rows: Dataset, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, TeacherFile]:
    """Open a folder to train on rows.

    Args:
        folder: written by `rlhf teacher` or :func:`create_teacher_file`.
        rows: tokenised as they were for the teacher.
        tokenizer: the student's.
    Returns:
        The rows with a column for their number in the folder, and the folder. A
        ``Collator(..., extras={"teacher": file.of_examples})`` then gives batches of these rows, in any order and
        selection, the entry ``batch.extras["teacher"]``.
    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it was made for another tokenizer, template or data set (the message names it), is not finished, or
            is cut short.
    """
    file = TeacherFile(folder)
    expected = {**tokenizer_key(tokenizer), **data_key(rows)}
    check_key(file.folder, file.key, expected, "run `rlhf teacher` on these rows")
    # A row without predictions would be trained on zeros.
    num_missing = len(file.missing())
    if num_missing:
        raise ValueError(
            f"{folder}: not finished, {num_missing} of {len(rows)} rows are missing: run the same `rlhf teacher` "
            "again, it goes on where it stopped"
        )
    return rows.add_column(TEACHER_ROW, np.arange(len(rows))), file


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> Key:
    """The part of a key that a tokenizer determines.

    Args:
        tokenizer: of teacher and student.
    Returns:
        Hashes of the vocabulary with its rules, and of the chat template.
    """
    # Rules and special tokens, not the settings of the tokenizer's last call.
    vocabulary = [tokenizer_rules(tokenizer), tokenizer.special_tokens_map]
    return {"tokenizer": _hash(vocabulary), "template": _hash(tokenizer.chat_template)}


def data_key(rows: Dataset) -> Key:
    """The part of a key that tokenised rows determine.

    Args:
        rows: with ``input_ids`` and ``labels``.
    Returns:
        A hash of the tokens, and the numbers of rows and of scored tokens.
    """
    token_hash = hash_of_tokens(rows, ("input_ids", "labels"))
    return {"data": token_hash, "rows": len(rows), "tokens": int(scored_tokens(rows).sum())}


def scored_tokens(rows: Dataset) -> np.ndarray:
    """Count the scored tokens of each row, reading whole columns.

    Args:
        rows: tokenised, with ``labels``.
    Returns:
        int64 [rows].
    """
    # One flat array of all labels; a loop over rows would take minutes for a large data set.
    labels = rows.with_format("arrow")[:]["labels"].combine_chunks()
    is_scored = labels.flatten().to_numpy() != IGNORE
    ends = np.cumsum(labels.value_lengths().to_numpy().astype(np.int64))
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    # Nothing predicts the first token of a row.
    is_scored[starts[starts < ends]] = False
    scored_before = np.concatenate([[0], np.cumsum(is_scored)])
    return scored_before[ends] - scored_before[starts]


def read_key(folder: Path) -> Key:
    """Read the key of a folder.

    Args:
        folder: of a teacher.
    Returns:
        The key.
    Raises:
        FileNotFoundError: there is no such folder, or it is not a teacher's.
        ValueError: it has another format.
    """
    path = folder / HEADER
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: holds no {HEADER}; write it with `rlhf teacher`")
    try:
        key = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # brackets may be too deep
        raise ValueError(
            f"{path}: not valid JSON ({error}); write the folder again (rlhf teacher --overwrite)"
        ) from error
    # Before anything else of the key is trusted: another format may mean other things by the same names.
    if not isinstance(key, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(key).__name__}; write the folder again")
    if key.get("format") != FORMAT:
        raise ValueError(f"{path}: format {key.get('format')}, this version reads {FORMAT}: write the folder again")
    return key


def check_key(folder: Path, key: Key, expected: Key, remedy: str) -> None:
    """Compare a folder's key with what it should be.

    Args:
        folder: named in the message.
        key: of the folder.
        expected: parts that must agree; others are not compared.
        remedy: what to do, for the message.
    Raises:
        ValueError: names each part that differs.
    """
    differences = []
    for name, value in expected.items():
        if key.get(name) != value:
            differences.append(_DIFFERENT_PART.get(name, f"{name} is {key.get(name)}, not {value}"))
    if differences:
        raise ValueError(f"{folder}: kept for something else: {'; '.join(differences)}; {remedy}")


def write_key(folder: Path, key: Key) -> None:
    """Write the key of a folder, replacing one that is there.

    Args:
        folder: which exists.
        key: to write.
    """
    path = folder / HEADER
    new_header = folder / NEW_HEADER
    text = json.dumps({"format": FORMAT, **key}, indent=2, ensure_ascii=False)
    with writing(folder), new_header.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        # Before the rename: else a power failure could leave an empty header.
        os.fsync(file.fileno())
    # Replaced in one step: an interruption leaves the key from before.
    os.replace(new_header, path)


def _layout_of(key: Key) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of each array."""
    for name in ("rows", "tokens", "k", "vocabulary"):
        value = key.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            found = repr(value)[:100]  # a damaged file may hold a text of any length
            raise ValueError(f"{HEADER}: {name} is {found}, expected a number of them; write the folder again")
    if key.get("dtype") not in ("float16", "float32"):
        raise ValueError(
            f"{HEADER}: dtype is {key.get('dtype')!r}, expected float16 or float32; write the folder again"
        )
    rows, tokens, k = key["rows"], key["tokens"], key["k"]
    # Two bytes where they suffice: ids otherwise take twice the room of the log-probs.
    id_type = np.dtype(np.uint16 if key["vocabulary"] <= 2**16 else np.uint32)
    return {
        "ids": ((tokens, k), id_type),
        "logps": ((tokens, k + 1), np.dtype(key["dtype"])),
        "offsets": ((rows + 1,), np.dtype(np.int64)),
        "done": ((rows,), np.dtype(np.uint8)),
    }


def _check_offsets(folder: Path, offsets: np.ndarray, num_tokens: int) -> None:
    """Refuse damaged offsets, which would take tokens of other rows."""
    rises = bool((np.diff(offsets) >= 0).all())
    if offsets[0] != 0 or offsets[-1] != num_tokens or not rises:
        raise ValueError(f"{folder / 'offsets.npy'}: damaged; write the folder again (rlhf teacher --overwrite)")


def _open_array(path: Path, shape: tuple[int, ...], dtype: np.dtype, mode: Mode) -> np.ndarray:
    """Map an array into memory; raises for one that is missing, cut short or of another folder."""
    try:
        # Read-only first: an array that is cut short would be filled up with zeros if it were opened to be written.
        array = open_memmap(path, mode="r")
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; write the folder again (rlhf teacher --overwrite)") from None
    # numpy raises anything for a header that is damaged.
    except Exception as error:
        size, expected_size = path.stat().st_size, int(np.prod(shape)) * dtype.itemsize
        raise ValueError(
            f"{path}: cut short, {size} bytes of more than {expected_size}: copy it again, or write the folder again "
            "(rlhf teacher --overwrite)"
        ) from error
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(
            f"{path}: holds {array.dtype} {array.shape}, {HEADER} says {dtype} {shape}: it is of another folder"
        )
    return array if mode == "r" else open_memmap(path, mode=mode)


def _flush(*arrays: np.ndarray) -> None:
    """Write what was changed in memory-mapped arrays to disk."""
    for array in arrays:
        if isinstance(array, np.memmap):
            array.flush()


def _hash(value: Any) -> str:
    return xxhash.xxh3_128(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
