"""Evaluation of a policy by the rewards of its own completions."""

from abc import abstractmethod
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from datasets import Dataset
from transformers.trainer_utils import PredictionOutput

from rlhf.data import in_memory
from rlhf.online.metrics import sample_metrics
from rlhf.online.samples import Sample
from rlhf.trainers.base import BaseTrainer
from rlhf.trainers.metric_sums import MetricSums
from rlhf.trainers.preparation import for_each_set


class EvaluatesBySampling(BaseTrainer):
    """A trainer whose evaluation samples completions; a subclass gives :meth:`answer_rows` and the rewards' names."""

    has_logits = False
    reward_names: list[str]  # the same on every process

    @abstractmethod
    def answer_rows(self, rows: Any) -> list[Sample]:
        """Scored completions of tokenised rows: this process's share."""

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample ``num_generations_eval`` completions (1) of each prompt of the evaluation rows, and score them."""
        rows: Any = self.eval_dataset if eval_dataset is None else for_each_set(in_memory, eval_dataset)
        if rows is None:
            raise ValueError("no rows to evaluate on: pass eval_dataset (--eval_dataset_name)")
        if isinstance(rows, dict):
            metrics: dict[str, float] = {}
            for name, part in rows.items():
                metrics |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        samples = self.answer_rows(self._tokenised_rows(rows))
        metrics = self._metrics_of(samples, metric_key_prefix)
        self.log(metrics)
        # As transformers' own evaluate: callbacks, such as early stopping, see the metrics.
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """As :meth:`evaluate`; ``predictions`` has the ``completions`` and the ``reward`` of each, in order."""
        samples = self.answer_rows(self._tokenised_rows(for_each_set(in_memory, test_dataset)))
        metrics = self._metrics_of(samples, metric_key_prefix)
        # Each process answered every n-th row; the group is the number of the row.
        all_samples = sorted(gather_object(samples), key=lambda sample: sample.group)
        predictions = {
            "completions": [sample.completion for sample in all_samples],
            "reward": np.array([sample.reward for sample in all_samples]),
        }
        return PredictionOutput(predictions=predictions, label_ids=None, metrics=metrics)  # type: ignore[arg-type]

    def _metrics_of(self, samples: list[Sample], prefix: str) -> dict[str, float]:
        sums = MetricSums()
        sums.add(sample_metrics(samples, self.reward_names, self.args.device))
        metrics = self.reduce_metrics(sums.reduce(self.accelerator))
        return {f"{prefix}_{name}": value for name, value in metrics.items()}

    def _metric_names(self, key: str, rows: Dataset) -> list[str]:
        return []  # unknown before the rewards were called
