"""From any Hugging Face causal LM to :class:`Scores`: the backbone, then the head in chunks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.logprobs.chunks import Mode
from rlhf.logprobs.divergence import Predictions
from rlhf.logprobs.head import backbone_of, read_head, verified_settings
from rlhf.logprobs.score import LocalLoss, Scores, score
from rlhf.logprobs.targets import Targets
from rlhf.logprobs.versions import kept_logits


def model_scores(
    model: nn.Module,
    targets: Targets,
    *,
    entropy: bool = False,
    mode: Mode = "auto",
    chunk_size: int | None = None,
    local_loss: LocalLoss | None = None,
    per_token: tuple[Tensor, ...] = (),
    temperature: float = 1.0,
    value_head: nn.Module | None = None,
    **inputs: Any,
) -> Scores:
    """Score ``targets`` under a causal LM.

    Args:
        model: a transformers causal LM or a PEFT model around one. Inside DDP, FSDP or ZeRO, call this from the
            wrapped module's ``forward`` (``rlhf.models.Policy`` does), so that their hooks fire.
        targets: built from the same ``input_ids`` [B, T].
        entropy, mode, chunk_size, local_loss, per_token: as in :func:`score`; a model that runs its own head ignores
            mode and chunk size.
        temperature: > 0, divides the logits, as it did when the tokens were sampled.
        value_head: from the hidden states [N, H] that predict the targets to their values [N, 1].
        inputs: what the model's forward takes: ``input_ids``, ``attention_mask``, ``position_ids``, …
    Returns:
        Scores of [N] vectors, at least float32.
    """
    model = without_adapter(model)
    settings = verified_settings(model)
    hidden = values = routers = None
    if settings is not None or value_head is not None:
        # A cache would be wasted, and with it transformers drops a packed mask without a word.
        outputs = backbone_of(model)(**inputs, use_cache=False)
        hidden, routers = outputs[0], getattr(outputs, "router_logits", None)
    if value_head is not None and hidden is not None:
        values = read_values(value_head, hidden, targets)
    if settings is None or hidden is None:
        with _router_logits(model, inputs) as heard:
            scores = _own_head(model, targets, entropy, temperature, inputs)
        routers = heard.get("router_logits")
        scores = scores if local_loss is None else scores._replace(loss=local_loss(scores, *per_token).sum())
    else:
        scores = score(
            hidden,
            read_head(model, settings, temperature),
            targets,
            entropy=entropy,
            mode=mode,
            chunk_size=chunk_size,
            local_loss=local_loss,
            per_token=per_token,
        )
    return scores._replace(values=values, router_logits=routers if inputs.get("output_router_logits") else None)


def model_predictions(model: nn.Module, targets: Targets, *, temperature: float = 1.0, **inputs: Any) -> Predictions:
    """What a causal LM says of ``targets`` short of the softmax: the last hidden states, [N, H], and the head.

    With gradient where one is wanted: for a teacher, call it under ``torch.no_grad()``. A model that runs its own head
    gives its logits, [N, V]. Arguments as in :func:`model_scores`.
    """
    model = without_adapter(model)
    settings = verified_settings(model)
    if settings is None:
        logits, row = own_logits(model, targets, temperature, inputs)
        return Predictions(logits[row])
    hidden = backbone_of(model)(**inputs, use_cache=False)[0]
    rows = hidden.reshape(-1, hidden.size(-1)).index_select(0, targets.source)
    return Predictions(rows, read_head(model, settings, temperature))


def without_adapter(model: nn.Module) -> nn.Module:
    """The transformers model, where PEFT is around it (whose layers are in it); else the model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def read_values(head: nn.Module, hidden: Tensor, targets: Targets) -> Tensor:
    """What ``head`` says, in float32, of the hidden states before each target: [N]."""
    rows = hidden.reshape(-1, hidden.size(-1)).index_select(0, targets.source)
    with torch.autocast(rows.device.type, enabled=False):
        return head(rows.to(torch.promote_types(rows.dtype, torch.float32))).squeeze(-1)


def _own_head(model: nn.Module, targets: Targets, entropy: bool, temperature: float, inputs: dict[str, Any]) -> Scores:
    logits, row = own_logits(model, targets, temperature, inputs)
    logps = logits.log_softmax(-1)
    entropies = -(logps.exp() * logps).sum(-1)[row] if entropy else None
    return Scores(logps[row, targets.token], entropies)


@contextmanager
def _router_logits(model: nn.Module, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Listen to what the routers say while the whole model runs; filled where ``inputs`` ask for it."""
    heard: dict[str, Any] = {}
    if not inputs.get("output_router_logits"):
        yield heard
        return

    def ask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"output_router_logits": True}

    def listen(module: nn.Module, args: Any, output: Any) -> None:
        heard["router_logits"] = output.router_logits

    backbone = backbone_of(model)
    handles = backbone.register_forward_pre_hook(ask, with_kwargs=True), backbone.register_forward_hook(listen)
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def own_logits(
    model: nn.Module, targets: Targets, temperature: float, inputs: dict[str, Any]
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The exact fallback: a model's own logits at the positions that are scored [R, V], and each target's row [N]."""
    kept, row = targets.source.unique(return_inverse=True)
    shape = inputs["input_ids"].shape
    mask = torch.zeros(shape.numel(), dtype=torch.bool, device=kept.device)
    mask[kept] = True
    # Of router logits the model would make a loss, under a mask that is not its own.
    inputs = inputs | {"output_router_logits": False} if "output_router_logits" in inputs else inputs
    logits = kept_logits(model, inputs, mask.view(shape))
    if logits.dim() == 3:  # it keeps all (ProphetNet)
        logits = logits.flatten(0, 1)[kept]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, row
