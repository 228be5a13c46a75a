"""Log-probs of tokens and their gradient on a GPU: one Triton kernel for each, in place of torch's chain of passes.

The first reads the logits once. The second reads them once more and writes the gradient, in half precision if asked.
Torch would read and write matrices of that size six times. In Triton's interpreter the kernels run on a CPU, for tests.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton reads the types of a kernel's arguments from what it is called with.

from typing import NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # only builds of torch for a GPU bring it
    triton = None  # type: ignore[assignment,unused-ignore]

# Logits that one program reads at a time, and the threads that share them.
BLOCK_SIZE, THREADS = 4096, 256
WARPS = THREADS // (64 if torch.version.hip else 32)  # a warp of AMD's has 64 threads
ALIGNMENT = 16  # numbers
# Arguments of which a program reads or writes one number. Where a chunk starts must not compile a kernel again.
NUMBERS_OF_ROWS = (
    "TOKEN", "LOGPS", "HIGHEST", "LOG_TOTAL", "ENTROPY", "GRAD_LOGPS", "GRAD_AT_TOKEN", "GRAD_ENTROPY",
)  # fmt: skip


class LogitTransform(NamedTuple):
    """From a product z of rows and weight to logits: ``cap(scale * z + bias) / temperature``.

    Args:
        bias: [V], times the scale of the head.
        scale: of the product; 1 where the rows were scaled.
        softcap: bound on the absolute logits; None for none.
        temperature: that tokens were sampled at.
    """

    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0


class TokenScores(NamedTuple):
    """Numbers of each token, [c].

    Args:
        logps: the tokens' log-probs.
        entropy: of the predictions, where it was asked for.
        highest: the largest logit, where the gradient reads it again.
        log_total: the log-sum-exp of the logits minus the largest. Two numbers: their sum would be rounded.
    """

    logps: Tensor
    entropy: Tensor | None = None
    highest: Tensor | None = None
    log_total: Tensor | None = None

    def rows(self, chunk: slice) -> "TokenScores":
        """The scores of some tokens alone."""
        logps, *others = (None if numbers is None else numbers[chunk] for numbers in self)
        assert logps is not None
        return TokenScores(logps, *others)


def has_triton() -> bool:
    """Whether Triton can be imported; whether its kernels work is found out by :mod:`rlhf.kernels.trial`."""
    return triton is not None


def empty_rows(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for logits or their gradient; on a GPU each row starts at a multiple of 16 numbers.

    Both the kernels and products of matrices read aligned rows several numbers at a time.

    Args:
        rows: number of rows.
        columns: number of columns.
        dtype: of the numbers.
        device: where they live.
    Returns:
        [rows, columns], a part of its memory where the columns are no multiple of 16.
    """
    padded_columns = columns if device.type == "cpu" else _padded(columns)
    return torch.empty(rows, padded_columns, dtype=dtype, device=device)[:, :columns]


def _padded(columns: int) -> int:
    return -(-columns // ALIGNMENT) * ALIGNMENT


def padded_bias(bias: Tensor) -> Tensor:
    """A copy of a head's bias, with the padding that a row of :func:`empty_rows` has.

    Args:
        bias: [V].
    Returns:
        [V], a part of its memory where V is no multiple of 16.
    """
    (copy,) = empty_rows(1, len(bias), bias.dtype, bias.device)
    return copy.copy_(bias)


def readable_columns(matrix: Tensor, bias: Tensor | None = None) -> int:
    """How many columns of each row may be read and written: with the padding of :func:`empty_rows`.

    Args:
        matrix: [c, V].
        bias: [V], which is read with each row.
    Returns:
        The columns of the matrix, or these and the padding of both.
    Raises:
        ValueError: the numbers of a row, or of the bias, are apart in memory.
    """
    rows, columns = matrix.shape
    for name, tensor in (("row", matrix), ("bias", bias)):
        # A kernel would read the memory between them.
        if tensor is not None and columns > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"the numbers of a {name} must lie side by side, but its stride is {tensor.stride(-1)}")
    padded_columns = matrix.stride(0)
    if padded_columns != _padded(columns) or matrix.storage_offset() % padded_columns:
        return columns
    # A part of a larger matrix may end before the padding of its last row does.
    is_padded = _has_room(matrix, rows * padded_columns)
    if bias is not None:
        is_padded = is_padded and _has_room(bias, padded_columns)
    return padded_columns if is_padded else columns


def _has_room(tensor: Tensor, numbers: int) -> bool:
    """Whether a tensor's memory holds so many numbers from its first one."""
    end = tensor.storage_offset() + numbers
    return end * tensor.element_size() <= tensor.untyped_storage().nbytes()


