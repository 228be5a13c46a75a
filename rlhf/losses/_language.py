"""Losses of causal language models on dense logits: ``[batch, seq, vocab]`` against ``[batch, seq]`` labels.

The trainers never build such logits (``rlhf.logprobs.score``). These functions are for loops that already have them.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.losses._checks import check_floating, check_range, check_same_shape, check_tensor
from rlhf.losses._class_targets import check_labels
from rlhf.losses._reduction import Reduction, reduce, upcast


def shift(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Pair the logits of each position with the *next* label.

    Args:
        logits: [..., T, V].
        labels: [..., T] class indices, aligned with ``input_ids``.
    Returns:
        ``logits[..., :-1, :]`` and ``labels[..., 1:]``.
    Example:
        >>> logits, labels = shift(torch.zeros(1, 3, 4), torch.tensor([[0, 2, 1]]))
        >>> tuple(logits.shape), labels
        ((1, 2, 4), tensor([[2, 1]]))
    """
    _check_dense(logits, labels)
    # The last position predicts a token beyond the text, and nothing predicts the first label.
    return logits[..., :-1, :], labels[..., 1:]


def token_logps(logits: Tensor, labels: Tensor, ignore_index: int = -100, *, shift: bool = True) -> Tensor:
    """Log-probability of each label, in nats.

    Args:
        logits: [..., T, V].
        labels: [..., T] class indices, aligned with ``input_ids``.
        ignore_index: label that is not scored.
        shift: pair position t with label t + 1, as Hugging Face models do; False if the labels are already shifted.
    Returns:
        [..., T - 1] ([..., T] without shift), nats, at least float32; 0 where the label is ignored.
    Raises:
        ValueError: shapes do not fit, labels are not integers or lie outside the vocabulary.
    Example:
        >>> token_logps(torch.zeros(1, 3, 4), torch.tensor([[0, 2, -100]]))    # uniform over 4: -log 4
        tensor([[-1.3863, -0.0000]])
    """
    return -_token_nll(logits, labels, ignore_index, shift)


def sequence_logps(
    logits: Tensor, labels: Tensor, ignore_index: int = -100, *, average: bool = False, shift: bool = True
) -> Tensor:
    """Sum (or, with ``average``, mean) of :func:`token_logps` over the scored tokens of each sequence.

    Args:
        logits: [..., T, V].
        labels: [..., T] class indices, aligned with ``input_ids``.
        ignore_index: label that is not scored.
        average: the mean over the scored tokens instead of the sum.
        shift: pair position t with label t + 1, as Hugging Face models do; False if the labels are already shifted.
    Returns:
        [...] nats, at least float32; 0 for a sequence without a scored token.
    Raises:
        ValueError: shapes do not fit, labels are not integers or lie outside the vocabulary.
    Example:
        >>> sequence_logps(torch.zeros(1, 3, 4), torch.tensor([[0, 2, 1]]))    # -2 log 4
        tensor([-2.7726])
    """
    sequence_sums = token_logps(logits, labels, ignore_index, shift=shift).sum(-1)
    if not average:
        return sequence_sums
    is_scored = (labels[..., 1:] if shift else labels) != ignore_index
    # A sequence without a scored token has the sum 0, and 0 / 1 is 0 where 0 / 0 is NaN.
    return sequence_sums / is_scored.sum(-1).clamp(min=1)


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    num_items: int | Tensor | None = None,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    shift: bool = True,
) -> Tensor:
    r"""Next-token cross-entropy.

    .. math:: -\frac{1}{|S|} \sum_{t \in S} \left(\log p(y_{t+1} \mid y_{\le t}) - \zeta \log^2 Z_t\right),\;
              S = \{t : y_{t+1} \ne ignore\}

    Args:
        logits: [..., T, V].
        labels: [..., T] class indices, aligned with ``input_ids``.
        ignore_index: label that is not scored.
        label_smoothing: share of the target that is spread over the vocabulary, in [0, 1).
        z_loss: >= 0, zeta; 1e-4 keeps the normaliser of the logits near 1, which helps in half precision.
        num_items: divide the (weighted) sum by this instead of the number of scored tokens here: the scored tokens of
            the whole optimizer step, as ``transformers.Trainer`` counts them, so that accumulation does not change the
            loss.
        reduction: ``"mean"`` divides by the number of scored tokens, or by their summed weight; ``"sum"`` or
            ``"none"``.
        weight: shape of ``labels`` and shifted with them, >= 0.
        mask: shape of ``labels`` and shifted with them, bool; True counts.
        shift: pair position t with label t + 1, as Hugging Face models do; False if the labels are already shifted.
    Returns:
        Scalar, or [..., T - 1] for ``"none"`` ([..., T] without shift); at least float32; 0 if nothing is scored.
    Raises:
        ValueError: shapes do not fit, labels are not integers or lie outside the vocabulary, or options out of range.
    Example:
        >>> causal_lm_loss(torch.zeros(1, 3, 4), torch.tensor([[0, 2, 1]]))
        tensor(1.3863)

    Source: z-loss arXiv 2204.02311 §5; smoothing arXiv 1512.00567 §7.
    """
    check_range("label_smoothing", label_smoothing, 0.0, 1.0)
    check_range("z_loss", z_loss, 0.0, math.inf)
    token_losses = _token_nll(logits, labels, ignore_index, shift, label_smoothing)
    if z_loss:
        # A second pass over the logits, because torch's cross-entropy does not return the normaliser.
        # In float32: the square of log Z loses the digits that matter in half precision.
        predicting_logits = upcast(logits[..., :-1, :] if shift else logits)
        token_losses = token_losses + z_loss * predicting_logits.logsumexp(-1) ** 2
    return _reduce_tokens(token_losses, labels, ignore_index, shift, reduction, weight, mask, num_items)


