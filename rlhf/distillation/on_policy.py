"""On-policy distillation: the student answers a share of the prompts itself, and the teacher judges these answers."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from rlhf.data import Batch
from rlhf.data.batch import IGNORE, Row
from rlhf.data.worker_processes import workers_end_with_this_process
from rlhf.logprobs import Scores, TokenLoss
from rlhf.models import Policy
from rlhf.rollouts import Completion, Sampling
from rlhf.rollouts.policy_sampler import PolicySampler
from rlhf.trainers.evaluating import Measures

Metrics = dict[str, tuple[float, float]]  # sum and count, by name

ROW_NUMBER = "row_number"  # column: the number of a row in the training data
ANSWER_START = "answer_start"  # column: where the answer begins that the student's own replaces


@workers_end_with_this_process()
def mark_prompts(rows: Dataset, max_prompt: int, drop_long_prompts: bool, num_proc: int | None = None) -> Dataset:
    """Add columns that tell where the prompt of each row ends: before its last run of scored tokens, the answer.

    Args:
        rows: tokenised, with ``input_ids`` and ``labels``.
        max_prompt: tokens that a prompt may have.
        drop_long_prompts: leave out rows with a longer one.
        num_proc: worker processes.
    Returns:
        The rows with :data:`ROW_NUMBER` and :data:`ANSWER_START`.
    Raises:
        ValueError: a row without a prompt or, unless these are dropped, with one that leaves no room to answer.
    """

    # In a conversation the last answer is replaced; earlier turns are its prompt.
    def mark(row: Row, number: int) -> Row:
        is_scored = np.array(row["labels"]) != IGNORE
        answer_end = int(np.flatnonzero(is_scored)[-1]) + 1
        unscored = np.flatnonzero(~is_scored[:answer_end])
        answer_start = int(unscored[-1]) + 1 if len(unscored) else 0
        return {ROW_NUMBER: number, ANSWER_START: answer_start}

    rows_with_starts = rows.map(mark, with_indices=True, num_proc=num_proc, desc="finding prompts")
    answer_starts = np.array(rows_with_starts[ANSWER_START])
    # A start of 0 is a row of which everything is scored: plain text has no prompt.
    if not answer_starts.all():
        raise ValueError(
            f"tokenised row {int(np.argmin(answer_starts)) + 1} is all scored, so it has no prompt for the student to "
            "answer: lmbda is for conversations and prompts with completions"
        )
    too_long = np.flatnonzero(answer_starts > max_prompt)
    if len(too_long) and not drop_long_prompts:
        raise ValueError(
            f"tokenised row {too_long[0] + 1}: its prompt has {answer_starts[too_long[0]]} tokens, and max_length less "
            f"max_completion_length leaves {max_prompt}: raise max_length, or pass --drop_long_prompts"
        )
    if len(too_long):
        rows_with_starts = rows_with_starts.select(np.flatnonzero(answer_starts <= max_prompt))
    if not len(rows_with_starts):
        raise ValueError(
            f"no prompt has at most the {max_prompt} tokens that max_length less max_completion_length leaves"
        )
    return rows_with_starts


@dataclass
class StudentRollouts:
    """Replaces the answers of a share of the rows by the student's own.

    Which rows these are, and what is sampled for each, follows from the seed, the step and the row alone: it is the
    same for any number of processes, any size of micro-batches, and after an interruption.

    Args:
        sampler: samples from the student.
        sampling: length and temperature of the answers.
        share: of the rows, in [0, 1].
        seed: of the training run.
        vocab_size: number of tokens that the teacher knows; None where it knows all that the student has.
    """

    sampler: PolicySampler
    sampling: Sampling
    share: float
    seed: int
    vocab_size: int | None = None

    def answer(
        self, micro_batches: Sequence[Sequence[Row]], policy: Policy, trained_model: nn.Module, step: int
    ) -> tuple[list[list[Row]], Metrics]:
        """Answer the micro-batches of one optimizer step with the student as it is before that step.

        Args:
            micro_batches: rows of :func:`mark_prompts`.
            policy: the student.
            trained_model: what accelerate made of it.
            step: optimizer steps so far.
        Returns:
            The rows, some of them with another answer, and what is logged.
        """
        rows = [row for micro_batch in micro_batches for row in micro_batch]
        chosen_rows = [row for row in rows if self._is_chosen(row, step)]
        numbers = [row[ROW_NUMBER] for row in chosen_rows]
        prompts = [row["input_ids"][: row[ANSWER_START]] for row in chosen_rows]
        # The row number is the stream of each answer, so which other rows are answered changes nothing.
        step_seed = int(np.random.SeedSequence((self.seed, step)).generate_state(1)[0])
        started = time.perf_counter()

        def draw() -> list[list[Completion]]:
            return self.sampler.engine.generate(prompts, 1, self.sampling, step_seed, numbers) if prompts else []

        groups = self.sampler.sample(policy, trained_model, step, draw)
        seconds = time.perf_counter() - started
        # One completion for each prompt.
        completions = [completion for (completion,) in groups]
        # A row whose answer has no token that the teacher knows keeps the answer of the data.
        replaced: dict[int, Row] = {}
        for number, prompt, completion in zip(numbers, prompts, completions, strict=True):
            row = answered_row(prompt, completion, self.vocab_size)
            if row is not None:
                replaced[number] = row
        answered = [[replaced.get(row[ROW_NUMBER], row) for row in micro_batch] for micro_batch in micro_batches]
        return answered, rollout_metrics(completions, len(rows), seconds)

    def _is_chosen(self, row: Row, step: int) -> bool:
        # A generator for each row and step: no state to save, and no dependence on batches or processes.
        generator = np.random.default_rng((self.seed, step, row[ROW_NUMBER]))
        return float(generator.random()) < self.share


def answered_row(prompt: list[int], completion: Completion, vocab_size: int | None) -> Row | None:
    """A training row of a prompt and the student's answer.

    Args:
        prompt: token ids.
        completion: the student's answer.
        vocab_size: the answer ends before a token from here on, which only the student's padded head has and no
            teacher can judge.
    Returns:
        The row; None where nothing is left of the answer.
    """
    unknown = (
        position for position, token in enumerate(completion.ids) if vocab_size is not None and token >= vocab_size
    )
    answer = completion.ids[: next(unknown, None)]
    if not answer:
        return None
    return {"input_ids": prompt + answer, "labels": [IGNORE] * len(prompt) + answer}


def rollout_metrics(completions: Sequence[Completion], num_rows: int, seconds: float) -> Metrics:
    """Sums and counts to log of the answers of one step.

    Args:
        completions: the student's answers.
        num_rows: rows of the step, answered by the student or not.
        seconds: that sampling took.
    Returns:
        Sum and count by name.
    """
    count = len(completions)
    metrics: Metrics = {"own_answers": (count, num_rows)}
    # Means over no answers would be logged as NaN.
    if count:
        tokens = sum(len(completion.ids) for completion in completions)
        truncated = sum(completion.finish_reason == "length" for completion in completions)
        metrics["completions/mean_length"] = (tokens, count)
        metrics["completions/clipped_ratio"] = (truncated, count)
        metrics["tokens_per_second/rollout"] = (tokens, seconds)
    return metrics


def measure_reward(model: nn.Module, batch: Batch, teacher_logps: Tensor) -> Measures:
    """The reward form of the reverse KL: each sampled token is rewarded by log p - log q.

    Args:
        model: the student, as accelerate wraps it.
        batch: the student's own answers.
        teacher_logps: log p of the sampled tokens, [N], without a gradient.
    Returns:
        Sums and counts for each sequence; the scalar sum of the loss carries the gradient.
    """
    scores = model(batch, TokenLoss(reverse_kl_loss, (teacher_logps,)))
    targets, logps = batch.targets, scores.logps.detach()
    tokens = targets.counts()
    sums = {
        "reverse_kl": targets.sum(logps - teacher_logps),
        "perplexity": -targets.sum(logps),
        "teacher_perplexity": -targets.sum(teacher_logps),
    }
    metrics = {name: (total, tokens) for name, total in sums.items()}
    return Measures(sums["reverse_kl"], tokens, metrics, scores.loss)


def reverse_kl_loss(scores: Scores, teacher_logps: Tensor) -> Tensor:
    """The loss of each sampled token, [N].

    Its value is log q - log p, whose mean over samples is KL(q, p). Its gradient is (log q - log p) times that of
    log q, whose mean is the gradient of KL(q, p).

    Args:
        scores: of the student; ``logps`` carries the gradient.
        teacher_logps: log p of the tokens, [N].
    Returns:
        [N], nats.
    """
    logps = scores.logps.detach()
    # The ratio is 1: it contributes the gradient of log q alone.
    ratio = torch.exp(scores.logps - logps)
    return (logps - teacher_logps) * ratio
