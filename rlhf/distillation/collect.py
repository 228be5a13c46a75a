"""A teacher, run once over a data set: what it says of each scored token, or its own answers to the prompts."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf.data import Collator, Reading
from rlhf.data.formats import prompt_dialogue
from rlhf.data.packing import num_tokens
from rlhf.distillation.teacher_file import TeacherFile, read_key, write_key
from rlhf.kernels import optimize
from rlhf.logprobs import model_top_k
from rlhf.models import choose_layout, disable_dropout
from rlhf.models.positions import inputs_of
from rlhf.rollouts import Completion, LocalEngine, Sampling

logger = logging.getLogger(__name__)

COMPLETIONS = "completions.jsonl"
PROMPTS = 16  # answered at a time


def keep_top_k(model: Any, rows: Dataset, file: TeacherFile, *, tokens_per_batch: int, layout: str = "auto") -> None:
    """Write into ``file`` what it does not hold yet: one forward pass over ``rows``.

    Batches are planned over all rows, whatever is there already: an interrupted pass that goes on gives the same bytes
    as one that was not.

    Args:
        model: the teacher, a causal LM; its dropout is switched off.
        rows: tokenised as for supervised fine-tuning; ``file`` was made for them.
        tokens_per_batch: as many rows as fit; a longer row goes alone. layout: as of a trainer.
    Raises:
        ValueError: the teacher gives NaN.
    """
    key = file.key
    device = next(model.parameters()).device
    model.eval()
    disable_dropout(model)
    optimize(model)
    collate = Collator(layout=choose_layout(model, layout))
    missing = set(file.missing().tolist())
    logger.info(
        "%s: %d of %d rows are stored, %d to come", file.folder, len(rows) - len(missing), len(rows), len(missing)
    )
    with datasets.utils.tqdm(total=len(missing), desc="teacher", unit="row") as bar:
        for planned in batches(num_tokens(rows), tokens_per_batch):
            todo = missing.intersection(planned)
            if not todo:
                continue
            batch = collate([rows[row] for row in planned]).to(device)
            kept = model_top_k(
                model,
                batch.targets,
                key["k"],
                temperature=key["temperature"],
                **inputs_of(model, batch),
            )
            file.write(planned, kept)
            bar.update(len(todo))


def batches(lengths: np.ndarray, capacity: int) -> Iterator[list[int]]:
    """Rows in batches of at most ``capacity`` tokens, padding counted; the longest first, as memory runs out at once
    or never, and neighbours need little padding."""
    batch: list[int] = []
    for row in np.argsort(-lengths, kind="stable").tolist():
        if batch and int(lengths[batch[0]]) * (len(batch) + 1) > capacity:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def sample_completions(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Dataset, folder: Path, sampling: Sampling, seed: int
) -> Path:  # fmt: skip
    """Write the teacher's answer to each prompt as rows that `rlhf sft` trains on: ``prompt``, ``completion``, ``row``.

    An answer that was cut at ``sampling.max_tokens``, or says nothing, is left out and counted: it would teach to end
    there. What is there already stays, but for the last prompts that were answered together; they are answered again,
    to the same bytes.

    Args:
        rows: with ``prompt_ids``, of :func:`rlhf.data.tokenize_prompts`. folder: with its key, then ``complete``.
    Returns:
        The file.
    """
    path = folder / COMPLETIONS
    kept, start = _answered(path)
    path.write_bytes(b"".join(kept))
    model.eval()
    optimize(model)
    engine = LocalEngine(model, tokenizer)
    written = len(kept)
    with path.open("ab") as out, datasets.utils.tqdm(total=len(rows), initial=start, desc="teacher", unit="row") as bar:
        for first in range(start, len(rows), PROMPTS):
            chunk = rows[first : first + PROMPTS]
            index = range(first, first + len(chunk["prompt_ids"]))
            answers = engine.generate(chunk["prompt_ids"], 1, sampling, seed, index=index)
            found = (_line(rows, row, answer, engine) for row, (answer,) in zip(index, answers, strict=True))
            lines = [line for line in found if line is not None]
            out.write(b"".join(lines))
            out.flush()
            written += len(lines)
            bar.update(len(index))
    if written < len(rows):
        logger.warning(
            "%d of %d answers are left out, cut at %d tokens or empty: raise --max_new_tokens",
            len(rows) - written, len(rows), sampling.max_tokens,
        )  # fmt: skip
    write_key(folder, {**read_key(folder), "complete": True})
    return path


def _answered(path: Path) -> tuple[list[bytes], int]:
    """Lines of prompts that were surely all answered, and the prompt to go on from."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    rows = [json.loads(line)["row"] for line in lines]
    start = max(rows, default=0) // PROMPTS * PROMPTS
    return [line for line, row in zip(lines, rows, strict=True) if row < start], start


def _line(rows: Dataset, row: int, answer: Completion, engine: LocalEngine) -> bytes | None:
    text = str(engine.tokenizer.decode(answer.ids, skip_special_tokens=True))
    if answer.finish_reason != "stop" or not text.strip():
        return None
    asked = prompt_dialogue(rows[row], Reading().for_tokenizer(engine.tokenizer).form)
    completion: Any = text if isinstance(asked.prompt, str) else [{"role": "assistant", "content": text}]
    written = {"prompt": asked.prompt, "completion": completion, "row": row}
    if asked.tools:
        written["tools"] = json.dumps(asked.tools, ensure_ascii=False)
    return (json.dumps(written, ensure_ascii=False) + "\n").encode()
