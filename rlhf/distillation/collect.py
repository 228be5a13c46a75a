"""Run a teacher once over a data set: store its most likely tokens at each scored position, or its answers."""

import json
import logging
import os
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
from rlhf.trainers.checkpoint_files import writing

logger = logging.getLogger(__name__)

COMPLETIONS = "completions.jsonl"
PROMPTS_PER_CALL = 16


def keep_top_k(model: Any, rows: Dataset, file: TeacherFile, *, tokens_per_batch: int, layout: str = "auto") -> None:
    """Write the predictions that a folder does not hold yet, in one forward pass over the rows.

    An interrupted pass that is continued gives the same bytes as one that was not.

    Args:
        model: the teacher, a causal LM; its dropout is switched off.
        rows: tokenised as for supervised fine-tuning; ``file`` was made for them.
        file: opened to be written.
        tokens_per_batch: as many rows as fit; a longer row goes alone.
        layout: as of a trainer.
    Raises:
        ValueError: the teacher gives NaN.
    """
    device = next(model.parameters()).device
    model.eval()
    disable_dropout(model)
    optimize(model)
    # Padding is never scored, so the id of the padding token does not matter here.
    collate = Collator(layout=choose_layout(model, layout))
    missing = set(file.missing().tolist())
    num_stored = len(rows) - len(missing)
    logger.info("%s: %d of %d rows are stored, %d to come", file.folder, num_stored, len(rows), len(missing))
    with datasets.utils.tqdm(total=len(missing), desc="teacher", unit="row") as progress:
        # Batches are planned over all rows, also over those that are stored: rounding depends on the batch, so another
        # plan would give other bytes.
        for batch_rows in batches(num_tokens(rows), tokens_per_batch):
            new_rows = missing.intersection(batch_rows)
            if not new_rows:
                continue
            batch = collate([rows[row] for row in batch_rows]).to(device)
            inputs = inputs_of(model, batch)
            temperature = file.key["temperature"]
            top_k = model_top_k(model, batch.targets, file.key["k"], temperature=temperature, **inputs)
            file.write(batch_rows, top_k)
            progress.update(len(new_rows))


def batches(lengths: np.ndarray, capacity: int) -> Iterator[list[int]]:
    """Group rows into batches, the longest first: memory runs out at once or never, and neighbours need little padding.

    Args:
        lengths: int64 [rows], tokens of each row.
        capacity: tokens of a batch, padding counted; a longer row goes alone.
    Yields:
        list[int]: numbers of the rows of a batch.
    """
    batch: list[int] = []
    for row in np.argsort(-lengths, kind="stable").tolist():
        if batch:
            longest = int(lengths[batch[0]])
            if longest * (len(batch) + 1) > capacity:
                yield batch
                batch = []
        batch.append(row)
    if batch:
        yield batch


def sample_completions(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Dataset, folder: Path, sampling: Sampling, seed: int
) -> Path:
    """Write the teacher's answer to each prompt, as rows for `rlhf sft`: ``prompt``, ``completion`` and ``row``.

    An answer that was cut at ``sampling.max_tokens``, or is empty, is left out and counted: it would teach to end
    there. An interrupted run continues where it stopped; the last prompts that were answered together are answered
    again, with the same result.

    Args:
        model: the teacher.
        tokenizer: of the teacher.
        rows: with ``prompt_ids``, of :func:`rlhf.data.tokenize_prompts`.
        folder: with its key, which then says that it is complete.
        sampling: how answers are sampled.
        seed: of the answers.
    Returns:
        The file.
    Raises:
        ValueError: the file has lines that this function did not write.
    """
    path = folder / COMPLETIONS
    lines, start = _completed(path)
    # Lines of the last, unfinished call are cut off, as its prompts are answered again.
    if path.exists():
        os.truncate(path, sum(map(len, lines)))
    model.eval()
    optimize(model)
    engine = LocalEngine(model, tokenizer)
    num_written = len(lines)
    progress = datasets.utils.tqdm(total=len(rows), initial=start, desc="teacher", unit="row")
    # The last of its lines may be cut short by a full disk; the next run cuts it off.
    with writing(path), path.open("ab") as answers_file, progress:
        for first_row in range(start, len(rows), PROMPTS_PER_CALL):
            prompts = rows[first_row : first_row + PROMPTS_PER_CALL]["prompt_ids"]
            numbers = range(first_row, first_row + len(prompts))
            # Each answer has a random stream of its own by its row number, whatever it is batched with.
            groups = engine.generate(prompts, 1, sampling, seed, index=numbers)
            for row, (completion,) in zip(numbers, groups, strict=True):
                line = _line(rows, row, completion, engine)
                if line is not None:
                    answers_file.write(line)
                    num_written += 1
            answers_file.flush()
            progress.update(len(numbers))
        # Before the key says that all is there.
        os.fsync(answers_file.fileno())
    if num_written < len(rows):
        logger.warning(
            "%d of %d answers are left out, cut at %d tokens or empty: raise --max_new_tokens",
            len(rows) - num_written, len(rows), sampling.max_tokens,
        )  # fmt: skip
    write_key(folder, {**read_key(folder), "complete": True})
    return path


def _completed(path: Path) -> tuple[list[bytes], int]:
    """Lines of prompts that were surely all answered, and the first prompt that was not."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()  # cut short by an interruption
    row_numbers = _row_numbers(path, lines)
    # Some of the last call's answers may be missing, because they were left out or not written: it is repeated.
    start = max(row_numbers, default=0) // PROMPTS_PER_CALL * PROMPTS_PER_CALL
    return [line for line, row in zip(lines, row_numbers, strict=True) if row < start], start


def _row_numbers(path: Path, lines: list[bytes]) -> list[int]:
    """The prompt that each line answers; refused where they do not ascend, as then two runs wrote the file."""
    numbers: list[int] = []
    for index, line in enumerate(lines, 1):
        try:
            number = int(json.loads(line)["row"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(
                f"{path}, line {index}: not an answer of a teacher; pass --overwrite to replace it"
            ) from None
        if numbers and number <= numbers[-1]:
            raise ValueError(f"{path}, line {index}: row {number} is there twice; pass --overwrite to replace it")
        numbers.append(number)
    return numbers


def _line(rows: Dataset, row: int, completion: Completion, engine: LocalEngine) -> bytes | None:
    """The JSON line of an answer; None for one that is left out."""
    text = str(engine.tokenizer.decode(completion.ids, skip_special_tokens=True))
    # An answer that was cut, or says nothing but special tokens, would teach the student to end there.
    if completion.finish_reason != "stop" or not text.strip():
        return None
    dialogue = prompt_dialogue(rows[row], Reading().for_tokenizer(engine.tokenizer).form)
    # The answer has the form of the prompt: text to text, messages to messages.
    is_text = isinstance(dialogue.prompt, str)
    answer: Any = text if is_text else [{"role": "assistant", "content": text}]
    training_row = {"prompt": dialogue.prompt, "completion": answer, "row": row}
    if dialogue.tools:
        training_row["tools"] = json.dumps(dialogue.tools, ensure_ascii=False)
    return (json.dumps(training_row, ensure_ascii=False) + "\n").encode()
