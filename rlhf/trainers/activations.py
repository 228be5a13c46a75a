"""What the first batch takes: the memory that waits for the backward pass, and what checkpointing would leave of it."""

from collections import Counter
from contextlib import ExitStack
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf.data import Batch
from rlhf.kernels.recompute import watchers
from rlhf.logprobs import Plan
from rlhf.models.policy import Wrapper

MIB = 2**20


class Activations:
    """While it is entered: bytes that autograd saves in a forward pass, each storage once, weights left out.

    Attributes:
        plan: how the last call with a gradient went about the head; None where the model runs its own.
        layers: bytes saved by each layer that activation checkpointing would compute again.
        inputs: bytes of their inputs. outside: bytes saved elsewhere, the head's among them.
    """

    def __init__(self, policy: Wrapper) -> None:
        self.policy = policy
        self.layers: Counter[nn.Module] = Counter()
        self.inputs = self.outside = 0
        self.plan: Plan | None = None
        self._layer: nn.Module | None = None
        self._seen = {t.untyped_storage().data_ptr() for t in chain(policy.parameters(), policy.buffers())}
        self._entered = ExitStack()

    @property
    def total(self) -> int:
        return self.outside + self.layers.total()

    @property
    def checkpointed(self) -> int:
        """What would be held at most: all inputs of layers, and one layer at a time."""
        return self.outside + self.inputs + max(self.layers.values(), default=0)

    def __enter__(self) -> "Activations":
        layers = [m for m in self.policy.modules() if isinstance(m, GradientCheckpointingLayer)]
        hooks = [self.policy.register_forward_pre_hook(self._call, with_kwargs=True)]
        hooks += [layer.register_forward_pre_hook(self._enter_layer) for layer in layers]
        hooks += [layer.register_forward_hook(self._leave_layer) for layer in layers]
        for hook in hooks:
            self._entered.callback(hook.remove)
        self._entered.enter_context(saved_tensors_hooks(self._pack, lambda tensor: tensor))
        watchers.append(self._keep)
        self._entered.callback(watchers.remove, self._keep)
        return self

    def __exit__(self, *args: Any) -> None:
        self._entered.close()

    def _call(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled():
            self.plan = self.policy.head_plan(*args, **kwargs)

    def _enter_layer(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled():
            self._layer = module
            self.inputs += args[0].nbytes

    def _leave_layer(self, module: nn.Module, args: Any, output: Any) -> None:
        self._layer = None

    def _pack(self, tensor: Tensor) -> Tensor:
        self._keep(tensor)
        return tensor.detach()  # an output that its own node saved would never be freed

    def _keep(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            if self._layer is None:
                self.outside += storage.nbytes()
            else:
                self.layers[self._layer] += storage.nbytes()

    def describe(self, checkpointing: bool) -> str:
        line = f"activations: {self.total / MIB:.0f} MiB saved for the backward pass"
        if checkpointing:
            return f"{line}, and one layer's at a time (--activation_checkpointing is on)"
        if not self.layers:
            return line
        kept = f"would keep about {self.checkpointed / MIB:.0f} MiB and add one forward pass"
        return f"{line}; --activation_checkpointing {kept}"

    def describe_batch(self, batch: Batch) -> str:
        layout = "rows" if batch.segments is None else "segments"
        line = (
            f"first batch: {batch.targets.num_sequences} sequences, {batch.input_ids.numel()} tokens in {layout}, "
            f"{len(batch.targets)} scored; head: "
        )
        plan = self.plan
        if plan is None:
            return line + "the model's own"
        chunks = -(-len(batch.targets) // plan.chunk_size)
        kept = f", {plan.kept} kept" if plan.kept else ""
        return f"{line}{plan.mode}, {chunks} chunks of {plan.chunk_size}{kept}"
