"""Keys and values of a batch that is being decoded, and the attention function that reads and writes them."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf.data.segments import Segments, Span
from rlhf.models.attention import UNKNOWN_PARTS, segment_attention
from rlhf.models.attention_spans import ScoreOptions

DECODING_ATTENTION = "rlhf_decoding"  # its name in transformers' registry
KeysValues = tuple[Tensor, Tensor]


class Cache:
    """The keys and values of each layer: those of a prompt once for all its rows, those of a completion by row.

    Prompts are padded on the left. They end in the same column, so the completion tokens of one step share a column.
    For the products with a prompt, its rows lie side by side in a grid of [prompts, rows of each]; where a prompt has
    fewer rows than others, cells of the grid are empty. Two prompts, of which the second has lost a row::

        prompt cache      completion cache      grid
        . . a b c         row 0: p q            0 1
                          row 1: r s
        d e f g h         row 2: t u            2 .

    One product of a prompt's keys with the queries of its rows reads the keys once. Row by row, or with the prompt
    copied into each row, they would be read as often as there are samples.

    Args:
        lengths: int64 [P], tokens of each prompt.
        num_samples: rows of each prompt. Row ``i * num_samples + j`` is sample j of prompt i.
        max_new_tokens: completion tokens that a row can keep. Their memory is reserved at the first of them.
    """

    def __init__(self, lengths: Tensor, num_samples: int, max_new_tokens: int) -> None:
        self.lengths = lengths
        self.longest = int(lengths.max())
        self.max_new_tokens = max_new_tokens
        self.segments: Segments | None = None  # of the prompts in the current prefill; None while decoding
        self.prompts_read = 0
        self.step = 0  # completion tokens before the one that is being written
        # By attention module: transformers passes that, not the number of the layer.
        self.prompt_cache: dict[nn.Module, KeysValues] = {}  # [P, kv_heads, longest, D]
        self.completion_cache: dict[nn.Module, KeysValues] = {}  # [R, kv_heads, max_new_tokens, D]
        prompts = torch.arange(len(lengths), device=lengths.device)
        self.prompt_of_row = prompts.repeat_interleave(num_samples)  # [R]
        self._lay_out_grid()

    # Prefill

    def begin_prefill(self, count: int) -> Segments:
        """Start to read the next prompts, laid out in one flat row.

        Args:
            count: how many.
        Returns:
            Their spans in the row.
        """
        lengths = self.lengths[self.prompts_read : self.prompts_read + count]
        self.segments = Segments.of(tuple(Span(length) for length in lengths.tolist())).to(lengths.device)
        return self.segments

    def end_prefill(self) -> None:
        """All layers have read these prompts."""
        assert self.segments is not None
        self.prompts_read += len(self.segments.spans)
        self.segments = None

    def store_prompts(self, layer: nn.Module, keys: Tensor, values: Tensor) -> None:
        """Keep the keys and values of the prompts that are being read.

        Args:
            layer: the attention module.
            keys: [1, kv_heads, T, D], of T tokens of all these prompts.
            values: alike.
        """
        assert self.segments is not None
        if layer not in self.prompt_cache:
            shape = (len(self.lengths), keys.size(1), self.longest)
            # Padding is masked, but a masked value is still multiplied by 0 and so must be finite.
            self.prompt_cache[layer] = keys.new_zeros(*shape, keys.size(3)), values.new_zeros(*shape, values.size(3))
        lengths = [span.length for span in self.segments.spans]
        for cached, new_entries in zip(self.prompt_cache[layer], (keys, values), strict=True):
            for prompt, prompt_entries in enumerate(new_entries[0].split(lengths, dim=1), start=self.prompts_read):
                padding = self.longest - prompt_entries.size(1)
                cached[prompt, :, padding:] = prompt_entries

    # Decoding

    def advance(self) -> None:
        """All layers have kept this step's tokens."""
        self.step += 1

    def append(self, layer: nn.Module, keys: Tensor, values: Tensor) -> None:
        """Keep the keys and values of this step's tokens.

        Args:
            layer: the attention module.
            keys: [R, kv_heads, 1, D].
            values: alike.
        """
        if layer not in self.completion_cache:
            shape = (*keys.shape[:2], self.max_new_tokens)
            # Empty will do: columns are written before they are read.
            reserved = keys.new_empty(*shape, keys.size(3)), keys.new_empty(*shape, values.size(3))
            self.completion_cache[layer] = reserved
        for cached, new_entries in zip(self.completion_cache[layer], (keys, values), strict=True):
            cached[:, :, self.step] = new_entries[:, :, 0]

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all other rows, and the prompts that no row needs any more.

        Args:
            rows: int64, rising: indices among the rows that are left now.
        """
        # `unique` gives the prompts that still have rows, and numbers them anew without gaps.
        prompts, self.prompt_of_row = self.prompt_of_row[rows].unique(return_inverse=True)
        if len(prompts) < len(self.lengths):
            self.lengths = self.lengths[prompts]
            for layer, (keys, values) in self.prompt_cache.items():
                self.prompt_cache[layer] = keys.index_select(0, prompts), values.index_select(0, prompts)
        for layer, (keys, values) in self.completion_cache.items():
            self.completion_cache[layer] = self._copy_rows(keys, rows), self._copy_rows(values, rows)
        self._lay_out_grid()

    def _copy_rows(self, cached: Tensor, rows: Tensor) -> Tensor:
        """Some rows of a completion cache; only the columns that were written are copied."""
        copied_rows = cached.new_empty(len(rows), *cached.shape[1:])
        copied_rows[:, :, : self.step] = cached[:, :, : self.step].index_select(0, rows)
        return copied_rows

    def _lay_out_grid(self) -> None:
        """Find each row's cell in the grid, and the padding of each prompt."""
        device = self.lengths.device
        # Rows are sorted by prompt, so a row's column is its distance from the first row of its prompt.
        rows_of_prompt = torch.bincount(self.prompt_of_row, minlength=len(self.lengths))
        self.grid_width = int(rows_of_prompt.max())
        first_row = rows_of_prompt.cumsum(0) - rows_of_prompt
        all_rows = torch.arange(len(self.prompt_of_row), device=device)
        column = all_rows - first_row[self.prompt_of_row]
        self.cell_of_row = self.prompt_of_row * self.grid_width + column
        self.grid_is_full = len(self.prompt_of_row) == len(self.lengths) * self.grid_width

        columns = torch.arange(self.longest, device=device)
        is_padding = columns < self.longest - self.lengths[:, None]
        # None where no prompt is padded saves a pass over the scores.
        self.padding = is_padding[:, None, None] if bool(is_padding.any()) else None  # [P, 1, 1, longest]

    def attend(self, layer: nn.Module, query: Tensor, options: ScoreOptions) -> Tensor:
        """Softmax attention of one token of each row over its prompt and its completion so far.

        Args:
            layer: whose keys and values to read.
            query: [R, heads, 1, D].
            options: of the layer; its window counts columns.
        Returns:
            [R, heads, 1, D].
        """
        keys, values = self.prompt_cache[layer]
        completion_keys, completion_values = self.completion_cache[layer]
        rows, heads = query.shape[:2]
        kv_heads = keys.size(1)
        # Query heads that share a key head are rows of one product: [R, kv_heads, heads / kv_heads, D].
        query = query.view(rows, kv_heads, heads // kv_heads, query.size(3))

        # A window counts columns back from this token's; the first of them may lie in the prompt or after it.
        column = self.longest + self.step
        window_start = 0 if options.window is None else max(0, column + 1 - options.window)
        prompt_start = min(window_start, self.longest)
        completion_start = max(0, window_start - self.longest)
        completion_end = self.step + 1
        completion_keys = completion_keys[:, :, completion_start:completion_end]
        completion_values = completion_values[:, :, completion_start:completion_end]

        # The prompt's keys are read once for all its rows, which is why queries go through the grid.
        completion_scores = attention_scores(query, completion_keys, options)
        prompt_scores = attention_scores(self._rows_to_grid(query), keys[:, :, prompt_start:], options)
        if self.padding is not None:
            prompt_scores.masked_fill_(self.padding[..., prompt_start:], -torch.inf)

        # One softmax over both parts, so that they compete for the same weight.
        scores = torch.cat((self._grid_to_rows(prompt_scores), completion_scores), dim=-1)
        weights = probabilities(scores, options.sinks).to(query.dtype)
        prompt_length = self.longest - prompt_start
        prompt_weights, completion_weights = weights.split((prompt_length, completion_end - completion_start), dim=-1)
        from_prompt = matmul_fp32(self._rows_to_grid(prompt_weights), values[:, :, prompt_start:])
        output = self._grid_to_rows(from_prompt) + matmul_fp32(completion_weights, completion_values)
        return output.to(query.dtype).reshape(rows, heads, 1, -1)

    def _rows_to_grid(self, tensor: Tensor) -> Tensor:
        """From rows to prompts: the rows of a prompt become rows of one matrix.

        Args:
            tensor: [R, kv_heads, G, X], for G query heads that share a key head.
        Returns:
            [P, kv_heads, grid_width * G, X]; cells without a row are 0.
        """
        prompts = len(self.lengths)
        if not self.grid_is_full:
            grid = tensor.new_zeros(prompts * self.grid_width, *tensor.shape[1:])
            tensor = grid.index_copy_(0, self.cell_of_row, tensor)
        if self.grid_width == 1:
            return tensor
        kv_heads, group, size = tensor.shape[1:]
        grid = tensor.view(prompts, self.grid_width, kv_heads, group, size)
        return grid.transpose(1, 2).reshape(prompts, kv_heads, self.grid_width * group, size)

    def _grid_to_rows(self, tensor: Tensor) -> Tensor:
        """The inverse of :meth:`_rows_to_grid`."""
        if self.grid_width > 1:
            prompts, kv_heads, group, size = tensor.shape
            group //= self.grid_width
            grid = tensor.view(prompts, kv_heads, self.grid_width, group, size)
            tensor = grid.transpose(1, 2).reshape(prompts * self.grid_width, kv_heads, group, size)
        return tensor if self.grid_is_full else tensor.index_select(0, self.cell_of_row)


def matmul_fp32(left: Tensor, right: Tensor) -> Tensor:
    """A product with a float32 result for half-precision operands, as fused attention has it.

    Args:
        left: [A, B, M, K].
        right: [A, B, K, N].
    Returns:
        [A, B, M, N].
    """
    if left.dtype in (torch.float32, torch.float64):
        return torch.matmul(left, right)
    if not left.is_cuda:
        # A CPU has no half-precision product with a float32 result.
        return torch.matmul(left.float(), right.float())
    product = torch.bmm(left.flatten(0, 1), right.flatten(0, 1), out_dtype=torch.float32)
    return product.view(*left.shape[:2], *product.shape[1:])


def attention_scores(query: Tensor, keys: Tensor, options: ScoreOptions) -> Tensor:
    """Scaled, and capped where the layer caps them; before any mask, whose -inf a cap would make finite.

    Args:
        query: [A, kv_heads, M, D].
        keys: [A, kv_heads, K, D].
        options: of the layer.
    Returns:
        [A, kv_heads, M, K], at least float32.
    """
    scale = query.size(-1) ** -0.5 if options.scaling is None else options.scaling
    scores = matmul_fp32(query, keys.transpose(2, 3)).mul_(scale)
    if options.softcap is not None:
        scores.div_(options.softcap).tanh_().mul_(options.softcap)
    return scores


def probabilities(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last dimension, in which a sink of each head takes part.

    Args:
        scores: [R, kv_heads, G, K], of G query heads that share a key head.
        sinks: [kv_heads * G].
    Returns:
        [R, kv_heads, G, K]; with sinks, their sums are below 1.
    """
    if sinks is None:
        return scores.softmax(-1)
    sink_scores = sinks.to(scores.dtype).view(1, *scores.shape[1:3], 1).expand(*scores.shape[:3], 1)
    return torch.cat((scores, sink_scores), dim=-1).softmax(-1)[..., :-1]


def decoding_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cache: Cache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in each layer while an engine decodes.

    Args:
        module: the attention layer.
        query: [1, heads, T, D] for prompts laid out flat, [R, heads, 1, D] for one token of each row.
        key: the same with kv_heads.
        value: the same with kv_heads.
        attention_mask: for transformers' own function, when there is no cache.
        dropout: for transformers' own function.
        scaling: factor of the products; by default 1 / sqrt(D).
        sliding_window: columns that a token sees; None for all.
        cache: where keys and values are kept. Without one, transformers' own SDPA runs.
        kwargs: further arguments of the layer.
    Returns:
        [1, T, heads, D] or [R, 1, heads, D]; and None for the attention weights.
    Raises:
        NotImplementedError: the layer passes an argument that changes attention in a way not known here.
    """
    if cache is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, sliding_window=sliding_window, **kwargs
        )
    if cache.segments is not None:
        cache.store_prompts(module, key, value)
        return segment_attention(
            module, query, key, value, None, 0.0, scaling, sliding_window, cache.segments, **kwargs
        )
    for name in UNKNOWN_PARTS:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"the decoding cache does not support {name}")
    cache.append(module, key, value)
    options = ScoreOptions(scaling, sliding_window, softcap=kwargs.get("softcap"), sinks=kwargs.get("s_aux"))
    return cache.attend(module, query, options).transpose(1, 2), None


AttentionInterface.register(DECODING_ATTENTION, decoding_attention)
AttentionMaskInterface.register(DECODING_ATTENTION, sdpa_mask)
