"""Matching hidden states: a distance between layers of the student and of the teacher, added to the divergence.

Hooks read the outputs of layers while both models run for the divergence anyway. Only positions that predict a scored
token are read, so that no number depends on layout, padding or the other rows of a batch. The output of the last layer
is read before the final norm.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.data import Batch
from rlhf.distillation.objectives import TeacherObjective
from rlhf.distillation.student import layer_list, matched_layers
from rlhf.logprobs import HeadObjective, Scores
from rlhf.losses import hidden_state_loss
from rlhf.models import Policy

DISTANCES = ("squared", "cosine")

LayerOutputs = dict[int, Tensor]  # from the position of a layer among the compared ones to its output, [N, H]


@dataclass(frozen=True)
class MatchingWeights:
    """Weights of the comparisons beyond predictions.

    Args:
        hidden_states: weight of the distance, >= 0; nothing is compared at 0.
        distance: one of :data:`DISTANCES`.
    Raises:
        ValueError: the weight or the distance is out of range.
    """

    hidden_states: float = 0.0
    distance: Any = "squared"

    def __post_init__(self) -> None:
        if not self.hidden_states >= 0:
            raise ValueError(f"hidden_state_weight must be at least 0, got {self.hidden_states}")
        if self.distance not in DISTANCES:
            raise ValueError(f"hidden_state_distance must be one of {', '.join(DISTANCES)}; got {self.distance!r}")


@contextmanager
def capture_layers(model: Any, layers: list[int], batch: Batch, outputs: LayerOutputs) -> Iterator[None]:
    """Record the outputs of layers during each forward pass of a transformers model; a later pass overwrites them.

    Args:
        model: the transformers model, without PEFT around it.
        layers: numbers of the layers to record.
        batch: what the model reads; its targets say which positions are recorded.
        outputs: receives the output of ``layers[position]`` under ``position``.
    Raises:
        ValueError: within the forward pass, from a model whose layers do not return [B, T, H].
    """
    shape, source = batch.input_ids.shape, batch.targets.source
    modules = layer_list(model)[1]
    position_of = {modules[layer]: position for position, layer in enumerate(layers)}

    # A hook sees the output of its own layer, so nothing of the model's forward is changed or repeated.
    def record(module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.shape[:-1] != shape:
            raise ValueError(
                f"{type(module).__name__} gives {tuple(hidden.shape)} for {tuple(shape)} tokens, not one hidden state "
                "each: leave hidden_state_weight out"
            )
        outputs[position_of[module]] = hidden.flatten(0, 1).index_select(0, source)

    # Removed on every way out, an error in the forward pass too.
    with ExitStack() as hooks:
        for module in position_of:
            hooks.callback(module.register_forward_hook(record).remove)
        yield


class MatchingPolicy(Policy):
    """A :class:`Policy` that adds the distance of hidden states to a loss with a teacher, after :meth:`match`.

    ``projections`` [D, C], one for each layer where the widths differ, are trained with the student and are no part of
    the saved model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.projections = nn.ParameterList()
        self.weights: MatchingWeights | None = None

    def match(self, teacher: Any, weights: MatchingWeights, seed: int) -> None:
        """Choose the teacher's model to compare with.

        Args:
            teacher: a transformers model, which may be the student's own under another adapter.
            weights: the comparisons and their weights.
            seed: of the projections, drawn as ``nn.Linear`` draws its weight.
        Raises:
            ValueError: the student is deeper than the teacher, or layers are not in one list.
        """
        student = self.without_adapter
        teacher_layers = matched_layers(student.config, teacher.config)
        for model in (student, teacher):
            layer_list(model)  # raises now rather than in the first step
        self.weights = weights
        self.student_layers = [*range(len(teacher_layers))]
        self.teacher_layers = teacher_layers
        # Held in a tuple: as an attribute, the module would be trained and saved with the student.
        self.teacher_model = (teacher,)
        self._draw_projections(student, teacher, seed)

    def _draw_projections(self, student: Any, teacher: Any, seed: int) -> None:
        """Projections from the student's width to the teacher's; none where the widths agree."""
        student_width, teacher_width = (model.config.get_text_config().hidden_size for model in (student, teacher))
        if student_width == teacher_width:
            return
        embedding: Any = student.get_input_embeddings().weight
        # At least float32, as they are trained and small updates of half precision are lost.
        dtype = torch.promote_types(embedding.dtype, torch.float32)
        # A generator of their own, so that drawing them changes no other random number of the run.
        generator = torch.Generator().manual_seed(seed)
        uniform_bound = 1 / math.sqrt(student_width)
        for _ in self.teacher_layers:
            weight = torch.empty(teacher_width, student_width).uniform_(
                -uniform_bound, uniform_bound, generator=generator
            )
            self.projections.append(nn.Parameter(weight.to(embedding.device, dtype)))

    def forward(self, batch: Batch, objective: HeadObjective | None = None, entropy: bool = False) -> Scores:
        """As :class:`Policy`; with a teacher, the loss has the weighted distance added."""
        weights = self.weights
        if not isinstance(objective, TeacherObjective) or weights is None:
            return super().forward(batch, objective, entropy)
        teacher = objective.teacher
        student_outputs: LayerOutputs = {}
        teacher_outputs: LayerOutputs = {}

        @contextmanager
        def captured_teacher(student: Policy) -> Iterator[Policy]:
            capture = capture_layers(self.teacher_model[0], self.teacher_layers, batch, teacher_outputs)
            with capture, teacher(student) as policy:
                yield policy

        # A teacher on the student's own weights runs first: its pass also fires the student's hooks, and the student's
        # pass then overwrites what they recorded.
        with capture_layers(self.without_adapter, self.student_layers, batch, student_outputs):
            scores = super().forward(batch, replace(objective, teacher=captured_teacher), entropy)
        assert scores.loss is not None and scores.teacher is not None
        # Hidden states may be large: in half precision their squares overflow.
        with torch.autocast(batch.input_ids.device.type, enabled=False):
            distances = self._distances(student_outputs, teacher_outputs, weights)
        return scores._replace(
            loss=scores.loss + weights.hidden_states * distances.sum(),
            teacher=scores.teacher._replace(hidden_states=distances.detach()),
        )

    def _distances(self, student: LayerOutputs, teacher: LayerOutputs, weights: MatchingWeights) -> Tensor:
        """Mean over layers of the distance at each scored token, [N]."""
        by_layer = []
        for position, output in student.items():
            projection = self.projections[position] if len(self.projections) else None
            distance = hidden_state_loss(
                output, teacher[position], projection=projection, distance=weights.distance, reduction="none"
            )
            by_layer.append(distance)
        return torch.stack(by_layer).mean(0)
