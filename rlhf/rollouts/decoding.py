"""The state of a batch that is being decoded: the tokens drawn for each row, and where each row ends."""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.rollouts.engine import Completion, Sampling
from rlhf.rollouts.sampling import draw, uniforms


class DecodingState:
    """The rows of a request: row ``i * num_samples + j`` is sample j of prompt i.

    Args:
        prompt_numbers: [P], the number of each prompt in the whole request; it decides the prompt's random numbers.
        num_samples: completions of each prompt, at least 1.
        sampling: how tokens are drawn.
        seed: at least 0.
        end_ids: tokens that end a completion.
        tokenizer: decodes the tokens when there are stop strings.
        device: the model's device.
        prompts: [P] lists of ids, read by the repetition penalty only.
        on_token: called with the row and the token, for each token of a row up to its end.
    """

    def __init__(
        self,
        prompt_numbers: Sequence[int],
        num_samples: int,
        sampling: Sampling,
        seed: int,
        end_ids: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        prompts: Sequence[Sequence[int]] = (),
        on_token: Callable[[int, int], None] | None = None,
    ) -> None:
        self.sampling = sampling
        self.on_token = on_token
        self.tokenizer = tokenizer
        self.num_samples = num_samples
        # MPS has no float64, which the uniform numbers need.
        self.device = torch.device("cpu") if device.type == "mps" else device

        num_rows = len(prompt_numbers) * num_samples
        shape = (num_rows, sampling.max_tokens)
        # A row that ends early leaves the rest of its columns unused.
        self.ids = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self.logps = torch.zeros(shape, device=self.device)
        self.stopped = torch.zeros(num_rows, dtype=torch.bool, device=self.device)
        self.lengths = torch.full((num_rows,), sampling.max_tokens, device=self.device)
        self.end_ids = torch.tensor(end_ids, device=self.device)
        self.step = 0

        # All random numbers are drawn first, so that a row's do not depend on when other rows end.
        row_uniforms = [
            uniforms(seed, number, sample, sampling.max_tokens)
            for number in prompt_numbers
            for sample in range(num_samples)
        ]
        self.uniforms = torch.from_numpy(np.stack(row_uniforms)).to(self.device)

        self.prompts = [torch.tensor(list(ids), device=self.device) for ids in prompts]
        self.seen_tokens: Tensor | None = None  # bool [rows, V], only with a repetition penalty

        # A stop string is looked for in the newest tokens only. A token has at least one byte and a character at most
        # four, so 4 tokens for each character are enough; a few more, as some tokens at the edge decode to nothing.
        longest_stop = max(map(len, sampling.stop), default=0)
        self.stop_window = 4 * longest_stop + 4

    def draw_next(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Draw the next token of some rows and note which rows end with it.

        Finished rows still consume a random number, so that results do not depend on the batch.

        Args:
            logits: [R, V], at the newest token of each row.
            rows: int64 [R], which rows these are.
        Returns:
            int64 [R], the tokens.
        """
        step = self.step
        may_end = step >= self.sampling.min_tokens
        token, token_logp = draw(
            logits.to(self.device),
            self.uniforms[rows, step],
            self.sampling,
            banned=None if may_end else self.end_ids,
            seen=self._seen_tokens_of(rows, logits.size(-1)),
        )
        if self.seen_tokens is not None:
            self.seen_tokens[rows, token] = True
        self.ids[rows, step] = token
        self.logps[rows, step] = token_logp

        already_stopped = self.stopped[rows]
        if may_end:
            ends_now = torch.isin(token, self.end_ids)
            if self.sampling.stop:
                ends_now |= self._completes_stop_string(rows)
            # Only the first end counts: a finished row goes on drawing tokens that are not used.
            self.lengths[rows] = torch.where(ends_now & ~already_stopped, step + 1, self.lengths[rows])
            self.stopped[rows] = already_stopped | ends_now
        self.step += 1
        if self.on_token is not None:
            self._report(rows[~already_stopped], token[~already_stopped])
        return token

    def _report(self, rows: Tensor, tokens: Tensor) -> None:
        # Waits for the device, which a request without `on_token` does not.
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            self.on_token(row, token)  # type: ignore[misc]  # the caller has checked it

    def _seen_tokens_of(self, rows: Tensor, vocab_size: int) -> Tensor | None:
        """The tokens that occurred in each row so far, its prompt included.

        Args:
            rows: int64 [R].
            vocab_size: V.
        Returns:
            bool [R, V]; None without a repetition penalty.
        """
        if self.sampling.repetition_penalty == 1:
            return None
        if self.seen_tokens is None:
            self.seen_tokens = torch.zeros(len(self.ids), vocab_size, dtype=torch.bool, device=self.device)
            for number, prompt in enumerate(self.prompts):
                first_row = number * self.num_samples
                self.seen_tokens[first_row : first_row + self.num_samples, prompt] = True
        return self.seen_tokens[rows]

    def _completes_stop_string(self, rows: Tensor) -> Tensor:
        """Whether the newest token of each row completes a stop string: bool [R]."""
        start = max(0, self.step + 1 - self.stop_window)
        newest_ids = self.ids[rows, start : self.step + 1].tolist()
        completes = []
        for ids, text in zip(newest_ids, self._decode(newest_ids), strict=True):
            is_complete = any(stop in text for stop in self.sampling.stop)
            if is_complete:
                # A stop string that was complete one token ago, within min_tokens, does not count.
                text_before = self._decode([ids[:-1]])[0]
                is_complete = any(text.count(stop) > text_before.count(stop) for stop in self.sampling.stop)
            completes.append(is_complete)
        return torch.tensor(completes, device=self.device)

    def _decode(self, ids: list[list[int]]) -> list[str]:
        # Clean-up would remove spaces, and a stop string may hold such a space.
        return self.tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)

    def completions(self, version: int) -> list[list[Completion]]:
        """The finished completions, by prompt and then by sample.

        Args:
            version: of the weights that sampled them.
        Returns:
            P lists of ``num_samples`` completions.
        Raises:
            FloatingPointError: a log-prob that is not finite.
        """
        completions = []
        rows = zip(self.ids.tolist(), self.logps.tolist(), self.lengths.tolist(), self.stopped.tolist(), strict=True)
        for index, (ids, logps, length, stopped) in enumerate(rows):
            if not np.isfinite(logps[:length]).all():
                raise FloatingPointError(
                    f"the policy's logits for prompt {index // self.num_samples} are not finite: "
                    "training has diverged, or half precision overflows"
                )
            finish_reason: Literal["stop", "length"] = "stop" if stopped else "length"
            completions.append(Completion(ids[:length], logps[:length], finish_reason, version))
        return [completions[start : start + self.num_samples] for start in range(0, len(completions), self.num_samples)]
