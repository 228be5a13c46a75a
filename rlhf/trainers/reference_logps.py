"""Log-probabilities of a frozen reference: computed once, kept in a file, read by every later epoch and run."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
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
from torch import Tensor

from rlhf.data.packing import hash_of_tokens, num_tokens

logger = logging.getLogger(__name__)

FORMAT = 1  # raise it when what is stored, or how it is computed, changes


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
    """``rows`` with a further column for each completion: the reference's log-probs, in nats, summed over it.

    They are read from a file in the Hugging Face cache whose name is a hash of all that determines them: the
    reference and the tokens. What it does not hold yet is computed, the ranks sharing the work, and written batch by
    batch: an interrupted pass goes on where it stopped.

    Args:
        rows: tokenised rows of a prompt and its completions.
        tokens: the columns that determine what is scored. columns: one for the sum of each completion of a row.
        fingerprint: what stands for the reference.
        score: from rows to their sums, [completions * rows], those of a row together, in the order of ``columns``.
        batch_size: rows that each rank scores at a time. name: of the data set, for the progress bar.
    Raises:
        ValueError: the reference gives NaN for a row.
    """
    shape = len(rows), len(columns)
    values, file = np.empty(0), None
    if accelerator.is_main_process:
        folder = Path(datasets.config.HF_CACHE_HOME) / "rlhf" / "ref_logps"
        file = _open(folder / f"{fingerprint}-{hash_of_tokens(rows, tokens)}.npy", shape)
        values = np.array(file)
    values = broadcast_object_list([values])[0]
    todo = np.flatnonzero(np.isnan(values).any(1))
    if len(todo):
        logger.info("%s: reference log-probs of %d rows are stored, %d to come", name, len(rows) - len(todo), len(todo))
    else:
        logger.info("%s: the reference's log-probs are stored already", name)
    # Longest first: neighbours need little padding, and memory runs out at once or never.
    todo = todo[np.argsort(-num_tokens(rows)[todo], kind="stable")]
    step = batch_size * accelerator.num_processes
    hidden = quiet or not accelerator.is_main_process
    with datasets.utils.tqdm(total=len(todo), desc=f"reference on {name}", unit="row", disable=hidden) as bar:
        for start in range(0, len(todo), step):
            chunk = todo[start : start + step]
            # Every rank has as many rows: the last ones are filled up by repeating.
            own = np.resize(chunk, -(-len(chunk) // accelerator.num_processes) * accelerator.num_processes)
            own = own.reshape(accelerator.num_processes, -1)[accelerator.process_index]
            found = (
                accelerator.gather(score([rows[int(i)] for i in own]).view(-1, len(columns)))[: len(chunk)]
                .float()
                .cpu()
                .numpy()
            )
            if np.isnan(found).any():
                row = chunk[np.isnan(found).any(1)][0]
                raise ValueError(f"{name}, row {row}: the reference's log-probs are NaN; check its weights and --dtype")
            values[chunk] = found
            if file is not None:
                file[chunk] = found
            bar.update(len(chunk))
    for index, column in enumerate(columns):
        rows = rows.add_column(column, values[:, index])
    return rows


def _open(path: Path, shape: tuple[int, int]) -> np.memmap:
    """The file, float32 [rows, completions], NaN where a row is not computed yet."""
    try:
        file = np.lib.format.open_memmap(path, mode="r+")
        if file.shape == shape and file.dtype == np.float32:
            return file
        logger.warning("%s: not what it should hold; computing it again", path)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        logger.warning("%s: cannot be read (%s); computing it again", path, error)
    file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    file[:] = np.nan
    return file


def reference_fingerprint(model: Any, precision: str, adapter_off: bool = False) -> str:
    """A hash of weights, configuration, precision of the arithmetic, and versions.

    With ``adapter_off`` it is the one that the model has without its adapter.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key[0] != "_" and key != "use_cache"}
    digest = xxhash.xxh3_128()
    about = [FORMAT, transformers.__version__, precision, config]
    digest.update(json.dumps(about, sort_keys=True, default=str).encode())
    for name, weight in sorted(_weights(model, adapter_off)):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _weights(model: Any, adapter_off: bool) -> Iterator[tuple[str, Tensor]]:
    """By name; with the adapter off, those that stay, under the names that they have without one."""
    if not (adapter_off and hasattr(model, "peft_config")):
        yield from model.named_parameters()
        return
    added = (model.base_model.prefix, "modules_to_save.")
    for name, weight in model.named_parameters():
        if not any(part in name for part in added):
            for part in ("base_model.model.", "base_layer.", "original_module."):
                name = name.replace(part, "", 1)
            yield name, weight
