"""Direct preference optimisation and its family, on pairs against a frozen reference."""

from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf.data import Batch, tokenize_preferences
from rlhf.trainers.config import BaseConfig
from rlhf.trainers.dpo_config import DPOConfig
from rlhf.trainers.evaluating import Measures
from rlhf.trainers.metric_sums import Metrics
from rlhf.trainers.pair_weights import tail_weights, wpo_weights
from rlhf.trainers.referenced import ReferencedTrainer
from rlhf.trainers.token_kl import WeightedKL


class DPOTrainer(ReferencedTrainer):
    """Align a policy with preference pairs.

    The reference is, under a new adapter, the model with the adapter off; otherwise a frozen copy of the weights as
    they are now (or ``ref_model``). The loss is the mean over the pairs of the whole optimizer step.

    Args:
        model: a model, a PEFT model, or a name or folder to load one from.
        ref_model: another reference, as a model or by name.
        args: the configuration.
        **kwargs: ``train_dataset`` and ``eval_dataset`` (rows of ``prompt``, ``chosen``, ``rejected``, and ``margin``
            for ``odpo``), ``processing_class``, ``peft_config``, ``callbacks``, … as in :class:`SFTTrainer`.
    Logs:
        ``loss`` (log 2 at the start, for ``sigmoid``), ``rewards/chosen`` and ``rewards/rejected``
        (beta * log-ratio to the reference), ``rewards/margins`` (their difference), ``log_ratios/margins`` (the same
        without beta, in nats), ``rewards/accuracies`` (share of
        pairs whose margin is positive; a tie counts one half, so policy = reference gives 0.5), ``logps/chosen`` and
        ``logps/rejected`` (sums over completion tokens, in nats), ``perplexity/chosen`` (of all chosen tokens).
    Raises:
        ValueError: bad data, named by data set and row, before any step.
    Example:
        ```python
        rows = [{"prompt": "What is 2 + 2?", "chosen": " It is 4.", "rejected": " It is 5."}]
        args = rlhf.DPOConfig("runs/dpo", beta=0.1, max_steps=100)
        trainer = rlhf.DPOTrainer("HuggingFaceTB/SmolLM2-135M-Instruct", args=args, train_dataset=rows)
        trainer.train()
        ```
    """

    config_class: ClassVar[type[BaseConfig]] = DPOConfig
    balances: ClassVar[bool] = True
    exp_metrics: ClassVar[frozenset[str]] = frozenset({"perplexity/chosen"})

    ref_tokens: ClassVar[tuple[str, ...]] = ("prompt_ids", "chosen_ids", "rejected_ids", "labels")
    ref_columns: ClassVar[tuple[str, ...]] = ("ref_chosen_logps", "ref_rejected_logps")

    def set_up(self) -> None:
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return
        if self.args.use_weighting:
            raise ValueError(
                "use_weighting reads the head once more, which is sharded under FSDP and DeepSpeed: leave it out"
            )
        if self.args.reads_kl():
            raise ValueError(
                f"loss_type {' '.join(self.args.loss_type)} reads the reference's head, which is sharded under FSDP "
                "and DeepSpeed: take another loss"
            )

    def tokenize(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: Any, vocab_size: int) -> Dataset:
        needs_margin = args.reads_margin()
        options = args.tokenize_kwargs()
        rows = tokenize_preferences(dataset, tokenizer, vocab_size=vocab_size, margin=needs_margin, **options)
        if needs_margin and "margin" not in (rows.column_names or []):
            raise ValueError(
                f"loss_type {' '.join(args.loss_type)} reads the column margin, which the rows do not have: add it, or "
                "give one number to all pairs, --loss_kwargs '{\"margin\": 1.0}'"
            )
        return rows

    def count(self, batch: Batch) -> int:
        return batch.targets.num_sequences // 2  # two sequences make a pair

    def sums(self, batch: Batch, logps: Tensor) -> Tensor:
        """Sums over each answer, [S]; with ld_alpha, tokens beyond the shorter answer of a pair count that much."""
        if self.args.ld_alpha is None:
            return super().sums(batch, logps)
        return batch.targets.sum(logps * tail_weights(batch.targets, self.args.ld_alpha))

    def reference_key(self) -> str:
        # ld_alpha weighs the reference's sums too, so that those of another value cannot be reused.
        return "" if self.args.ld_alpha is None else f"-ld{self.args.ld_alpha}"

    def measure(self, model: nn.Module, batch: Batch) -> Measures:
        if self.args.reads_kl():
            return self._measure_with_kl(model, batch)
        # The reference first, while no activations of the policy are in memory.
        ref_sums = self.ref_sums(model, batch)
        scores = model(batch)
        sums = self.sums(batch, scores.logps)
        losses = self._losses(batch, sums, ref_sums)
        # Weights carry no gradient; the policy runs once more, for the whole distribution at each token.
        if self.args.use_weighting:
            policy = self.accelerator.unwrap_model(model)
            losses = losses * wpo_weights(policy, batch, scores.logps.detach())
        metrics = self._metrics(batch, scores.logps.detach(), sums.detach(), ref_sums)
        return Measures(losses, torch.ones_like(losses), metrics, router_logits=scores.router_logits)

    def _measure_with_kl(self, model: nn.Module, batch: Batch) -> Measures:
        """The same for losses that read the KL to the reference, whose gradient goes through all predictions.

        A loss is a function of sums over sequences. A first pass, without gradient, finds these and the derivatives of
        the loss in them. A second pass takes the gradient of the sum of all tokens weighted by these derivatives.
        """
        assert self.reference is not None  # the configuration keeps it
        with torch.no_grad(), self.accelerator.autocast():
            reference = self.reference.predictions(batch)
            zero_weights = torch.zeros(len(batch.targets), device=reference.rows.device)
            scores = model(batch, WeightedKL(reference, zero_weights, zero_weights))
        ref_sums = self.sums(batch, scores.teacher.logps)
        metrics = self._metrics(batch, scores.logps, self.sums(batch, scores.logps), ref_sums)
        sums = self.sums(batch, scores.logps).requires_grad_()
        sequence_kls = batch.targets.sum(scores.teacher.kl).requires_grad_()
        losses = self._losses(batch, sums, ref_sums, sequence_kls)
        total = None
        if torch.is_grad_enabled():
            # A loss may read only one of the two: its derivative in the other is 0.
            loss_derivatives = torch.autograd.grad(
                losses.sum(), (sums, sequence_kls), allow_unused=True, materialize_grads=True
            )
            logp_weight, kl_weight = (derivative[batch.targets.sequence] for derivative in loss_derivatives)
            scores = model(batch, WeightedKL(reference, logp_weight, kl_weight))
            # The value of the loss with the gradient of the weighted sum.
            total = losses.detach().sum() + scores.loss - scores.loss.detach()
        losses = losses.detach()
        return Measures(losses, torch.ones_like(losses), metrics, total, scores.router_logits)

    def _losses(self, batch: Batch, sums: Tensor, ref_sums: Tensor, kls: Tensor | None = None) -> Tensor:
        """The loss of each pair, from sums over its two sequences: the chosen answer, then the rejected one."""
        lengths = batch.targets.counts()
        by_sequence = {"lengths": lengths} if kls is None else {"lengths": lengths, "kl": kls}
        columns = {}
        for name, values in by_sequence.items():
            columns[f"chosen_{name}"], columns[f"rejected_{name}"] = values.view(-1, 2).unbind(1)
        if "margin" in batch.per_sequence:  # the same at both sequences of a pair
            columns["margin"] = batch.per_sequence["margin"].view(-1, 2)[:, 0]
        return self.args.loss(*sums.view(-1, 2).unbind(1), *ref_sums.view(-1, 2).unbind(1), **columns)

    def _metrics(self, batch: Batch, logps: Tensor, sums: Tensor, ref_sums: Tensor) -> Metrics:
        """What is logged of pairs, from log-probs without gradient."""
        chosen, rejected = sums.view(-1, 2).unbind(1)
        ref_chosen, ref_rejected = ref_sums.view(-1, 2).unbind(1)
        metrics = pair_metrics(chosen, rejected, ref_chosen, ref_rejected, self.args.beta)
        chosen_nll = -batch.targets.sum(logps).view(-1, 2)[:, 0]
        # A count of tokens, not of pairs: the perplexity is that of all chosen tokens together.
        metrics["perplexity/chosen"] = (chosen_nll, batch.targets.counts().view(-1, 2)[:, 0])
        return metrics


def pair_metrics(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Metrics:
    """The implicit rewards of pairs, beta times the log-ratio to the reference, and how they compare.

    Args:
        chosen: [S], log-probabilities of the chosen answers under the policy, in nats, without gradient.
        rejected: the same of the rejected answers.
        ref_chosen: [S], the same under the reference.
        ref_rejected: the same of the rejected answers.
        beta: > 0.
    Returns:
        By name, [S] values and [S] counts of 1.
    """
    chosen_rewards = beta * (chosen - ref_chosen)
    rejected_rewards = beta * (rejected - ref_rejected)
    margins = chosen_rewards - rejected_rewards
    # A tie within rounding: sums that were stored differ in their last bits from those computed now.
    is_tie = margins.abs() <= 1e-6 * beta * (chosen + rejected).abs()
    values = {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": torch.where(is_tie, 0.5, (margins > 0).to(margins.dtype)),
        "rewards/margins": margins,
        # Without beta, so that runs with different betas compare.
        "log_ratios/margins": (chosen - ref_chosen) - (rejected - ref_rejected),
        "logps/chosen": chosen,
        "logps/rejected": rejected,
    }
    pair_counts = torch.ones_like(margins)
    return {name: (value, pair_counts) for name, value in values.items()}
