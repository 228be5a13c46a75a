"""Direct preference optimisation and its family, on pairs against a frozen reference."""

import copy
import logging
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf.data import Batch, Packed, tokenize_preferences
from rlhf.losses import PREFERENCE_LOSSES, arguments_of, dpo_loss
from rlhf.models import Policy, load_model
from rlhf.models.loading import adapter_is_trained
from rlhf.trainers.base import BaseConfig, BaseTrainer, Measures
from rlhf.trainers.reference import add_ref_logps, reference_fingerprint

logger = logging.getLogger(__name__)


@dataclass
class DPOConfig(BaseConfig):
    """Arguments of :class:`DPOTrainer`; names and defaults are TRL's where TRL has the same thing."""

    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate of AdamW."})
    beta: float = field(default=0.1, metadata={"help": "Larger stays nearer the reference."})
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": f"One of {', '.join(PREFERENCE_LOSSES)}; or several, whose weighted sum is taken."},
    )
    loss_weights: list[float] | None = field(default=None, metadata={"help": "One weight for each loss_type."})
    loss_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'What a loss takes besides, such as {"simpo_gamma": 1.0}.'}
    )
    label_smoothing: float = field(default=0.0, metadata={"help": "Chance that a pair is labelled the wrong way."})
    disable_dropout: bool = field(default=True, metadata={"help": "Train without dropout."})
    precompute_ref_log_probs: bool | None = field(
        default=None,
        metadata={
            "help": "Compute the reference's log-probs once, before training, and keep them on disk: no copy of the "
            "weights in memory. By default where rows are read more than once."
        },
    )
    precompute_ref_batch_size: int | None = field(
        default=None, metadata={"help": "Rows at a time in that pass; per_device_eval_batch_size by default."}
    )

    _VALID_DICT_FIELDS = [*BaseConfig._VALID_DICT_FIELDS, "loss_kwargs"]  # noqa: RUF012  # not a field

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        one = torch.ones(1)  # the loss itself checks its hyper-parameters, now rather than at the first step
        try:
            self.loss(one, one, one, one, chosen_lengths=one, rejected_lengths=one)
        except TypeError as error:
            raise ValueError(f"loss_type {' '.join(self.loss_type)}: {error}") from error

    def loss(self, *logps: Tensor, **lengths: Tensor) -> Tensor:
        """Loss of each pair, from the four sums of log-probabilities; [S]."""
        offered = {"label_smoothing": self.label_smoothing, **lengths}
        losses = [PREFERENCE_LOSSES[name] for name in self.loss_type if name in PREFERENCE_LOSSES]
        taken = {name: value for loss in losses for name, value in arguments_of(loss, offered).items()}
        own = self.loss_kwargs if isinstance(self.loss_kwargs, dict) else {}
        return dpo_loss(
            *logps, self.beta, loss_type=self.loss_type, loss_weights=self.loss_weights, reduction="none", **taken | own
        )


class DPOTrainer(BaseTrainer):
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

    def __init__(
        self,
        model: str | nn.Module,
        ref_model: str | nn.Module | None = None,
        args: DPOConfig | None = None,
        **kwargs: Any,
    ) -> None:
        args = args if args is not None else DPOConfig(output_dir="runs")
        super().__init__(model, args, **kwargs)
        self.ref_policy: Policy | None = None
        self.has_adapter = self.model.has_adapter
        precompute = args.precompute_ref_log_probs
        if precompute is None:
            precompute = self._reads_rows_again()
        if ref_model is not None:
            loaded = load_model(ref_model, **args.model_kwargs()) if isinstance(ref_model, str) else ref_model
            self.ref_policy = self.freeze(loaded)
            self.share_layout(self.ref_policy.model)
        elif not self.has_adapter:
            if not precompute:
                self.ref_policy = self.freeze(copy.deepcopy(self.model.model))
        elif kwargs.get("peft_config") is None and adapter_is_trained(self.model):
            logger.warning(
                "the reference is the model without its adapter, and this adapter is trained already; to align from "
                "where it stands, merge it first: model = model.merge_and_unload()"
            )
        if precompute:
            self._precompute()

    def _reads_rows_again(self) -> bool:
        """Whether training reads a row a second time, so that knowing its reference saves work."""
        args = self.args
        if self.train_dataset is None:
            return False
        if args.max_steps > 0:
            batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            return args.max_steps * batch > len(self.train_dataset)  # type: ignore[arg-type]
        return args.num_train_epochs > 1

    def _precompute(self) -> None:
        """Give every row the reference's sums; nothing is left to ask it then, and no copy is kept."""
        if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise ValueError("ZeRO-3 shards the weights before they could be asked: --precompute_ref_log_probs false")
        reference = self.ref_policy or self.model
        home = next(reference.parameters()).device
        reference.to(self.args.device).eval()

        fingerprint = reference_fingerprint(reference.model, self.accelerator.mixed_precision, self.ref_policy is None)

        def score(rows: list[dict[str, Any]]) -> Tensor:
            return self.ask_reference(reference, self.data_collator(rows).to(self.args.device))  # type: ignore[attr-defined]

        def add(rows: Any, name: str) -> Any:
            if isinstance(rows, Packed):
                rows.rows = add(rows.rows, name)
            elif rows is not None:
                size = self.args.precompute_ref_batch_size or self.args.per_device_eval_batch_size
                return add_ref_logps(rows, fingerprint, score, self.accelerator, size, name, self.args.disable_tqdm)
            return rows

        self.train_dataset = add(self.train_dataset, "training rows")
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: add(rows, name) for name, rows in self.eval_dataset.items()}
        else:
            self.eval_dataset = add(self.eval_dataset, "evaluation rows")
        self.ref_policy = None
        reference.to(home)

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

    def ref_sums(self, model: nn.Module, batch: Batch) -> Tensor:
        """Sums of log-probabilities under the reference, [S]: as stored, or asked of it now."""
        if batch.ref_logps is not None:
            return batch.ref_logps
        if self.ref_policy is None and not self.has_adapter:
            raise ValueError("these rows have no reference log-probs; train with --precompute_ref_log_probs false")
        return self.ask_reference(self.ref_policy or model, batch)

    def ask_reference(self, reference: nn.Module, batch: Batch) -> Tensor:
        """Its sums of log-probabilities, [S]; the trained model answers for it with the adapter off."""
        adapter_off = self.ref_policy is None and self.has_adapter
        off = self.accelerator.unwrap_model(reference).adapter_off() if adapter_off else nullcontext()
        with torch.no_grad(), self.accelerator.autocast(), off:
            return batch.targets.sum(reference(batch).logps)

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
