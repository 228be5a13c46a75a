"""Evaluation and prediction: sums and counts over a data set, each row once however it is spread over ranks."""

from abc import abstractmethod
from collections.abc import Sequence
from os import PathLike
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import EvalPrediction
from transformers.trainer_pt_utils import EvalLoopContainer
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

from rlhf.data import Batch, Mixture, as_rows, in_memory, is_tokenised
from rlhf.data.batch import IGNORE
from rlhf.models import vocabulary_size
from rlhf.models.positions import inputs_of
from rlhf.trainers.history import as_frame
from rlhf.trainers.metric_sums import Metrics
from rlhf.trainers.parallelism import gather_rows
from rlhf.trainers.progress import ProgressLines, replace_progress
from rlhf.trainers.resuming import Resuming
from rlhf.trainers.sample_answers import SampleAnswers, SamplePrompt, choose_prompts


class Measures(NamedTuple):
    """What one batch adds up to, for each item ([S]: a sequence, or a pair)."""

    loss: Tensor  # [S], summed over what counts; carries the gradient, unless `total` does
    counts: Tensor  # [S], what the loss is divided by
    metrics: Metrics  # by name, [S] sums and [S] counts
    total: Tensor | None = None  # scalar sum of `loss`, with the gradient
    router_logits: tuple[Tensor, ...] | None = None  # to be balanced


