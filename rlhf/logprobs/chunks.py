"""Scored tokens in chunks: some hundred rows of logits at a time, and the sum of their gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from rlhf.kernels.matmul import add_product, product, use_onednn
from rlhf.kernels.token_scores import LogitTransform, empty_rows, padded_bias
from rlhf.kernels.trial import kernels_work
from rlhf.logprobs.chunk_plan import ChunkPlan
from rlhf.logprobs.chunk_scores import ChunkPredictions, DenseChunk, FusedChunk, transform_logits
from rlhf.logprobs.head import Head, Predictions


def check_tokens(token: Tensor, vocabulary: int) -> None:
    """Raise for a token outside the vocabulary, on a CPU; on a GPU, looking would wait for the device.

    Args:
        token: int64 [N].
        vocabulary: number of tokens of the head.
    Raises:
        ValueError: a token is outside ``[0, vocabulary)``.
    """
    if token.device.type != "cpu" or not token.numel():
        return
    lowest, highest = int(token.min()), int(token.max())
    if lowest < 0 or highest >= vocabulary:
        wrong_token = lowest if lowest < 0 else highest
        raise ValueError(f"target token {wrong_token} is outside the vocabulary [0, {vocabulary})")


def needs_grad(predictions: Predictions) -> tuple[bool, bool]:
    """Whether a gradient is wanted at all, and whether the head needs one."""
    rows, head = predictions
    parameters = [] if head is None else [head.weight, head.bias]
    head_needs_grad = any(parameter is not None and parameter.requires_grad for parameter in parameters)
    # Under `torch.no_grad()` a trainable weight still requires a gradient, but none is computed.
    return torch.is_grad_enabled() and (rows.requires_grad or head_needs_grad), head_needs_grad


def multiplies_in_half(rows: Tensor) -> bool:
    """Whether products with these rows are taken in half precision: on a GPU, which adds them up in float32."""
    return rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16)


def use_fused_kernels(device: torch.device, result_dtype: torch.dtype) -> bool:
    """Whether chunks are :class:`FusedChunk`: on a GPU where the kernels work, in float32, which they compute in.

    Args:
        device: where the rows live.
        result_dtype: of the log-probs.
    Returns:
        False for torch's own operators.
    """
    return device.type == "cuda" and result_dtype == torch.float32 and kernels_work(device)


class ChunkedHead:
    """The log-probs of some rows under a head, ``size`` rows at a time.

    The head is cast once. Matrix products read float32 on a CPU, which would emulate half precision, and half precision
    on a GPU, which accumulates in float32; they return float32, or float64 where either side is. Without a head, the
    rows are logits already.
    """

    def __init__(self, predictions: Predictions, size: int) -> None:
        rows, head = predictions
        # Detached: the gradients are computed here by hand, so autograd must not record the products.
        self.rows, self.head, self.size = rows.detach(), head, size
        dtypes = {rows.dtype} if head is None else {rows.dtype, head.weight.dtype}
        self.result_dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        self.operand_dtype = rows.dtype if multiplies_in_half(rows) else self.result_dtype
        self.fuses = use_fused_kernels(rows.device, self.result_dtype)
        self._memory: Tensor | None = None
        self.transform = LogitTransform()
        if head is None:
            return
        self.weight = head.weight.detach().to(self.operand_dtype)
        bias = None
        if head.bias is not None:
            bias = padded_bias(head.bias.detach().to(self.result_dtype) * head.scale)
        # In half precision the product is scaled: scaled rows would be rounded.
        self.scales_rows = self.operand_dtype == self.result_dtype
        scale = 1.0 if self.scales_rows else head.scale
        self.transform = LogitTransform(bias, scale, head.softcap, head.temperature)

    def chunks(self) -> list[slice]:
        """At least one chunk, which may be empty."""
        # A batch without a scored token still needs a result of the right shape and type to concatenate.
        starts = range(0, max(len(self.rows), 1), self.size)
        return [slice(start, start + self.size) for start in starts]

    def predictions(self, chunk: slice, keep: bool = False, gradient_memory: Tensor | None = None) -> ChunkPredictions:
        """The predictions of a chunk: one matrix product.

        Args:
            chunk: which rows.
            keep: give them memory of their own. Otherwise the next call overwrites them.
            gradient_memory: of :meth:`Gradients.memory`; None for any.
        Returns:
            The predictions, in the form that is faster on this device.
        """
        if not self.fuses:
            log_probs, slope = self.log_probs(chunk, keep)
            return DenseChunk(log_probs, slope, log_probs)
        if self.head is None:
            # Logits of the caller's, of any strides.
            logits = self.rows[chunk] if self.rows.stride(1) == 1 else self.rows[chunk].contiguous()
            return FusedChunk(logits, self.transform, self.rows.dtype, gradient_memory)
        product = self._product(chunk, keep)
        if gradient_memory is None:
            gradient_memory = product
        return FusedChunk(product, self.transform, self.operand_dtype, gradient_memory)

    def restored(
        self, chunk: slice, product: Tensor, slope: Tensor | None, gradient_memory: Tensor | None
    ) -> ChunkPredictions:
        """Predictions that were kept, from what ``saved`` of these returned.

        Args:
            chunk: which rows.
            product: log-probs or product, [c, V].
            slope: of the soft-cap, [c, V].
            gradient_memory: as in :meth:`predictions`.
        Returns:
            The predictions. Their tensors stay whole: somebody may go backward again.
        """
        if self.fuses and gradient_memory is not None:
            return FusedChunk(product, self.transform, self.operand_dtype, gradient_memory)
        memory = self.memory(chunk)
        if self.fuses:
            return FusedChunk(product, self.transform, self.operand_dtype, memory)
        return DenseChunk(product, slope, memory)

    def log_probs(self, chunk: slice, keep: bool = False) -> tuple[Tensor, Tensor | None]:
        """The log-probs of a chunk: one matrix product.

        Args:
            chunk: which rows.
            keep: as in :meth:`predictions`.
        Returns:
            Log-probs [c, V], which the caller may overwrite, and the slope of the soft-cap [c, V] where there is one.
        """
        if self.head is None:
            return self.rows[chunk].to(self.result_dtype).log_softmax(-1), None
        logits, slope = transform_logits(self._product(chunk, keep), self.transform)
        if logits.is_cuda:
            return logits.log_softmax(-1), slope
        # In place: one pass over the logits, no second buffer. Only the operator without autograd takes `out`.
        return torch.ops.aten._log_softmax.out(logits, 1, False, out=logits), slope

    def _product(self, chunk: slice, keep: bool) -> Tensor:
        assert self.head is not None
        rows = self.rows[chunk]
        if self.scales_rows:
            rows = rows.to(self.operand_dtype) * self.head.scale
        return self.product(rows, self.weight.T, None if keep else self.memory(chunk))

    def memory(self, chunk: slice) -> Tensor | None:
        """Memory for the logits of a chunk, shared by all chunks; None where a product brings its own.

        Fresh memory of that size would cost a CPU a page fault for each 4 KiB, and a GPU a second chunk of logits.
        """
        is_dense_on_gpu = self.rows.is_cuda and not self.fuses
        if self.head is None or is_dense_on_gpu or use_onednn(self.rows, self.weight):
            return None
        if self._memory is None:
            rows = min(self.size, len(self.rows))
            self._memory = empty_rows(rows, self.weight.size(0), self.result_dtype, self.rows.device)
        # The last chunk may be shorter than the others.
        return self._memory[: len(self.rows[chunk])]

    def product(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """``a @ b`` in the result's precision."""
        a, b = a.to(self.operand_dtype), b.to(self.operand_dtype)
        if self.operand_dtype == self.result_dtype:
            return product(a, b, out)
        # The float32 accumulator is returned as it is: rounded to half precision, it keeps 8 to 11 bits.
        if out is None:
            return torch.mm(a, b, out_dtype=self.result_dtype)
        return torch.mm(a, b, out_dtype=self.result_dtype, out=out)

    def empty(self) -> Tensor:
        """Memory for a number of each row, [N]."""
        return self.rows.new_empty(len(self.rows), dtype=self.result_dtype)


