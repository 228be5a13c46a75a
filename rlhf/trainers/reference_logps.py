"""Log-probabilities of a frozen reference: computed once, kept in a file, read by every later epoch and run."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
import xxhash
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from filelock import FileLock
from torch import Tensor

from rlhf.data.array_files import UNFINISHED, create_array
from rlhf.data.packing import hash_of_tokens, num_tokens
from rlhf.visible import visible

logger = logging.getLogger(__name__)

FORMAT = 1  # raise it when what is stored, or how it is computed, changes


_is_left_out = ContextVar("_is_left_out", default=False)


@contextmanager
def without_reference_pass() -> Iterator[None]:
    """A context in which rows get zeros in place of the reference's log-probs: nothing is computed or stored."""
    token = _is_left_out.set(True)
    try:
        yield
    finally:
        _is_left_out.reset(token)


def add_ref_logps(
    rows: Dataset,
    tokens: Sequence[str],
    columns: Sequence[str],
    fingerprint: str,
    score: Callable[[list[dict[str, Any]]], Tensor],
    accelerator: Accelerator,
    batch_size: int,
    name: str,
    quiet: bool = False,
) -> Dataset:
    """Give each row the reference's log-probs of its completions.

    They are read from a file in the Hugging Face cache whose name is a hash of all that determines them: the
    reference and the tokens. What the file does not hold yet is computed, the ranks sharing the work, and written
    batch by batch, so that an interrupted pass continues where it stopped.

    Args:
        rows: tokenised rows of a prompt and its completions.
        tokens: the columns that determine the log-probs.
        columns: the new columns, one for the sum of each completion of a row.
        fingerprint: a hash of the reference.
        score: from rows to their sums, [completions * rows], those of a row together, in the order of ``columns``.
        accelerator: of the run.
        batch_size: rows that each rank scores at a time.
        name: of the data set, for messages and the progress bar.
        quiet: whether to leave out the progress bar.
    Returns:
        The rows with the new columns: sums over the tokens of a completion, in nats.
    Raises:
        ValueError: the reference gives NaN for a row.
        OSError: the file cannot be written.
    """
    if _is_left_out.get():
        for column in columns:
            rows = rows.add_column(column, np.zeros(len(rows)))
        return rows
    shape = len(rows), len(columns)
    sums, file = np.empty(0), None
    # One process reads and writes the file; the others get its content, also where they share no disk.
    if accelerator.is_main_process:
        folder = Path(datasets.config.HF_CACHE_HOME) / "rlhf" / "ref_logps"
        file = _open(folder / f"{fingerprint}-{hash_of_tokens(rows, tokens)}.npy", shape)
        sums = np.array(file)
    sums = broadcast_object_list([sums])[0]
    missing = np.flatnonzero(~_is_stored(sums).all(1))
    if len(missing):
        num_stored = len(rows) - len(missing)
        logger.info("%s: reference log-probs of %d rows are stored, %d to come", name, num_stored, len(missing))
    else:
        logger.info("%s: the reference's log-probs are stored already", name)
    # Longest first: neighbours need little padding, and memory runs out at once or never.
    missing = missing[np.argsort(-num_tokens(rows)[missing], kind="stable")]
    chunk_size = batch_size * accelerator.num_processes
    hidden = quiet or not accelerator.is_main_process
    description = visible(f"reference on {name}")
    with datasets.utils.tqdm(total=len(missing), desc=description, unit="row", disable=hidden) as progress:
        for start in range(0, len(missing), chunk_size):
            chunk = missing[start : start + chunk_size]
            shard = [rows[int(index)] for index in _shard(chunk, accelerator)]
            gathered = accelerator.gather(score(shard).view(-1, len(columns)))
            # A sum over hundreds of tokens needs more digits than half precision has.
            chunk_sums = gathered[: len(chunk)].float().cpu().numpy()
            is_nan = np.isnan(chunk_sums).any(1)
            if is_nan.any():
                row = chunk[is_nan][0]
                raise ValueError(f"{name}, row {row}: the reference's log-probs are NaN; check its weights and --dtype")
            sums[chunk] = chunk_sums
            if file is not None:
                file[chunk] = chunk_sums
            progress.update(len(chunk))
    for index, column in enumerate(columns):
        rows = rows.add_column(column, sums[:, index])
    return rows


