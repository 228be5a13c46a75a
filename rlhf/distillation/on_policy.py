"""On-policy distillation: the student answers a share of the prompts itself, and the teacher judges these answers."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from rlhf.data.batch import IGNORE
from rlhf.rollouts import Completion, RolloutEngine
from rlhf.rollouts.policy_sampler import PolicySampler, make_engine

Row = dict[str, Any]
NUMBER, START = "row_number", "answer_start"  # columns: which row, and where the answer that is left out begins


def with_prompts(rows: Dataset, room: int, drop_long_prompts: bool, num_proc: int | None = None) -> Dataset:
    """Tokenised rows (``input_ids``, ``labels``) with the place where the last scored stretch, the answer, begins.

    Args:
        room: tokens that a prompt may have.
    Raises:
        ValueError: a row without a prompt or, unless these are dropped, with one that leaves no room to answer.
    """

    def mark(row: Row, number: int) -> Row:
        scored = np.array(row["labels"]) != IGNORE
        end = int(np.flatnonzero(scored)[-1]) + 1
        before = np.flatnonzero(~scored[:end])
        return {NUMBER: number, START: int(before[-1]) + 1 if len(before) else 0}

    marked = rows.map(mark, with_indices=True, num_proc=num_proc, desc="finding prompts")
    starts = np.array(marked[START])
    if not starts.all():
        raise ValueError(
            f"tokenised row {int(np.argmin(starts)) + 1} is all scored, so it has no prompt for the student to answer: "
            "lmbda is for conversations and prompts with completions"
        )
    long = np.flatnonzero(starts > room)
    if len(long) and not drop_long_prompts:
        raise ValueError(
            f"tokenised row {long[0] + 1}: its prompt has {starts[long[0]]} tokens, and max_length less "
            f"max_completion_length leaves {room}: raise max_length, or pass --drop_long_prompts"
        )
    if len(long):
        marked = marked.select(np.flatnonzero(starts <= room))
    if not len(marked):
        raise ValueError(f"no prompt has at most the {room} tokens that max_length less max_completion_length leaves")
    return marked


class OwnAnswers:
    """Puts the student's answers in place of those of the data, in a share ``lmbda`` of the rows.

    Which rows these are, and what is drawn for each, follows from the seed, the step and the row alone: it is the same
    for any number of processes, any size of micro-batches, and after an interruption.

    Args:
        trainer: the :class:`DistillTrainer`. engine: who samples; by default this process, or the configured server.
    Raises:
        ValueError: as :func:`make_engine`.
    """

    def __init__(self, trainer: Any, engine: RolloutEngine | None = None) -> None:
        self.trainer = trainer
        if engine is None:
            engine = make_engine(
                trainer.args, trainer.policy, trainer.processing_class, trainer.accelerator, reads_logps=False
            )
        self.sampler = PolicySampler(engine, trainer.accelerator)

    def __call__(self, micro: Sequence[Sequence[Row]]) -> list[list[Row]]:
        """The micro-batches of an optimizer step, answered by the student as it is before that step."""
        trainer, args = self.trainer, self.trainer.args
        step = trainer.state.global_step
        asked = [row for rows in micro for row in rows if _drawn(args.seed, step, row[NUMBER]) < args.lmbda]
        prompts = [row["input_ids"][: row[START]] for row in asked]
        numbers = [row[NUMBER] for row in asked]
        seed = int(np.random.SeedSequence((args.seed, step)).generate_state(1)[0])
        began = time.perf_counter()
        with self.sampler.synced_engine(trainer.policy, trainer.model_wrapped, step) as engine:
            groups = engine.generate(prompts, 1, args.sampling(), seed, numbers) if prompts else []
        self._report([answer for (answer,) in groups], sum(map(len, micro)), time.perf_counter() - began)
        known = trainer.divergence.vocab_size
        rows = (_answered(prompt, answer, known) for prompt, (answer,) in zip(prompts, groups, strict=True))
        answered = {number: row for number, row in zip(numbers, rows, strict=True) if row is not None}
        return [[answered.get(row[NUMBER], row) for row in rows] for rows in micro]

    def _report(self, answers: list[Completion], rows: int, seconds: float) -> None:
        tokens, count = sum(len(answer.ids) for answer in answers), len(answers)
        cut = sum(answer.finish_reason == "length" for answer in answers)
        found: dict[str, tuple[float, float]] = {"own_answers": (count, rows)}
        if count:
            found |= {
                "completions/mean_length": (tokens, count),
                "completions/clipped_ratio": (cut, count),
                "tokens_per_second/rollout": (tokens, seconds),
            }
        to = self.trainer.args.device
        self.trainer.add_metrics(
            {n: (torch.tensor(a, device=to), torch.tensor(b, device=to)) for n, (a, b) in found.items()}
        )


def _answered(prompt: list[int], answer: Completion, known: int | None) -> Row | None:
    """The row, up to a token that only the student's padded head has: no teacher can judge it. None for no row."""
    unknown = (place for place, token in enumerate(answer.ids) if known is not None and token >= known)
    ids = answer.ids[: next(unknown, None)]
    if not ids:
        return None
    return {"input_ids": prompt + ids, "labels": [IGNORE] * len(prompt) + ids}


def _drawn(seed: int, step: int, row: int) -> float:
    return float(np.random.default_rng((seed, step, row)).random())
