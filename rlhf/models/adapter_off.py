"""What a model is with its adapter switched off: the model that training starts from, or another."""

import logging
from typing import Any

import torch
from torch import Tensor

from rlhf.models.policy import eval_mode

logger = logging.getLogger(__name__)

_PROBE_TOKENS = 16
_SHIFT = 0.5  # large against any weight, so that a weight that is still in use changes the logits
_TOLERANCE = 1e-4  # relative to the largest logit


def adapter_off_stays(model: Any) -> bool:
    """Whether a PEFT model with its adapter off stays the same during training.

    It does not with ``bias="all"``, whose biases stay on. The logits of 16 tokens are compared before and after every
    weight that is trained is moved.

    Args:
        model: The PEFT model.

    Returns:
        False if it changes; True also if the weights cannot be read (sharded).
    """
    logits_before = logits_without_adapter(model)
    return logits_before is None or are_same(logits_before, _logits_after_moving(model))


def adapter_off_is_start(model: Any) -> bool:
    """Whether a PEFT model with its adapter off is always the model that training started from.

    That is the model before :func:`add_adapter`, or else the model as it is now, with its adapter on. It is so under a
    new LoRA adapter. It is not under PiSSA, an adapter that is trained already, or ``bias="all"``: then a warning says
    that the frozen reference is a copy.

    Args:
        model: The PEFT model.

    Returns:
        Whether it is; True also if the weights cannot be read (sharded).
    """
    with eval_mode(model):
        logits = probe_logits(model)
    if logits is None:
        return True
    if hasattr(model, "off_was_before"):
        is_start = model.off_was_before
    else:
        is_start = are_same(logits, logits_without_adapter(model))
    if is_start and adapter_off_stays(model):
        return True
    configs = [model.peft_config[name] for name in model.active_adapters]
    descriptions = [f"{config.peft_type.value} adapter, bias {getattr(config, 'bias', 'none')!r}" for config in configs]
    logger.warning(
        "the model with its adapter off is not the model that training starts from (%s): a frozen copy is the "
        "reference; to save that memory, merge the adapter first, or train a new LoRA adapter without biases",
        "; ".join(descriptions),
    )
    return False


@torch.no_grad()
def probe_logits(model: Any) -> Tensor | None:
    """Compute the logits of 16 tokens; of a reward model, the last hidden states.

    Args:
        model: A transformers or PEFT model.

    Returns:
        [1, 16, V] (or [1, 16, d]), float32; None if the weights are sharded or on the meta device.
    """
    # The transformers model itself, as the policy calls it: PEFT's layers are inside.
    base_model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if any(parameter.is_meta or hasattr(parameter, "ds_id") for parameter in base_model.parameters()):
        return None
    embeddings = base_model.get_input_embeddings().weight
    probe_ids = torch.arange(1, _PROBE_TOKENS + 1, device=embeddings.device) % embeddings.size(0)
    inputs = {"input_ids": probe_ids[None], "use_cache": False}
    is_reward_model = hasattr(base_model, "score")
    # The head of a new reward model is zero, so its rewards would tell nothing.
    output: Tensor = base_model.base_model(**inputs)[0] if is_reward_model else base_model(**inputs).logits
    return output.float()


def logits_without_adapter(model: Any) -> Tensor | None:
    """As :func:`probe_logits`, with the adapter off and without dropout."""
    # Dropout would make two passes of one model differ.
    with eval_mode(model), model.disable_adapter():
        return probe_logits(model)


@torch.no_grad()
def _logits_after_moving(model: Any) -> Tensor | None:
    """As :func:`logits_without_adapter`, while all weights that are trained are moved."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    originals = [parameter.detach().clone() for parameter in trained]
    try:
        for parameter in trained:
            # Unmoved, a weight that acts with the adapter off would not show: a new adapter changes nothing yet.
            parameter.add_(_SHIFT)
        return logits_without_adapter(model)
    finally:
        for parameter, original in zip(trained, originals, strict=True):
            # From copies: subtracting the shift again would leave a rounding error.
            parameter.copy_(original)


def are_same(first: Tensor, second: Tensor | None) -> bool:
    """Whether two logits agree; True if the second could not be computed."""
    return second is None or torch.allclose(first, second, rtol=0, atol=_TOLERANCE * float(first.abs().max()))
