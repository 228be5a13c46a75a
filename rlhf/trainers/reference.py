"""The frozen policy that a trained one is compared with, and how it may follow the policy (TR-DPO)."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf.data import Batch
from rlhf.logprobs import Predictions
from rlhf.models import Policy


@dataclass
class Reference:
    """A frozen policy: a separate model, or the trained policy with its adapter off.

    Attributes:
        policy: the trained policy, without what accelerate wraps around it.
        frozen: a policy with weights of its own; None where the adapter is switched off instead.
        sharded: what gathers the weights of ``frozen``, where they are sharded over the processes.
    """

    policy: Policy
    frozen: Policy | None
    sharded: nn.Module | None = None

    def logps(self, model: nn.Module, batch: Batch) -> Tensor:
        """Log-probs of the scored tokens under the reference. Gradients and autocast are up to the caller.

        Args:
            model: the trained policy as accelerate wrapped it, so that the hooks of DDP and FSDP run.
            batch: on the device.
        Returns:
            [N], in nats.
        """
        own = self.sharded or self.frozen
        if own is not None:
            return own(batch).logps
        # The wrapped model runs the forward pass: parameters sharded by FSDP are gathered by its hooks.
        with self.policy.adapter_off():
            logps: Tensor = model(batch).logps
        return logps

    def predictions(self, batch: Batch) -> Predictions:
        """The reference's predictions of the scored tokens, before the softmax.

        Args:
            batch: on the device.
        Returns:
            N rows and the head. Gradients and autocast are up to the caller.
        """
        if self.frozen is not None:
            return self.frozen.predictions(batch)
        # Without accelerate's hooks: losses that read predictions are refused where weights are sharded.
        with self.policy.adapter_off():
            return self.policy.predictions(batch)


@dataclass
class ReferenceSyncArguments:
    """Options of a reference that follows the policy; names and defaults are TRL's."""

    sync_ref_model: bool = field(
        default=False, metadata={"help": "Update the reference towards the policy during training (TR-DPO)."}
    )
    ref_model_mixup_alpha: float = field(
        default=0.6,
        metadata={"help": "Share of the policy in an update of the reference, in (0, 1]; needs sync_ref_model."},
    )
    ref_model_sync_steps: int = field(
        default=512, metadata={"help": "Steps between two updates of the reference; needs sync_ref_model."}
    )

    def check_sync(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: one of them is out of range.
        """
        # 1 replaces the whole reference, the paper's hard update.
        if not 0 < self.ref_model_mixup_alpha <= 1:
            raise ValueError(f"ref_model_mixup_alpha must be in (0, 1], got {self.ref_model_mixup_alpha}")
        if self.ref_model_sync_steps < 1:
            raise ValueError(f"ref_model_sync_steps must be at least 1, got {self.ref_model_sync_steps}")


class SyncReference(TrainerCallback):
    """Every ``steps`` steps the reference becomes ``alpha`` of the policy and ``1 - alpha`` of itself.

    Args:
        reference: the frozen policy, changed in place; None is refused, as there is nothing to move.
        args: ``ref_model_mixup_alpha``, the share of the policy, and ``ref_model_sync_steps``.
        is_sharded: whether the weights are sharded by FSDP or DeepSpeed.
    Raises:
        ValueError: no reference with weights of its own, or sharded weights.

    Source: Gorbatovski et al., arXiv 2404.09656.
    """

    def __init__(self, reference: Policy | None, args: ReferenceSyncArguments, is_sharded: bool) -> None:
        if reference is None:
            raise ValueError(
                "sync_ref_model moves a copy of the weights: it needs a reference (beta above 0) and a full model, not "
                "an adapter"
            )
        if is_sharded:
            raise ValueError("sync_ref_model cannot read sharded weights: leave it off under FSDP and DeepSpeed")
        self.reference = reference
        self.alpha = args.ref_model_mixup_alpha
        self.steps = args.ref_model_sync_steps

    @torch.no_grad()
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Move the reference, at the steps that are due."""
        if state.global_step % self.steps:
            return
        policy = getattr(model, "module", model).model  # without DDP; a value head is no part of the reference
        for frozen, trained in zip(self.reference.model.parameters(), policy.parameters(), strict=True):
            # In place, as the trainer holds these tensors. The reference may be on another device, or in another dtype.
            frozen.lerp_(trained.to(frozen), self.alpha)