def dft_loss(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    *,
    num_items: int | Tensor | None = None,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    shift: bool = True,
) -> Tensor:
    r"""Dynamic fine-tuning: cross-entropy weighted by the token's probability; unlikely tokens have less influence.

    .. math:: -\mathrm{sg}(p_t) \log p_t

    Args:
        logits: [..., T, V].
        labels: [..., T] class indices, aligned with ``input_ids``.
        ignore_index: label that is not scored.
        num_items: divide the (weighted) sum by this instead of the number of scored tokens here: the scored tokens of
            the whole optimizer step, as ``transformers.Trainer`` counts them, so that accumulation does not change the
            loss.
        reduction: ``"mean"`` divides by the number of scored tokens, or by their summed weight; ``"sum"`` or
            ``"none"``.
        weight: shape of ``labels`` and shifted with them, >= 0.
        mask: shape of ``labels`` and shifted with them, bool; True counts.
        shift: pair position t with label t + 1, as Hugging Face models do; False if the labels are already shifted.
    Returns:
        Scalar, or [..., T - 1] for ``"none"`` ([..., T] without shift); at least float32; 0 if nothing is scored.
    Raises:
        ValueError: shapes do not fit, labels are not integers or lie outside the vocabulary.
    Example:
        >>> dft_loss(torch.zeros(1, 2, 4), torch.tensor([[0, 2]]))    # log(4) / 4
        tensor(0.3466)

    Source: arXiv 2508.05629.
    """
    # The probability is a factor and no weight: a weighted mean would divide it out again.
    token_nll = _token_nll(logits, labels, ignore_index, shift)
    probability = (-token_nll.detach()).exp()  # a constant: the gradient of the product is that of the weighted loss
    return _reduce_tokens(probability * token_nll, labels, ignore_index, shift, reduction, weight, mask, num_items)


def unlikelihood_loss(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    *,
    num_items: int | Tensor | None = None,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    shift: bool = True,
) -> Tensor:
    r"""Unlikelihood: lowers the probability of given tokens, such as repetitions.

    .. math:: -\log(1 - p(y_{t+1} \mid y_{\le t}))

    Args:
        logits: [..., T, V].
        labels: [..., T], tokens that should *not* follow; ``ignore_index`` where there is none.
        ignore_index: label that is not scored.
        num_items: divide the (weighted) sum by this instead of the number of scored tokens here: the scored tokens of
            the whole optimizer step, as ``transformers.Trainer`` counts them, so that accumulation does not change the
            loss.
        reduction: ``"mean"`` divides by the number of scored tokens, or by their summed weight; ``"sum"`` or
            ``"none"``.
        weight: shape of ``labels`` and shifted with them, >= 0.
        mask: shape of ``labels`` and shifted with them, bool; True counts.
        shift: pair position t with label t + 1, as Hugging Face models do; False if the labels are already shifted.
    Returns:
        Scalar, or [..., T - 1] for ``"none"`` ([..., T] without shift); at least float32; 0 if nothing is scored.
    Raises:
        ValueError: shapes do not fit, labels are not integers or lie outside the vocabulary.
    Example:
        >>> unlikelihood_loss(torch.zeros(1, 2, 4), torch.tensor([[0, 2]]))    # -log(3 / 4)
        tensor(0.2877)

    Source: arXiv 1908.04319.
    """
    _check_dense(logits, labels)
    check_floating("logits", logits)
    check_labels("labels", labels, logits.size(-1), ignore_index, "vocabulary")
    predicting_logits, unwanted_tokens = (logits[..., :-1, :], labels[..., 1:]) if shift else (logits, labels)
    log_probs = upcast(predicting_logits).log_softmax(-1)
    # scatter needs a valid index everywhere; what is ignored is masked below.
    token_index = torch.where(unwanted_tokens == ignore_index, 0, unwanted_tokens.long())[..., None]
    # log(1 - p) from all the other tokens: exact where p rounds to 1.
    token_losses = -log_probs.scatter(-1, token_index, -math.inf).logsumexp(-1)
    return _reduce_tokens(token_losses, labels, ignore_index, shift, reduction, weight, mask, num_items)


