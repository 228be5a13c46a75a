"""Matching what a student has inside with what its teacher has: terms of distillation beside the divergence.

Both are read by hooks while the two models run anyway, at the rows that predict a scored token, so nothing depends on
layout, padding or other rows of the batch. Layers are read as they are, the last one before the final norm.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlhf.data import Batch
from rlhf.distillation.student import layer_list, matched_layers
from rlhf.logprobs import Scores
from rlhf.logprobs.head import backbone_of
from rlhf.losses import attention_loss, hidden_state_loss
from rlhf.models import Policy
from rlhf.models.attention import NAME

DISTANCES = ("squared", "cosine")


@dataclass(frozen=True)
class Weights:
    """Weights of the terms, >= 0; what has 0 is not computed. ``distance`` is that of hidden states.

    Raises:
        ValueError: a weight or the distance is out of range.
    """

    hidden_states: float = 0.0
    attention: float = 0.0
    distance: Any = "squared"

    def __post_init__(self) -> None:
        for name, weight in (("hidden_state_weight", self.hidden_states), ("attention_weight", self.attention)):
            if not weight >= 0:
                raise ValueError(f"{name} must be at least 0, got {weight}")
        if self.distance not in DISTANCES:
            raise ValueError(f"hidden_state_distance must be one of {', '.join(DISTANCES)}; got {self.distance!r}")

    def sum(self, terms: dict[str, Tensor]) -> Tensor | float:
        own = {"hidden_state_loss": self.hidden_states, "attention_loss": self.attention}
        return sum(own[name] * value for name, value in terms.items())


class Inside(NamedTuple):
    """Of each compared layer, by its place among them: output [N, H], and attention probabilities [N, heads, keys]."""

    hidden_states: dict[int, Tensor]
    attention: dict[int, Tensor]


@contextmanager
def watched(model: Any, layers: list[int], weights: Weights, batch: Batch, found: Inside) -> Iterator[None]:
    """In here, each forward of ``model`` (of transformers) fills ``found``, over what the one before wrote.

    Raises:
        ValueError: within the forward, from a model whose layers give no [B, T, H], or not all of them attention.
    """
    shape, source = batch.input_ids.shape, batch.targets.source
    modules, backbone = layer_list(model)[1], backbone_of(model)
    places = {modules[layer]: place for place, layer in enumerate(layers)}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.shape[:-1] != shape:
            raise ValueError(
                f"{type(module).__name__} gives {tuple(hidden.shape)} for {tuple(shape)} tokens, not one hidden state "
                "each: leave hidden_state_weight out"
            )
        found.hidden_states[places[module]] = hidden.flatten(0, 1).index_select(0, source)

    def ask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"output_attentions": True}

    def read(module: nn.Module, args: Any, output: Any) -> None:
        maps = getattr(output, "attentions", None) or ()
        if len(maps) != len(modules):
            raise ValueError(
                f"{type(module).__name__} gives attention of {len(maps)} of its {len(modules)} layers: leave "
                "attention_weight out"
            )
        for place, layer in enumerate(layers):
            found.attention[place] = maps[layer][source // shape[1], :, source % shape[1]]

    with ExitStack() as hooks:
        for module in places if weights.hidden_states else ():
            hooks.callback(module.register_forward_hook(keep).remove)
        if weights.attention:
            hooks.callback(backbone.register_forward_pre_hook(ask, with_kwargs=True).remove)
            hooks.callback(backbone.register_forward_hook(read).remove)
        yield


def check_attention(side: str, model: Any) -> None:
    """Raise unless ``model`` has its attention as probabilities."""
    kind = model.config.get_text_config()._attn_implementation
    if kind != "eager":
        raise ValueError(
            f"attention_weight needs probabilities, which only eager attention has; the {side}'s is "
            f"{'sdpa' if kind == NAME else kind}: load both with attn_implementation eager (--attn_implementation, and "
            "for a teacher of its own --teacher_model_init_kwargs)"
        )


def _same_heads(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.size(1) == teacher.size(1):
        return student, teacher
    return student.float().mean(1, keepdim=True), teacher.float().mean(1, keepdim=True)


class MatchingPolicy(Policy):
    """A :class:`Policy` that adds further terms to the loss beside a teacher, once :meth:`match` has said which.

    ``projections`` [D, C], one for each layer where the widths differ, are trained with it, and no part of the model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.projections = nn.ParameterList()
        self.weights: Weights | None = None

    def match(self, teacher: Any, weights: Weights, seed: int) -> None:
        """Compare with a model of transformers, which may be the own trunk; projections as ``nn.Linear`` draws them.

        Raises:
            ValueError: the student is deeper, layers are not in one list, or attention is not at hand.
        """
        student = self.without_adapter
        pairs = matched_layers(student.config, teacher.config)
        for side, model in (("student", student), ("teacher", teacher)):
            layer_list(model)
            if weights.attention:
                check_attention(side, model)
        # In a tuple: as a module, the teacher would be trained and saved.
        self.weights, self.sides = weights, ((student, [*range(len(pairs))]), (teacher, pairs))
        width, wanted = (model.config.get_text_config().hidden_size for model in (student, teacher))
        if not weights.hidden_states or width == wanted:
            return
        like: Any = student.get_input_embeddings().weight
        dtype = torch.promote_types(like.dtype, torch.float32)
        generator, bound = torch.Generator().manual_seed(seed), 1 / math.sqrt(width)  # the run's numbers stay
        for _ in pairs:
            drawn = torch.empty(wanted, width).uniform_(-bound, bound, generator=generator)
            self.projections.append(nn.Parameter(drawn.to(like.device, dtype)))

    def forward(self, batch: Batch, *args: Any, **kwargs: Any) -> Scores:
        teacher, weights = kwargs.get("teacher"), self.weights
        if teacher is None or weights is None:
            return super().forward(batch, *args, **kwargs)
        own, other = self.sides
        ours, theirs = Inside({}, {}), Inside({}, {})

        @contextmanager
        def watched_teacher(student: Policy) -> Iterator[Policy]:
            with watched(*other, weights, batch, theirs), teacher(student) as policy:
                yield policy

        # A teacher on the same trunk runs before the student, which writes over what was the teacher's.
        with watched(*own, weights, batch, ours):
            scores = super().forward(batch, *args, **kwargs | {"teacher": watched_teacher})
        assert scores.loss is not None and scores.teacher is not None
        with torch.autocast(batch.input_ids.device.type, enabled=False):
            terms = self._terms(ours, theirs, weights)
        loss = scores.loss + weights.sum({name: values.sum() for name, values in terms.items()})
        matched = {name: values.detach() for name, values in terms.items()}
        return scores._replace(loss=loss, teacher=scores.teacher._replace(matched=matched))

    def _terms(self, ours: Inside, theirs: Inside, weights: Weights) -> dict[str, Tensor]:
        """Of each scored token, means over layers (and heads): [N] by name."""
        found = {}
        if weights.hidden_states:
            found["hidden_state_loss"] = [
                hidden_state_loss(
                    own, theirs.hidden_states[place], projection=self.projections[place] if self.projections else None,
                    distance=weights.distance, reduction="none",
                )
                for place, own in ours.hidden_states.items()
            ]  # fmt: skip
        if weights.attention:
            found["attention_loss"] = [
                attention_loss(*_same_heads(own, theirs.attention[place]), reduction="none").mean(1)
                for place, own in ours.attention.items()
            ]
        return {name: torch.stack(values).mean(0) for name, values in found.items()}
