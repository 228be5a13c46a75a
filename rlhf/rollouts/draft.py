"""Completions in the making: what is drawn for each row, and when it ends."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.rollouts.engine import Completion, Sampling
from rlhf.rollouts.sampling import draw, uniforms


class Draft:
    """The rows of a request: row ``i * n + j`` is sample j of prompt i.

    Args:
        index: the number of each prompt in the whole request: its randomness follows it.
        end_ids: tokens that end a completion.
        tokenizer: spells the tokens where there are stop strings.
        prompts: what stands before, which a repetition penalty reads.
    """

    def __init__(
        self,
        index: Sequence[int],
        n: int,
        sampling: Sampling,
        seed: int,
        end_ids: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        prompts: Sequence[Sequence[int]] = (),
    ) -> None:
        self.sampling, self.end_ids, self.tokenizer, self.n = sampling, list(end_ids), tokenizer, n
        shape = (len(index) * n, sampling.max_tokens)
        self.device = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        numbers = [uniforms(seed, i, j, sampling.max_tokens) for i in index for j in range(n)]
        self.u = torch.from_numpy(np.stack(numbers)).to(self.device)
        self.ids = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self.logps = torch.zeros(shape, device=self.device)
        self.stopped = torch.zeros(shape[0], dtype=torch.bool, device=self.device)
        self.lengths = torch.full((shape[0],), sampling.max_tokens, device=self.device)
        self.ends = torch.tensor(self.end_ids, device=self.device)
        self.step = 0
        self.prompts = [torch.tensor(list(ids), device=self.device) for ids in prompts]
        self.seen: Tensor | None = None  # [rows, V], where there is a repetition penalty
        # A token spells at least a byte, a character has at most four; some tokens at the edge spell nothing.
        self.tail = 4 * max(map(len, sampling.stop), default=0) + 4

    def take(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Draw the next token of ``rows`` [R] from ``logits`` [R, V]; a row that has ended is drawn for in vain."""
        step, early = self.step, self.step < self.sampling.min_tokens
        seen = self._seen(rows, logits.size(-1))
        banned = self.end_ids if early else ()
        token, logp = draw(logits.to(self.device), self.u[rows, step], self.sampling, banned, seen)
        if self.seen is not None:
            self.seen[rows, token] = True
        self.ids[rows, step] = token
        self.logps[rows, step] = logp
        if not early:
            ended = torch.isin(token, self.ends)
            if self.sampling.stop:
                ended |= self._spelled(rows)
            known = self.stopped[rows]
            self.lengths[rows] = torch.where(ended & ~known, step + 1, self.lengths[rows])
            self.stopped[rows] = known | ended
        self.step += 1
        return token

    def _seen(self, rows: Tensor, vocab: int) -> Tensor | None:
        """The tokens that each row has met, [R, V]; None where nobody asks."""
        if self.sampling.repetition_penalty == 1:
            return None
        if self.seen is None:
            self.seen = torch.zeros(len(self.ids), vocab, dtype=torch.bool, device=self.device)
            for number, ids in enumerate(self.prompts):
                self.seen[number * self.n : (number + 1) * self.n, ids] = True
        return self.seen[rows]

    def _spelled(self, rows: Tensor) -> Tensor:
        """Which rows' newest token completes a stop string: [R]."""
        tails = self.ids[rows, max(0, self.step + 1 - self.tail) : self.step + 1].tolist()
        after = self._spell(tails)
        found = [any(stop in text for stop in self.sampling.stop) for text in after]
        for index, hit in enumerate(found):
            if hit:  # a stop string that was there before (within min_tokens) does not count
                before = self._spell([tails[index][:-1]])[0]
                found[index] = any(after[index].count(stop) > before.count(stop) for stop in self.sampling.stop)
        return torch.tensor(found, device=self.device)

    def _spell(self, ids: list[list[int]]) -> list[str]:
        return self.tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)

    def completions(self, version: int) -> list[list[Completion]]:
        """By prompt, then by sample.

        Raises:
            FloatingPointError: a log-prob that is not finite.
        """
        columns = zip(self.ids.tolist(), self.logps.tolist(), self.lengths.tolist(), self.stopped.tolist(), strict=True)
        done = [
            Completion(ids[:length], logps[:length], "stop" if stopped else "length", version)
            for ids, logps, length, stopped in columns
        ]
        for index, completion in enumerate(done):
            if not np.isfinite(completion.logps).all():
                raise FloatingPointError(
                    f"the policy's logits for prompt {index // self.n} are not finite: "
                    "training has diverged, or half precision overflows"
                )
        return [done[start : start + self.n] for start in range(0, len(done), self.n)]
