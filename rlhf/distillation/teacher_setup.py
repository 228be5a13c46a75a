"""Before training: check that one teacher is named, load it, and check that it fits the student."""

import logging
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf.data import Packed, tokenizer_difference
from rlhf.distillation.config import DistillConfig
from rlhf.distillation.teacher_file import TeacherFile, open_teacher_file
from rlhf.models import Policy, load_model, load_tokenizer
from rlhf.models.adapter_off import adapter_off_is_start, adapter_off_stays

logger = logging.getLogger(__name__)


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
    # Under an adapter the model's own weights stay as they were, so that they can be the teacher.
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
    # The active adapter is the one that is trained, so it cannot be the fixed teacher as well.
    if teacher_adapter == getattr(student, "active_adapter", None):
        raise ValueError(f"teacher_adapter {teacher_adapter!r} is the adapter that is trained: activate another one")
    adapters = list(getattr(student, "peft_config", {}))
    if teacher_model is not None or teacher_adapter not in adapters:
        raise ValueError(
            f"teacher_adapter {teacher_adapter!r} must be an adapter of the model, without another teacher; "
            f"adapters: {', '.join(adapters) or 'none'}"
        )


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
            "the model with its adapter off would be trained too (bias='all', or another kind that stays on), "
            "and it is the teacher: pass teacher_model"
        )
    return True


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
        raise ValueError(f"teacher_file {folder}: there are no training rows that it could belong to")
    numbered, file = open_teacher_file(folder, rows.rows if isinstance(rows, Packed) else rows, tokenizer)
    temperature = file.key["temperature"]
    # Log-probs can be taken to another temperature only with all of them, and the folder has k.
    if temperature != args.temperature:
        raise ValueError(
            f"{folder}: written at temperature {temperature}, and training is at {args.temperature}: pass "
            f"--temperature {temperature}, or write the folder again (the mass of the rest depends on it)"
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
    # A module without a name says nothing of its tokenizer; sizes that differ are found later.
    if teacher is None:
        logger.warning(
            "the teacher's tokenizer is not known, so the student's is assumed: pass "
            "teacher_processing_class to have it checked"
        )
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
    # Read off the heads: a configuration may have been changed without the weights.
    vocab_sizes = [policy.without_adapter.get_output_embeddings().weight.size(0) for policy in (student, teacher)]
    if vocab_sizes[0] == vocab_sizes[1]:
        return None
    if tokenizer is None:
        raise ValueError(
            f"the student has {vocab_sizes[0]} tokens, the teacher {vocab_sizes[1]}: pass teacher_processing_class, "
            "its tokenizer, to show that they differ by padding alone"
        )
    # Beyond the largest id both heads have nothing but padding.
    num_tokens = max(tokenizer.get_vocab().values()) + 1
    logger.info("student and teacher are padded to %d and %d tokens; the %d real ones count", *vocab_sizes, num_tokens)
    return num_tokens


def known_tokenizer(
    model: str | nn.Module, tokenizer: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was given, or that of the model's name or folder; None where neither is known."""
    if tokenizer is not None:
        return tokenizer
    # transformers notes in the configuration where a model was loaded from.
    name = model if isinstance(model, str) else str(getattr(model.config, "_name_or_path", ""))
    return load_tokenizer(name) if name else None


def load_if_named(model: str | nn.Module, load_options: Any) -> nn.Module:
    """The model, loaded where it was given by name; ``load_options`` are arguments of ``from_pretrained``."""
    if isinstance(model, str):
        return load_model(model, **(load_options if isinstance(load_options, dict) else {}))
    return model