def score_tokens(product: Tensor, token: Tensor, transform: LogitTransform, entropy: bool) -> TokenScores:
    """The tokens' log-probs, in one pass over the product.

    Args:
        product: [c, V], the numbers of a row side by side; float32 or half precision.
        token: int64 [c]. One outside the vocabulary gets a log-prob of nan.
        transform: from the product to the logits.
        entropy: the entropy is wanted too.
    Returns:
        The scores, float32.
    """
    rows, vocabulary = product.shape
    logps, highest, log_total = (torch.empty(rows, dtype=torch.float32, device=product.device) for _ in range(3))
    entropies = torch.empty_like(logps) if entropy else None
    if rows:
        # Triton starts a kernel on the current GPU, which need not be that of the tensors.
        with torch.cuda.device_of(product):
            _score_kernel[(rows,)](
                product,
                token.contiguous(),
                transform.bias,
                logps,
                highest,
                log_total,
                entropies,
                vocabulary,
                readable_columns(product, transform.bias),
                product.stride(0),
                transform.scale,
                transform.softcap or 1.0,
                1 / transform.temperature,
                HAS_BIAS=transform.bias is not None,
                HAS_SOFTCAP=transform.softcap is not None,
                HAS_ENTROPY=entropy,
                BLOCK=block_size(vocabulary),
                num_warps=WARPS,
            )
    return TokenScores(logps, entropies, highest, log_total)


def write_gradient(
    product: Tensor,
    token: Tensor,
    transform: LogitTransform,
    scores: TokenScores,
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
    out: Tensor,
) -> None:
    r"""Write the gradient of a loss, from its gradients in the tokens' log-probs and entropies.

    .. math:: \big(g\,(1_y - p) - e\,p\,(\log p + H)\big)\,\mathrm{cap}'

    With respect to the logits before the soft-cap, times the temperature: the caller divides a smaller matrix by it.

    Args:
        product: [c, V], as in :func:`score_tokens`.
        token: int64 [c], y.
        transform: as in :func:`score_tokens`.
        scores: its result, with the entropy where ``grad_entropy`` is given.
        grad_logps: [c], g.
        grad_entropy: [c], e.
        out: [c, V], memory for the result, in its precision; may be ``product``.
    """
    rows, vocabulary = product.shape
    if not rows:
        return
    if grad_logps is None:
        grad_logps = torch.zeros_like(scores.logps)
    # 1 - p as -expm1(log p), formed before any downcast: exact for confident tokens.
    grad_at_token = -scores.logps.expm1() * grad_logps
    block = block_size(vocabulary)
    with torch.cuda.device_of(product):
        _gradient_kernel[(rows, triton.cdiv(vocabulary, block))](
            product,
            token.contiguous(),
            transform.bias,
            scores.highest,
            scores.log_total,
            scores.entropy,
            grad_logps.contiguous(),
            grad_at_token,
            None if grad_entropy is None else grad_entropy.contiguous(),
            out,
            vocabulary,
            readable_columns(product, transform.bias),
            readable_columns(out),
            product.stride(0),
            out.stride(0),
            transform.scale,
            transform.softcap or 1.0,
            1 / transform.temperature,
            HAS_BIAS=transform.bias is not None,
            HAS_SOFTCAP=transform.softcap is not None,
            HAS_ENTROPY=grad_entropy is not None,
            BLOCK=block,
            num_warps=WARPS,
        )


