"""The memory of an optimizer step, measured on a few layers and carried on to all of them.

A step is run with two layers and with three, on the largest batch of the run. All that grows with the depth grows by
the same bytes for each layer: activations that are kept, gradients, and the state of the optimizer. So the difference
of the two runs is the cost of a layer, with recomputation, checkpointing and our kernels as they are. What does not
grow, such as the head and the temporaries of a layer, is in both. The whole model never runs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rlhf.planning.batches import Micro
from rlhf.planning.layers import LayerStack
from rlhf.planning.tracking import MemoryRecorder, Phase, resident_bytes
from rlhf.trainers.base import BaseTrainer

FEW = 2  # layers; with one, the first and the last would be the same
_STATE, _KEPT = "state", "kept"

FORWARD, HEAD, BACKWARD, LOWER_LAYERS, END, OPTIMIZER = (
    "forward", "head and loss", "backward", "backward of lower layers", "end of backward", "optimizer step",
)  # fmt: skip


@dataclass(frozen=True)
class StepMemory:
    """The memory of a step, in bytes, beside weights.

    Attributes:
        peaks: of each phase, with all layers; the state of the optimizer is not in them.
        optimizer: the state of the optimizer.
        kept: activations of all layers that are kept for the backward pass.
    """

    peaks: dict[str, int]
    optimizer: int
    kept: int

    @property
    def peak(self) -> int:
        """The largest of all phases, with the state of the optimizer."""
        return self.optimizer + max(self.peaks.values())

    @property
    def peak_phase(self) -> str:
        """The phase that is the largest."""
        return max(self.peaks, key=lambda name: self.peaks[name])


def stacks_of(trainer: BaseTrainer) -> list[LayerStack]:
    """The layers of the trained model first, then those of every other model that the trainer holds.

    Args:
        trainer: with its reference, teacher or critic, if any.

    Returns:
        One for each model.

    Raises:
        ValueError: the layers of a model are not found.
    """
    model: Any = trainer.model
    stacks = [LayerStack(model.without_adapter)]
    return stacks + [LayerStack(other) for other in other_models(trainer)]


def other_models(trainer: BaseTrainer) -> list[nn.Module]:
    """Models with weights of their own beside the trained one.

    Args:
        trainer: of the run.

    Returns:
        The reference, the teacher and the critic, as far as there are any.
    """
    teacher = getattr(trainer, "teacher", None)
    candidates = [trainer.ref_policy, getattr(teacher, "policy", None), getattr(trainer.model, "critic", None)]
    found = {id(model): model for model in candidates if isinstance(model, nn.Module) and model is not trainer.model}
    return list(found.values())


@contextmanager
def depths(stacks: Sequence[LayerStack], counts: Sequence[int]) -> Iterator[list[nn.Module]]:
    """Models with a few of their layers.

    Args:
        stacks: the trained model's first.
        counts: how many layers of each stay.

    Yields:
        The layers of the trained model.
    """
    with ExitStack() as exits:
        cut = [exits.enter_context(stack.cut_to(count)) for stack, count in zip(stacks, counts, strict=True)]
        yield list(cut[0])


def at_full_depth(stacks: Sequence[LayerStack], run: Callable[[list[nn.Module]], dict[str, int]]) -> dict[str, int]:
    """Carry figures of a few layers on to all layers.

    Models of one depth grow together; a teacher of another depth has a run of its own.

    Args:
        stacks: the trained model's first.
        run: gets the layers of the trained model, and returns bytes by name.

    Returns:
        Bytes by name, with all layers of all models.
    """
    with depths(stacks, [FEW] * len(stacks)) as layers:
        shallow = run(layers)
    totals = dict(shallow)
    for full_depth in {len(stack) for stack in stacks}:
        counts = [FEW + (len(stack) == full_depth) for stack in stacks]
        with depths(stacks, counts) as layers:
            deeper = run(layers)
        for name, num_bytes in shallow.items():
            totals[name] += (full_depth - FEW) * (deeper[name] - num_bytes)
    return totals


def measure_step(trainer: BaseTrainer, micro: Micro, stacks: Sequence[LayerStack]) -> StepMemory:
    """Predict the memory of a step.

    Args:
        trainer: not trained yet.
        micro: the largest micro-batch.
        stacks: from :func:`stacks_of`.

    Returns:
        The memory with all layers.
    """

    def run(layers: list[nn.Module]) -> dict[str, int]:
        phases, state_bytes = run_step(trainer, micro, layers)
        peaks = {name: phase.peak for name, phase in phases.items()}
        return peaks | {_STATE: state_bytes, _KEPT: phases[FORWARD].end}

    figures = at_full_depth(stacks, run)
    state_bytes, kept = figures.pop(_STATE), figures.pop(_KEPT)
    return StepMemory(figures, state_bytes, kept)


def run_step(trainer: BaseTrainer, micro: Micro, layers: Sequence[nn.Module]) -> tuple[dict[str, Phase], int]:
    """Run a step and record its memory.

    Args:
        trainer: not trained yet.
        micro: the batch.
        layers: of the model as it is now.

    Returns:
        The phases of a step that is not the first, and the bytes of the optimizer's state.
    """
    trainer.optimizer = None
    trainer.create_optimizer()
    device = trainer.args.device
    model: Any = trainer.model
    model.train()
    # The first step makes the optimizer's state; later steps have it from their beginning.
    backward(trainer, micro)
    update(trainer)
    recorder = MemoryRecorder(device)
    # With accumulation the gradients of earlier micro-batches exist while the next one runs.
    passes = min(trainer.args.gradient_accumulation_steps, 2)

    def step() -> None:
        for _ in range(passes):
            recorder.mark(FORWARD)
            backward(trainer, micro, lambda: recorder.mark(BACKWARD))
        recorder.mark(OPTIMIZER)
        update(trainer)

    with _layer_marks(recorder, layers):
        recorder.record(step)
    state = optimizer_bytes(trainer.optimizer, device)
    trainer.optimizer = None
    return recorder.phases, state


def backward(trainer: BaseTrainer, micro: Micro, before_backward: Callable[[], None] | None = None) -> None:
    """Forward and backward of a micro-batch, as in training.

    Args:
        trainer: of the run.
        micro: the batch.
        before_backward: is called between the two.
    """
    with trainer.accelerator.autocast():
        loss = trainer.compute_loss(trainer.model, micro.batch, num_items_in_batch=micro.count)
    if before_backward is not None:
        before_backward()
    trainer.accelerator.backward(loss)


def update(trainer: BaseTrainer) -> None:
    """Clip gradients and take a step with a learning rate of 0.

    Args:
        trainer: with an optimizer.
    """
    optimizer: Any = trainer.optimizer
    model: Any = trainer.model
    if trainer.args.max_grad_norm:
        nn.utils.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
    # A learning rate of 0 keeps the weights, which are measured again with another depth.
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    optimizer.zero_grad()


@contextmanager
def _layer_marks(recorder: MemoryRecorder, layers: Sequence[nn.Module]) -> Iterator[None]:
    """Mark where the layers end in the forward pass, and where the backward pass reaches the input of a layer."""

    def on_gradient_of_input(name: str) -> Callable[..., None]:
        def before_forward(_: nn.Module, args: Any, kwargs: Any) -> None:
            hidden = args[0] if args else kwargs.get("hidden_states")
            # Under an adapter the input of the first layer needs no gradient.
            if isinstance(hidden, torch.Tensor) and hidden.requires_grad and torch.is_grad_enabled():
                hidden.register_hook(lambda _: recorder.mark(name))

        return before_forward

    def after_last_layer(*_: Any) -> None:
        if torch.is_grad_enabled():
            recorder.mark(HEAD)

    handles = [
        layers[-1].register_forward_pre_hook(on_gradient_of_input(LOWER_LAYERS), with_kwargs=True),
        layers[0].register_forward_pre_hook(on_gradient_of_input(END), with_kwargs=True),
        layers[-1].register_forward_hook(after_last_layer),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def optimizer_bytes(optimizer: Any, device: torch.device) -> int:
    """The memory of an optimizer's state.

    Args:
        optimizer: after a step.
        device: where its state is.

    Returns:
        Bytes of all tensors.
    """
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    return sum(resident_bytes(tensor.nbytes, device) for tensor in tensors if isinstance(tensor, torch.Tensor))
