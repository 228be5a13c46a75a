"""Online DPO: pairs of the policy's own completions, judged as they are made."""

from typing import Any, ClassVar

import torch
from torch import nn

from rlhf.online.presets import OnlineDPOConfig
from rlhf.online.trainer import PPOTrainer
from rlhf.trainers.base import BaseConfig, Measures


class OnlineDPOTrainer(PPOTrainer):
    r"""DPO on the best and the worst of each prompt's completions, by reward; a tie teaches nothing and is left out.

    The loss is the mean over the pairs of the optimizer step; everything else is :class:`PPOTrainer`'s.

    Logs:
        ``rewards/margins`` (beta times the difference of log-ratios), ``rewards/accuracies``, and what
        :class:`PPOTrainer` logs of its rollouts.

    Source: arXiv 2402.04792.
    """

    config_class: ClassVar[type[BaseConfig]] = OnlineDPOConfig

    def count(self, batch: Any) -> int:
        return sum(_both(batch.lengths))

    def measure(self, model: nn.Module, batch: Any) -> Measures:
        targets = batch.targets
        logps = model(batch).logps
        chosen, rejected = targets.sum(logps).view(-1, 2).unbind(1)
        ref_logps = batch.per_token["ref_logps"]
        ref_chosen, ref_rejected = targets.sum(ref_logps).view(-1, 2).unbind(1)
        lengths = targets.counts().view(-1, 2).unbind(1)
        losses = self.args.pair_loss(
            chosen, rejected, ref_chosen, ref_rejected, chosen_lengths=lengths[0], rejected_lengths=lengths[1]
        )
        says = torch.tensor(_both(batch.lengths), device=losses.device)
        losses, counted = torch.where(says, losses, 0.0), says.float()
        margins = self.args.beta * ((chosen - ref_chosen) - (rejected - ref_rejected)).detach()
        tokens = torch.ones_like(ref_logps)
        metrics = {
            "rewards/margins": (margins * counted, counted),
            "rewards/accuracies": (((margins > 0) + 0.5 * (margins == 0)) * counted, counted),
            "kl": (targets.sum((logps - ref_logps).detach()), torch.ones_like(targets.sum(tokens))),
            "entropy": (-logps.detach(), tokens),
        }
        return Measures(losses, counted, metrics)


def _both(lengths: tuple[int, ...]) -> list[bool]:
    """Whether both answers of each pair count."""
    return [chosen > 0 and rejected > 0 for chosen, rejected in zip(lengths[::2], lengths[1::2], strict=True)]