def block_size(vocabulary: int, matrices: int = 1) -> int:
    """How many columns a program reads at a time.

    Args:
        vocabulary: number of columns.
        matrices: that it reads side by side. The registers of a thread hold so many numbers and no more.
    Returns:
        A power of 2.
    """
    return min(BLOCK_SIZE // matrices, triton.next_power_of_2(vocabulary))


# Names in capitals are pointers, or constants that a kernel is compiled for.
if triton is not None:

    @triton.jit
    def before_softcap(product, BIAS, column, is_readable, scale, HAS_BIAS: tl.constexpr):
        logits = product * scale
        if HAS_BIAS:
            logits += tl.load(BIAS + column, mask=is_readable, other=0.0).to(tl.float32)
        return logits

    @triton.jit
    def with_softcap(logits, softcap):
        # tanh(x) = sign(x) (1 - d) / (1 + d) with d = exp(-2 |x|), which cannot overflow.
        decay = tl.exp(-2.0 * tl.abs(logits / softcap))
        size = softcap * (1.0 - decay) / (1.0 + decay)
        return tl.where(logits < 0, -size, size)

    @triton.jit
    def softcap_slope(logits, softcap):
        # 1 - tanh² = 4 d / (1 + d)², without the cancellation where tanh is nearly 1.
        decay = tl.exp(-2.0 * tl.abs(logits / softcap))
        return 4.0 * decay / ((1.0 + decay) * (1.0 + decay))

    @triton.jit(do_not_specialize_on_alignment=NUMBERS_OF_ROWS)
    def _score_kernel(
        PRODUCT, TOKEN, BIAS, LOGPS, HIGHEST, LOG_TOTAL, ENTROPY,
        vocabulary, readable, row_stride, scale, softcap, inverse_temperature,
        HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """A program reads one row, and keeps its running maximum and the sums of exponentials below it."""
        row = tl.program_id(0).to(tl.int64)  # a chunk of logits has more entries than int32 counts
        first = PRODUCT + row * row_stride
        highest = -float("inf")
        total = 0.0  # of exp(z - highest)
        weighted = 0.0  # of exp(z - highest) (z - highest)
        for start in range(0, vocabulary, BLOCK):
            column = start + tl.arange(0, BLOCK)
            # Padding is read and left out below: a mask at any column would have each number read by itself.
            is_readable = column < readable
            logits = tl.load(first + column, mask=is_readable, other=0.0).to(tl.float32)
            logits = before_softcap(logits, BIAS, column, is_readable, scale, HAS_BIAS)
            if HAS_SOFTCAP:
                logits = with_softcap(logits, softcap)
            logits = tl.where(column < vocabulary, logits * inverse_temperature, -float("inf"))
            new_highest = tl.maximum(highest, tl.max(logits, 0))
            # While all logits are -inf, a difference to their maximum would be nan.
            reference = tl.where(new_highest == -float("inf"), 0.0, new_highest)
            moved = tl.where(highest == -float("inf"), 0.0, highest - reference)
            shrink = tl.exp(highest - reference)
            exponentials = tl.exp(logits - reference)
            if HAS_ENTROPY:
                # 0 times -inf would be nan.
                distance = tl.where(logits == -float("inf"), 0.0, logits - reference)
                weighted = shrink * (weighted + moved * total) + tl.sum(exponentials * distance, 0)
            total = total * shrink + tl.sum(exponentials, 0)
            highest = new_highest
        log_total = tl.log(total)
        token = tl.load(TOKEN + row)
        # A token outside the vocabulary reads nan, not the memory of another row.
        known = (token >= 0) & (token < vocabulary)
        at_token = tl.load(first + token, mask=known, other=float("nan")).to(tl.float32)
        at_token = before_softcap(at_token, BIAS, token, known, scale, HAS_BIAS)
        if HAS_SOFTCAP:
            at_token = with_softcap(at_token, softcap)
        tl.store(LOGPS + row, at_token * inverse_temperature - highest - log_total)
        tl.store(HIGHEST + row, highest)
        tl.store(LOG_TOTAL + row, log_total)
        if HAS_ENTROPY:
            tl.store(ENTROPY + row, log_total - weighted / total)

    @triton.jit(do_not_specialize_on_alignment=NUMBERS_OF_ROWS)
    def _gradient_kernel(
        PRODUCT, TOKEN, BIAS, HIGHEST, LOG_TOTAL, ENTROPY, GRAD_LOGPS, GRAD_AT_TOKEN, GRAD_ENTROPY, OUT,
        vocabulary, readable, writable, row_stride, out_stride, scale, softcap, inverse_temperature,
        HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """A program reads one block of a row and writes its gradient; the result may replace what was read."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        is_readable = column < readable
        before = tl.load(PRODUCT + row * row_stride + column, mask=is_readable, other=0.0).to(tl.float32)
        before = before_softcap(before, BIAS, column, is_readable, scale, HAS_BIAS)
        logits = before
        if HAS_SOFTCAP:
            logits = with_softcap(before, softcap)
        log_probs = logits * inverse_temperature - tl.load(HIGHEST + row) - tl.load(LOG_TOTAL + row)
        probs = tl.exp(log_probs)
        gradient = -tl.load(GRAD_LOGPS + row) * probs
        gradient = tl.where(column == tl.load(TOKEN + row), tl.load(GRAD_AT_TOKEN + row), gradient)
        if HAS_ENTROPY:
            surprise = tl.load(ENTROPY + row) + log_probs
            # A probability of 0 has no part in the entropy; its logarithm of -inf would make nan.
            surprise = tl.where(probs == 0, 0.0, surprise)
            gradient -= tl.load(GRAD_ENTROPY + row) * probs * surprise
        if HAS_SOFTCAP:
            gradient *= softcap_slope(before, softcap)
        tl.store(OUT + row * out_stride + column, gradient.to(OUT.dtype.element_ty), mask=column < writable)
