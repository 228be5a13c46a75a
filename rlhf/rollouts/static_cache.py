"""A cache whose shapes and addresses are the same in each decoding step, so that a CUDA graph can replay the step."""

import torch
from torch import Tensor, nn

from rlhf.models.attention_spans import ScoreOptions
from rlhf.rollouts.cache import Cache, attention_scores, matmul_fp32, probabilities

FIRST_COLUMNS = 64  # completion columns that attention reads at first; doubled when they are full


class StaticCache(Cache):
    """A :class:`Cache` that knows its step on the device, and masks the columns that are not written yet.

    Attention reads :attr:`columns` columns of the completions in each step. They are doubled when they are full, so
    that at most half of what is read is masked, and few graphs are captured.

    Args:
        lengths: int64 [P], tokens of each prompt.
        num_samples: rows of each prompt.
        max_new_tokens: completion tokens that a row can keep.
    """

    def __init__(self, lengths: Tensor, num_samples: int, max_new_tokens: int) -> None:
        super().__init__(lengths, num_samples, max_new_tokens)
        self.columns = min(FIRST_COLUMNS, max_new_tokens)
        self.device_step = torch.zeros(1, dtype=torch.int64, device=lengths.device)

    def advance(self) -> None:
        """See :meth:`Cache.advance`."""
        super().advance()
        self.device_step += 1
        if self.step == self.columns:
            self.columns = min(2 * self.columns, self.max_new_tokens)

    def append(self, layer: nn.Module, keys: Tensor, values: Tensor) -> None:
        """See :meth:`Cache.append`.

        Args:
            layer: the attention module.
            keys: [R, kv_heads, 1, D].
            values: alike.
        """
        if layer not in self.completion_cache:
            shape = (*keys.shape[:2], self.max_new_tokens)
            # Columns that are not written yet are masked, but a masked value is still multiplied by 0.
            reserved = keys.new_zeros(*shape, keys.size(3)), values.new_zeros(*shape, values.size(3))
            self.completion_cache[layer] = reserved
        for cached, new_entries in zip(self.completion_cache[layer], (keys, values), strict=True):
            cached.index_copy_(2, self.device_step, new_entries)

    def _copy_rows(self, cached: Tensor, rows: Tensor) -> Tensor:
        return cached.index_select(0, rows)

    def attend(self, layer: nn.Module, query: Tensor, options: ScoreOptions) -> Tensor:
        """See :meth:`Cache.attend`.

        Args:
            layer: whose keys and values to read.
            query: [R, heads, 1, D].
            options: of the layer; its window counts columns.
        Returns:
            [R, heads, 1, D].
        """
        keys, values = self.prompt_cache[layer]
        completion_keys, completion_values = (cached[:, :, : self.columns] for cached in self.completion_cache[layer])
        rows, heads = query.shape[:2]
        kv_heads = keys.size(1)
        query = query.view(rows, kv_heads, heads // kv_heads, query.size(3))

        completion_scores = attention_scores(query, completion_keys, options)
        completion_scores.masked_fill_(self._hidden_completion_columns(options.window), -torch.inf)
        prompt_scores = attention_scores(self._rows_to_grid(query), keys, options)
        hidden_prompt_columns = self._hidden_prompt_columns(options.window)
        if hidden_prompt_columns is not None:
            prompt_scores.masked_fill_(hidden_prompt_columns, -torch.inf)

        scores = torch.cat((self._grid_to_rows(prompt_scores), completion_scores), dim=-1)
        weights = probabilities(scores, options.sinks).to(query.dtype)
        prompt_weights, completion_weights = weights.split((self.longest, self.columns), dim=-1)
        from_prompt = matmul_fp32(self._rows_to_grid(prompt_weights), values)
        output = self._grid_to_rows(from_prompt) + matmul_fp32(completion_weights, completion_values)
        return output.to(query.dtype).reshape(rows, heads, 1, -1)

    def _hidden_completion_columns(self, window: int | None) -> Tensor:
        """bool [columns]: not written yet, or before the window."""
        column = torch.arange(self.columns, device=self.device_step.device)
        hidden = column > self.device_step
        if window is not None:
            hidden |= column <= self.device_step - window
        return hidden

    def _hidden_prompt_columns(self, window: int | None) -> Tensor | None:
        """bool [P or 1, 1, 1, longest]: padding, or before the window; None where all are seen."""
        if window is None:
            return self.padding
        column = torch.arange(self.longest, device=self.device_step.device)
        before_window = (column <= self.longest + self.device_step - window)[None, None, None]
        return before_window if self.padding is None else self.padding | before_window
