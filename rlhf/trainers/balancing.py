"""The load-balancing loss of a mixture's routers, added to a trainer's loss."""

import logging
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rlhf.data import Batch
from rlhf.models import Balancing, Policy, Routing, balancing_of, routing
from rlhf.models.activations import check_checkpointing
from rlhf.models.policy import eval_mode

logger = logging.getLogger(__name__)


class Balancer:
    """The load-balancing loss of an optimizer step, in shares of its micro-batches.

    The loss depends on which experts all tokens of the step choose, so that the step must be known before the loss of
    its first micro-batch. No share depends on how the step is split.

    Args:
        balancing: experts of a token, and the weight of the loss.
        accelerator: of the run.
    """

    def __init__(self, balancing: Balancing, accelerator: Accelerator) -> None:
        self.balancing, self.accelerator = balancing, accelerator
        self._step: Routing | None = None  # of all micro-batches and ranks, where there are several

    def look_ahead(self, model: nn.Module, batches: list[Batch]) -> None:
        """Count which experts the whole step chooses.

        Where a step has several batches, this costs one more forward pass, without gradient.

        Args:
            model: the policy, as accelerate wrapped it.
            batches: the micro-batches of the step, of this process.
        """
        self._step = None
        if len(batches) == 1 and self.accelerator.num_processes == 1:
            return  # the batch is the step: its own forward pass counts
        counts = []
        for batch in batches:
            # In eval mode this pass draws no random numbers that the training pass would miss.
            with torch.no_grad(), self.accelerator.autocast(), eval_mode(model):
                logits = model(batch).router_logits
            batch_routing = routing(logits, batch, self.balancing.top_k)
            counts.append(torch.cat([batch_routing.chosen, batch_routing.probs, batch_routing.rows[None]]))
        # One reduction for all of them: sums over the batches here, then over the processes.
        total: Tensor = self.accelerator.reduce(torch.stack(counts).sum(0))
        chosen, probs = total[:-1].chunk(2)
        self._step = Routing(chosen, probs, total[-1])

    def share(self, router_logits: tuple[Tensor, ...], batch: Batch) -> Tensor:
        """A micro-batch's share of the loss, before its weight.

        Args:
            router_logits: of each layer, with gradient.
            batch: the micro-batch that they are of.
        Returns:
            Scalar; the shares of a step add up to its loss.
        """
        return routing(router_logits, batch, self.balancing.top_k).loss(self._step)


def balancer(model: nn.Module, args: Any, accelerator: Accelerator, able: bool) -> Balancer | None:
    """Decide whether this run balances routers, and let the model hand out their logits if so.

    Args:
        model: the wrapper around the model, changed in place.
        args: of the run, with ``router_aux_loss_coef``; None there for the model's own.
        accelerator: of the run.
        able: whether the trainer hands on router logits.
    Returns:
        None where nothing is balanced.
    Raises:
        ValueError: a weight is given, and this trainer or model has no such loss; reentrant checkpointing.
    """
    coef = args.router_aux_loss_coef
    if not able or not isinstance(model, Policy):
        # A weight of 0 asks for no such loss, which is so anyway.
        if coef:
            raise ValueError("router_aux_loss_coef: this trainer adds no load-balancing loss; leave it out")
        if isinstance(model, Policy) and balancing_of(model.without_adapter) is not None:
            logger.warning("the config asks for a load-balancing loss of the routers, and this trainer adds none")
        return None
    model.balancing = balancing_of(model.without_adapter, coef)
    if model.balancing is None:
        return None
    check_checkpointing(args, "the load-balancing loss of the routers")
    return Balancer(model.balancing, accelerator)
