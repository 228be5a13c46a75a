"""A model's generation config: what ends an answer, and whether it can be saved."""

import logging
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def mend_generation_config(model: nn.Module) -> None:
    """Make the generation config one that can be saved: options of sampling mean that sampling is on.

    Args:
        model: its ``generation_config`` is changed in place.
    Raises:
        ValueError: it cannot be saved for another reason.
    """
    config: Any = getattr(model, "generation_config", None)
    if config is None:
        return
    try:
        config.validate(strict=True)
        return
    except ValueError as error:
        reason = str(error)
    set_options = [name for name in _SAMPLING if getattr(config, name, None) is not None]
    if not config.do_sample and set_options:
        config.do_sample = True
        logger.warning(
            "generation_config.json sets %s without do_sample: do_sample is set, or it could not be saved",
            ", ".join(set_options),
        )
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise ValueError(f"generation_config.json could not be saved with the model: {reason}; mend it") from error


def add_answer_ends(model: nn.Module, ends: list[int]) -> None:
    """Let generation end where answers were taught to end: ``ends`` join ``generation_config.eos_token_id``."""
    config: Any = getattr(model, "generation_config", None)
    if config is None:
        return
    named = config.eos_token_id
    known = list(named) if isinstance(named, list) else [] if named is None else [named]
    new = [token for token in ends if token not in known]
    if new:
        together = [*known, *new]
        config.eos_token_id = together if len(together) > 1 else together[0]
