"""Evaluation of a policy by its own answers."""

import time
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers.trainer_utils import PredictionOutput

from rlhf.models import Policy
from rlhf.online.collector import Roller
from rlhf.online.metrics import RolloutReport
from rlhf.online.prompts import in_memory
from rlhf.online.samples import Sample
from rlhf.trainers.base import BaseTrainer


class Answering(BaseTrainer):
    """A trainer whose policy is judged by the rewards of its answers."""

    has_logits = False
    policy: Policy
    roller: Roller
    report: RolloutReport
    _trained_since: float  # when the last rollout ended; evaluation is no part of training

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample ``num_generations_eval`` answers (1) to each prompt of the evaluation rows, and score them."""
        began = time.perf_counter()
        rows: Any = self.eval_dataset if eval_dataset is None else in_memory(eval_dataset)
        if rows is None:
            raise ValueError("no rows to evaluate on: pass eval_dataset (--eval_dataset_name)")
        if isinstance(rows, dict):
            found: dict[str, float] = {}
            for name, part in rows.items():
                found |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return found
        metrics = self._told_of(self.roller.answer(self.policy, self._tokenised_rows(rows)), metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self._trained_since:
            self._trained_since += time.perf_counter() - began
        return metrics

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """As many answers to each prompt: ``predictions`` has ``completions`` and the ``reward`` of each, in order."""
        rows = self._tokenised_rows(in_memory(test_dataset))
        samples = self.roller.answer(self.policy, rows)
        metrics = self._told_of(samples, metric_key_prefix)
        everyone = sorted(gather_object(samples), key=lambda sample: sample.group)
        rewards = np.array([sample.reward for sample in everyone])
        found = {"completions": [sample.completion for sample in everyone], "reward": rewards}
        return PredictionOutput(predictions=found, label_ids=None, metrics=metrics)  # type: ignore[arg-type]

    def _told_of(self, samples: list[Sample], prefix: str) -> dict[str, float]:
        sums = self.report.of_evaluation(samples)
        names = list(sums)
        table = torch.stack([torch.stack([total.sum(), count.sum()]) for total, count in sums.values()])
        pairs = self.accelerator.reduce(table.to(self.args.device)).tolist()
        values = self.reduce_metrics({name: (total, count) for name, (total, count) in zip(names, pairs, strict=True)})
        return {f"{prefix}_{name}": value for name, value in values.items()}

    def _metric_names(self, key: str, rows: Dataset) -> list[str]:
        """Unknown before rewards were asked."""
        return []
