"""Teachers: sources of the predictions that a student is compared with, behind one protocol.

A teacher is a model of its own, another adapter on the student's weights, a folder of kept predictions, a server
(:mod:`rlhf.distillation.server_teacher`), or a model with another tokenizer (:mod:`rlhf.distillation.cross_tokenizer`).
The trainer knows the protocol alone.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf.data import Batch, Packed, tokenizer_difference
from rlhf.data.batch import Row
from rlhf.distillation.config import DistillConfig
from rlhf.distillation.matching import MatchingWeights
from rlhf.distillation.objectives import TeacherObjective
from rlhf.distillation.teacher_file import TeacherFile, open_teacher_file
from rlhf.logprobs import Divergence, HeadObjective
from rlhf.models import Policy, load_model, load_tokenizer
from rlhf.models.adapter_off import adapter_off_is_start, adapter_off_stays
from rlhf.models.policy import eval_mode
from rlhf.trainers.base import Measures

logger = logging.getLogger(__name__)


@dataclass
class TeacherSource(ABC):
    """A source of the teacher's predictions, and the loss that a student gets from it.

    Args:
        divergence: the loss of a token.
        matching: the comparison of hidden states, for teachers that run beside the student.
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
    """A teacher that runs beside the student: all of its predictions are known, and its layers too."""

    @abstractmethod
    def policy_of(self, student: Policy) -> Any:
        """A context manager that gives the teacher's policy, for use within it."""

    def objective(self, batch: Batch) -> HeadObjective:
        return TeacherObjective(self.policy_of, self.divergence)

    def token_logps(self, student: Policy, batch: Batch) -> Tensor:
        with torch.no_grad(), self.policy_of(student) as teacher:
            logps: Tensor = teacher(batch).logps
        return logps