def perplexity(logits: Tensor, labels: Tensor, ignore_index: int = -100, *, shift: bool = True) -> Tensor:
    """``exp(total NLL / scored tokens)`` over everything given; 1 when nothing is scored.

    Over several batches, sum NLL and counts first (``causal_lm_loss(..., reduction="sum")``): a mean of batch
    perplexities depends on the batch size.

    Args:
        logits: [..., T, V].
        labels: [..., T] class indices, aligned with ``input_ids``.
        ignore_index: label that is not scored.
        shift: pair position t with label t + 1, as Hugging Face models do; False if the labels are already shifted.
    Returns:
        Scalar, at least 1; 1 if nothing is scored.
    Raises:
        ValueError: shapes do not fit, labels are not integers or lie outside the vocabulary.
    Example:
        >>> perplexity(torch.zeros(1, 3, 4), torch.tensor([[0, 2, 1]]))
        tensor(4.)
    """
    # The exponential of the mean; a mean of exponentials would be larger and dominated by the worst token.
    return causal_lm_loss(logits, labels, ignore_index, shift=shift).exp()


def bits_per_byte(
    logits: Tensor, labels: Tensor, num_bytes: int | Tensor, ignore_index: int = -100, *, shift: bool = True
) -> Tensor:
    """Total NLL in bits for each byte of the text. Unlike perplexity, it can be compared between tokenizers.

    Args:
        logits: [..., T, V].
        labels: [..., T] class indices, aligned with ``input_ids``.
        num_bytes: > 0, UTF-8 bytes of the text of the scored labels.
        ignore_index: label that is not scored.
        shift: pair position t with label t + 1, as Hugging Face models do; False if the labels are already shifted.
    Returns:
        Scalar, bits for each byte.
    Raises:
        ValueError: shapes do not fit, labels are not integers or lie outside the vocabulary.
    Example:
        >>> bits_per_byte(torch.zeros(1, 3, 4), torch.tensor([[0, 2, 1]]), num_bytes=8)    # 2 tokens of 2 bits
        tensor(0.5000)
    """
    return causal_lm_loss(logits, labels, ignore_index, reduction="sum", shift=shift) / (num_bytes * math.log(2))


def _reduce_tokens(
    losses: Tensor,
    labels: Tensor,
    ignore_index: int,
    shift: bool,
    reduction: Reduction,
    weight: Tensor | None,
    mask: Tensor | None,
    num_items: int | Tensor | None,
) -> Tensor:
    # The first token is predicted by none, so that its label, weight and mask fall away.
    predicted = slice(1, None) if shift else slice(None)
    is_scored = labels[..., predicted] != ignore_index
    check_same_shape(labels=labels, weight=weight, mask=mask)
    # Ignored labels and the mask become one, so that neither is in the divisor.
    if mask is not None:
        is_scored = is_scored & mask[..., predicted].bool()
    weight = None if weight is None else weight[..., predicted]
    # num_items replaces the divisor of a mean; a sum has none.
    if num_items is None or reduction != "mean":
        return reduce(losses, reduction, weight, is_scored)
    return reduce(losses, "sum", weight, is_scored) / num_items


def _check_dense(logits: Tensor, labels: Tensor) -> None:
    check_tensor("logits", logits)
    check_tensor("labels", labels)
    if logits.dim() < 2 or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels must have the shape of logits without the vocabulary, {tuple(logits.shape[:-1])}, "
            f"got {tuple(labels.shape)}"
        )


def _token_nll(
    logits: Tensor, labels: Tensor, ignore_index: int, shift: bool, label_smoothing: float = 0.0
) -> Tensor:  # fmt: skip
    _check_dense(logits, labels)
    check_floating("logits", logits)
    check_labels("labels", labels, logits.size(-1), ignore_index, "vocabulary")
    if shift:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    # For half-precision logits this is a float32 copy of the whole vocabulary, which trainers avoid.
    flat_logits = upcast(logits).reshape(-1, logits.size(-1))
    flat_nll = F.cross_entropy(
        flat_logits,
        # torch refuses int32 labels.
        labels.reshape(-1).long(),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    return flat_nll.view(torch.Size(labels.shape))
