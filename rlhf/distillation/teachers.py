"""Teachers: sources of the predictions that a student is compared with, behind one protocol.

A teacher is a model of its own, another adapter on the student's weights, a folder of kept predictions, a server
(:mod:`rlhf.distillation.server_teacher`), or a model with another tokenizer (:mod:`rlhf.distillation.cross_tokenizer`).
The trainer knows the protocol alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rlhf.data import Batch
from rlhf.data.batch import Row
from rlhf.distillation.matching import MatchingWeights
from rlhf.distillation.objectives import TeacherObjective
from rlhf.distillation.teacher_file import TeacherFile
from rlhf.logprobs import Divergence, HeadObjective
from rlhf.models import Policy
from rlhf.models.policy import eval_mode
from rlhf.trainers.evaluating import Measures


@dataclass
class TeacherSource(ABC):
    """A source of the teacher's predictions, and the loss that a student gets from it.

    Args:
        divergence: the loss of a token.
        matching: the comparison of hidden states, for teachers that run in the same process.
    """

    divergence: Divergence
    matching: MatchingWeights = field(default_factory=MatchingWeights, kw_only=True)

    # Whether predictions depend on the optimizer step, so that rows are collated then and not by a worker before.
    collates_late: ClassVar[bool] = False

    @abstractmethod
    def objective(self, batch: Batch) -> HeadObjective:
        """The loss of a batch, for the student's forward pass."""

    def collator(self, collator: Any) -> Any:
        """The collator that adds to each batch what this source needs; by default ``collator`` itself."""
        return collator

    def complete(self, batch: Batch, rows: Sequence[Row]) -> Batch:
        """Add the predictions of a source that collates late.

        Args:
            batch: made of ``rows``.
            rows: tokenised, packed or not.
        Returns:
            The batch with everything that :meth:`objective` needs.
        """
        return batch

    def covers(self, batch: Batch) -> bool:
        """Whether the teacher's predictions for this batch are known."""
        return True

    def token_logps(self, student: Policy, batch: Batch) -> Tensor:
        """The teacher's log-probs of the scored tokens themselves, without a gradient, [N].

        Args:
            student: the policy that is trained.
            batch: one that this source covers.
        Returns:
            [N], nats.
        """
        raise NotImplementedError(f"{type(self).__name__} has no log-probs of single tokens")

    def measure(self, model: nn.Module, batch: Batch) -> Measures:
        """Run the student on a batch, and sum up loss and metrics for each sequence.

        Args:
            model: the student, as accelerate wraps it.
            batch: one that this source covers.
        Returns:
            Sums and counts for each sequence; the scalar sum of the loss carries the gradient.
        """
        scores = model(batch, self.objective(batch))
        comparison, targets = scores.teacher, batch.targets
        logps = scores.logps.detach()
        # The same loss once more, of each sequence and without a gradient: the forward pass summed over all tokens.
        loss = targets.sum(self.divergence.loss(comparison.divergence, logps))
        sums = {"perplexity": -targets.sum(logps)}
        if comparison.kl is None:
            # Only a part of the teacher's predictions is known: the divergence is an estimate.
            sums["divergence"] = targets.sum(comparison.divergence)
        else:
            sums["kl"] = targets.sum(comparison.kl)
            sums["agreement"] = targets.sum(comparison.agrees.to(logps.dtype))
            sums["teacher_perplexity"] = -targets.sum(comparison.logps)
        # A server reports the log-probs of the tokens themselves too; a folder does not keep them.
        if "teacher_logps" in batch.per_token:
            sums["teacher_perplexity"] = -targets.sum(batch.per_token["teacher_logps"])
        if comparison.hidden_states is not None:
            # Logged before its weight, so that runs with other weights compare.
            sums["hidden_state_loss"] = targets.sum(comparison.hidden_states)
            loss = loss + self.matching.hidden_states * sums["hidden_state_loss"]
        tokens = targets.counts()
        metrics = {name: (total, tokens) for name, total in sums.items()}
        return Measures(loss, tokens, metrics, scores.loss)


class RunningTeacher(TeacherSource):
    """A teacher in memory: all of its predictions and hidden states are available."""

    @abstractmethod
    def policy_of(self, student: Policy) -> Any:
        """A context manager that gives the teacher's policy, for use within it."""

    def objective(self, batch: Batch) -> HeadObjective:
        return TeacherObjective(self.policy_of, self.divergence)

    def token_logps(self, student: Policy, batch: Batch) -> Tensor:
        # Outside of the student's forward pass, as the objective there asks for these numbers alone.
        with torch.no_grad(), self.policy_of(student) as teacher:
            logps: Tensor = teacher(batch).logps
        return logps


@dataclass
class LiveTeacher(RunningTeacher):
    """A separate model, frozen and without dropout.

    Args:
        policy: the teacher.
    """

    policy: Policy

    @contextmanager
    def policy_of(self, student: Policy) -> Iterator[Policy]:
        yield self.policy


@dataclass
class AdapterTeacher(RunningTeacher):
    """The student's own weights under another adapter.

    Args:
        adapter: name of the teacher's adapter; None is the model without an adapter.
    """

    adapter: str | None = None

    @contextmanager
    def policy_of(self, student: Policy) -> Iterator[Policy]:
        # Dropout is off for the teacher's pass alone; the student's own pass keeps it.
        switched = student.adapter_off() if self.adapter is None else student.adapter(self.adapter)
        with eval_mode(student), switched:
            yield student


class TopKTeacher(TeacherSource):
    """A teacher that is not in memory: its most likely tokens travel with the batch, ``batch.extras["teacher"]``."""

    def objective(self, batch: Batch) -> HeadObjective:
        top_k: Any = batch.extras["teacher"]
        return self.divergence.from_top_k(top_k)

    def covers(self, batch: Batch) -> bool:
        # Rows of evaluation have none, and are then measured as in supervised fine-tuning.
        return "teacher" in batch.extras


@dataclass
class FileTeacher(TopKTeacher):
    """The teacher's most likely tokens, stored in a folder for the training rows.

    Args:
        file: the opened folder.
    """

    file: TeacherFile

    def collator(self, collator: Any) -> Any:
        # Read by the workers of the data loader: the arrays are memory-mapped, so each opens them without a copy.
        return replace(collator, extras={**collator.extras, "teacher": self.file.of_examples})
