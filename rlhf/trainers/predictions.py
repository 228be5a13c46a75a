"""Logits of an evaluation, for those who bring a ``compute_metrics`` of their own."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction
from transformers.trainer_pt_utils import EvalLoopContainer

from rlhf.data import Batch
from rlhf.data.batch import IGNORE
from rlhf.models.positions import inputs_of


def logits_and_labels(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """What transformers' ``Trainer`` gives to metrics: logits [B, T, V], and labels [B, T], −100 where nothing counts.

    Args:
        model: the wrapper around a causal LM. batch: padded rows.
    Raises:
        ValueError: a batch without rows.
    """
    if batch.segments is not None:
        raise ValueError("compute_metrics reads padded rows: pass layout='rows'")
    labels = torch.full_like(batch.input_ids, IGNORE)
    width = labels.size(1)
    source = batch.targets.source
    labels[source // width, source % width + 1] = batch.targets.token
    return model.without_adapter(**inputs_of(model.without_adapter, batch), use_cache=False).logits, labels


class Predictions:
    """Predictions and labels of all batches and ranks, for ``compute_metrics``."""

    def __init__(self, accelerator: Any, preprocess: Any = None) -> None:
        self.accelerator, self.preprocess = accelerator, preprocess
        self.predictions = EvalLoopContainer(do_nested_concat=True, padding_index=IGNORE)
        self.labels = EvalLoopContainer(do_nested_concat=True, padding_index=IGNORE)

    def add(self, predictions: Any, labels: Tensor) -> None:
        if self.preprocess is not None:
            predictions = self.preprocess(predictions, labels)
        for container, found in ((self.predictions, predictions), (self.labels, labels)):
            found = self.accelerator.pad_across_processes(found, dim=1, pad_index=IGNORE)
            container.add(self.accelerator.gather_for_metrics(found))
            container.to_cpu_and_numpy()

    def result(self) -> EvalPrediction:
        return EvalPrediction(predictions=self.predictions.get_arrays(), label_ids=self.labels.get_arrays())


def inner(model: nn.Module) -> Any:
    """The wrapper, where DDP is around it."""
    return getattr(model, "module", model)
