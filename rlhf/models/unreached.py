"""Parameters that no loss on text can reach, such as those of a vision tower."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.data import Collator
from rlhf.models.policy import Wrapper, eval_mode

# A text of a few tokens, all of them scored but the first.
TRIAL_IDS = (5, 6, 7, 3, 4, 2)


def unreached_parameters(policy: Wrapper) -> list[str]:
    """Names of the trainable parameters that a few tokens of text do not reach.

    The graph of one forward pass is walked, as DDP walks it. No gradient is computed.

    Args:
        policy: the wrapper around a whole model.
    Returns:
        Names of parameters of the transformers model, in its order. Empty where the trial fails: training will tell.
    """
    vocab_size = policy.config.get_text_config().vocab_size
    token_ids = [token_id % vocab_size for token_id in TRIAL_IDS]
    device = next(policy.parameters()).device
    batch = Collator()([{"input_ids": token_ids, "labels": token_ids}]).to(device)
    # In evaluation mode, activations are not checkpointed: reentrant checkpointing would hide the graph.
    with eval_mode(policy), torch.enable_grad():
        try:
            output = policy(batch)
        except (NotImplementedError, RuntimeError, TypeError, ValueError):
            return []
    reached = _leaves(output)
    return [name for name, parameter in policy.without_adapter.named_parameters() if _is_missing(parameter, reached)]


def unreached_parts(model: nn.Module, names: list[str]) -> dict[str, list[str]]:
    """The parts of a model that text never reaches: none of their trainable parameters is reached.

    Args:
        model: a transformers model.
        names: of its unreached parameters.
    Returns:
        Unreached names by part, such as ``model.vision_tower``. A layer of which only some parameters are not reached,
        such as a mixture whose experts were not chosen, is in no such part.
    """
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    reached_parts = {_part(name) for name in set(trainable) - set(names)}
    parts: dict[str, list[str]] = {}
    for name in names:
        if _part(name) not in reached_parts:
            parts.setdefault(_part(name), []).append(name)
    return parts


def _part(name: str) -> str:
    """The first two words of a parameter's name: those of a backbone's child, such as ``model.vision_tower``."""
    return ".".join(name.split(".")[:2])


def _is_missing(parameter: nn.Parameter, reached: set[int]) -> bool:
    return parameter.requires_grad and id(parameter) not in reached


def _leaves(output: Any) -> set[int]:
    """Identities of the tensors that a backward pass from ``output`` would give a gradient."""
    nodes = [tensor.grad_fn for tensor in _tensors(output) if tensor.grad_fn is not None]
    seen, found = set(nodes), set()
    while nodes:
        node = nodes.pop()
        # Only the node of a leaf, which accumulates its gradient, has a variable.
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        for next_node, _ in node.next_functions:
            if next_node is not None and next_node not in seen:
                seen.add(next_node)
                nodes.append(next_node)
    return found


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of a nested tuple."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple):
        for part in output:
            yield from _tensors(part)