@dataclass
class LiveTeacher(RunningTeacher):
    """A model of its own, frozen and without dropout.

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
    """A teacher that is not in memory: its likeliest tokens travel with the batch, ``batch.extras["teacher"]``."""

    def objective(self, batch: Batch) -> HeadObjective:
        top_k: Any = batch.extras["teacher"]
        return self.divergence.from_top_k(top_k)

    def covers(self, batch: Batch) -> bool:
        # Rows of evaluation have none, and are then measured as in supervised fine-tuning.
        return "teacher" in batch.extras


@dataclass
class FileTeacher(TopKTeacher):
    """The teacher's likeliest tokens, kept in a folder for the training rows.

    Args:
        file: the opened folder.
    """

    file: TeacherFile

    def collator(self, collator: Any) -> Any:
        return replace(collator, extras={**collator.extras, "teacher": self.file.of_examples})


def adapter_off_teaches(model: Any, is_new: bool) -> bool:
    """Whether the model with its adapter off can be the teacher.

    Args:
        model: the student, with PEFT around it.
        is_new: the adapter was just added, so the teacher is the model from before.
    Returns:
        False where the new adapter's off-state is another model (PiSSA, say), so that a copy is needed.
    Raises:
        ValueError: the model with its adapter off would be trained too.
    """
    if is_new:
        return adapter_off_is_start(model)
    # An adapter from before: the teacher is the model without it, which must not change while the adapter is trained.
    if not adapter_off_stays(model):
        raise ValueError(
            "the model with its adapter off would learn too (bias='all', or another kind that stays on), and it is "
            "the teacher: pass teacher_model"
        )
    return True


def check_teacher(
    args: DistillConfig, student: Any, teacher_model: Any, teacher_adapter: str | None, adapter_is_new: bool
) -> None:
    """Check that exactly one teacher is named.

    Args:
        args: the configuration.
        student: the model that is trained, or its name.
        teacher_model: the teacher or its name, where it is a model.
        teacher_adapter: the teacher's adapter, where it is one.
        adapter_is_new: an adapter will be added to the student.
    Raises:
        ValueError: no teacher, two, or one that is trained itself.
    """
    if teacher_model is student:
        raise ValueError("the student is its own teacher: pass a copy, or train an adapter and no teacher_model")
    is_elsewhere = args.teacher_file is not None or args.teacher_server_url is not None
    has_adapter = adapter_is_new or hasattr(student, "get_base_model")
    if teacher_model is None and not has_adapter and not is_elsewhere:
        raise ValueError(
            "no teacher: pass --teacher_model_name_or_path; or train an adapter (--use_peft), and the model "
            "without it is the teacher"
        )
    if is_elsewhere and (teacher_model is not None or teacher_adapter is not None):
        raise ValueError(
            "teacher_file and teacher_server_url stand for a teacher: leave the model and teacher_adapter out"
        )
    if teacher_adapter is None:
        return
    if teacher_adapter == getattr(student, "active_adapter", None):
        raise ValueError(f"teacher_adapter {teacher_adapter!r} is the one that learns: activate another one")
    adapters = list(getattr(student, "peft_config", {}))
    if teacher_model is not None or teacher_adapter not in adapters:
        raise ValueError(
            f"teacher_adapter {teacher_adapter!r} is for no other teacher and a model that has it; "
            f"adapters: {', '.join(adapters) or 'none'}"
        )


def open_rows(args: DistillConfig, rows: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, TeacherFile]:
    """Open a teacher's folder for the training rows, which may be packed.

    Args:
        args: with ``teacher_file``.
        rows: tokenised; None where nothing is trained.
        tokenizer: the student's.
    Returns:
        The rows, each with the number of its row in the folder; and the folder.
    Raises:
        ValueError: no rows, or the folder was written for others or at another temperature.
    """
    folder = str(args.teacher_file)
    if rows is None:
        raise ValueError(f"teacher_file {folder}: there are no training rows for it to belong to")
    numbered, file = open_teacher_file(folder, rows.rows if isinstance(rows, Packed) else rows, tokenizer)
    temperature = file.key["temperature"]
    if temperature != args.temperature:
        raise ValueError(
            f"{folder}: kept at temperature {temperature}, and training is at {args.temperature}: pass --temperature "
            f"{temperature}, or write the folder again (the mass of the rest is known at no other)"
        )
    if not isinstance(rows, Packed):
        return numbered, file
    # A packed row is a plan over examples, so the numbers belong to the examples below it.
    rows.rows = numbered
    return rows, file


def check_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase | None) -> None:
    """Check that a teacher reads the student's token ids.

    Args:
        student: the student's tokenizer.
        teacher: the teacher's; None where it is not known, which is logged.
    Raises:
        ValueError: the two tokenizers differ.
    """
    if teacher is None:
        logger.warning("the teacher's tokenizer is not known (teacher_processing_class); taken to be the student's")
        return
    difference = tokenizer_difference(student, teacher)
    if difference is not None:
        raise ValueError(
            f"the teacher has another tokenizer: {difference}; pass --align uld or --align spans to learn from it"
        )


def shared_vocabulary(student: Policy, teacher: Policy, tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """The number of tokens to compare where the two heads are padded to different sizes; None where they agree.

    Args:
        student: the student's policy.
        teacher: the teacher's policy.
        tokenizer: of both; shows which tokens are padding.
    Returns:
        The size of the tokenizer, or None.
    Raises:
        ValueError: the sizes differ and the tokenizer is not known.
    """
    sizes = [policy.without_adapter.get_output_embeddings().weight.size(0) for policy in (student, teacher)]
    if sizes[0] == sizes[1]:
        return None
    if tokenizer is None:
        raise ValueError(
            f"the student has {sizes[0]} tokens, the teacher {sizes[1]}: pass teacher_processing_class, its "
            "tokenizer, to show that they differ by padding alone"
        )
    # Beyond the largest id both heads have nothing but padding.
    tokens = max(tokenizer.get_vocab().values()) + 1
    logger.info("student and teacher are padded to %d and %d tokens; the %d real ones count", *sizes, tokens)
    return tokens


def known_tokenizer(
    model: str | nn.Module, tokenizer: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was given, or that of the model's name or folder; None where neither is known."""
    if tokenizer is not None:
        return tokenizer
    name = model if isinstance(model, str) else str(getattr(model.config, "_name_or_path", ""))
    return load_tokenizer(name) if name else None


def load_if_named(model: str | nn.Module, load_options: Any) -> nn.Module:
    """The model, loaded where it was given by name; ``load_options`` are arguments of ``from_pretrained``."""
    if isinstance(model, str):
        return load_model(model, **(load_options if isinstance(load_options, dict) else {}))
    return model
