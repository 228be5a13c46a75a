"""Keys and values of a batch that is being decoded, and the attention function that reads and writes them."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf.data.batching import Segments, Span
from rlhf.models.attention import segment_attention

NAME = "rlhf_decoding"


class Cache:
    """What the layers keep: each prompt once, for all its rows, and the own tokens of each row; nothing is copied.

    Prompts end in the same column (padded on the left), and so own tokens of one step share a column too. Rows of a
    prompt lie side by side in a grid of ``[prompts, places]``; a group that loses rows leaves places empty.

    Args:
        lengths: int64 [P], tokens of each prompt.
        n: rows of each prompt: row ``i * n + j`` is its sample j.
        width: own tokens that a row can keep; reserved at the first of them.
    """

    def __init__(self, lengths: Tensor, n: int, width: int) -> None:
        self.lengths = lengths
        self.longest = int(lengths.max())
        self.width = width
        self.segments: Segments | None = None  # of the prompts that are being read
        self.read = 0  # prompts that have been
        self.step = 0  # own tokens before the one that is being written
        self.prompts: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # [P, kv_heads, longest, D]
        self.own: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # [R, kv_heads, width, D]
        self.owner = torch.arange(len(lengths), device=lengths.device).repeat_interleave(n)  # [R]
        self._place()

    def start(self, prompts: int) -> Segments:
        """The next ``prompts`` prompts are read, laid out in one flat row."""
        lengths = self.lengths[self.read : self.read + prompts].tolist()
        self.segments = Segments(tuple(Span(length) for length in lengths))
        return self.segments

    def finish(self) -> None:
        assert self.segments is not None
        self.read += len(self.segments.spans)
        self.segments = None

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (int64, rising) only, and with the prompts that they need."""
        prompts, self.owner = self.owner[rows].unique(return_inverse=True)
        if len(prompts) < len(self.lengths):
            self.lengths = self.lengths[prompts]
            for module, pair in self.prompts.items():
                key, value = (t.index_select(0, prompts) for t in pair)
                self.prompts[module] = key, value
        used = self.step
        for module, pair in self.own.items():
            key, value = (t.new_empty(len(rows), *t.shape[1:]) for t in pair)
            for new, old in zip((key, value), pair, strict=True):
                new[:, :, :used] = old[:, :, :used].index_select(0, rows)
            self.own[module] = key, value
        self._place()

    def _place(self) -> None:
        counts = torch.bincount(self.owner, minlength=len(self.lengths))
        self.places = int(counts.max())
        first = counts.cumsum(0) - counts
        self.cells = self.owner * self.places + torch.arange(len(self.owner), device=first.device) - first[self.owner]
        self.full = len(self.owner) == len(self.lengths) * self.places
        hidden = torch.arange(self.longest, device=first.device) < self.longest - self.lengths[:, None]
        self.hidden = hidden[:, None, None] if bool(hidden.any()) else None  # padding: [P, 1, 1, longest]

    def store(self, module: nn.Module, key: Tensor, value: Tensor) -> None:
        """Keep the keys and values [1, kv_heads, T, D] of the prompts that are being read."""
        assert self.segments is not None
        if module not in self.prompts:
            shape = (len(self.lengths), key.size(1), self.longest)
            # Padding is zero: it is masked, and what is masked must still be finite.
            self.prompts[module] = key.new_zeros(*shape, key.size(3)), value.new_zeros(*shape, value.size(3))
        lengths = [span.length for span in self.segments.spans]
        for kept, new in zip(self.prompts[module], (key, value), strict=True):
            for index, piece in enumerate(new[0].split(lengths, dim=1), start=self.read):
                kept[index, :, self.longest - piece.size(1) :] = piece

    def append(self, module: nn.Module, key: Tensor, value: Tensor) -> None:
        """Keep the keys and values [R, kv_heads, 1, D] of this step's tokens."""
        if module not in self.own:
            rows, heads = key.shape[:2]
            own = (key.new_empty(rows, heads, self.width, t.size(3)) for t in (key, value))
            self.own[module] = tuple(own)  # type: ignore[assignment]
        for kept, new in zip(self.own[module], (key, value), strict=True):
            kept[:, :, self.step] = new[:, :, 0]

    def attend(self, module: nn.Module, query: Tensor, scaling: float, window: int | None) -> Tensor:
        """Softmax attention of one token a row over its prompt and its own tokens: [R, heads, 1, D] to the same."""
        keys, values = self.prompts[module]
        own_keys, own_values = self.own[module]
        rows, heads, kv = query.size(0), query.size(1), keys.size(1)
        shape = (rows, kv, heads // kv, query.size(3))
        query = query.view(shape)
        now = self.longest + self.step  # this token's column; a window counts columns back from it
        start = 0 if window is None else max(0, now + 1 - window)
        first, own = min(start, self.longest), max(0, start - self.longest)

        on_own = _product(query, own_keys[:, :, own : self.step + 1].transpose(2, 3))
        on_prompt = _product(self._to_grid(query), keys[:, :, first:].transpose(2, 3))
        if self.hidden is not None:
            on_prompt.masked_fill_(self.hidden[..., first:], -torch.inf)
        scores = torch.cat((self._to_rows(on_prompt), on_own), dim=-1).mul_(scaling)
        weights = scores.softmax(-1).to(query.dtype)
        on_prompt, on_own = weights.split((self.longest - first, self.step + 1 - own), dim=-1)
        output = self._to_rows(_product(self._to_grid(on_prompt), values[:, :, first:]))
        output = output + _product(on_own, own_values[:, :, own : self.step + 1])
        return output.to(query.dtype).reshape(rows, heads, 1, -1)

    def _to_grid(self, t: Tensor) -> Tensor:
        """[R, kv, g, X] by rows to [P, kv, places * g, X] by prompts."""
        prompts = len(self.lengths)
        if not self.full:
            grid = t.new_zeros(prompts * self.places, *t.shape[1:])
            t = grid.index_copy_(0, self.cells, t)
        if self.places == 1:
            return t
        kv, g, x = t.shape[1:]
        return t.view(prompts, self.places, kv, g, x).transpose(1, 2).reshape(prompts, kv, self.places * g, x)

    def _to_rows(self, t: Tensor) -> Tensor:
        """The other way."""
        prompts, kv, g, x = t.shape
        if self.places > 1:
            g //= self.places
            t = t.view(prompts, kv, self.places, g, x).transpose(1, 2).reshape(prompts * self.places, kv, g, x)
        return t if self.full else t.index_select(0, self.cells)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in float32 whatever the operands, as fused attention has it: [.., m, k] and [.., k, n]."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.matmul(a, b)
    if not a.is_cuda:
        return torch.matmul(a.float(), b.float())
    out = torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32)
    return out.view(*a.shape[:2], *out.shape[1:])


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
        query: [1, heads, T, D] for prompts laid out flat, [R, heads, 1, D] for one token a row; key, value alike.
        cache: where keys and values go; without one, transformers' own SDPA answers.
    Returns:
        [1, T, heads, D] or [R, 1, heads, D]
    """
    if cache is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, sliding_window=sliding_window, **kwargs
        )
    if cache.segments is not None:
        cache.store(module, key, value)
        return segment_attention(
            module, query, key, value, None, 0.0, scaling, sliding_window, cache.segments, **kwargs
        )
    for name in ("s_aux", "softcap", "position_bias"):  # sinks, soft-capping, ALiBi and relatives
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"the cache knows no {name}")
    cache.append(module, key, value)
    scale = query.size(-1) ** -0.5 if scaling is None else scaling
    return cache.attend(module, query, scale, sliding_window).transpose(1, 2), None


AttentionInterface.register(NAME, decoding_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
