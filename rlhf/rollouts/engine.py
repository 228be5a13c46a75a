"""The protocol of engines that sample: from prompts to token ids, log-probs and the reason of each end."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Args:
        temperature: >= 0, divides the logits; 0 takes the most probable token.
        top_p: in (0, 1], keeps the fewest most probable tokens whose total probability reaches it; 1 keeps all.
        top_k: >= 0, keeps this many most probable tokens; 0 keeps all.
        min_tokens: no end token and no stop string counts before this many.
        max_tokens: >= 1; a completion of this length is cut, with the finish reason ``"length"``.
        stop: strings that end a completion. Their tokens stay in the completion, as they were sampled.
        min_p: in [0, 1), keeps tokens whose probability is at least this share of the most likely one's; 0 keeps all.
        repetition_penalty: > 0, divides the logit of a token that occurred before (prompt included), or multiplies it
            if it is below 0; 1 is none.
    Raises:
        ValueError: an option out of its range.

    Top-k comes first, then top-p, then min-p, as in transformers' ``generate``.
    Log-probs are those of the distribution that is drawn from: a *renormalised* one where ``top_p``, ``top_k``,
    ``min_p`` or ``min_tokens`` remove tokens. A trainer scores the full vocabulary, so these options and the penalty
    make its log-probs differ from the sampler's.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_tokens: int = 0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        # A single string is a sequence too: each of its letters would become a stop string.
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)  # the class is frozen
        ranges = {
            "temperature": (0 <= self.temperature < float("inf"), "at least 0"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "top_k": (self.top_k >= 0, "at least 0 (0 keeps all tokens)"),
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "min_tokens": (0 <= self.min_tokens <= self.max_tokens, f"in [0, max_tokens = {self.max_tokens}]"),
            # An empty string is in every text, so that it would end each completion at once.
            "stop": (all(self.stop), "strings that are not empty"),
            "min_p": (0 <= self.min_p < 1, "in [0, 1) (0 keeps all tokens)"),
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "positive (1 is none)"),
        }
        for name, (is_in_range, expected) in ranges.items():
            if not is_in_range:
                raise ValueError(f"Sampling: {name} must be {expected}, got {getattr(self, name)!r}")

    @property
    def truncates(self) -> bool:
        """Whether tokens are removed, which makes log-probs differ from a full softmax."""
        # At temperature 0 the most probable token is in every truncated set.
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)

    @property
    def reshapes(self) -> bool:
        """Whether tokens come from another distribution than the softmax at this temperature."""
        return self.truncates or self.repetition_penalty != 1


@dataclass(frozen=True)
class Completion:
    """One sampled answer.

    Args:
        ids: the sampled tokens, with the end token if there was one; never decoded and encoded again.
        logps: nats, one for each id, under the distribution that it was drawn from; at temperature 0, under the softmax
            at temperature 1.
        finish_reason: ``"stop"`` after an end token or a stop string, ``"length"`` if cut by ``max_tokens``.
        version: of the weights that sampled it, as last given to ``update_weights``.
    """

    ids: list[int]
    logps: list[float]
    finish_reason: Literal["stop", "length"]
    version: int


class RolloutEngine(Protocol):
    """Samples completions from the current policy, in this process or elsewhere.

    The order of a training step: ``sleep``, train, ``update_weights``, ``wake``, ``generate``.
    """

    version: int

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        index: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """``n`` completions of each prompt.

        Sample j of prompt i depends on the weights, the prompt, ``(seed, i, j)`` and ``sampling`` alone, and on nothing
        else in the request (up to rounding, which depends on the shapes of the matrix products).

        Args:
            prompt_ids: each not empty; a chat prompt comes from ``rlhf.data.encode_prompt``.
            n: completions of each prompt, at least 1.
            sampling: how tokens are drawn.
            seed: at least 0.
            index: the number i of each prompt, where the request is a part of a larger one; 0, 1, 2, … by default.
        Returns:
            A list of ``n`` completions for each prompt.
        Raises:
            ValueError: an empty prompt, ``n`` < 1, or a prompt that leaves no room for ``max_tokens``.
        """
        ...

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Load new weights.

        Args:
            weights: name and tensor of each, under the names of a Hugging Face checkpoint.
            version: of these weights; the completions that follow have it.
        Raises:
            ValueError: a name or shape that the engine's model does not have.
            OSError: the engine cannot take weights.
        """
        ...

    def sleep(self) -> None:
        """Free what memory can be freed while the policy trains."""
        ...

    def wake(self) -> None:
        """Undo ``sleep``."""
        ...

    def close(self) -> None:
        """Release all resources; the engine is not used again."""
        ...


def check_request(prompt_ids: Sequence[Sequence[int]], n: int, seed: int) -> None:
    """Check a request before an engine runs it.

    Args:
        prompt_ids: ids of each prompt.
        n: completions of each prompt.
        seed: of the random numbers.
    Raises:
        ValueError: ``n`` below 1, a negative seed, or an empty prompt.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1 completion a prompt, got {n}")
    # numpy's generators take no negative seed.
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    # The first token of a completion is predicted by the last one of the prompt.
    for index, ids in enumerate(prompt_ids):
        if not len(ids):
            raise ValueError(f"prompt {index} is empty: give it at least one token, such as the tokenizer's BOS")


def sample_seed(seed: int, prompt: int, sample: int) -> int:
    """The seed of one completion, for an engine that takes one for each request.

    Args:
        seed: of the whole request.
        prompt: number of the prompt.
        sample: number of the completion.
    Returns:
        A number of 31 bits: servers take a signed one of 32.
    """
    return int(np.random.SeedSequence((seed, prompt, sample)).generate_state(1)[0] >> 1)