def _shard(indices: np.ndarray, accelerator: Accelerator) -> np.ndarray:
    """This rank's part of a chunk. Every rank gets as many rows: the last ones are filled up by repeating."""
    rows_per_rank = -(-len(indices) // accelerator.num_processes)
    padded_indices = np.resize(indices, rows_per_rank * accelerator.num_processes)
    return padded_indices.reshape(accelerator.num_processes, rows_per_rank)[accelerator.process_index]


def _is_stored(sums: np.ndarray) -> np.ndarray:
    """Whether each sum is one. NaN is not computed yet; 0 and more, or an infinity, is no log-prob but damage."""
    return np.isfinite(sums) & (sums < 0)


def _open(path: Path, shape: tuple[int, int]) -> np.memmap:
    """The file of sums, float32 [rows, completions]; NaN where a row is not computed yet."""
    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True)
    # Held only while a file is opened. Runs that compute the same sums at once then write the same numbers.
    with FileLock(folder.with_suffix(".lock")):
        # Whoever began these held the lock, so they are of runs that were killed.
        for unfinished in folder.glob(f"*{UNFINISHED}"):
            unfinished.unlink()
        file = _existing(path, shape)
        if file is not None:
            return file
        # NaN marks what is missing, so that an interrupted pass is seen from the file alone.
        create_array(path, shape, np.float32, fill=np.nan)
        return np.lib.format.open_memmap(path, mode="r+")


def _existing(path: Path, shape: tuple[int, int]) -> np.memmap | None:
    """A file that was written before; None if there is none, or a damaged one."""
    try:
        file = np.lib.format.open_memmap(path, mode="r+")
    except FileNotFoundError:
        return None
    except ValueError as error:
        logger.warning("%s: cannot be read (%s); computing it again", path, error)
        return None
    if file.shape != shape or file.dtype != np.float32:
        logger.warning("%s: not what it should hold; computing it again", path)
        return None
    is_damaged = ~(np.isnan(file) | _is_stored(file)).all(1)
    if is_damaged.any():
        logger.warning("%s: %d rows hold what is no log-prob; computing them again", path, is_damaged.sum())
    return file


def reference_fingerprint(model: Any, precision: str, adapter_off: bool = False) -> str:
    """Hash a reference: its weights, its configuration, the precision of the arithmetic, and versions.

    Args:
        model: a transformers model, or a PEFT model around one.
        precision: mixed precision of accelerate: ``no``, ``bf16``, …
        adapter_off: hash the model as it is without its adapter.
    Returns:
        32 hexadecimal digits; with ``adapter_off`` those of the plain model.
    """
    settings = model.config.to_dict().items()
    # Private entries and use_cache do not change a log-prob.
    config = {key: value for key, value in settings if not key.startswith("_") and key != "use_cache"}
    # Hashing reads all weights once, at some GB/s: much less than one pass over the rows.
    digest = xxhash.xxh3_128()
    hashed_settings = [FORMAT, transformers.__version__, precision, config]
    # A configuration may hold dtypes, which are no JSON.
    digest.update(json.dumps(hashed_settings, sort_keys=True, default=str).encode())
    for name, weight in sorted(_weights(model, adapter_off)):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        # As bytes, because numpy has no bfloat16.
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _weights(model: Any, adapter_off: bool) -> Iterator[tuple[str, Tensor]]:
    """Weights by name; with the adapter off, those that remain, under the names of the plain model."""
    if not (adapter_off and hasattr(model, "peft_config")):
        yield from model.named_parameters()
        return
    # Plain names, so that runs with and without an adapter share one file.
    of_adapter = (model.base_model.prefix, "modules_to_save.")
    for name, weight in model.named_parameters():
        if any(part in name for part in of_adapter):
            continue
        for part in ("base_model.model.", "base_layer.", "original_module."):
            name = name.replace(part, "", 1)
        yield name, weight
