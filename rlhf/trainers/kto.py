"""KTO: answers that are good or bad by themselves, without partners, against a frozen reference."""

import logging
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import EvalLoopOutput

from rlhf.data import Batch, add_mismatched, tokenize_unpaired
from rlhf.data.columns import check_unpaired_columns
from rlhf.losses import kto_loss
from rlhf.trainers.config import BaseConfig
from rlhf.trainers.evaluating import Measures
from rlhf.trainers.parallelism import gather_rows
from rlhf.trainers.referenced import ReferencedConfig, ReferencedTrainer

logger = logging.getLogger(__name__)

LOSS_TYPES = ("kto", "apo_zero_unpaired")


@dataclass
class KTOConfig(ReferencedConfig):
    """Arguments of :class:`KTOTrainer`; names and defaults are TRL's where TRL has the same thing."""

    loss_type: str = field(
        default="kto",
        metadata={
            "help": "kto: against an estimate of the KL to the reference. apo_zero_unpaired: against 0, for good "
            "answers that are better than the model's own.",
            "choices": list(LOSS_TYPES),
        },
    )
    desirable_weight: float = field(default=1.0, metadata={"help": "Weight of the loss of good answers."})
    undesirable_weight: float = field(default=1.0, metadata={"help": "Weight of the loss of bad answers."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("desirable_weight", "undesirable_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number from 0 on, got {getattr(self, name)}")
        one_row = torch.ones(1)  # the loss itself checks its hyper-parameters, now rather than at the first step
        kto_loss(one_row, one_row, one_row > 0, self.beta)

    def check_columns(self, columns: list[str]) -> None:
        check_unpaired_columns(columns, self.reading().form)


class KTOTrainer(ReferencedTrainer):
    r"""Align a policy with answers that are marked good or bad.

    .. math:: \lambda_D[1 - \sigma(\beta(s - z))] \text{ if good, else } \lambda_U[1 - \sigma(\beta(z - s))],\;
              z = \max(0, \operatorname{mean}_i [\log\pi(y_{i-1}|x_i) - \log\pi_{ref}(y_{i-1}|x_i)])

    The loss is the mean over the rows of the whole optimizer step, and so is z: each prompt gets the answer of a row
    before it in the data set, to another prompt, and the mean runs over all micro-batches and ranks. In evaluation it
    runs over the data set. No number depends on how a step is split into batches. TRL rotates the answers within each
    micro-batch instead, and takes z over that; for a data set of one batch of different prompts the two are the same.

    Args:
        model: a model, a PEFT model, or a name or folder to load one from.
        ref_model: another reference, as a model or by name; see :class:`ReferencedTrainer`.
        args: the configuration.
        **kwargs: ``train_dataset`` and ``eval_dataset`` (rows of ``prompt``, ``completion`` and ``label`` (true: good),
            or pairs of ``chosen`` and ``rejected``, which become two rows each), ``processing_class``,
            ``peft_config``, ``callbacks``, … as in :class:`SFTTrainer`.
    Logs:
        ``loss`` (0.5 at the start, with weights of 1), ``kl`` (z, nats), ``rewards/chosen`` and ``rewards/rejected``
        (beta * log-ratio to the reference, of good and of bad answers), ``rewards/margins`` (their difference),
        ``log_ratios/margins`` (the same without beta, in nats),
        ``logps/chosen`` and ``logps/rejected`` (sums over completion tokens, in nats).
    Raises:
        ValueError: bad data, named by data set and row, before any step.
    Example:
        ```python
        rows = [
            {"prompt": "What is 2 + 2?", "completion": " It is 4.", "label": True},
            {"prompt": "What is 3 + 3?", "completion": " It is 5.", "label": False},
        ]
        args = rlhf.KTOConfig("runs/kto", max_steps=100)
        trainer = rlhf.KTOTrainer("HuggingFaceTB/SmolLM2-135M-Instruct", args=args, train_dataset=rows)
        trainer.train()
        ```

    Source: Ethayarajh et al., arXiv 2402.01306, section 4; apo_zero_unpaired: D'Oosterlinck et al., arXiv 2408.06266.
    """

    config_class: ClassVar[type[BaseConfig]] = KTOConfig
    balances: ClassVar[bool] = True

    ref_tokens: ClassVar[tuple[str, ...]] = (
        "prompt_ids", "completions", "labels", "mismatched", "mismatched_labels",
    )  # fmt: skip

    _kl: Tensor | float = 0.0  # z: of the optimizer step, or of the evaluation, that is under way

    def set_up(self) -> None:
        # The labels of a stream are unknown before it is read.
        if isinstance(self.train_dataset, Dataset):
            warn_of_unbalanced_labels(self.train_dataset["desirable"], self.args)

    @property
    def ref_columns(self) -> tuple[str, ...]:  # type: ignore[override]
        # apo_zero_unpaired compares with 0 instead of an estimate, and needs no other answers.
        return ("ref_logps", "ref_mismatched_logps") if self.args.loss_type == "kto" else ("ref_logps",)

    def reference_row(self, row: dict[str, Any]) -> dict[str, Any]:
        """The prompt with its own answer and that to another prompt."""
        completions, labels = row["completions"], row["labels"]
        if "mismatched" in row:
            completions, labels = completions + row["mismatched"], labels + row["mismatched_labels"]
        return {"prompt_ids": row["prompt_ids"], "completions": completions, "labels": labels}

    def tokenize(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: Any, vocab_size: int) -> Dataset:
        rows = tokenize_unpaired(dataset, tokenizer, vocab_size=vocab_size, **args.tokenize_kwargs())
        if args.loss_type != "kto":
            return rows
        # Drawn once over the whole data set, so that z does not depend on how a step is split into batches.
        return add_mismatched(rows, args.max_length, args.dataset_num_proc)

    def count(self, batch: Batch) -> int:
        return batch.targets.num_sequences

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor:
        # The loss of the first micro-batch needs the KL of the whole step, so it is estimated here, before any of them.
        count = super()._get_num_items_in_batch(batch_samples, device)
        kl_sums = [self._mismatched_kl(self.model_wrapped, batch.to(device)).sum() for batch in batch_samples]
        kl_sum = self.accelerator.reduce(torch.stack(kl_sums).sum())
        self._kl = (kl_sum / count).clamp(min=0)  # an estimate may be negative, a KL is not
        return count

    def _mismatched_kl(self, model: nn.Module, batch: Batch) -> Tensor:
        """Log-ratios to the reference of answers to other prompts, [S], in nats, without gradient."""
        mismatched: Any = batch.extras.get("mismatched")
        if mismatched is None:
            return torch.zeros(batch.targets.num_sequences, device=batch.input_ids.device)
        with torch.no_grad(), self.accelerator.autocast():
            logps = mismatched.targets.sum(model(mismatched).logps)
        return logps - self.ref_sums(model, mismatched)

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As for every trainer; the KL of the whole data set comes first."""
        # This estimate runs before the loop that switches dropout off.
        self.model.eval()
        batch_kls = [gather_rows(self.accelerator, self._mismatched_kl(self.model, batch)) for batch in dataloader]
        self._kl = torch.cat(batch_kls).mean().clamp(min=0)
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def measure(self, model: nn.Module, batch: Batch) -> Measures:
        args = self.args
        desirable = batch.per_sequence.get("desirable")  # [S] bool
        if desirable is None:
            raise ValueError("these rows have no 'label': pass them to the trainer as prompt, completion and label")
        ref_logps = self.ref_sums(model, batch)
        scores = model(batch)
        logps = batch.targets.sum(scores.logps)
        losses = kto_loss(
            logps,
            ref_logps,
            desirable,
            args.beta,
            kl=self._kl,
            desirable_weight=args.desirable_weight,
            undesirable_weight=args.undesirable_weight,
            reduction="none",
        )
        rewards = args.beta * (logps - ref_logps).detach()
        sequence_counts = torch.ones_like(rewards)
        metrics = {"kl": (self._kl * sequence_counts, sequence_counts)}
        for name, is_counted in (("chosen", desirable), ("rejected", ~desirable)):
            counts = is_counted * sequence_counts
            metrics[f"rewards/{name}"] = (rewards * counts, counts)
            metrics[f"logps/{name}"] = (logps.detach() * counts, counts)
        return Measures(losses, sequence_counts, metrics, router_logits=scores.router_logits)

    def reduce_metrics(self, sums: dict[str, tuple[float, float]]) -> dict[str, float]:
        values = super().reduce_metrics(sums)
        if "rewards/chosen" in values:
            values["rewards/margins"] = values["rewards/chosen"] - values["rewards/rejected"]
            # Without beta, so that runs with different betas compare.
            values["log_ratios/margins"] = values["rewards/margins"] / self.args.beta
        reported = {}
        for name, value in values.items():
            # NaN where a logging step had answers of one kind only: no value is known then.
            if not (name.startswith(("rewards/", "logps/", "log_ratios/")) and math.isnan(value)):
                reported[name] = value
        return reported


def warn_of_unbalanced_labels(labels: list[bool], args: KTOConfig) -> None:
    """Warn where answers of one kind weigh more than the paper's bounds allow (eq. 8), with weights that would fit.

    Args:
        labels: of the training rows, true for a good answer.
        args: its weights of good and bad answers.
    """
    num_good = sum(labels)
    num_bad = len(labels) - num_good
    if not num_good or not num_bad:
        label = "true" if num_good else "false"
        logger.warning("all %d rows have the label %s: KTO needs good and bad answers", len(labels), label)
        return
    # A weight may be 0.
    weight_ratio = args.desirable_weight * num_good / max(args.undesirable_weight * num_bad, 1e-12)
    if 1 <= round(weight_ratio, 2) <= 1.34:  # from 1 to 4/3
        return
    desirable_weight = args.undesirable_weight * num_bad / num_good
    undesirable_weight = args.desirable_weight * num_good / num_bad
    logger.warning(
        "%d good and %d bad answers: pass --desirable_weight %.2f (up to %.2f), or --undesirable_weight %.2f "
        "(down to %.2f), so that the good ones weigh 1 to 4/3 times as much",
        num_good, num_bad, desirable_weight, desirable_weight * 4 / 3, undesirable_weight, undesirable_weight * 3 / 4,
    )  # fmt: skip
