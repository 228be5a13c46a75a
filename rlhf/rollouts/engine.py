"""What an engine is: prompts in; ids, log-probs and the reason of each end out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Args:
        temperature: ≥ 0, divides the logits; 0 takes the most probable token.
        top_p: in (0, 1], keep the fewest most probable tokens whose probability reaches it; 1 keeps all.
        top_k: ≥ 0, keep this many most probable tokens; 0 keeps all.
        min_tokens: no end token and no stop string before this many.
        max_tokens: ≥ 1; a completion that reaches it is cut, and says so.
        stop: strings that end a completion. The tokens that spell one stay, as they were sampled.
        min_p: in [0, 1), keep tokens whose probability is at least this share of the likeliest one's; 0 keeps all.
        repetition_penalty: > 0, divides the logit of a token that was there before (prompt included), or multiplies one
            below 0; 1 is none.
    Raises:
        ValueError: an option out of its range.

    Top-k comes first, then top-p, then min-p, as in transformers' ``generate``.
    Log-probs are those of the distribution that is drawn from, so of the *renormalised* one where ``top_p``, ``top_k``,
    ``min_p`` or ``min_tokens`` take tokens out. A trainer scores the full vocabulary: where the two are compared, these
    and the penalty make them differ.
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
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        for name, fine, wanted in (
            ("temperature", 0 <= self.temperature < float("inf"), "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= 0, "at least 0 (0 keeps all tokens)"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, f"in [0, max_tokens = {self.max_tokens}]"),
            ("stop", all(self.stop), "strings that are not empty"),
            ("min_p", 0 <= self.min_p < 1, "in [0, 1) (0 keeps all tokens)"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "positive (1 is none)"),
        ):
            if not fine:
                raise ValueError(f"Sampling: {name} must be {wanted}, got {getattr(self, name)!r}")

    @property
    def truncates(self) -> bool:
        """Whether tokens are taken out, which makes log-probs differ from a full softmax."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)

    @property
    def reshapes(self) -> bool:
        """Whether tokens come from another distribution than the softmax at this temperature."""
        return self.truncates or self.repetition_penalty != 1


@dataclass(frozen=True)
class Completion:
    """One sampled answer.

    Args:
        ids: what was sampled, with the end token if there was one; never decoded and encoded again.
        logps: nats, one for each id, under the distribution that the id was drawn from; for temperature 0, under the
            softmax at temperature 1.
        finish_reason: ``"stop"`` after an end token or a stop string, ``"length"`` if cut by ``max_tokens``.
        version: of the policy that sampled it, as last given to ``update_weights``.
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

        Sample j of prompt i is a function of the weights, the prompt, ``(seed, i, j)`` and ``sampling`` alone, whatever
        else is in the request (up to rounding, which depends on the shapes of the products).

        Args:
            prompt_ids: each not empty; a chat prompt comes from ``rlhf.data.encode_prompt``.
            seed: ≥ 0.
            index: the number i of each prompt, where the request is a part of a larger one; 0, 1, 2, … by default.
        Raises:
            ValueError: an empty prompt, ``n`` < 1, or a prompt that leaves no room for ``max_tokens``.
        """
        ...

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Load named weights (under the names of a Hugging Face checkpoint) and stamp what comes after as ``version``.

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
        """Let go of everything; the engine is not used again."""
        ...


def check_request(prompt_ids: Sequence[Sequence[int]], n: int, seed: int) -> None:
    """Refuse a request that no engine can answer."""
    if n < 1:
        raise ValueError(f"n must be at least 1 completion a prompt, got {n}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    for index, ids in enumerate(prompt_ids):
        if not len(ids):
            raise ValueError(f"prompt {index} is empty: give it at least one token, such as the tokenizer's BOS")
