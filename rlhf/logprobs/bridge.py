"""From any Hugging Face causal LM to :class:`Scores`: the backbone, then the head in chunks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.logprobs.chunk_plan import Mode
from rlhf.logprobs.head import HeadSettings, Predictions, as_autocast_casts, backbone_of, read_head, verified_settings
from rlhf.logprobs.objective import HeadObjective, Scores
from rlhf.logprobs.score import score_predictions
from rlhf.logprobs.targets import Targets
from rlhf.logprobs.versions import kept_logits


def model_scores(
    model: nn.Module,
    targets: Targets,
    *,
    objective: HeadObjective | None = None,
    entropy: bool = False,
    mode: Mode = "auto",
    chunk_size: int | None = None,
    temperature: float = 1.0,
    value_head: nn.Module | None = None,
    **inputs: Any,
) -> Scores:
    """Score ``targets`` under a causal LM.

    Args:
        model: a transformers causal LM or a PEFT model around one. Inside DDP, FSDP or ZeRO, call this from the
            wrapped module's ``forward`` (``rlhf.models.Policy`` does), so that their hooks fire.
        targets: built from the same ``input_ids`` [B, T].
        objective: as in :func:`score`.
        entropy: as in :func:`score`.
        mode: as in :func:`score`; a model that runs its own head ignores it.
        chunk_size: as in :func:`score`.
        temperature: > 0, divides the logits, as it did when the tokens were sampled.
        value_head: from the hidden states [N, H] that predict the targets to their values [N, 1].
        inputs: the arguments of the model's forward: ``input_ids``, ``attention_mask``, ``position_ids``, …
    Returns:
        Scores of [N] vectors, at least float32.
    """
    model = without_adapter(model)
    settings = verified_settings(model)
    values = router_logits = None
    if settings is not None or value_head is not None:
        # A cache would be wasted, and with it transformers drops a packed mask without a word.
        outputs = backbone_of(model)(**inputs, use_cache=False)
        hidden, router_logits = outputs[0], getattr(outputs, "router_logits", None)
        if value_head is not None:
            values = read_values(value_head, hidden, targets)
    if settings is not None:
        predictions = _under_head(model, settings, hidden, targets, temperature)
    else:
        # Such a model runs as a whole, so its router logits are read off the backbone inside.
        with _record_router_logits(model, inputs) as recorded:
            predictions = _under_own_head(model, targets, temperature, inputs)
        router_logits = recorded.get("router_logits")
    scores = score_predictions(
        predictions, targets.token, objective=objective, entropy=entropy, mode=mode, chunk_size=chunk_size
    )
    # A backbone whose config asks for router logits returns them unasked.
    if not inputs.get("output_router_logits"):
        router_logits = None
    return scores._replace(values=values, router_logits=router_logits)


def model_predictions(model: nn.Module, targets: Targets, *, temperature: float = 1.0, **inputs: Any) -> Predictions:
    """A causal LM's predictions of ``targets`` before the softmax: the last hidden states, [N, H], and the head.

    With gradient where one is wanted: for a teacher, call it under ``torch.no_grad()``. A model that runs its own head
    gives its logits, [N, V].

    Args:
        model: as in :func:`model_scores`.
        targets: as in :func:`model_scores`.
        temperature: as in :func:`model_scores`.
        inputs: as in :func:`model_scores`.
    Returns:
        The predictions, for :func:`rlhf.logprobs.compare` and the like.
    """
    model = without_adapter(model)
    settings = verified_settings(model)
    if settings is None:
        return _under_own_head(model, targets, temperature, inputs)
    hidden = backbone_of(model)(**inputs, use_cache=False)[0]
    return _under_head(model, settings, hidden, targets, temperature)


def _under_head(
    model: nn.Module, settings: HeadSettings, hidden: Tensor, targets: Targets, temperature: float
) -> Predictions:
    rows = hidden.reshape(-1, hidden.size(-1)).index_select(0, targets.source)
    head = read_head(model, settings, temperature)
    if rows.size(1) != head.weight.size(1):
        raise ValueError(f"hidden states have size {rows.size(1)}, the head {head.weight.size(1)}")
    return Predictions(as_autocast_casts(rows), head)


def _under_own_head(model: nn.Module, targets: Targets, temperature: float, inputs: dict[str, Any]) -> Predictions:
    """The exact fallback: logits that the model computes itself."""
    logits, row_of_target = own_logits(model, targets, temperature, inputs)
    return Predictions(logits if row_of_target is None else logits[row_of_target])


def without_adapter(model: nn.Module) -> nn.Module:
    """The transformers model, where PEFT is around it (whose layers are in it); else the model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def read_values(head: nn.Module, hidden: Tensor, targets: Targets) -> Tensor:
    """The output of ``head``, in float32, for the hidden state before each target: [N]."""
    rows = hidden.reshape(-1, hidden.size(-1)).index_select(0, targets.source)
    with torch.autocast(rows.device.type, enabled=False):
        # A value head has float32 weights under a model in half precision, too.
        return head(rows.to(torch.promote_types(rows.dtype, torch.float32))).squeeze(-1)


@contextmanager
def _record_router_logits(model: nn.Module, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Record the router logits of a mixture while the whole model runs, where ``inputs`` ask for them."""
    recorded: dict[str, Any] = {}
    if not inputs.get("output_router_logits"):
        yield recorded
        return

    def ask_for_them(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"output_router_logits": True}

    def record(module: nn.Module, args: Any, output: Any) -> None:
        recorded["router_logits"] = output.router_logits

    # The hooks ask the backbone and not the whole model, which would add a balancing loss of its own.
    backbone = backbone_of(model)
    hooks = [
        backbone.register_forward_pre_hook(ask_for_them, with_kwargs=True),
        backbone.register_forward_hook(record),
    ]
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()


def own_logits(
    model: nn.Module, targets: Targets, temperature: float, inputs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """A model's own logits at the positions that are scored.

    Args:
        model: a transformers causal LM.
        targets: the N scored tokens.
        temperature: divides the logits.
        inputs: the arguments of its forward.
    Returns:
        Logits [R, V], at least float32, and for each target its row in them, int64 [N]; None where the rows are the
        targets in their order.
    """
    # Answers that share a prompt share its last position: its logits are computed once.
    positions, row_of_target = targets.source.unique(return_inverse=True)
    batch_shape = inputs["input_ids"].shape
    is_wanted = torch.zeros(batch_shape.numel(), dtype=torch.bool, device=positions.device)
    is_wanted[positions] = True
    if "output_router_logits" in inputs:
        # Of router logits the model would make a loss, under a mask that is not its own.
        inputs = inputs | {"output_router_logits": False}
    logits = kept_logits(model, inputs, is_wanted.view(batch_shape))
    if logits.dim() == 3:  # it keeps all (ProphetNet)
        logits = logits.flatten(0, 1)[positions]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Divided after the cast, so that half precision rounds once.
    if temperature != 1:
        logits = logits / temperature
    # Picking rows copies all logits: it is left out where every position predicts one target, in order.
    in_order = len(positions) == len(targets) and torch.equal(positions, targets.source)
    return logits, None if in_order else row_of_target
