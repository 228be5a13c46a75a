"""How the layers of a trained model are computed: ``--torch_compile``."""

from typing import Any

from accelerate.utils import TorchDynamoPlugin
from torch import nn
from transformers import Trainer

from rlhf.models.compiling import compile_layers


class CompiledTrainer(Trainer):
    """A ``transformers.Trainer`` that compiles each layer of a model, where the configuration asks for it."""

    args: Any

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        # accelerate would compile the whole model.
        return super()._build_accelerator_args(**kwargs) | {"dynamo_plugin": TorchDynamoPlugin(backend="no")}

    def compile(self, model: nn.Module) -> None:
        """Compile the layers of a model with ``--torch_compile``.

        Args:
            model: the policy, or another model of this trainer; changed in place.
        """
        if self.args.torch_compile:
            compile_layers(model, self.args.torch_compile_backend, self.args.torch_compile_mode)
