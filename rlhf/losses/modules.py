"""The losses as ``torch.nn`` modules, for people who configure modules: ``FocalLoss(alpha=0.25, gamma=2.0)``.

Each is made from its function: the constructor takes the hyper-parameters, in the function's order or by name, and a
call takes the tensors (and ``weight``, ``mask``, or any argument of the function). A tensor among the hyper-parameters
becomes a buffer, and a ``Parameter`` is trained: ``InfoNCELoss(temperature=nn.Parameter(torch.tensor(0.07)))``.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rlhf.losses._anchored import kto_loss
from rlhf.losses._classification import (
    bce_loss,
    bce_with_logits_loss,
    categorical_cross_entropy,
    cross_entropy_loss,
    focal_loss,
    hinge_loss,
    label_smoothing_loss,
    modified_huber_loss,
    multiclass_focal_loss,
    nll_loss,
    poly1_loss,
)
from rlhf.losses._divergences import (
    alpha_divergence,
    distillation_loss,
    generalized_jsd,
    jensen_shannon,
    kl_divergence,
    skew_kl,
    span_loss,
    total_variation,
    uld_loss,
)
from rlhf.losses._language import causal_lm_loss, dft_loss, unlikelihood_loss
from rlhf.losses._matching import attention_loss, hidden_state_loss
from rlhf.losses._policy import actor_critic_loss, ppo_loss, value_loss
from rlhf.losses._preference import dpo_loss
from rlhf.losses._regression import (
    epsilon_insensitive_loss,
    huber_loss,
    log_cosh_loss,
    mae_loss,
    mse_loss,
    quantile_loss,
    smooth_l1_loss,
)
from rlhf.losses._representation import (
    batch_triplet_loss,
    cosine_embedding_loss,
    info_nce_loss,
    siglip_loss,
    supervised_contrastive_loss,
    triplet_loss,
)
from rlhf.losses._rewards import plackett_luce_loss, reward_loss
from rlhf.losses._top_k import sampled_distillation_loss, top_k_jsd, top_k_kl

__all__ = [
    "MSELoss",
    "MAELoss",
    "HuberLoss",
    "SmoothL1Loss",
    "LogCoshLoss",
    "QuantileLoss",
    "EpsilonInsensitiveLoss",
    "BCEWithLogitsLoss",
    "BCELoss",
    "CrossEntropyLoss",
    "LabelSmoothingLoss",
    "CategoricalCrossEntropy",
    "NLLLoss",
    "FocalLoss",
    "MulticlassFocalLoss",
    "HingeLoss",
    "ModifiedHuberLoss",
    "Poly1Loss",
    "CausalLMLoss",
    "DFTLoss",
    "UnlikelihoodLoss",
    "InfoNCELoss",
    "SupervisedContrastiveLoss",
    "TripletLoss",
    "BatchTripletLoss",
    "SigLIPLoss",
    "CosineEmbeddingLoss",
    "KLDivergence",
    "GeneralizedJSD",
    "JensenShannon",
    "SkewKL",
    "TotalVariation",
    "AlphaDivergence",
    "DistillationLoss",
    "ULDLoss",
    "SpanLoss",
    "HiddenStateLoss",
    "AttentionLoss",
    "TopKKL",
    "TopKJSD",
    "SampledDistillationLoss",
    "RewardLoss",
    "PlackettLuceLoss",
    "KTOLoss",
    "PPOLoss",
    "ValueLoss",
    "ActorCriticLoss",
    "DPOLoss",
    "CombinedLoss",
    "as_compute_loss",
]


class LossModule(nn.Module):
    """A loss function with its hyper-parameters set."""

    function: ClassVar[Callable[..., Tensor]]
    hyper_parameters: ClassVar[tuple[str, ...]]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__()
        if len(args) > len(self.hyper_parameters):
            raise TypeError(f"{type(self).__name__} takes {', '.join(self.hyper_parameters)}; got {len(args)} values")
        options = dict(zip(self.hyper_parameters, args, strict=False), **options)
        for name in options:
            if name not in self.hyper_parameters:
                raise TypeError(
                    f"{type(self).__name__} has no argument {name!r}; it takes {', '.join(self.hyper_parameters)}"
                )
        # Only what was given: defaults stay with the function alone.
        self.names = tuple(options)
        for name, value in options.items():
            # So that tensors follow the module to a device and into its state.
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, *tensors: Tensor, **more: Any) -> Tensor:
        # An option of the call overrides the module's.
        return type(self).function(*tensors, **{name: getattr(self, name) for name in self.names} | more)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self.names)


def _module(name: str, function: Callable[..., Tensor]) -> type[LossModule]:
    """The class of a loss, whose hyper-parameters are those of the function."""
    setting_names = []
    takes_more = False
    for parameter in inspect.signature(function).parameters.values():
        # Tensors have no default, or None; so do weight and mask, which belong to a call.
        is_setting = parameter.default is not parameter.empty and parameter.default is not None
        if parameter.name not in ("weight", "mask") and (is_setting or parameter.kind is parameter.KEYWORD_ONLY):
            setting_names.append(parameter.name)
        takes_more |= parameter.kind is parameter.VAR_KEYWORD
    if takes_more:  # it passes these on to another loss
        setting_names += [option for option in ("reduction", "ignore_index") if option not in setting_names]
    summary = (function.__doc__ or "").strip().splitlines()[0]
    members = {
        "function": staticmethod(function),
        "hyper_parameters": tuple(setting_names),
        # So that pickle finds the class by its name here.
        "__module__": __name__,
        "__doc__": f"{summary} See :func:`rlhf.losses.{function.__name__}`.",
    }
    return type(name, (LossModule,), members)


# Written out instead of made in a loop, so that editors and type checkers know the names.
MSELoss = _module("MSELoss", mse_loss)
MAELoss = _module("MAELoss", mae_loss)
HuberLoss = _module("HuberLoss", huber_loss)
SmoothL1Loss = _module("SmoothL1Loss", smooth_l1_loss)
LogCoshLoss = _module("LogCoshLoss", log_cosh_loss)
QuantileLoss = _module("QuantileLoss", quantile_loss)
EpsilonInsensitiveLoss = _module("EpsilonInsensitiveLoss", epsilon_insensitive_loss)
BCEWithLogitsLoss = _module("BCEWithLogitsLoss", bce_with_logits_loss)
BCELoss = _module("BCELoss", bce_loss)
CrossEntropyLoss = _module("CrossEntropyLoss", cross_entropy_loss)
LabelSmoothingLoss = _module("LabelSmoothingLoss", label_smoothing_loss)
CategoricalCrossEntropy = _module("CategoricalCrossEntropy", categorical_cross_entropy)
NLLLoss = _module("NLLLoss", nll_loss)
FocalLoss = _module("FocalLoss", focal_loss)
MulticlassFocalLoss = _module("MulticlassFocalLoss", multiclass_focal_loss)
HingeLoss = _module("HingeLoss", hinge_loss)
ModifiedHuberLoss = _module("ModifiedHuberLoss", modified_huber_loss)
Poly1Loss = _module("Poly1Loss", poly1_loss)
CausalLMLoss = _module("CausalLMLoss", causal_lm_loss)
DFTLoss = _module("DFTLoss", dft_loss)
UnlikelihoodLoss = _module("UnlikelihoodLoss", unlikelihood_loss)
InfoNCELoss = _module("InfoNCELoss", info_nce_loss)
SupervisedContrastiveLoss = _module("SupervisedContrastiveLoss", supervised_contrastive_loss)
TripletLoss = _module("TripletLoss", triplet_loss)
BatchTripletLoss = _module("BatchTripletLoss", batch_triplet_loss)
SigLIPLoss = _module("SigLIPLoss", siglip_loss)
CosineEmbeddingLoss = _module("CosineEmbeddingLoss", cosine_embedding_loss)
KLDivergence = _module("KLDivergence", kl_divergence)
GeneralizedJSD = _module("GeneralizedJSD", generalized_jsd)
JensenShannon = _module("JensenShannon", jensen_shannon)
SkewKL = _module("SkewKL", skew_kl)
TotalVariation = _module("TotalVariation", total_variation)
AlphaDivergence = _module("AlphaDivergence", alpha_divergence)
DistillationLoss = _module("DistillationLoss", distillation_loss)
ULDLoss = _module("ULDLoss", uld_loss)
SpanLoss = _module("SpanLoss", span_loss)
HiddenStateLoss = _module("HiddenStateLoss", hidden_state_loss)
AttentionLoss = _module("AttentionLoss", attention_loss)
TopKKL = _module("TopKKL", top_k_kl)
TopKJSD = _module("TopKJSD", top_k_jsd)
SampledDistillationLoss = _module("SampledDistillationLoss", sampled_distillation_loss)
RewardLoss = _module("RewardLoss", reward_loss)
PlackettLuceLoss = _module("PlackettLuceLoss", plackett_luce_loss)
KTOLoss = _module("KTOLoss", kto_loss)
PPOLoss = _module("PPOLoss", ppo_loss)
ValueLoss = _module("ValueLoss", value_loss)
ActorCriticLoss = _module("ActorCriticLoss", actor_critic_loss)


# Not made by _module: its hyper-parameters depend on loss_type, so the call checks them.
class DPOLoss(nn.Module):
    """Any preference loss by name: ``DPOLoss(beta=0.1, loss_type="sigmoid", label_smoothing=0.1)``.

    Takes the arguments of :func:`rlhf.losses.dpo_loss` that are no tensors, and is called with the tensors, in either
    of its forms.
    """

    def __init__(self, beta: float = 0.1, loss_type: str | list[str] = "sigmoid", **options: Any) -> None:
        super().__init__()
        self.options = {"beta": beta, "loss_type": loss_type, **options}

    def forward(self, *tensors: Tensor, **more: Any) -> Tensor:
        return dpo_loss(*tensors, **self.options | more)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class CombinedLoss(nn.Module):
    r"""A weighted sum of losses on the same inputs, each part reported.

    .. math:: \sum_i w_i\,l_i, \quad \text{or } \sum_i w_i\,l_i/\mathrm{sg}(l_i), \quad
              \text{or } \sum_i w_i (e^{-s_i} l_i + s_i)

    Args:
        parts: name to loss (a function or module); each is called with what the call is given.
        weights: name to w, default 1.
        scheme: ``"sum"`` · ``"scaled"``: each part divided by its own value, so that all have the same influence
            whatever their units (a part that is 0 stays 0) · ``"uncertainty"``: the s are learned (``log_variances``).
    A call returns ``(total, {name: value of the part})``; the values carry no gradient.

    Raises:
        ValueError: no parts, a weight for no part, or an unknown scheme.
    Example:
        >>> both = CombinedLoss({"mse": MSELoss(), "mae": MAELoss()}, weights={"mae": 0.5})
        >>> both(torch.tensor([2.0]), torch.tensor([0.0]))
        (tensor(5.), {'mse': tensor(4.), 'mae': tensor(2.)})

    Source: uncertainty weighting arXiv 1705.07115, with s the log of the variance.
    """

    def __init__(
        self,
        parts: Mapping[str, Callable[..., Tensor]],
        weights: Mapping[str, float] | None = None,
        scheme: str = "sum",
    ) -> None:
        super().__init__()
        if not parts or set(weights or {}) - set(parts):
            raise ValueError(f"parts are {sorted(parts)}, weights are for {sorted(weights or {})}: name the same")
        if scheme not in ("sum", "scaled", "uncertainty"):
            raise ValueError(f'scheme must be "sum", "scaled" or "uncertainty", got {scheme!r}')
        self.parts = dict(parts)
        # Registered, so that their parameters are found; parts may also be plain functions.
        self.modules_of_parts = nn.ModuleDict(
            {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
        )
        self.weights = {name: (weights or {}).get(name, 1.0) for name in parts}
        self.scheme = scheme
        if scheme == "uncertainty":
            # 0 is a variance of 1: training starts from the plain sum.
            self.log_variances = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in parts})

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        part_values = {name: loss(*args, **kwargs) for name, loss in self.parts.items()}
        # Weights apply after the scheme, so that they compare parts of one scale.
        weighted_terms = [self.weights[name] * self._term(name, value) for name, value in part_values.items()]
        return torch.stack(weighted_terms).sum(), {name: value.detach() for name, value in part_values.items()}

    def _term(self, name: str, value: Tensor) -> Tensor:
        if self.scheme == "scaled":
            # Detached: the gradient is that of log |value|, free of units.
            magnitude = value.detach().abs()
            return value / torch.where(magnitude > 0, magnitude, 1.0)
        if self.scheme == "uncertainty":
            log_variance = self.log_variances[name]
            # Without the second term the variance would grow for ever.
            return value * torch.exp(-log_variance) + log_variance
        return value


def as_compute_loss(loss: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """A loss in the form that ``transformers.Trainer(compute_loss_func=...)`` calls.

    Args:
        loss: called as ``loss(logits, labels, **options)``; it must take ``reduction``.
        options: hyper-parameters, fixed.
    Returns:
        ``compute(outputs, labels, num_items_in_batch=None)``. Given the number of items, the summed loss is divided by
        it, so that accumulated micro-batches give the gradient of the whole batch; without it, the mean is taken.
    Example:
        >>> compute = as_compute_loss(causal_lm_loss, z_loss=1e-4)
        >>> outputs = {"logits": torch.zeros(1, 3, 4)}
        >>> compute(outputs, torch.tensor([[0, 2, 1]]), num_items_in_batch=4)    # 2 tokens here, 4 in the step
        tensor(0.6932)
    """

    def compute(outputs: Any, labels: Tensor, num_items_in_batch: int | Tensor | None = None) -> Tensor:
        logits = outputs["logits"]
        # Trainer gives the number of items of the whole step, over accumulated micro-batches.
        if num_items_in_batch is None:
            return loss(logits, labels, **options)
        # A mean of each micro-batch would give a token of a short one more weight.
        return loss(logits, labels, reduction="sum", **options) / num_items_in_batch

    return compute
