"""What a model is with its adapter switched off: the model that training starts from, or something else."""

import logging
from typing import Any

import torch
from torch import Tensor

from rlhf.models.policy import still

logger = logging.getLogger(__name__)


def adapter_off_stays(model: Any) -> bool:
    """Whether a PEFT model with its adapter off is the same whatever is learned (``bias="all"`` stays on, say).

    A forward pass of 16 tokens, before and after every learned weight is moved; True where the weights cannot be read.
    """
    before = off(model)
    return before is None or same(before, moved(model))


def adapter_off_is_start(model: Any) -> bool:
    """Whether a PEFT model with its adapter off is, whatever is learned, the model that training starts from.

    That is the model as it was before :func:`add_adapter`, or else as it is now with its adapter on. So it is under a
    new LoRA adapter, and not under PiSSA, an adapter that is trained already, or ``bias="all"``: the frozen reference
    is then a copy, and this says so. True where the weights cannot be read (sharded).
    """
    with still(model):
        now = probe(model)
    if now is None:
        return True
    starts = model.off_was_before if hasattr(model, "off_was_before") else same(now, off(model))
    if starts and adapter_off_stays(model):
        return True
    configs = [model.peft_config[name] for name in model.active_adapters]
    told = [f"{c.peft_type.value} adapter, bias {getattr(c, 'bias', 'none')!r}" for c in configs]
    logger.warning(
        "the model with its adapter off is not the model that training starts from (%s): a frozen copy is the "
        "reference; to save that memory, merge the adapter first, or train a new LoRA adapter without biases",
        "; ".join(told),
    )
    return False


@torch.no_grad()
def probe(model: Any) -> Tensor | None:
    """Logits of 16 tokens (of a reward model, last hidden states); None where the weights are sharded, or on meta."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if any(p.is_meta or hasattr(p, "ds_id") for p in inner.parameters()):
        return None
    embeddings = inner.get_input_embeddings().weight
    ids = torch.arange(1, 17, device=embeddings.device)[None] % embeddings.size(0)
    inputs = dict(input_ids=ids, use_cache=False)
    # A new reward model says 0 of everything.
    found: Tensor = inner.base_model(**inputs)[0] if hasattr(inner, "score") else inner(**inputs).logits
    return found.float()


def off(model: Any) -> Tensor | None:
    with still(model), model.disable_adapter():
        return probe(model)


@torch.no_grad()
def moved(model: Any) -> Tensor | None:
    learned = [p for p in model.parameters() if p.requires_grad]
    kept = [p.detach().clone() for p in learned]
    try:
        for p in learned:
            p.add_(0.5)
        return off(model)
    finally:
        for p, value in zip(learned, kept, strict=True):
            p.copy_(value)


def same(one: Tensor, other: Tensor | None) -> bool:
    return other is None or torch.allclose(one, other, rtol=0, atol=1e-4 * float(one.abs().max()))
