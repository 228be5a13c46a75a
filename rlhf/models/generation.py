"""A model's generation config: which tokens end an answer, and whether it can be saved."""

import logging
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)

_SAMPLING_OPTIONS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def mend_generation_config(model: nn.Module) -> None:
    """Make the generation config one that can be saved: if it has options of sampling, sampling is switched on.

    Args:
        model: Its ``generation_config`` is changed in place.

    Raises:
        ValueError: It cannot be saved for another reason.
    """
    config: Any = getattr(model, "generation_config", None)
    if config is None:
        return
    try:
        # The check that transformers makes when it saves: a run would fail at its first checkpoint.
        config.validate(strict=True)
        return
    except ValueError as error:
        reason = str(error)
    set_options = [option for option in _SAMPLING_OPTIONS if getattr(config, option, None) is not None]
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
    """Let generation stop at the tokens that end answers in training.

    Args:
        model: The ids are added to its ``generation_config.eos_token_id``.
        ends: Ids of tokens.
    """
    config: Any = getattr(model, "generation_config", None)
    if config is None:
        return
    configured = config.eos_token_id  # an id, a list of them, or None
    known_ends = list(configured) if isinstance(configured, list) else [configured]
    known_ends = [token_id for token_id in known_ends if token_id is not None]
    new_ends = [token_id for token_id in ends if token_id not in known_ends]
    if new_ends:
        all_ends = [*known_ends, *new_ends]
        # A single id stays a number, as checkpoints have it.
        config.eos_token_id = all_ends if len(all_ends) > 1 else all_ends[0]
