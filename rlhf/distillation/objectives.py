"""Objectives with a live teacher: its forward pass comes first, then the student's, then the walk over the head."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import record_function

from rlhf.data import Batch
from rlhf.logprobs import Divergence, HeadObjective, Predictions, SortedComparison
from rlhf.models import Policy

REFERENCE_LABEL = "rlhf.reference"  # of `--profile`: the time of models that are only asked


PolicyOfTeacher = Callable[[Policy], AbstractContextManager[Policy]]
"""From the student's policy to the teacher's, for a while: another one, or the same under other weights."""


@dataclass(frozen=True)
class TeacherObjective(HeadObjective):
    """The divergence from a teacher that is run on the student's batch.

    Args:
        teacher: from the student's policy to the teacher's.
        divergence: the divergence, and the weights of the loss.
    """

    teacher: PolicyOfTeacher
    divergence: Divergence

    def prepare(self, policy: Policy, batch: Batch) -> HeadObjective:
        return self.divergence.against(self.predictions(policy, batch))

    def predictions(self, policy: Policy, batch: Batch) -> Predictions:
        """The teacher's predictions of the targets of ``batch``, without a gradient."""
        # Hidden states before the head: logits are computed chunk by chunk, together with the student's.
        with record_function(REFERENCE_LABEL), torch.no_grad(), self.teacher(policy) as teacher:
            return teacher.predictions(batch)


@dataclass(frozen=True)
class AlignedTeacherObjective(TeacherObjective):
    """The sorted comparison with a teacher that is run on a batch of its own tokens, ``batch.extras["alignment"]``."""

    def prepare(self, policy: Policy, batch: Batch) -> HeadObjective:
        alignment: Any = batch.extras["alignment"]
        predictions = self.predictions(policy, alignment.batch)
        return SortedComparison(predictions, alignment.batch.targets.token, alignment.partner, self.divergence)
