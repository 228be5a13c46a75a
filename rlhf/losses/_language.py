"""Causal language models with dense logits in hand: ``[batch, seq, vocab]`` against ``[batch, seq]`` labels.

Our trainers never build these logits (``rlhf.logprobs.score``); these are for people who already have them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.losses._checks import check_floating, check_labels
from rlhf.losses._reduction import Reduction, reduce, upcast


def shift(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Pair each position's logits with the *next* label.

    Args:
        logits: [..., T, V]. labels: [..., T], aligned with ``input_ids`` as in Hugging Face.
    Returns:
        ``logits[..., :-1, :]`` and ``labels[..., 1:]``.
    """
    _check_dense(logits, labels)
    return logits[..., :-1, :], labels[..., 1:]


def token_logps(logits: Tensor, labels: Tensor, ignore_index: int = -100, *, shift: bool = True) -> Tensor:
    """Log-probability of each label, in nats.

    Args:
        logits: [..., T, V].
        labels: [..., T] class indices aligned with ``input_ids``; ``ignore_index`` is not scored.
        shift: pair position t with label t + 1, as Hugging Face models do; False when the labels are shifted already.
    Returns:
        [..., T - 1] ([..., T] with ``shift=False``), at least fp32; 0 where the label is ignored.
    Raises:
        ValueError: shapes do not fit, labels are no indices or lie outside the vocabulary.
    Example:
        >>> token_logps(torch.zeros(1, 3, 4), torch.tensor([[0, 2, -100]]))    # uniform over 4: -log 4
        tensor([[-1.3863, -0.0000]])
    """
    return -_token_nll(logits, labels, ignore_index, shift)


def sequence_logps(
    logits: Tensor, labels: Tensor, ignore_index: int = -100, *, average: bool = False, shift: bool = True
) -> Tensor:
    """Sum (or, with ``average``, mean) of :func:`token_logps` over the scored tokens of each sequence.

    Returns:
        [...] nats, at least fp32; 0 for a sequence without a scored token.
    """
    sums = token_logps(logits, labels, ignore_index, shift=shift).sum(-1)
    if not average:
        return sums
    scored = (labels[..., 1:] if shift else labels) != ignore_index
    return sums / scored.sum(-1).clamp(min=1)


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    *,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    shift: bool = True,
) -> Tensor:
    r"""Next-token cross-entropy.

    .. math:: -\frac{1}{|S|} \sum_{t \in S} \log p(y_{t+1} \mid y_{\le t}),\; S = \{t : y_{t+1} \ne ignore\}

    Args:
        logits: [..., T, V]. labels: [..., T] aligned with ``input_ids``.
        ignore_index: label that is not scored.
        reduction: ``"mean"`` divides by the scored tokens (by their summed weight when ``weight`` is given).
        weight, mask: shape of ``labels``, aligned with them (shifted together); mask True counts.
        shift: False when the labels are shifted already.
    Returns:
        Scalar, or [..., T - 1] for ``"none"`` ([..., T] without shift); at least fp32. 0 when nothing is scored.
    Raises:
        ValueError: shapes do not fit, labels are no indices or lie outside the vocabulary.
    Example:
        >>> causal_lm_loss(torch.zeros(1, 3, 4), torch.tensor([[0, 2, 1]]))
        tensor(1.3863)
    """
    nll = _token_nll(logits, labels, ignore_index, shift)
    cut = slice(1, None) if shift else slice(None)
    scored = labels[..., cut] != ignore_index
    if mask is not None:
        scored = scored & mask[..., cut].bool()
    return reduce(nll, reduction, None if weight is None else weight[..., cut], scored)


def perplexity(logits: Tensor, labels: Tensor, ignore_index: int = -100, *, shift: bool = True) -> Tensor:
    """``exp(total NLL / scored tokens)`` over everything given; 1 when nothing is scored.

    Over several batches, sum NLL and counts first (``causal_lm_loss(..., reduction="sum")``): a mean of batch
    perplexities depends on the batch size.
    """
    return causal_lm_loss(logits, labels, ignore_index, shift=shift).exp()


def _check_dense(logits: Tensor, labels: Tensor) -> None:
    if logits.dim() < 2 or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels must have the shape of logits without the vocabulary, {tuple(logits.shape[:-1])}, "
            f"got {tuple(labels.shape)}"
        )


def _token_nll(logits: Tensor, labels: Tensor, ignore_index: int, shift: bool) -> Tensor:
    _check_dense(logits, labels)
    check_floating("logits", logits)
    check_labels("labels", labels, logits.size(-1), ignore_index)
    if shift:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    flat = upcast(logits).reshape(-1, logits.size(-1))
    nll = F.cross_entropy(flat, labels.reshape(-1).long(), ignore_index=ignore_index, reduction="none")
    return nll.view(torch.Size(labels.shape))
