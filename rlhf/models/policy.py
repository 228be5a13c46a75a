"""The modules that are trained: around a transformers model, with a :class:`Batch` going in."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.data import Batch
from rlhf.logprobs import LocalLoss, Plan, Scores, model_scores, plan, verified_settings
from rlhf.models.attention import NAME
from rlhf.models.linear import speed_up_linear
from rlhf.models.remake import fewer_activations, slim


class Wrapper(nn.Module):
    """A transformers model (plain, or PEFT around one) under a forward of our own.

    This is what accelerate wraps, so that the hooks of DDP, FSDP2 and ZeRO fire. Everything else about the model
    (``config``, ``generate``, ``save_pretrained``, …) is reached through it as if it were the model itself.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        slim(model)
        speed_up_linear(model)

    @property
    def has_adapter(self) -> bool:
        return hasattr(self.model, "get_base_model")

    @property
    def without_adapter(self) -> Any:
        """The transformers model, also where PEFT is around it."""
        return self.model.get_base_model() if self.has_adapter else self.model  # type: ignore[operator]

    def head_plan(self, *args: Any, **kwargs: Any) -> Plan | None:
        """How ``forward``, called the same way, goes about the head; None where the model runs its own."""
        return None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)


class Policy(Wrapper):
    """A causal LM (plain, or PEFT around one) whose forward takes a :class:`Batch` and returns :class:`Scores`.

    ``temperature`` divides its logits: that of sampling, in on-policy training.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.temperature = 1.0
        self.value_head: nn.Module | None = None
        self.critic: Any = None  # of an ActorCritic
        # Before anything shards the weights: read the head and check it against the model's own logits.
        verified_settings(self.without_adapter)

    def forward(
        self,
        batch: Batch,
        local_loss: LocalLoss | None = None,
        entropy: bool = False,
        per_token: tuple[Tensor, ...] = (),
    ) -> Scores:
        if batch.segments is not None and self.config._attn_implementation != NAME:
            raise ValueError("the batch is laid out in segments, the model is not ready for them: use_segments(model)")
        with fewer_activations():
            return model_scores(
                self.model,
                batch.targets,
                entropy=entropy,
                local_loss=local_loss,
                per_token=per_token,
                temperature=self.temperature,
                value_head=self.value_head,
                **batch.inputs(),
            )

    def head_plan(
        self,
        batch: Batch,
        local_loss: LocalLoss | None = None,
        entropy: bool = False,
        per_token: tuple[Tensor, ...] = (),
    ) -> Plan | None:
        model = self.without_adapter
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
