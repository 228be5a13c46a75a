"""What all losses share: precision, masks and reductions."""

import inspect
import re
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf.losses._checks import check_floating, check_same_shape, check_tensor
from rlhf.losses._class_targets import check_class_weights, check_labels, has_soft_targets
from rlhf.losses._suspicions import check_sum

Reduction = Literal["mean", "sum", "none"]
# Called with the arguments of a loss and the mask of what counts.
Check = Callable[[dict[str, Any], Tensor | None], None]


def upcast(tensor: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay."""
    # bfloat16 has 8 bits of mantissa: a sum in it stops growing after a few hundred terms of one size.
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def reduce(
    values: Tensor,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """Reduce per-element losses.

    Args:
        values: any shape.
        reduction: ``"mean"`` is the weighted mean over what counts, ``sum(w * x) / sum(w)``; ``"sum"`` is
            ``sum(w * x)``; ``"none"`` keeps the shape, with 0 where the mask is False.
        weight: same shape as ``values``, non-negative.
        mask: same shape, True counts. What it hides may be NaN or infinite without harm.
        counts: same shape; what each element adds to the divisor of the mean, instead of 1.
    Returns:
        Scalar, or ``values``'s shape for ``"none"``. Nothing counts: a zero that can be differentiated.
    """
    check_same_shape(values=values, weight=weight, mask=mask)
    # Selected, not multiplied by 0: what is masked may be NaN.
    if mask is not None:
        values = torch.where(mask.bool(), values, 0.0)
    if weight is not None:
        weight = weight.to(values.dtype)
        if mask is not None:
            # A hidden weight must not be in the divisor, and may be NaN too.
            weight = torch.where(mask.bool(), weight, 0.0)
        values = values * weight
    match reduction:
        case "none":
            return values
        case "sum":
            return values.sum()
        case "mean":
            counted = weight if weight is not None else mask
            if counts is not None:
                counted = counts if counted is None else counted * counts
            divisor = values.new_tensor(values.numel()) if counted is None else counted.sum().to(values.dtype)
            # Nothing counts: 0 / 1 keeps the graph, where 0 / 0 would be NaN.
            return values.sum() / torch.where(divisor == 0, 1.0, divisor)
    raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')


def _option(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


SHARED_OPTIONS = [
    _option("reduction", "mean", Reduction),
    _option("weight", None, Tensor | None),
    _option("mask", None, Tensor | None),
]


SHARED_HELP = {
    "ignore_index": "label that is not scored.",
    "reduction": '``"mean"`` over the elements that count, ``"sum"`` or ``"none"``.',
    "weight": "shape of the losses, >= 0; a mean divides by the sum of the weights that count.",
    "mask": "shape of the losses, bool; True counts. A masked element may be NaN.",
}


def document_options(docstring: str, options: Mapping[str, str], instead_of: str | None = None) -> str:
    """Describe the parameters that a decorator gives to a function.

    Args:
        docstring: of the function, which describes its own parameters.
        options: name to description; the ones that the docstring describes are left out.
        instead_of: a parameter that the decorator takes away; its line is replaced by those of the options.
    Returns:
        The docstring, with the lines in that place, or at the end of its ``Args``; unchanged if it has none.
    """
    docstring = inspect.cleandoc(docstring)
    # The section ends at the first line that is not indented.
    section = re.search(r"^Args:\n((?:[ ].*\n|\n)*)", docstring, re.MULTILINE)
    if section is None:
        return docstring
    lines = [
        f"    {name}: {description}\n"
        for name, description in options.items()
        if not re.search(rf"^    {name}:", section[1], re.MULTILINE)
    ]
    start = end = section.end()
    if instead_of is not None and (replaced_line := re.search(rf"^    {instead_of}: .*\n", section[0], re.MULTILINE)):
        start, end = section.start() + replaced_line.start(), section.start() + replaced_line.end()
    return docstring[:start] + "".join(lines) + docstring[end:]


def reducible(
    *inputs: str, labels: str | None = None, soft: bool = False, check: Check | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Tensor]]:
    """Give a function of per-element losses the arguments ``reduction``, ``weight`` and ``mask``.

    Args:
        inputs: its floating-point arguments that have the shape of the losses (or one more dimension, of classes).
            They are checked, taken to float32 where they are half precision, and set to 0 where the mask is False, so
            that what it hides reaches neither the loss nor, by way of 0 * NaN, a gradient. An argument may be None.
        labels: its argument of class indices into the last dimension of the first input. They are checked, the
            argument ``ignore_index`` is added, and what is ignored is masked.
        soft: ``labels`` may also be probabilities of the classes, which are treated as an input is.
        check: called with the arguments and the mask before the loss, for checks that need to know what is masked.
    Returns:
        A decorator.
    """

    def decorate(loss: Callable[..., Any]) -> Callable[..., Tensor]:
        signature = inspect.signature(loss)
        loss_parameters = list(signature.parameters.values())
        positional = [
            parameter.name for parameter in loss_parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        added_options = SHARED_OPTIONS if labels is None else [_option("ignore_index", -100, int), *SHARED_OPTIONS]
        parameters = [*loss_parameters, *added_options]
        required = {parameter.name for parameter in loss_parameters if parameter.default is parameter.empty}

        @wraps(loss)
        def call(
            *args: Any,
            reduction: Reduction = "mean",
            weight: Tensor | None = None,
            mask: Tensor | None = None,
            **kwargs: Any,
        ) -> Tensor:
            if len(args) > len(positional):
                given = f"got {len(args)} arguments by position"
                by_name = ", ".join(parameter.name for parameter in parameters if parameter.name not in positional)
                raise TypeError(f"{loss.__name__}({', '.join(positional)}): {given}; pass by name: {by_name}")
            if mask is not None:
                check_tensor("mask", mask)
            arguments = dict(zip(positional, args, strict=False), **kwargs)
            # An ignored label hides its loss, but is not worth a copy of the logits, as in torch.
            hiding_mask = mask
            if labels is not None:
                mask = _take_labels(arguments, inputs[0], labels, mask, soft)
            for name in inputs:
                is_given = name in arguments and (arguments[name] is not None or name in required)
                if is_given:
                    arguments[name] = hide(name, arguments[name], hiding_mask)
            # Without a required argument the call below raises, as any function does.
            if check is not None and required <= set(arguments):
                check(arguments, mask)
            loss_output = loss(**arguments)
            # Some losses also return what each element adds to the divisor of the mean.
            values, counts = loss_output if isinstance(loss_output, tuple) else (loss_output, None)
            check_sum(loss.__name__, reduction, values.numel())
            if weight is not None and not (isinstance(weight, Tensor) and weight.shape == values.shape):
                classes = None if labels is None else arguments[inputs[0]].size(-1)
                raise ValueError(_weight_error(weight, values, set(signature.parameters), labels, classes))
            return reduce(values, reduction, weight, mask, counts)

        # help(), the modules and the catalogue read the signature; *args would tell them nothing.
        call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        call.__doc__ = document_options(
            loss.__doc__ or "", {option.name: SHARED_HELP[option.name] for option in added_options}
        )
        return call

    return decorate


def _take_labels(given: dict[str, Any], scores: str, name: str, mask: Tensor | None, soft: bool) -> Tensor | None:
    """Check the labels, put a valid one where none is scored, and return the mask of what is."""
    ignore_index = given.pop("ignore_index", -100)
    if scores not in given or name not in given:
        return mask
    logits, labels = given[scores], given[name]
    is_soft = has_soft_targets(scores, logits, name, labels, soft)
    check_class_weights(given.get("class_weights"), logits.size(-1))
    if is_soft:
        given[name] = hide(name, labels, mask)
        return mask
    check_labels(name, labels, logits.size(-1), ignore_index)
    is_scored = labels != ignore_index
    check_same_shape(mask=mask, **{name: labels})
    mask = is_scored if mask is None else mask.bool() & is_scored
    # Class 0 exists for any number of classes; the loss there is masked.
    given[name] = torch.where(mask, labels.long(), 0)
    return mask


def _weight_error(weight: Any, values: Tensor, options: set[str], labels: str | None, classes: int | None) -> str:
    """What is wrong with a ``weight`` that has not the shape of the losses, and what it may have been meant for."""
    check_tensor("weight", weight)
    shape = tuple(weight.shape)
    remedy = ""
    if shape == (classes,):
        option = "class_weights=" if "class_weights" in options else f"weight=weight[{labels}]"
        remedy = f": for the weight of each class pass {option}"
    elif "pos_weight" in options:
        remedy = ": for the weight of the positives pass pos_weight="
    return f"weight must have the shape of the losses, {tuple(values.shape)}, got {shape}{remedy}"


def hide(name: str, value: Tensor, mask: Tensor | None) -> Tensor:
    check_floating(name, value)
    value = upcast(value)
    if mask is None:
        return value
    visible = mask.bool()
    if value.dim() == mask.dim() + 1:
        visible = visible[..., None]
    check_same_shape(mask=mask, **{name: value if value.dim() == mask.dim() else value[..., 0]})
    # Selected before the loss is computed: masking only the result would leave 0 * NaN in the gradient.
    return torch.where(visible, value, 0.0)
