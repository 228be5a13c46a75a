"""A chunk's predictions: the tokens' log-probs and entropies, and the gradient of a loss that reads these.

Two forms of one thing. :class:`DenseChunk` is made of torch's own operators, on any device. :class:`FusedChunk` leaves
the logits as the product returned them, and reads them by the kernels of :mod:`rlhf.kernels.token_scores`.
"""

import torch
from torch import Tensor

from rlhf.kernels.token_scores import LogitTransform, TokenScores, empty_rows, score_tokens, write_gradient

IN_CACHE = 2**17  # logits that a CPU reads several times from its cache


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The sum over v of a b, [c, V] twice to [c].

    Not by ``bmm``, which on a CPU may add the terms one after another: over 50,000 of them 1e-4 of the sum is lost.
    """
    block_rows = max(IN_CACHE // a.size(1), 1) if a.device.type == "cpu" else max(len(a), 1)
    starts = range(0, max(len(a), 1), block_rows)
    return torch.cat(
        [torch.linalg.vecdot(a[start : start + block_rows], b[start : start + block_rows]) for start in starts]
    )


def grad_of_logits(
    log_probs: Tensor, token: Tensor, grad_logps: Tensor | None, grad_entropy: Tensor | None, out: Tensor | None
) -> Tensor:  # fmt: skip
    r"""The gradient of a loss with respect to the logits, from its gradients in the tokens' log-probs and entropies.

    .. math:: g\,(1_y - p) - e\,p\,(\log p + H)

    Args:
        log_probs: [c, V].
        token: int64 [c], y.
        grad_logps: [c], g.
        grad_entropy: [c], e.
        out: memory for the result where there is no e; may be ``log_probs``.
    Returns:
        [c, V].
    """
    token = token[:, None]
    token_logps = log_probs.gather(1, token)  # before `out`, which may be the same memory
    probs = torch.exp(log_probs, out=out if grad_entropy is None else None)
    if grad_logps is not None:
        # 1 - p as -expm1(log p), formed before any downcast: exact for confident tokens.
        at_token = -token_logps.expm1() * grad_logps[:, None]
    if grad_entropy is None:
        if grad_logps is None:
            return probs.mul_(0)
        return probs.mul_(-grad_logps[:, None]).scatter_(1, token, at_token)
    # The entropy reads p and log p, so the result needs memory of its own.
    entropy = -dot(probs, log_probs)[:, None]
    # p (log p + H) sums to 0 over the vocabulary, as the gradient of a softmax must.
    gradient = probs * (log_probs + entropy).mul_(-grad_entropy[:, None])
    if grad_logps is not None:
        grad_at_token = gradient.gather(1, token) + at_token
        gradient.sub_(grad_logps[:, None] * probs).scatter_(1, token, grad_at_token)
    return gradient


def transform_logits(product: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor | None]:
    """From a product to the logits, in place: bias, scale, soft-cap, temperature.

    Args:
        product: [c, V], overwritten.
        transform: the settings.
    Returns:
        The logits, and the slope of the soft-cap [c, V] where there is one.
    """
    logits = product
    if transform.scale != 1:
        logits *= transform.scale
    if transform.bias is not None:
        logits += transform.bias
    slope = None
    if transform.softcap is not None:
        # The slope of c tanh(z / c) is 1 - tanh², which is at hand now.
        logits.div_(transform.softcap).tanh_()
        slope = 1 - logits**2
        logits.mul_(transform.softcap)
    if transform.temperature != 1:
        logits.div_(transform.temperature)
    return logits, slope


class DenseChunk:
    """Log-probs of all tokens, computed at once.

    Args:
        log_probs: [c, V].
        slope: of the soft-cap, [c, V], where there is one.
        gradient_memory: memory for a gradient, [c, V]; may be ``log_probs``. None for new memory.
    """

    def __init__(self, log_probs: Tensor, slope: Tensor | None, gradient_memory: Tensor | None) -> None:
        self._log_probs, self.slope, self._gradient_memory = log_probs, slope, gradient_memory

    def log_probs(self) -> Tensor:
        """The log-probs of all tokens, [c, V], which the caller may overwrite: call this once, and nothing else."""
        return self._log_probs

    def scores(self, token: Tensor, entropy: bool) -> TokenScores:
        """The numbers of each token.

        Args:
            token: int64 [c].
            entropy: the entropy is wanted too.
        Returns:
            The scores, [c].
        """
        log_probs = self._log_probs
        logps = log_probs.gather(1, token[:, None]).squeeze(1)
        return TokenScores(logps, -dot(log_probs.exp(), log_probs) if entropy else None)

    def grad_of_logits(
        self, token: Tensor, scores: TokenScores, grad_logps: Tensor | None, grad_entropy: Tensor | None
    ) -> Tensor:
        """The gradient with respect to the logits after the soft-cap; ``slope`` is still to be applied.

        Args:
            token: int64 [c].
            scores: of :meth:`scores`.
            grad_logps: [c], of the loss.
            grad_entropy: [c], of the loss.
        Returns:
            [c, V].
        """
        return grad_of_logits(self._log_probs, token, grad_logps, grad_entropy, self._gradient_memory)

    def saved(self) -> tuple[Tensor, Tensor | None]:
        """The tensors that this chunk is made of, for a backward pass."""
        return self._log_probs, self.slope


class FusedChunk:
    """The product of rows and weight, read by kernels that transform it on the way.

    Args:
        product: [c, V].
        transform: from the product to the logits.
        gradient_dtype: of the gradient: that of the products which read it.
        gradient_memory: memory for a gradient, used if it has that type; may be ``product``. None for new memory.
    """

    def __init__(
        self,
        product: Tensor,
        transform: LogitTransform,
        gradient_dtype: torch.dtype,
        gradient_memory: Tensor | None,
    ) -> None:
        self.product, self.transform = product, transform
        self._gradient_dtype, self._gradient_memory = gradient_dtype, gradient_memory
        self.slope: Tensor | None = None

    def log_probs(self) -> Tensor:
        """As :meth:`DenseChunk.log_probs`, for losses that read all of them."""
        # Without a head, the product is a tensor of the caller's, and the transform changes nothing.
        logits, self.slope = transform_logits(self.product.float(), self.transform)
        return logits.log_softmax(-1)

    def scores(self, token: Tensor, entropy: bool) -> TokenScores:
        """As :meth:`DenseChunk.scores`, in one pass."""
        return score_tokens(self.product, token, self.transform, entropy)

    def grad_of_logits(
        self, token: Tensor, scores: TokenScores, grad_logps: Tensor | None, grad_entropy: Tensor | None
    ) -> Tensor:
        """As :meth:`DenseChunk.grad_of_logits`, in one pass, in the precision of the next product.

        The slope of the soft-cap is applied already.
        """
        memory = self.gradient_memory()
        write_gradient(self.product, token, self.transform, scores, grad_logps, grad_entropy, memory)
        return memory

    def gradient_memory(self) -> Tensor:
        """Memory for a gradient, [c, V], in the precision of the next product."""
        memory = self._gradient_memory
        if memory is not None and memory.dtype == self._gradient_dtype:
            return memory
        rows, vocabulary = self.product.shape
        return empty_rows(rows, vocabulary, self._gradient_dtype, self.product.device)

    def saved(self) -> tuple[Tensor, Tensor | None]:
        """As :meth:`DenseChunk.saved`."""
        return self.product, None


ChunkPredictions = DenseChunk | FusedChunk
"""What a loss reads of a chunk."""
