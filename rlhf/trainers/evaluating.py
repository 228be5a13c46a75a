"""Evaluation and prediction: sums and counts over a data set, each row once however it is spread over ranks."""

from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

from rlhf.data import Batch, Mixture, held, is_tokenised
from rlhf.models import vocabulary_size
from rlhf.trainers.checkpointing import Checkpointing
from rlhf.trainers.predictions import Predictions, inner


class Measures(NamedTuple):
    """What one batch adds up to, for each item ([S]: a sequence, or a pair)."""

    loss: Tensor  # [S], summed over what counts; carries the gradient, unless `total` does
    counts: Tensor  # [S], what the loss is divided by
    metrics: dict[str, tuple[Tensor, Tensor]]  # name to ([S] sums, [S] counts)
    total: Tensor | None = None  # scalar sum of `loss`, with the gradient
    router_logits: tuple[Tensor, ...] | None = None  # to be balanced


class Evaluating(Checkpointing):
    """A ``transformers.Trainer`` whose evaluation adds up :class:`Measures`."""

    exp_metrics: ClassVar[frozenset[str]] = frozenset()  # metrics reported as exp(sum / count)
    has_logits: ClassVar[bool] = True  # whether compute_metrics can be given those of evaluation rows

    @abstractmethod
    def measure(self, model: nn.Module, batch: Any) -> Measures: ...

    @abstractmethod
    def reduce_metrics(self, sums: dict[str, tuple[float, float]]) -> dict[str, float]: ...

    @abstractmethod
    def predictions(self, model: Any, batch: Batch) -> tuple[Any, Tensor]: ...

    @abstractmethod
    def _prepare_rows(self, dataset: Any, tokenizer: Any, args: Any, vocab_size: int) -> Any: ...

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As ``transformers.Trainer``; rows may be as they are in a file too."""
        return super().evaluate(self._tokenised_rows(eval_dataset), ignore_keys, metric_key_prefix)

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """What is measured of each row: ``predictions`` is a dictionary of float64 arrays, [rows].

        A metric of a row is its own mean: ``loss`` of fine-tuning is the mean over the row's tokens. Rows may be as
        they are in a file. ``metrics`` are those of :meth:`evaluate`. ``predictions`` is None with
        ``prediction_loss_only``.
        """
        return super().predict(self._tokenised_rows(test_dataset), ignore_keys, metric_key_prefix)

    def _tokenised_rows(self, dataset: Any) -> Any:
        """Rows as ``tokenize`` makes them, one set or several."""
        if isinstance(dataset, dict):
            return {name: self._tokenised_rows(rows) for name, rows in dataset.items()}
        if isinstance(dataset, list):
            dataset = Dataset.from_list(dataset)
        if not isinstance(dataset, Dataset | IterableDataset | Mixture):
            return dataset
        if not isinstance(dataset, Mixture) and is_tokenised(dataset):
            return held(dataset)
        model = self.accelerator.unwrap_model(self.model)
        return held(self._prepare_rows(dataset, self.processing_class, self.args, vocabulary_size(model)))

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None  # the order moves no figure

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Sums and counts over the data set."""
        model = self.model
        if not self.accelerator._models and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            model = self.model = self.model_wrapped = self.accelerator.prepare(model)
        model.eval()
        names: list[str] = []
        tables: list[Tensor] = []
        predictions = Predictions(self.accelerator, self.preprocess_logits_for_metrics)
        for batch in dataloader:
            with torch.no_grad(), self.accelerator.autocast():
                measures = self.measure(model, batch)
                if self.compute_metrics is not None:
                    predictions.add(*self.predictions(inner(model), batch))
            columns = {"loss": (measures.loss, measures.counts), **measures.metrics}
            names = list(columns)
            table = torch.stack([column.float() for pair in columns.values() for column in pair], dim=1)
            # Ranks are evened out by repeating rows; this drops the repeated ones.
            tables.append(self.accelerator.gather_for_metrics(table).double().cpu())
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        whole = torch.cat(tables) if tables else torch.zeros(0, 0, dtype=torch.float64)
        pairs = whole.sum(0).view(-1, 2).tolist()
        values = self.reduce_metrics(dict(zip(names, pairs, strict=True)))
        if self.compute_metrics is not None:
            values |= self.compute_metrics(predictions.result())
        metrics = {f"{metric_key_prefix}_{name.removeprefix(f'{metric_key_prefix}_')}": x for name, x in values.items()}
        each = None if prediction_loss_only or self.args.prediction_loss_only else self._each(names, whole, values)
        return EvalLoopOutput(predictions=each, label_ids=None, metrics=metrics, num_samples=len(whole))  # type: ignore[arg-type]

    def _check_best_metric(self) -> None:
        """Find before training that evaluation does not give the metric that chooses the best checkpoint."""
        wanted, sets = self.args.metric_for_best_model, self.eval_dataset
        if wanted is None or self.is_fsdp_enabled or self.is_deepspeed_enabled or self.args.eval_strategy == "no":
            return
        parts = sets if isinstance(sets, dict) else {"": sets}
        if not all(isinstance(rows, Dataset) for rows in parts.values()):
            return
        with torch.random.fork_rng(devices=[]):  # a data loader draws a seed
            found = [name for key, rows in parts.items() for name in self._metric_names(key, rows)]
        if found:
            check_metric(wanted, found)

    def _metric_names(self, key: str, rows: Dataset) -> list[str]:
        """Names of what the evaluation of these rows gives; none where they are not known before."""
        prefix = f"eval_{key}" if key else "eval"
        loader = self.get_eval_dataloader(rows.select(range(1)))
        return list(self.evaluation_loop(loader, "Names", True, metric_key_prefix=prefix).metrics or {})

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        check_metric(self.args.metric_for_best_model, list(metrics))
        return super()._determine_best_metric(metrics, trial)

    def _each(self, names: list[str], whole: Tensor, values: dict[str, float]) -> dict[str, np.ndarray]:
        """The mean of each row, of what is reported."""
        sums, counts = whole[:, 0::2], whole[:, 1::2]
        means = (sums / counts).unbind(1)  # nan where nothing counts
        found = {name: mean for name, mean in zip(names, means, strict=True) if name in values}
        return {name: (mean.exp() if name in self.exp_metrics else mean).numpy() for name, mean in found.items()}


def check_metric(wanted: str | None, found: list[str]) -> None:
    """Raise where the metric that chooses the best checkpoint is none of those that evaluation gives."""
    if wanted is not None and f"eval_{wanted.removeprefix('eval_')}" not in found:
        names = ", ".join(sorted(name.removeprefix("eval_") for name in found))
        raise ValueError(f"--metric_for_best_model {wanted}: evaluation gives {names}")