class Gradients:
    """The sum over chunks of the gradients of rows, weight and bias.

    Weight and bias are summed in the result's precision, because sums in bf16 drift. In half precision a product adds
    in float32 by itself, so the gradients of several chunks of logits can wait for one product: fewer passes over the
    gradient of the weight, none of them where all chunks wait.

    Args:
        chunked_head: the head that the chunks went through.
        needs_input_grad: of rows, weight and bias, as autograd says.
        chunks_per_product: how many chunks wait, see :class:`rlhf.logprobs.ChunkPlan`.
    """

    def __init__(
        self, chunked_head: ChunkedHead, needs_input_grad: tuple[bool, ...], chunks_per_product: int = 1
    ) -> None:
        self.chunked_head = chunked_head
        self.needs_weight, self.needs_bias = needs_input_grad[1:3]
        # Every row is in exactly one chunk, so its gradient is written once and not summed.
        self.rows = torch.empty_like(chunked_head.rows) if needs_input_grad[0] else None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self._rows_per_product = chunks_per_product * chunked_head.size
        self._waiting = self._empty_group() if chunks_per_product > 1 else None

    def _empty_group(self) -> Tensor:
        chunked_head = self.chunked_head
        rows = min(self._rows_per_product, len(chunked_head.rows))
        return empty_rows(rows, chunked_head.weight.size(0), chunked_head.operand_dtype, chunked_head.rows.device)

    def memory(self, chunk: slice) -> Tensor | None:
        """Where the gradient of a chunk's logits waits for its product; None where it does not wait."""
        if self._waiting is None:
            return None
        start = chunk.start % self._rows_per_product
        return self._waiting[start : start + len(self.chunked_head.rows[chunk])]

    def add(self, chunk: slice, grad_logits: Tensor, slope: Tensor | None) -> None:
        """Add a chunk's share.

        Args:
            chunk: which rows.
            grad_logits: [c, V], of the loss with respect to the logits over the head's temperature; overwritten.
            slope: of the soft-cap, [c, V], where it is still to be applied.
        """
        chunked_head, head = self.chunked_head, self.chunked_head.head
        if head is None:
            if self.rows is not None:
                self.rows[chunk] = grad_logits
            return
        if slope is not None:
            grad_logits *= slope
        if self.needs_bias:
            # The products below take the same factor, on smaller matrices.
            bias_grad = grad_logits.sum(0, dtype=chunked_head.result_dtype).mul_(head.scale / head.temperature)
            self.bias = bias_grad if self.bias is None else self.bias.add_(bias_grad)
        if self._waiting is None:
            self._multiply(chunk, grad_logits)
            return
        memory = self.memory(chunk)
        assert memory is not None
        if memory.data_ptr() != grad_logits.data_ptr():
            memory.copy_(grad_logits)
        group_start = chunk.start - chunk.start % self._rows_per_product
        group = slice(group_start, group_start + self._rows_per_product)
        if chunk.stop >= min(group.stop, len(chunked_head.rows)):
            self._multiply(group, self._waiting[: len(chunked_head.rows[group])])

    def _multiply(self, rows: slice, grad_logits: Tensor) -> None:
        chunked_head, head = self.chunked_head, self.chunked_head.head
        assert head is not None
        # From the gradient over the temperature to that of the product.
        scale = head.scale / head.temperature
        grad_logits = grad_logits.to(chunked_head.operand_dtype)  # once, for both products
        if self.rows is not None:
            self.rows[rows] = chunked_head.product(grad_logits, chunked_head.weight).mul_(scale)
        if not self.needs_weight:
            return
        left, right = grad_logits.T, chunked_head.rows[rows].to(chunked_head.operand_dtype) * scale
        is_half = chunked_head.operand_dtype != chunked_head.result_dtype
        if is_half and len(grad_logits) == len(chunked_head.rows) and head.weight.dtype == chunked_head.operand_dtype:
            self.weight = torch.mm(left, right)  # nothing is added to it: rounded once, without a float32 copy
        elif self.weight is None:
            self.weight = chunked_head.product(left, right)  # the first chunk needs no zeros to be added to
        elif not is_half:
            add_product(self.weight, left, right)
        elif not chunked_head.fuses:
            self.weight += chunked_head.product(left, right)
        else:
            # The product in half precision is added to float32 memory where it is computed.
            torch.addmm(self.weight, left, right, out_dtype=self.weight.dtype, out=self.weight)

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of rows, weight and bias, in the types of these."""
        head = self.chunked_head.head
        if head is None:
            return self.rows, None, None
        # Rounded once, after the last chunk.
        grad_weight = None if self.weight is None else self.weight.to(head.weight.dtype)
        grad_bias = None if self.bias is None or head.bias is None else self.bias.to(head.bias.dtype)
        return self.rows, grad_weight, grad_bias


class ChunkResult(NamedTuple):
    """A chunk's share of a loss.

    Args:
        per_token: [n, c], n numbers of each token; constants.
        loss: the chunk's sum.
        grad_logits: [c, V], its gradient with respect to the logits over the head's temperature; without meaning where
            no gradient is wanted.
    """

    per_token: Tensor
    loss: Tensor
    grad_logits: Tensor | None


Step = Callable[[slice, ChunkPredictions], ChunkResult]
"""From a chunk and its predictions, which it may overwrite, to the chunk's share of the loss."""


