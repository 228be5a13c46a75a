"""What a training forward draws: dropout and router noise, switched off; noise on embeddings, switched on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.data import Batch

_KEPT = "_dropout_of_config"  # attribute: (config, name, value) as they were


def disable_dropout(model: nn.Module) -> None:
    """Make repeated forward passes agree, in training mode too: dropout of every kind, and noise of routers.

    A probability is read off a layer, off a float that a layer hands to a function, or off the configuration.
    :func:`configured_dropout` gives the configuration back for saving.
    """
    kept: list[tuple[Any, str, float]] = getattr(model, _KEPT, [])
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, _ in _probabilities(module):
            setattr(module, name, 0.0)
    config = getattr(model, "config", None)
    if config is None:
        return
    for part in {id(own): own for own in (config, config.get_text_config())}.values():
        for name, value in _probabilities(part):
            kept.append((part, name, value))
            setattr(part, name, 0.0)
    object.__setattr__(model, _KEPT, kept)


def _probabilities(holder: Any) -> list[tuple[str, float]]:
    named = ("drop", "jitter")
    return [
        (name, value)
        for name, value in vars(holder).items()
        if isinstance(value, float) and value > 0 and any(word in name for word in named)
    ]


@contextmanager
def configured_dropout(model: nn.Module) -> Iterator[None]:
    """The configuration as it was before :func:`disable_dropout`, to save it."""
    kept = getattr(model, _KEPT, [])
    for holder, name, value in kept:
        setattr(holder, name, value)
    try:
        yield
    finally:
        for holder, name, _ in kept:
            setattr(holder, name, 0.0)


def add_embedding_noise(wrapper: nn.Module, alpha: float) -> None:
    r"""NEFTune: uniform noise of up to :math:`\alpha / \sqrt{L d}` on the embeddings, in forwards that learn.

    L is the length of a token's own sequence, with its prompt, in every layout; d the width. A prompt that several
    sequences share has the first one's. A forward without gradient, such as a reference's, gets none.

    Args:
        wrapper: takes a :class:`Batch`; its ``model`` has the embeddings.
        alpha: > 0, the size of the noise.

    Source: arXiv 2310.05914.
    """
    current: list[Batch] = []

    def remember(module: nn.Module, args: tuple[Any, ...]) -> None:
        current[:] = args[:1]

    def noise(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if not (module.training and torch.is_grad_enabled() and current):
            return output
        lengths = sequence_lengths(current[0]).to(output.device)
        bound = alpha / (lengths * output.size(-1)).sqrt()
        return output + torch.empty_like(output).uniform_(-1, 1) * bound[..., None].to(output.dtype)

    wrapper.register_forward_pre_hook(remember)
    wrapper.model.get_input_embeddings().register_forward_hook(noise)  # type: ignore[union-attr,operator]


def sequence_lengths(batch: Batch) -> Tensor:
    """Tokens of each token's own sequence, with its prompt: float32, the shape of ``input_ids``."""
    if batch.segments is None:
        return batch.attention_mask.sum(1, keepdim=True).expand_as(batch.input_ids).float()
    spans = batch.segments.spans
    whole = torch.tensor([float(span.length + span.prefix) for span in spans])
    return whole.repeat_interleave(torch.tensor([span.length for span in spans]))[None]
