"""The load-balancing loss of a mixture's routers, over a whole optimizer step however it is split into batches."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.data import Batch


class Balancing(NamedTuple):
    """Settings of the load-balancing loss. ``top_k``: experts of a token. ``coef``: weight in the loss."""

    top_k: int
    coef: float


class Routing(NamedTuple):
    """Choices and probabilities of the routers, summed over layers and tokens.

    ``chosen`` [E]: how often each expert was. ``probs`` [E]: their probabilities, which carry the gradient.
    ``rows``: tokens times layers.
    """

    chosen: Tensor
    probs: Tensor
    rows: Tensor

    def loss(self, step: "Routing | None" = None) -> Tensor:
        r"""This batch's share of the loss of the optimizer step; of ``step=None``, the batch is all of it.

        .. math:: L = E \sum_e \frac{c_e}{n} \frac{p_e}{n}

        It is linear in the probabilities, so the shares of batches add up to the loss of the step.
        """
        whole = step or self
        return len(self.probs) * (whole.chosen * self.probs).sum() / whole.rows**2


def balancing_of(model: Any, coef: float | None = None) -> Balancing | None:
    """How the routers of a model are balanced; by default only if its config has ``output_router_logits`` on.

    Args:
        model: a transformers causal LM.
        coef: weight of the loss, instead of the config's; 0 switches it off.
    Returns:
        The settings; None for no balancing.
    Raises:
        ValueError: a weight for a model that offers no router logits, or whose loss is another one.
    """
    config = model.config.get_text_config()
    if coef is None and not getattr(config, "output_router_logits", False):
        return None
    given = coef
    if coef is None:
        coef = _first(model, config, "router_aux_loss_coef", "aux_loss_coef") or 0.0
    if not coef:
        return None
    top_k = _first(model, config, "num_experts_per_tok", "moe_top_k")
    if top_k is None or not hasattr(config, "output_router_logits") or config.model_type in _OTHERS:
        if given is None:
            return None
        raise ValueError(
            f"router_aux_loss_coef {given}: {type(model).__name__} has no load-balancing loss that is known here; "
            "leave it out"
        )
    return Balancing(int(top_k), float(coef))


_OTHERS = ("doge",)  # routes by product keys


def _first(model: Any, config: Any, *names: str) -> Any:
    found = (getattr(place, name, None) for place in (model, config) for name in names)
    return next((value for value in found if value is not None), None)


def routing(router_logits: tuple[Tensor, ...], batch: Batch, top_k: int) -> Routing:
    """Sums over the tokens of all sequences, each with its prompt: the same in any layout.

    Args:
        router_logits: of each layer, [tokens, E].
        batch: the tokens.
        top_k: experts of a token.
    Returns:
        The sums over layers and tokens.

    Source: load_balancing_loss_func of transformers (Switch Transformer, arXiv 2101.03961, eq. 4-6).
    """
    device = router_logits[0].device
    weight = occurrences(batch).to(device, torch.float32)
    size = router_logits[0].size(-1)
    chosen, probs = (torch.zeros(size, device=device) for _ in range(2))
    for logits in router_logits:
        own = logits.to(device).reshape(-1, size).softmax(-1)
        picked = own.topk(top_k, dim=-1).indices.reshape(-1)
        chosen = chosen.scatter_add(0, picked, weight.repeat_interleave(top_k))
        probs = probs + (own.float() * weight[:, None]).sum(0)
    return Routing(chosen, probs, weight.sum() * len(router_logits))


def occurrences(batch: Batch) -> Tensor:
    """In how many sequences each token of the flattened rows is: 0 for padding, 2 for the prompt of a pair; [B * T]."""
    if batch.segments is None:
        return batch.attention_mask.reshape(-1)
    spans = batch.segments.spans
    lengths = torch.tensor([span.length for span in spans])
    starts = (lengths.cumsum(0) - lengths).tolist()
    counts = torch.ones(int(lengths.sum()), dtype=torch.int64)
    for span in spans:
        if span.prefix:
            counts[starts[span.parent] : starts[span.parent] + span.prefix] += 1
    return counts.to(batch.input_ids.device)
