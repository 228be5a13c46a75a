"""Online DPO: pairs of the policy's own completions, chosen and rejected by their rewards."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rlhf.online.presets import OnlineDPOConfig
from rlhf.online.samples import RolloutBatch
from rlhf.online.trainer import PPOTrainer
from rlhf.trainers.config import BaseConfig
from rlhf.trainers.evaluating import Measures


class OnlineDPOTrainer(PPOTrainer):
    r"""DPO on the best and the worst of each prompt's completions, by reward; a tie is left out.

    The loss is the mean over the pairs of the optimizer step. Everything else is :class:`PPOTrainer`'s, also the
    arguments: ``model``, ``reward_funcs``, ``args``, ``train_dataset``, ``eval_dataset``, and so on.

    Logs:
        ``rewards/margins`` (beta times the difference of log-ratios), ``rewards/accuracies``, and what
        :class:`PPOTrainer` logs of its rollouts.
    Example:
        ```python
        def is_short(completions, **columns):
            return [-len(text) for text in completions]

        rows = [{"prompt": "What is 2 + 2?"}, {"prompt": "What is 3 + 3?"}]
        args = rlhf.OnlineDPOConfig("runs/online-dpo", max_steps=100)
        trainer = rlhf.OnlineDPOTrainer("HuggingFaceTB/SmolLM2-135M-Instruct", is_short, args, train_dataset=rows)
        trainer.train()
        ```

    Source: arXiv 2402.04792.
    """

    config_class: ClassVar[type[BaseConfig]] = OnlineDPOConfig

    def count(self, batch: Any) -> int:
        return sum(_pairs_in_loss(batch))

    def measure(self, model: nn.Module, batch: Any) -> Measures:
        targets, ref_logps = batch.targets, batch.per_token["ref_logps"]
        logps = model(batch).logps
        # The samples of a pair are neighbours: the chosen one, then the rejected one.
        chosen, rejected = _of_pairs(targets.sum(logps))
        ref_chosen, ref_rejected = _of_pairs(targets.sum(ref_logps))
        chosen_lengths, rejected_lengths = _of_pairs(targets.counts())
        losses = self.args.pair_loss(
            chosen, rejected, ref_chosen, ref_rejected, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths
        )
        # On the device, as a copy from the host would wait for it.
        chosen_in_loss, rejected_in_loss = _of_pairs(targets.sum(batch.per_token["in_loss"].float()) > 0)
        in_loss = chosen_in_loss & rejected_in_loss
        # A tie, or a sample without a reward, gives no preference. The divisor is the number of the other pairs.
        losses = torch.where(in_loss, losses, 0.0)
        pair_counts = in_loss.float()

        log_ratios = (logps - ref_logps).detach()
        chosen_log_ratio, rejected_log_ratio = _of_pairs(targets.sum(log_ratios))
        log_ratio_margins = chosen_log_ratio - rejected_log_ratio
        margins = self.args.beta * log_ratio_margins
        # A tie counts one half, as in offline DPO: policy = reference gives 0.5.
        accuracies = (margins > 0) + 0.5 * (margins == 0)
        kl = targets.sum(log_ratios)
        metrics = {
            "rewards/margins": (margins * pair_counts, pair_counts),
            "log_ratios/margins": (log_ratio_margins * pair_counts, pair_counts),
            "rewards/accuracies": (accuracies * pair_counts, pair_counts),
            "kl": (kl, torch.ones_like(kl)),
            # Estimated from the samples, which needs no pass over the logits.
            "entropy": (-logps.detach(), torch.ones_like(ref_logps)),
        }
        return Measures(losses, pair_counts, metrics)


def _of_pairs(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values of the chosen and of the rejected sequences, from those of all sequences [2 * pairs]."""
    chosen, rejected = values.view(-1, 2).unbind(1)
    return chosen, rejected


def _pairs_in_loss(batch: RolloutBatch) -> list[bool]:
    """Whether each pair has tokens of both samples in the loss."""
    chosen_lengths, rejected_lengths = batch.lengths[::2], batch.lengths[1::2]
    return [chosen > 0 and rejected > 0 for chosen, rejected in zip(chosen_lengths, rejected_lengths, strict=True)]
