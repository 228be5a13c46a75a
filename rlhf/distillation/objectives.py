"""Objectives with a live teacher: its forward pass comes first, then the student's, then the walk over the head."""

from dataclasses import dataclass
from typing import Any

import torch

from rlhf.data import Batch
from rlhf.logprobs import Divergence, HeadObjective, SortedComparison
from rlhf.models import Policy
from rlhf.models.policy import Teacher


@dataclass(frozen=True)
class TeacherObjective(HeadObjective):
    """The divergence from a teacher that is run on the student's batch.

    Args:
        teacher: from the student's policy to the teacher's.
        divergence: what is compared, and the weights of the loss.
    """

    teacher: Teacher
    divergence: Divergence

    def prepare(self, policy: Policy, batch: Batch) -> HeadObjective:
        with torch.no_grad(), self.teacher(policy) as teacher:
            predictions = teacher.predictions(batch)
        return self.divergence.against(predictions)


@dataclass(frozen=True)
class AlignedTeacherObjective(TeacherObjective):
    """The sorted comparison with a teacher that is run on a batch of its own tokens, ``batch.extras["alignment"]``."""

    def prepare(self, policy: Policy, batch: Batch) -> HeadObjective:
        alignment: Any = batch.extras["alignment"]
        with torch.no_grad(), self.teacher(policy) as teacher:
            predictions = teacher.predictions(alignment.batch)
        return SortedComparison(predictions, alignment.batch.targets.token, alignment.partner, self.divergence)
