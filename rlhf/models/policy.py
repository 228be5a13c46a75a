"""The module that is trained: a causal LM that answers with scores instead of logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from rlhf.data import Batch
from rlhf.logprobs import LocalLoss, Scores, model_scores, verified_settings
from rlhf.models.attention import NAME


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
        if batch.segments is not None and self.config._attn_implementation != NAME:
            raise ValueError("the batch is laid out in segments, the model is not ready for them: use_segments(model)")
        return model_scores(self.model, batch.targets, entropy=entropy, local_loss=local_loss, **batch.inputs())

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
