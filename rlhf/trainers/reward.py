"""Reward models: a scalar for an answer, learned from preference pairs."""

import copy
import logging
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf.data import Batch, sample, tokenize_preferences
from rlhf.data.columns import check_preference_columns
from rlhf.evaluation import calibration_bins, calibration_error
from rlhf.losses import reward_loss
from rlhf.models import RewardModel, add_scalar_head, load_reward_model, vocabulary_size
from rlhf.models.reward_model import spare_pad_token
from rlhf.trainers.base import BaseTrainer
from rlhf.trainers.config import BaseConfig
from rlhf.trainers.evaluating import Measures
from rlhf.trainers.metric_sums import Metrics
from rlhf.trainers.options import as_config

logger = logging.getLogger(__name__)


@dataclass
class RewardConfig(BaseConfig):
    """Arguments of :class:`RewardTrainer`; names and defaults are TRL's where TRL has the same thing."""

    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of AdamW."})
    center_rewards_coefficient: float | None = field(
        default=None, metadata={"help": "Weight of (chosen + rejected)², which centres rewards at 0; 0.01 is usual."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Train without dropout."})

    def __post_init__(self) -> None:
        super().__post_init__()
        one_pair = torch.ones(1)  # the loss itself checks its hyper-parameter, now rather than at the first step
        reward_loss(one_pair, one_pair, center_rewards_coefficient=self.center_rewards_coefficient or 0.0)

    def check_columns(self, columns: list[str]) -> None:
        check_preference_columns(columns, self.reading().form)


class RewardTrainer(BaseTrainer):
    r"""Train a causal LM with a scalar head so that chosen answers get the larger reward.

    .. math:: L = -\log\sigma(r_w - r_l - m) + c\,(r_w + r_l)^2

    The reward is read at the last token of an answer. The loss is the mean over the pairs of the whole optimizer step.
    ``AutoModelForSequenceClassification.from_pretrained(output_dir, num_labels=1)`` loads the saved model and gives the
    same score for the same tokens: the saved pad token is one that ends no answer, because transformers looks for the
    last token that is not the pad. An adapter's folder has no such config: pass ``pad_token_id=`` of its tokenizer.

    Args:
        model: a reward model, a causal LM (gets a new head of zeros), a PEFT model around a reward model, or a name or
            folder to load one from.
        args: the configuration.
        peft_config: train this adapter and the head instead of the weights.
        **kwargs: ``train_dataset`` and ``eval_dataset`` (rows of ``prompt``, ``chosen``, ``rejected`` and, if there is
            one, ``margin``: how far apart the rewards should be; or ids, ``chosen_ids`` and ``rejected_ids``, each
            with its prompt), ``processing_class``, ``callbacks``, … as in :class:`SFTTrainer`.
    Logs:
        ``loss`` (log 2 at the start, under a new head), ``accuracy`` (share of pairs whose chosen answer has the larger
        reward; a tie counts one half), ``margin`` (reward of the chosen answer minus that of the rejected one),
        ``mean_reward`` and ``std_reward`` (over all answers), ``rewards/chosen``, ``rewards/rejected``,
        ``brier_score`` (mean of (1 - sigmoid(margin)) squared; 0.25 is the score of random guessing); in evaluation
        also ``eval_calibration_error`` (:func:`rlhf.evaluation.calibration_error`), over the whole data set.
    Raises:
        ValueError: bad data, named by data set and row, before any step; or a model that cannot be a reward model.
    Example:
        ```python
        rows = [{"prompt": "What is 2 + 2?", "chosen": " It is 4.", "rejected": " It is 5."}]
        args = rlhf.RewardConfig("runs/reward", max_steps=100)
        trainer = rlhf.RewardTrainer("HuggingFaceTB/SmolLM2-135M-Instruct", args, train_dataset=rows)
        trainer.train()
        ```

    Source: Bradley and Terry 1952; Stiennon et al., arXiv 2009.01325, section 3.4.
    """

    config_class: ClassVar[type[BaseConfig]] = RewardConfig
    writes_text: ClassVar[bool] = False
    wrapper = RewardModel

    def __init__(
        self,
        model: Any,
        args: RewardConfig | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        args = as_config(args, RewardConfig)
        if isinstance(model, str):
            quantization = kwargs.pop("quantization_config", None)
            options = {} if quantization is None else {"quantization_config": quantization}
            model = load_reward_model(model, **args.model_kwargs() | options)
        if isinstance(model, RewardModel):
            model = model.model
        elif not hasattr(model, "get_base_model") and model.get_output_embeddings() is not None:
            model = add_scalar_head(model)  # a causal LM; an adapter brings the head of its own base
        if peft_config is not None:
            peft_config.task_type = "SEQ_CLS"  # the head is trained and saved with the adapter
        self._end_tokens: set[int] = set()
        super().__init__(model, args, peft_config=peft_config, **kwargs)
        if self.train_dataset is not None:
            self._choose_pad_token()

    def tokenize(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: Any, vocab_size: int) -> Dataset:
        columns = set(dataset.column_names or [])
        if {"chosen_ids", "rejected_ids"} <= columns and "prompt_ids" not in columns:
            # Whole sequences, each with its prompt: nothing is shared.
            dataset = dataset.map(lambda row: {"prompt_ids": []})
        # A margin is used wherever rows have one, as in TRL.
        rows = tokenize_preferences(dataset, tokenizer, vocab_size=vocab_size, margin=True, **args.tokenize_kwargs())
        self._end_tokens |= last_tokens(sample(rows))
        return rows

    def _choose_pad_token(self) -> None:
        """Save a pad token that ends no answer: transformers' own pooling reads the last token that is not the pad."""
        config, vocab_size = self.model.config, vocabulary_size(self.model)
        tokenizer: Any = copy.deepcopy(self.processing_class)
        pad_id = spare_pad_token(tokenizer, self._end_tokens, vocab_size)
        if pad_id is None:
            logger.warning(
                "no special token of the tokenizer is free to pad with: AutoModelForSequenceClassification will score "
                "one sequence at a time (rlhf.models.RewardModel any number)"
            )
        # Trainer brings the config in line with the tokenizer.
        tokenizer.pad_token = None if pad_id is None else tokenizer.convert_ids_to_tokens(pad_id)
        tokenizer.padding_side = "right"  # what models with absolute positions need
        config.get_text_config().pad_token_id = pad_id
        self.processing_class = tokenizer

    def count(self, batch: Batch) -> int:
        return batch.targets.num_sequences // 2  # two sequences make a pair

    def measure(self, model: nn.Module, batch: Batch) -> Measures:
        # One reward for each answer; those of a pair are neighbours.
        chosen, rejected = model(batch).view(-1, 2).unbind(1)
        margin = batch.per_sequence.get("margin")
        losses = reward_loss(
            chosen,
            rejected,
            0.0 if margin is None else margin.view(-1, 2)[:, 0],
            center_rewards_coefficient=self.args.center_rewards_coefficient or 0.0,
            reduction="none",
        )
        return Measures(losses, torch.ones_like(losses), self._pair_metrics(model, chosen.detach(), rejected.detach()))

    def _pair_metrics(self, model: nn.Module, chosen: Tensor, rejected: Tensor) -> Metrics:
        """Sums and counts of pairs, from the rewards of their answers, [S]."""
        margins = chosen - rejected
        pair_counts = torch.ones_like(margins)
        metrics = {
            "accuracy": ((margins > 0) + 0.5 * (margins == 0), pair_counts),
            "margin": (margins, pair_counts),
            "mean_reward": (chosen + rejected, 2 * pair_counts),
            "squared_reward": (chosen**2 + rejected**2, 2 * pair_counts),
            "rewards/chosen": (chosen, pair_counts),
            "rewards/rejected": (rejected, pair_counts),
            "brier_score": (torch.sigmoid(-margins) ** 2, pair_counts),
        }
        if not model.training:
            # The error of calibration is no mean over pairs: the gap and the count of each bin are added up instead.
            gaps, counts = calibration_bins(margins)
            for index, gap_and_count in enumerate(zip(gaps.unbind(1), counts.unbind(1), strict=True)):
                metrics[f"bin/{index}"] = gap_and_count
        return metrics

    def predictions(self, model: Any, batch: Batch) -> tuple[Any, Tensor]:
        """Rewards of the chosen and the rejected answers [pairs, 2]; the label is 0, where the better one should be."""
        rewards = model(batch).view(-1, 2)
        return rewards, torch.zeros_like(rewards[:, 0], dtype=torch.int64)

    def reduce_metrics(self, sums: dict[str, tuple[float, float]]) -> dict[str, float]:
        bin_sums = [sums[name] for name in sums if name.startswith("bin/")]
        values = super().reduce_metrics({name: sums[name] for name in sums if not name.startswith("bin/")})
        variance = values.pop("squared_reward") - values["mean_reward"] ** 2
        values["std_reward"] = math.sqrt(max(variance, 0.0))  # rounding may leave less than nothing
        if bin_sums:
            gaps, counts = zip(*bin_sums, strict=True)
            values["calibration_error"] = calibration_error(list(gaps), list(counts))
        return values


def last_tokens(rows: Dataset) -> set[int]:
    """The ids that end an answer in tokenised rows of pairs."""
    arrow_table = rows.with_format("arrow")[:]
    tokens: set[int] = set()
    for answers in (arrow_table["chosen_ids"], arrow_table["rejected_ids"]):
        last_positions = pc.list_value_length(answers).to_numpy().cumsum() - 1
        tokens |= set(np.unique(pc.list_flatten(answers).to_numpy()[last_positions]).tolist())
    return tokens
