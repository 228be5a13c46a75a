"""DDP waits for the gradient of each trainable parameter: those that text never reaches are frozen before training."""

import logging
from typing import Any

from accelerate import Accelerator

from rlhf.models.policy import Wrapper
from rlhf.models.unreached import unreached_parameters, unreached_parts
from rlhf.trainers.sharding import uses_ddp

logger = logging.getLogger(__name__)


def settle_unused_parameters(policy: Wrapper, accelerator: Accelerator, is_decided: bool) -> None:
    """Freeze the parts of a model that text never reaches; for other unreached parameters let DDP look at each step.

    Nothing happens in one process, and where weights are sharded: only DDP waits for missing gradients.

    Args:
        policy: the wrapper around the model; parameters may be frozen.
        accelerator: of the run, before it prepares the model.
        is_decided: whether the user has set ``ddp_find_unused_parameters``.
    """
    if is_decided or not uses_ddp(accelerator):
        return
    names = unreached_parameters(policy)
    parts = unreached_parts(policy.without_adapter, names)
    parameters = dict(policy.without_adapter.named_parameters())
    for part_names in parts.values():
        for name in part_names:
            parameters[name].requires_grad_(False)
    if parts and accelerator.is_main_process:
        logger.warning("frozen, because text never reaches them: %s", ", ".join(parts))
    # Which experts are chosen depends on the batch, so these must be looked for at each step.
    others = [name for name in names if parameters[name].requires_grad]
    if others:
        handler: Any = accelerator.ddp_handler
        handler.find_unused_parameters = True
    if others and accelerator.is_main_process:
        logger.warning("DDP looks for unused parameters at each step: a trial text missed %s", _some(others))


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return names[0] + rest
