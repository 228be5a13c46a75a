"""The load-balancing loss of a mixture's routers, added to a trainer's loss."""

import logging

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rlhf.data import Batch
from rlhf.models import Balancing, Policy, Routing, balancing_of, routing
from rlhf.models.policy import still

logger = logging.getLogger(__name__)


class Balancer:
    """Each batch's share of the balancing loss of its optimizer step: no share depends on how the step is split."""

    def __init__(self, balancing: Balancing, accelerator: Accelerator) -> None:
        self.balancing, self.accelerator = balancing, accelerator
        self._step: Routing | None = None  # of all micro-batches and ranks, where there are several

    def look_ahead(self, model: nn.Module, batches: list[Batch]) -> None:
        """Count which experts the whole step chooses: the loss of a batch depends on it.

        Where a step has several batches, that is one more pass, without gradient.
        """
        self._step = None
        if len(batches) == 1 and self.accelerator.num_processes == 1:
            return
        found = []
        for batch in batches:
            with torch.no_grad(), self.accelerator.autocast(), still(model):
                logits = model(batch).router_logits
            own = routing(logits, batch, self.balancing.top_k)
            found.append(torch.cat([own.chosen, own.probs, own.rows[None]]))
        whole: Tensor = self.accelerator.reduce(torch.stack(found).sum(0))
        chosen, probs = whole[:-1].chunk(2)
        self._step = Routing(chosen, probs, whole[-1])

    def share(self, router_logits: tuple[Tensor, ...], batch: Batch) -> Tensor:
        """This batch's share, before its weight; over the batches of a step they add up to its loss."""
        return routing(router_logits, batch, self.balancing.top_k).loss(self._step)


def balancer(model: nn.Module, coef: float | None, accelerator: Accelerator, able: bool) -> Balancer | None:
    """Where this run balances routers; ``model`` then hands out what they say.

    Args:
        coef: of ``--router_aux_loss_coef``. able: the trainer hands on router logits.
    Raises:
        ValueError: a weight where nothing is balanced.
    """
    if not able or not isinstance(model, Policy):
        if coef:
            raise ValueError("router_aux_loss_coef: this trainer adds no load-balancing loss; leave it out")
        if isinstance(model, Policy) and balancing_of(model.without_adapter) is not None:
            logger.warning("the config asks for a load-balancing loss of the routers, and this trainer adds none")
        return None
    model.balancing = balancing_of(model.without_adapter, coef)
    return None if model.balancing is None else Balancer(model.balancing, accelerator)