def sum_over_chunks(student: Predictions, plan: ChunkPlan, step: Step, with_grad: bool) -> tuple[Tensor, Tensor]:
    """A loss that is a sum over tokens: its gradient is taken while a chunk's logits live.

    Args:
        student: the rows and the head.
        plan: how many rows at a time.
        step: what is done with a chunk.
        with_grad: take the gradient.
    Returns:
        The numbers of all tokens, [n, N], constants; and the loss, with its gradient.
    """
    rows, head = student
    if with_grad:
        weight, bias = (None, None) if head is None else (head.weight, head.bias)
        return _Sum.apply(rows, weight, bias, head, plan, step)
    with torch.no_grad():
        return _sum(ChunkedHead(student, plan.chunk_size), step)


def _sum(chunked_head: ChunkedHead, step: Step, gradients: Gradients | None = None) -> tuple[Tensor, Tensor]:
    # Of a chunk, only the numbers for each token stay; its logits do not outlive the step.
    per_token_parts = []
    # On the device: nothing here waits for it.
    total_loss = chunked_head.rows.new_zeros((), dtype=chunked_head.result_dtype)
    for chunk in chunked_head.chunks():
        gradient_memory = None if gradients is None else gradients.memory(chunk)
        predictions = chunked_head.predictions(chunk, gradient_memory=gradient_memory)
        chunk_result = step(chunk, predictions)
        per_token_parts.append(chunk_result.per_token)
        total_loss += chunk_result.loss
        if gradients is not None:
            assert chunk_result.grad_logits is not None
            gradients.add(chunk, chunk_result.grad_logits, predictions.slope)
        del predictions, chunk_result  # before the next chunk takes memory
    return torch.cat(per_token_parts, 1), total_loss


class _Sum(Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        head: Head | None,
        plan: ChunkPlan,
        step: Step,
    ) -> tuple[Tensor, Tensor]:
        # Weight and bias are arguments of their own beside `head`: autograd sees tensors only where they are arguments.
        chunked_head = ChunkedHead(Predictions(rows, head), plan.chunk_size)
        gradients = Gradients(chunked_head, ctx.needs_input_grad, plan.chunks_per_product)
        per_token, total_loss = _sum(chunked_head, step, gradients)
        ctx.save_for_backward(*gradients.results())
        ctx.is_spent = False
        # Without this, a loss made of these numbers would silently get no gradient, instead of an error.
        ctx.mark_non_differentiable(per_token)
        return per_token, total_loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.is_spent:
            raise RuntimeError("this loss has one backward pass; for another one, run the forward pass again")
        ctx.is_spent = True
        # In place: the gradients were taken in the forward pass for this one use.
        grad_loss = grads[1]
        scaled_grads = [None if grad is None else grad.mul_(grad_loss.to(grad.dtype)) for grad in ctx.saved_tensors]
        return *scaled_grads, None, None, None
