"""A loss that is taken with the head: what runs on each chunk, and what it returns for each scored token."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.logprobs.chunk_scores import ChunkPredictions
from rlhf.logprobs.chunks import ChunkResult, Step
from rlhf.logprobs.head import Predictions


class Comparison(NamedTuple):
    """A student compared with its teacher at each scored token; constants, [N] each, in nats.

    Args:
        divergence: the one asked for, at its temperature.
        kl: KL(teacher, student) at temperature 1, for any trained divergence. This and the next two are None
            where only a part of the teacher's predictions is known.
        logps: the teacher's log-probs of the tokens.
        agrees: whether both have the same most likely token.
        hidden_states: the distance of hidden states, where it is part of the loss.
    """

    divergence: Tensor
    kl: Tensor | None = None
    logps: Tensor | None = None
    agrees: Tensor | None = None
    hidden_states: Tensor | None = None


class Scores(NamedTuple):
    """Numbers of each scored token, float32 (float64 for float64 hidden states), in nats.

    Args:
        logps: [N], log-probs of the tokens. With an objective, these and the entropy are constants.
        entropy: [N], of the predictions.
        loss: the sum over tokens of an objective; it carries the gradient.
        values: [N], a critic's value of the state before each token; with a gradient of its own.
        teacher: the comparison with a teacher.
        router_logits: a mixture's, of each layer, where they were asked for.
    """

    logps: Tensor
    entropy: Tensor | None = None
    loss: Tensor | None = None
    values: Tensor | None = None
    teacher: Comparison | None = None
    router_logits: tuple[Tensor, ...] | None = None


class HeadObjective:
    """A loss that is a sum over the scored tokens, taken while the logits of a chunk live.

    ``policy(batch, objective)`` calls :meth:`prepare`, and then goes through the chunks of the head with :meth:`begin`.
    To write one, define :meth:`begin` and :meth:`scores`; the others have defaults.
    """

    def prepare(self, policy: Any, batch: Any) -> "HeadObjective":
        """Whatever must run before the policy's own forward, such as a teacher's.

        Args:
            policy: the :class:`rlhf.models.Policy` that is scored.
            batch: its :class:`rlhf.data.Batch`.
        Returns:
            The objective of this batch.
        """
        return self

    def check(self, student: Predictions, token: Tensor) -> Predictions:
        """The predictions that are scored.

        Args:
            student: predictions of all N tokens.
            token: int64 [N], the scored tokens.
        Returns:
            The student's predictions, or those among fewer tokens.
        Raises:
            ValueError: sizes do not fit.
        """
        return student

    def logits_per_token(self, vocabulary: int) -> int:
        """How many numbers of the size of a logit live at a time for each token; sets the size of chunks."""
        return vocabulary

    def begin(self, token: Tensor, chunk_size: int, with_grad: bool, entropy: bool) -> Step:
        """Start a pass over all chunks.

        Args:
            token: int64 [N], the scored tokens.
            chunk_size: rows at a time.
            with_grad: a gradient is wanted.
            entropy: the entropy is wanted too.
        Returns:
            The function that is called with each chunk, in order.
        """
        raise NotImplementedError

    def scores(self, per_token: Tensor, loss: Tensor) -> Scores:
        """The result, from the numbers of all chunks [n, N] and the loss."""
        raise NotImplementedError


TokenFunction = Callable[..., Tensor]
"""From a chunk's :class:`Scores` and its slices of further tensors, [c] each, to the loss of each token, [c]."""


@dataclass(frozen=True)
class TokenLoss(HeadObjective):
    """The sum of a loss that is local to a token.

    Args:
        function: the loss of some tokens, such as ``lambda scores: -scores.logps``. It must not depend on which tokens
            share a chunk.
        columns: [N] tensors, constants that the function takes after the scores, such as advantages.
    """

    function: TokenFunction
    columns: tuple[Tensor, ...] = ()

    def begin(self, token: Tensor, chunk_size: int, with_grad: bool, entropy: bool) -> Step:
        def step(chunk: slice, predictions: ChunkPredictions) -> ChunkResult:
            # Computed before the gradient, which may be written over the predictions.
            token_scores = predictions.scores(token[chunk], entropy)
            # Leaves of their own: the graph of the loss ends here and not at the logits.
            logps = token_scores.logps.requires_grad_(with_grad)
            entropies = None if token_scores.entropy is None else token_scores.entropy.requires_grad_(with_grad)
            inputs = [logps] if entropies is None else [logps, entropies]
            with torch.set_grad_enabled(with_grad):
                columns = [column[chunk] for column in self.columns]
                loss = self.function(Scores(logps, entropies), *columns).sum()
            grad_logits = None
            if with_grad:
                # Autograd runs on two numbers for each token; the step from them to the logits is in closed form.
                # A loss may ignore one of the two, and without an entropy there is one gradient alone.
                grad_logps, grad_entropy = (*torch.autograd.grad(loss, inputs, allow_unused=True), None)[:2]
                grad_logits = predictions.grad_of_logits(token[chunk], token_scores, grad_logps, grad_entropy)
            return ChunkResult(torch.stack([tensor.detach() for tensor in inputs]), loss.detach(), grad_logits)

        return step

    def scores(self, per_token: Tensor, loss: Tensor) -> Scores:
        entropy = per_token[1] if len(per_token) > 1 else None  # it was asked for in `begin`
        return Scores(per_token[0], entropy, loss)
