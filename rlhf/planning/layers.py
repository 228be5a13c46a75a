"""Models with a few of their layers: what one more layer costs is the difference between two such models."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


class LayerStack:
    """The decoder layers of a model, and where they hang.

    Args:
        model: any module around a transformers model.

    Raises:
        ValueError: the model has no list of layers that is recognised.
    """

    def __init__(self, model: nn.Module) -> None:
        lists = [
            (parent, name, child)
            for parent in model.modules()
            for name, child in parent.named_children()
            if isinstance(child, nn.ModuleList) and len(child) > 1 and _is_stack(child)
        ]
        if not lists:
            raise ValueError(f"{type(model).__name__}: no list of decoder layers was found in it")
        # A vision tower or the experts of a layer are lists too: most parameters are in the decoder.
        self.parent, self.name, self.layers = max(lists, key=lambda item: _size(item[2]))

    def __len__(self) -> int:
        return len(self.layers)

    @contextmanager
    def cut_to(self, count: int) -> Iterator[Sequence[nn.Module]]:
        """The model with its first layers only.

        Args:
            count: how many layers stay.

        Yields:
            These layers.
        """
        first_layers = nn.ModuleList(list(self.layers)[:count])
        setattr(self.parent, self.name, first_layers)
        configs = _configs_with_layers(self.parent)
        depths = [config.num_hidden_layers for config in configs]
        for config in configs:
            config.num_hidden_layers = min(config.num_hidden_layers, count)
        try:
            yield list(first_layers)
        finally:
            setattr(self.parent, self.name, self.layers)
            for config, depth in zip(configs, depths, strict=True):
                config.num_hidden_layers = depth


def _is_stack(modules: nn.ModuleList) -> bool:
    """Whether the modules are of one kind, and each holds others: layers of a decoder."""
    return all(any(True for _ in module.children()) for module in modules)


def _size(modules: nn.ModuleList) -> int:
    return sum(parameter.numel() for parameter in modules.parameters())


def _configs_with_layers(module: nn.Module) -> list[Any]:
    config = getattr(module, "config", None)
    return [config] if hasattr(config, "num_hidden_layers") else []
