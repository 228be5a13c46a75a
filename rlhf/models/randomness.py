"""Randomness of a training forward: dropout and router noise, switched off; noise on embeddings, switched on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.data import Batch

_SAVED = "_dropout_of_config"  # attribute of a model: (config, name, value) for each probability that was set to 0


def disable_dropout(model: nn.Module) -> None:
    """Make repeated forward passes agree, in training mode too: no dropout of any kind, no noise of routers.

    A probability may be held by a layer of dropout, by another layer that hands it to a function, or by the
    configuration, from which a forward reads it. :func:`configured_dropout` restores the configuration for saving.

    Args:
        model: Changed in place.
    """
    for module in model.modules():
        # The base class of all of torch's dropout layers.
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for attribute, _ in _probabilities(module):
            setattr(module, attribute, 0.0)
    config = getattr(model, "config", None)
    if config is None:
        return
    saved_values: list[tuple[Any, str, float]] = getattr(model, _SAVED, [])
    text_config = config.get_text_config()
    # A model with an image part has a text config inside its own, with probabilities in both.
    for holder in [config] if text_config is config else [config, text_config]:
        for attribute, probability in _probabilities(holder):
            saved_values.append((holder, attribute, probability))
            setattr(holder, attribute, 0.0)
    object.__setattr__(model, _SAVED, saved_values)  # past nn.Module, which would look for parameters in it


def draws_random_numbers(model: nn.Module) -> bool:
    """Whether a training forward draws random numbers: for dropout of any kind, or for noise of routers.

    Args:
        model: A model or a part of one.

    Returns:
        False after :func:`disable_dropout`.
    """
    modules = list(model.modules())
    layers = [module for module in modules if isinstance(module, nn.modules.dropout._DropoutNd)]
    return any(layer.p > 0 for layer in layers) or any(_probabilities(module) for module in modules)


def _probabilities(holder: Any) -> list[tuple[str, float]]:
    """Attributes that are probabilities of dropout, or strengths of router noise, above 0."""
    floats = [(name, value) for name, value in vars(holder).items() if isinstance(value, float)]
    return [(name, value) for name, value in floats if value > 0 and ("drop" in name or "jitter" in name)]


@contextmanager
def configured_dropout(model: nn.Module) -> Iterator[None]:
    """Restore the configuration as it was before :func:`disable_dropout`, to save it.

    Args:
        model: Its configuration is restored inside the context.
    """
    saved_values = getattr(model, _SAVED, [])
    for holder, attribute, probability in saved_values:
        setattr(holder, attribute, probability)
    try:
        yield
    finally:
        for holder, attribute, _ in saved_values:
            setattr(holder, attribute, 0.0)


def add_embedding_noise(wrapper: nn.Module, alpha: float) -> None:
    r"""NEFTune: add uniform noise of up to :math:`\alpha / \sqrt{L d}` to the embeddings, in training.

    L is the length of a token's own sequence, with its prompt, in every layout; d is the width. A prompt that several
    sequences share has the length of the first one. A forward without gradient, such as a reference's, gets no noise.

    Args:
        wrapper: Takes a :class:`Batch`; its ``model`` has the embeddings.
        alpha: > 0, the size of the noise.

    Source: arXiv 2310.05914.
    """
    # The hook on the embeddings sees ids only; the lengths of sequences are known to the wrapper.
    current_batch: list[Batch] = []

    def remember_batch(module: nn.Module, args: tuple[Any, ...]) -> None:
        # The list stays the same object, which the other hook reads.
        current_batch[:] = args[:1]

    def add_noise(module: nn.Module, args: Any, embeddings: Tensor) -> Tensor:
        is_training = module.training and torch.is_grad_enabled()
        if not is_training or not current_batch:
            return embeddings
        lengths = _sequence_lengths(current_batch[0]).to(embeddings.device)
        bound = alpha / (lengths * embeddings.size(-1)).sqrt()
        noise = torch.empty_like(embeddings).uniform_(-1, 1)
        return embeddings + noise * bound[..., None].to(embeddings.dtype)

    wrapper.register_forward_pre_hook(remember_batch)
    wrapper.model.get_input_embeddings().register_forward_hook(add_noise)  # type: ignore[union-attr,operator]


def _sequence_lengths(batch: Batch) -> Tensor:
    """Tokens of each token's own sequence, with its prompt: float32, the shape of ``input_ids``."""
    if batch.segments is None:
        return batch.attention_mask.sum(1, keepdim=True).expand_as(batch.input_ids).float()
    layout = batch.segments.layout
    # A branch has its own tokens and those of the prompt that it shares.
    whole_lengths = layout.key_starts.diff().float()
    # With the size given, the host does not wait for the lengths.
    num_tokens = batch.input_ids.size(1)
    return whole_lengths.repeat_interleave(layout.query_starts.diff(), output_size=num_tokens)[None]
