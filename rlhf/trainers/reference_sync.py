"""A reference that follows the policy (TR-DPO)."""

from typing import Any

import torch
from transformers import TrainerCallback

from rlhf.models import Policy


class SyncReference(TrainerCallback):
    """Every ``steps`` steps the reference becomes ``alpha`` of the policy and ``1 - alpha`` of itself.

    Args:
        reference: the frozen policy, changed in place; None is refused, as there is nothing to move.
        alpha: share of the policy, in (0, 1].
        steps: optimizer steps between two moves.
        is_sharded: whether the weights are sharded by FSDP or DeepSpeed.
    Raises:
        ValueError: no reference with weights of its own, or sharded weights.

    Source: Gorbatovski et al., arXiv 2404.09656.
    """

    def __init__(self, reference: Policy | None, alpha: float, steps: int, is_sharded: bool = False) -> None:
        if reference is None:
            raise ValueError(
                "sync_ref_model moves a copy of the weights: it needs a reference (beta above 0) and a full model, not "
                "an adapter"
            )
        if is_sharded:
            raise ValueError("sync_ref_model cannot read sharded weights: leave it off under FSDP and DeepSpeed")
        self.reference, self.alpha, self.steps = reference, alpha, steps

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Move the reference, at the steps that are due."""
        if state.global_step % self.steps:
            return
        policy = getattr(model, "module", model).model  # without DDP; a value head is no part of the reference
        for frozen, trained in zip(self.reference.model.parameters(), policy.parameters(), strict=True):
            frozen.lerp_(trained.to(frozen), self.alpha)