class Evaluating(Resuming):
    """A ``transformers.Trainer`` whose evaluation adds up :class:`Measures`."""

    exp_metrics: ClassVar[frozenset[str]] = frozenset()  # reported as exp(sum / count), such as a perplexity
    has_logits: ClassVar[bool] = True  # whether compute_metrics can be given those of evaluation rows
    writes_text: ClassVar[bool] = True  # whether the model can answer a prompt
    sample_prompts: Sequence[SamplePrompt] = ()

    @abstractmethod
    def measure(self, model: nn.Module, batch: Any) -> Measures: ...

    @abstractmethod
    def reduce_metrics(self, sums: dict[str, tuple[float, float]]) -> dict[str, float]: ...

    @abstractmethod
    def _prepare_rows(self, rows: Any, tokenizer: Any, args: Any, vocab_size: int) -> Any: ...

    def choose_prompts(self, eval_rows: Any, tokenizer: Any, args: Any) -> None:
        """Choose the prompts that are answered at each evaluation.

        Args:
            eval_rows: as they are in a file, or None.
            tokenizer: of the model.
            args: the configuration.
        """
        count = args.num_sample_answers if self.writes_text else 0
        self.sample_prompts = choose_prompts(eval_rows, count, tokenizer, args)

    def show_run(self) -> None:
        """Show lines of the log, and answers at each evaluation, instead of what transformers shows."""
        self.progress = ProgressLines(type(self), self.args.log_all, plain=bool(self.args.disable_tqdm))
        answers = SampleAnswers(self.sample_prompts, self.accelerator, self.progress.tell)
        # Answers come first, so that their time is not that of training.
        callbacks = [answers, self.progress] if self.sample_prompts else [self.progress]
        replace_progress(self.callback_handler, callbacks)

    def history(self) -> pd.DataFrame:
        """The log as a table: a row for each step, with figures of training and of evaluation (``eval_...``).

        Returns:
            As :func:`rlhf.trainers.history.as_frame`; empty before training.
        """
        return as_frame(self.state.log_history)

    def predictions(self, model: Any, batch: Batch) -> tuple[Any, Tensor]:
        """Predictions and labels of a batch, for ``compute_metrics``."""
        return logits_and_labels(model, batch)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As ``transformers.Trainer``; rows may also be untokenised, as they are in a file."""
        return super().evaluate(self._tokenised_rows(eval_dataset), ignore_keys, metric_key_prefix)

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Measure each row by itself.

        A metric of a row is its own mean: ``loss`` of fine-tuning is the mean over the row's tokens.

        Args:
            test_dataset: rows, tokenised or as they are in a file.
            ignore_keys: not read.
            metric_key_prefix: before the names of the metrics.
        Returns:
            ``predictions`` is a dictionary of float64 arrays, [rows]; None with ``prediction_loss_only``. ``metrics``
            are those of :meth:`evaluate`.
        """
        return super().predict(self._tokenised_rows(test_dataset), ignore_keys, metric_key_prefix)

    def _tokenised_rows(self, dataset: Any) -> Any:
        """Rows as ``tokenize`` makes them, of one data set or several."""
        if isinstance(dataset, dict):
            return {name: self._tokenised_rows(rows) for name, rows in dataset.items()}
        # None, a name of one of the evaluation sets, and a data set of torch are left to transformers.
        if isinstance(dataset, list | tuple | pd.DataFrame | PathLike):
            dataset = as_rows(dataset)
        if not isinstance(dataset, Dataset | IterableDataset | Mixture):
            return dataset
        if not isinstance(dataset, Mixture) and is_tokenised(dataset):
            return in_memory(dataset)
        model = self.accelerator.unwrap_model(self.model)
        return in_memory(self._prepare_rows(dataset, self.processing_class, self.args, vocabulary_size(model)))

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        # transformers' own may sort by length; predictions are in the order of the rows.
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Sums and counts over the data set."""
        model = self._prepared_model()
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        names: list[str] = []
        batch_tables: list[Tensor] = []  # [rows, 2 * metrics]: the sum and the count of each metric side by side
        predictions = GatheredPredictions(self.accelerator, self.preprocess_logits_for_metrics)
        for batch in dataloader:
            with torch.no_grad(), self.accelerator.autocast():
                measures = self.measure(model, batch)
                if self.compute_metrics is not None:
                    predictions.add(*self.predictions(without_ddp(model), batch))
            metrics = {"loss": (measures.loss, measures.counts), **measures.metrics}
            names = list(metrics)
            columns = [column.float() for sum_and_count in metrics.values() for column in sum_and_count]
            # Ranks are evened out by repeating rows; the repeated ones are dropped.
            row_sums = gather_rows(self.accelerator, torch.stack(columns, dim=1))
            batch_tables.append(row_sums.double().cpu())
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        row_sums = torch.cat(batch_tables) if batch_tables else torch.zeros(0, 0, dtype=torch.float64)
        sums = dict(zip(names, row_sums.sum(0).view(-1, 2).tolist(), strict=True))
        values = self.reduce_metrics(sums)
        if self.compute_metrics is not None:
            values |= self.compute_metrics(predictions.result())
        row_values = None
        if not (prediction_loss_only or self.args.prediction_loss_only):
            row_values = self._row_values(names, row_sums, reported=set(values))
        return EvalLoopOutput(
            predictions=row_values,  # type: ignore[arg-type]
            label_ids=None,
            metrics=with_prefix(values, metric_key_prefix),
            num_samples=len(row_sums),
        )

    def _prepared_model(self) -> Any:
        """The model, sharded if the run shards it; ``Trainer`` does so only when it trains."""
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if is_sharded and not self.accelerator._models:
            self.model = self.model_wrapped = self.accelerator.prepare(self.model)
        return self.model

    def _row_values(self, names: list[str], table: Tensor, reported: set[str]) -> dict[str, np.ndarray]:
        """The mean of each row, for the metrics that are reported."""
        sums, counts = table[:, 0::2], table[:, 1::2]
        means = (sums / counts).unbind(1)  # NaN where nothing counts
        values = {}
        for name, mean in zip(names, means, strict=True):
            if name in reported:
                values[name] = (mean.exp() if name in self.exp_metrics else mean).numpy()
        return values

    # The metric that chooses the best checkpoint

    def _check_best_metric(self) -> None:
        """Find before training that evaluation does not give the metric that chooses the best checkpoint."""
        metric, eval_sets = self.args.metric_for_best_model, self.eval_dataset
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if metric is None or is_sharded or self.args.eval_strategy == "no":
            return
        parts = eval_sets if isinstance(eval_sets, dict) else {"": eval_sets}
        if not all(isinstance(rows, Dataset) for rows in parts.values()):
            return
        names = []
        with torch.random.fork_rng(devices=[]):  # a data loader draws a seed, which training would miss
            for set_name, rows in parts.items():
                names += self._metric_names(set_name, rows)
        if names:
            check_metric(metric, names)

    def _metric_names(self, key: str, rows: Dataset) -> list[str]:
        """Names of the metrics that the evaluation of these rows gives; none where they are not known before."""
        prefix = f"eval_{key}" if key else "eval"
        loader = self.get_eval_dataloader(rows.select(range(1)))
        return list(self.evaluation_loop(loader, "Names", True, metric_key_prefix=prefix).metrics or {})

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        check_metric(self.args.metric_for_best_model, list(metrics))
        return super()._determine_best_metric(metrics, trial)


def check_metric(metric: str | None, names: list[str]) -> None:
    """Check that evaluation gives the metric that chooses the best checkpoint.

    Args:
        metric: its name, with or without ``eval_``; None for no such metric.
        names: of what evaluation gives, with ``eval_``.
    Raises:
        ValueError: the metric is none of them.
    """
    if metric is not None and f"eval_{metric.removeprefix('eval_')}" not in names:
        known_names = ", ".join(sorted(name.removeprefix("eval_") for name in names))
        raise ValueError(f"--metric_for_best_model {metric}: evaluation gives {known_names}")


def with_prefix(values: dict[str, float], prefix: str) -> dict[str, float]:
    """The values under names that begin with ``prefix`` and an underscore, once."""
    start = f"{prefix}_"
    return {start + name.removeprefix(start): value for name, value in values.items()}


def without_ddp(model: nn.Module) -> Any:
    """The wrapper, where DDP is around it."""
    return getattr(model, "module", model)


# Logits, for those who bring a ``compute_metrics`` of their own


def logits_and_labels(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The logits and labels that transformers' ``Trainer`` gives to metrics.

    Args:
        model: the wrapper around a causal LM.
        batch: padded rows.
    Returns:
        Logits [B, T, V], and labels [B, T], −100 where nothing counts.
    Raises:
        ValueError: a batch without rows.
    """
    if batch.segments is not None:
        raise ValueError("compute_metrics reads padded rows: pass layout='rows'")
    labels = torch.full_like(batch.input_ids, IGNORE)
    # A target is predicted at `source`, one position before the token itself.
    row, position = batch.targets.source // labels.size(1), batch.targets.source % labels.size(1)
    labels[row, position + 1] = batch.targets.token
    inputs = inputs_of(model.without_adapter, batch)
    return model.without_adapter(**inputs, use_cache=False).logits, labels


class GatheredPredictions:
    """Predictions and labels of all batches and ranks, for ``compute_metrics``.

    Args:
        accelerator: of the run.
        preprocess: ``preprocess_logits_for_metrics`` of transformers; it may shrink predictions before they are kept.
    """

    def __init__(self, accelerator: Any, preprocess: Any = None) -> None:
        self.accelerator, self.preprocess = accelerator, preprocess
        self._predictions = EvalLoopContainer(do_nested_concat=True, padding_index=IGNORE)
        self._labels = EvalLoopContainer(do_nested_concat=True, padding_index=IGNORE)

    def add(self, predictions: Any, labels: Tensor) -> None:
        """Gather those of a batch from all ranks, and keep them off the device."""
        if self.preprocess is not None:
            predictions = self.preprocess(predictions, labels)
        for container, values in ((self._predictions, predictions), (self._labels, labels)):
            padded_values = self.accelerator.pad_across_processes(values, dim=1, pad_index=IGNORE)
            container.add(self.accelerator.gather_for_metrics(padded_values))
            container.to_cpu_and_numpy()

    def result(self) -> EvalPrediction:
        return EvalPrediction(predictions=self._predictions.get_arrays(), label_ids=self._labels.get_arrays())
