"""Direct preference optimisation and its family, on pairs against a frozen reference."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf.data import Batch, tokenize_preferences
from rlhf.data.formats import check_preference_columns
from rlhf.losses import PREFERENCE_LOSSES, arguments_of, dpo_loss
from rlhf.trainers.base import BaseConfig, Measures
from rlhf.trainers.referenced import ReferencedConfig, ReferencedTrainer


@dataclass
class DPOConfig(ReferencedConfig):
    """Arguments of :class:`DPOTrainer`; names and defaults are TRL's where TRL has the same thing."""

    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": f"One of {', '.join(PREFERENCE_LOSSES)}; or several, whose weighted sum is taken."},
    )
    loss_weights: list[float] | None = field(default=None, metadata={"help": "One weight for each loss_type."})
    loss_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'What a loss takes besides, such as {"simpo_gamma": 1.0}.'}
    )
    label_smoothing: float = field(default=0.0, metadata={"help": "Chance that a pair is labelled the wrong way."})

    _VALID_DICT_FIELDS = [*ReferencedConfig._VALID_DICT_FIELDS, "loss_kwargs"]  # noqa: RUF012  # not a field

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        one = torch.ones(1)  # the loss itself checks its hyper-parameters, now rather than at the first step
        try:
            self.loss(one, one, one, one, chosen_lengths=one, rejected_lengths=one)
        except TypeError as error:
            raise ValueError(f"loss_type {' '.join(self.loss_type)}: {error}") from error

    def check_columns(self, columns: list[str]) -> None:
        check_preference_columns(columns, self.reading().form)

    def loss(self, *logps: Tensor, **lengths: Tensor) -> Tensor:
        """Loss of each pair, from the four sums of log-probabilities; [S]."""
        offered = {"label_smoothing": self.label_smoothing, **lengths}
        losses = [PREFERENCE_LOSSES[name] for name in self.loss_type if name in PREFERENCE_LOSSES]
        taken = {name: value for loss in losses for name, value in arguments_of(loss, offered).items()}
        own = self.loss_kwargs if isinstance(self.loss_kwargs, dict) else {}
        return dpo_loss(
            *logps, self.beta, loss_type=self.loss_type, loss_weights=self.loss_weights, reduction="none", **taken | own
        )


class DPOTrainer(ReferencedTrainer):
    """Align a policy with preference pairs.

    The reference is, under a new adapter, the model with the adapter off; otherwise a frozen copy of the weights as
    they are now (or ``ref_model``). The loss is the mean over the pairs of the whole optimizer step.

    Args:
        model: a model, a PEFT model, or a name or folder to load one from.
        ref_model: another reference, as a model or by name.
        args: the configuration.
        train_dataset, eval_dataset: rows of ``prompt``, ``chosen``, ``rejected``.
        kwargs: ``processing_class``, ``peft_config``, ``callbacks``, … as in :class:`SFTTrainer`.
    Logs:
        ``loss`` (log 2 at the start, for ``sigmoid``), ``rewards/chosen`` and ``rewards/rejected``
        (beta * log-ratio to the reference), ``rewards/margins`` (their difference), ``rewards/accuracies`` (share of
        pairs whose margin is positive; a tie counts one half, so policy = reference gives 0.5), ``logps/chosen`` and
        ``logps/rejected`` (sums over completion tokens, in nats), ``perplexity/chosen`` (of all chosen tokens).
    Raises:
        ValueError: bad data, named by data set and row, before any step.
    """

    config_class: ClassVar[type[BaseConfig]] = DPOConfig
    exponentials: ClassVar[frozenset[str]] = frozenset({"perplexity/chosen"})

    ref_tokens: ClassVar[tuple[str, ...]] = ("prompt_ids", "chosen_ids", "rejected_ids", "labels")
    ref_columns: ClassVar[tuple[str, ...]] = ("ref_chosen_logps", "ref_rejected_logps")

    def tokenize(
        self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: Any, vocab_size: int
    ) -> Dataset:  # fmt: skip
        return tokenize_preferences(
            dataset,
            tokenizer,
            max_length=args.max_length,
            vocab_size=vocab_size,
            drop_long_prompts=args.drop_long_prompts,
            num_proc=args.dataset_num_proc,
            reading=args.reading(),
        )

    def count(self, batch: Batch) -> int:
        return batch.targets.num_sequences // 2

    def measure(self, model: nn.Module, batch: Batch) -> Measures:
        targets, args = batch.targets, self.args
        ref_chosen, ref_rejected = self.ref_sums(model, batch).view(-1, 2).unbind(1)
        chosen, rejected = targets.sum(model(batch).logps).view(-1, 2).unbind(1)
        chosen_lengths, rejected_lengths = targets.counts().view(-1, 2).unbind(1)
        losses = args.loss(
            chosen, rejected, ref_chosen, ref_rejected, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths
        )
        rewards_chosen = args.beta * (chosen - ref_chosen).detach()
        rewards_rejected = args.beta * (rejected - ref_rejected).detach()
        margins = rewards_chosen - rewards_rejected
        # A tie within rounding: sums that were stored differ in their last bits from those computed now.
        tie = margins.abs() <= 1e-6 * args.beta * (chosen + rejected).detach().abs()
        one = torch.ones_like(margins)
        metrics = {
            "rewards/chosen": rewards_chosen,
            "rewards/rejected": rewards_rejected,
            "rewards/accuracies": torch.where(tie, 0.5, (margins > 0).to(margins.dtype)),
            "rewards/margins": margins,
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }
        counted = {name: (value, one) for name, value in metrics.items()}
        return Measures(losses, one, {**counted, "perplexity/chosen": (-chosen, chosen_lengths)})
