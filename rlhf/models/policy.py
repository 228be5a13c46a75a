"""The module that is trained: a causal LM that answers with scores instead of logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rlhf.data import Batch
from rlhf.logprobs import LocalLoss, Plan, Scores, model_scores, plan, verified_settings


class Policy(nn.Module):
    """A causal LM (plain, or PEFT around one) whose forward takes a :class:`Batch` and returns :class:`Scores`.

    This is what accelerate wraps, so that the hooks of DDP, FSDP2 and ZeRO fire. Everything else about the model
    (``config``, ``generate``, ``save_pretrained``, …) is reached through it as if it were the model itself.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # Before anything shards the weights: read the head and check it against the model's own logits.
        verified_settings(model.get_base_model() if self.has_adapter else model)  # type: ignore[operator]

    @property
    def has_adapter(self) -> bool:
        return hasattr(self.model, "get_base_model")

    def forward(self, batch: Batch, local_loss: LocalLoss | None = None, entropy: bool = False) -> Scores:
        return model_scores(self.model, batch.targets, entropy=entropy, local_loss=local_loss, **batch.inputs())

    def head_plan(self, batch: Batch, local_loss: LocalLoss | None = None, entropy: bool = False) -> Plan | None:
        """How ``forward``, called the same way, goes about the head; None where the model runs its own."""
        model: Any = self.model.get_base_model() if self.has_adapter else self.model  # type: ignore[operator]
        settings = verified_settings(model)
        if settings is None:
            return None
        head = list(model.get_output_embeddings().parameters())
        return plan(
            len(batch.targets),
            min(settings.vocab_size or head[0].size(0), head[0].size(0)),
            batch.input_ids.device,
            learns=torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()),
            head_learns=any(p.requires_grad for p in head),
            local=local_loss is not None,
            entropy=entropy,
        )

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """The model as it was before the adapter: under LoRA, the reference."""
        with self.model.disable_adapter():  # type: ignore[operator]
            yield

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)
