"""The load-balancing loss of a mixture's routers, over a whole optimizer step however it is split into batches."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.data import Batch

_OTHER_LOSSES = ("doge",)  # routes by product keys


class Balancing(NamedTuple):
    """Settings of the load-balancing loss.

    Args:
        top_k: Experts of a token.
        coef: Weight in the loss.
    """

    top_k: int
    coef: float


class Routing(NamedTuple):
    """Choices and probabilities of the routers, summed over layers and tokens.

    Args:
        chosen: [E], how often each expert was chosen.
        probs: [E], the sum of its probabilities; carries gradient.
        rows: Scalar, tokens times layers.
    """

    chosen: Tensor
    probs: Tensor
    rows: Tensor

    def loss(self, step: "Routing | None" = None) -> Tensor:
        r"""Compute this batch's share of the loss of an optimizer step.

        .. math:: L = E \sum_e \frac{c_e}{n} \frac{p_e}{n}

        The loss is linear in the probabilities, so the shares of batches add up to the loss of the step.

        Args:
            step: The sums over all batches of the step; None if this batch is the whole step.

        Returns:
            Scalar.
        """
        # The counts are of the whole step; the probabilities, which have the gradient, of this batch alone.
        whole = step or self
        num_experts = len(self.probs)
        return num_experts * (whole.chosen * self.probs).sum() / whole.rows**2


def balancing_of(model: Any, coef: float | None = None) -> Balancing | None:
    """How the routers of a model are balanced; by default only if its config has ``output_router_logits`` on.

    Args:
        model: A transformers causal LM.
        coef: Weight of the loss, instead of the config's; 0 switches it off.

    Returns:
        The settings; None for no balancing.

    Raises:
        ValueError: A weight is given for a model that returns no router logits, or whose loss is another one.
    """
    config = model.config.get_text_config()
    if coef is None:
        is_on = getattr(config, "output_router_logits", False)
        # Models name it differently, and some keep a copy on the model itself.
        weight = _first_attribute(model, config, "router_aux_loss_coef", "aux_loss_coef") if is_on else None
    else:
        weight = coef
    if not weight:
        return None
    top_k = _first_attribute(model, config, "num_experts_per_tok", "moe_top_k")
    has_known_loss = hasattr(config, "output_router_logits") and config.model_type not in _OTHER_LOSSES
    if top_k is not None and has_known_loss:
        return Balancing(int(top_k), float(weight))
    if coef is None:
        return None
    raise ValueError(
        f"router_aux_loss_coef {coef}: {type(model).__name__} has no load-balancing loss that is known here; "
        "leave it out"
    )


def _first_attribute(model: Any, config: Any, *names: str) -> Any:
    """The first of the attributes that is set, on the model or on its config; None if none is."""
    values = (getattr(holder, name, None) for holder in (model, config) for name in names)
    return next((value for value in values if value is not None), None)


def routing(router_logits: tuple[Tensor, ...], batch: Batch, top_k: int) -> Routing:
    """Sum over the tokens of all sequences, each with its prompt: the same in any layout.

    Args:
        router_logits: Of each layer, [tokens, E].
        batch: The tokens.
        top_k: Experts of a token.

    Returns:
        The sums over layers and tokens.

    Source: load_balancing_loss_func of transformers (Switch Transformer, arXiv 2101.03961, eq. 4-6).
    """
    device = router_logits[0].device
    num_experts = router_logits[0].size(-1)
    occurrences = _occurrences(batch).to(device, torch.float32)
    chosen = torch.zeros(num_experts, device=device)
    probs = torch.zeros(num_experts, device=device)
    # Choices carry no gradient; through the probabilities, experts that are chosen too often get less.
    for logits in router_logits:
        # The layers of a model may be spread over several devices.
        layer_probs = logits.to(device).reshape(-1, num_experts).softmax(-1)
        experts = layer_probs.topk(top_k, dim=-1).indices.reshape(-1)
        chosen = chosen.scatter_add(0, experts, occurrences.repeat_interleave(top_k))
        # Summed in float32: a sum in bfloat16 stops growing after a few hundred tokens.
        probs = probs + (layer_probs.float() * occurrences[:, None]).sum(0)
    return Routing(chosen, probs, occurrences.sum() * len(router_logits))


def _occurrences(batch: Batch) -> Tensor:
    """In how many sequences each token of the flattened rows is: 0 for padding, 2 for the prompt of a pair; [B * T]."""
    if batch.segments is None:
        # In padded rows a shared prompt is repeated, so that its tokens count once in each row.
        return batch.attention_mask.reshape(-1)
    layout = batch.segments.layout
    prompt_ends = layout.prefix_starts + layout.prefix_lengths()
    # A prompt lies in one span with its first answer; each further answer adds one.
    # +1 where a prompt begins and -1 behind its end: the running sum counts the further answers.
    changes = torch.zeros(batch.input_ids.numel() + 1, dtype=torch.int64, device=prompt_ends.device)
    ones = torch.ones_like(prompt_ends, dtype=torch.int64)
    changes.index_add_(0, layout.prefix_starts, ones).index_add_(0, prompt_ends, -ones)
    return 1 + changes.cumsum(0)[:-1]
