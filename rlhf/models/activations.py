"""Selective activation checkpointing: the backward pass recomputes what is large or cheap, and nothing else.

Full checkpointing keeps the input of each layer and runs the layer a second time. Here the results of attention and of
matrix products are kept too, unless a product is wider than its input: those of a gated MLP hold most of a layer's
memory. So the second run has no attention and no projections.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

SELECTIVE = "selective"  # the key in activation_checkpointing_kwargs
# Operators of torch, and the place of the right factor [k, n] among their arguments.
_PRODUCTS = {"aten::mm": 1, "aten::addmm": 2, "aten::bmm": 1, "aten::baddbmm": 2, "aten::_grouped_mm": 1}
_TRANSPOSED_PRODUCTS = {"mkldnn::_linear_pointwise": 1}  # their right factor is [n, k]


def checkpoint_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``torch.utils.checkpoint.checkpoint``.

    Args:
        given: ``activation_checkpointing_kwargs``, where ``selective`` may be true.
    Returns:
        The same without ``selective``, and with the functions that it stands for.
    Raises:
        ValueError: ``selective`` with ``use_reentrant``, which torch cannot do.
    """
    others = {name: value for name, value in given.items() if name != SELECTIVE}
    if not given.get(SELECTIVE):
        return others
    if others.get("use_reentrant"):
        raise ValueError('activation_checkpointing_kwargs: "selective" needs "use_reentrant": false')
    return {**others, "use_reentrant": False, "context_fn": selective_contexts}


def checkpointing_options(args: Any) -> tuple[bool, dict[str, Any]]:
    """Whether a run checkpoints activations, and how; older transformers (5.19) has other names.

    Args:
        args: of the training run.
    Returns:
        The two options.
    """
    is_on = getattr(args, "activation_checkpointing", None)
    if is_on is None:
        return args.gradient_checkpointing, dict(args.gradient_checkpointing_kwargs or {})
    return is_on, dict(args.activation_checkpointing_kwargs or {})


def check_checkpointing(args: Any, reader: str) -> None:
    """Refuse reentrant checkpointing where something reads a value inside a layer and sends a gradient back to it.

    Its first pass through a layer records no gradient, so that the value would be a constant.

    Args:
        args: of the training run.
        reader: of the values, for the message.
    Raises:
        ValueError: ``use_reentrant`` is true.
    """
    is_on, checkpoint_kwargs = checkpointing_options(args)
    if is_on and checkpoint_kwargs.get("use_reentrant"):
        raise ValueError(
            f'activation_checkpointing_kwargs: with "use_reentrant": true {reader} would have no gradient; leave it out'
        )


def enable_checkpointing(model: Any, checkpoint_kwargs: dict[str, Any] | None, **own_kwargs: Any) -> None:
    """Have a transformers model checkpoint its layers, under the name that its version has for this.

    Args:
        model: of transformers, or PEFT around one.
        checkpoint_kwargs: of torch's ``checkpoint``.
        own_kwargs: of the model's method.
    """
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=checkpoint_kwargs, **own_kwargs)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpoint_kwargs, **own_kwargs)


def choose_kept(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Whether the result of an operator is kept for the backward pass.

    Args:
        context: of torch; not read.
        operator: of torch.
        *args: its arguments.
        **kwargs: its arguments by name.
    Returns:
        ``MUST_SAVE`` for attention, and for products that are not wider than their input.
    """
    name = operator.name().split(".")[0]
    is_kept = "attention" in name or "_attn" in name
    if name in _PRODUCTS:
        inner_size, outer_size = args[_PRODUCTS[name]].shape[-2:]
        is_kept = outer_size <= inner_size
    elif name in _TRANSPOSED_PRODUCTS:
        outer_size, inner_size = args[_TRANSPOSED_PRODUCTS[name]].shape[-2:]
        is_kept = outer_size <= inner_size
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


selective_contexts: Callable[[], Any] = partial(create_selective_checkpoint_contexts, choose_kept)
"""Makes the two contexts of a checkpoint: of the forward pass, and of its recomputation."""
