"""Distillation: a student learns what a teacher says of each scored token, next to or instead of the token itself."""

import logging
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, get_args

from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf.data import Batch, Packed, open_teacher_file, tokenizer_difference
from rlhf.logprobs import Divergence, Predictions
from rlhf.logprobs.topk import Estimate
from rlhf.losses import DIVERGENCES
from rlhf.models import Policy, load_model, load_tokenizer
from rlhf.models.policy import Teacher, still
from rlhf.trainers.base import BaseConfig, Measures
from rlhf.trainers.matching import DISTANCES, MatchingPolicy, Weights
from rlhf.trainers.sft import SFTConfig, SFTTrainer

logger = logging.getLogger(__name__)


@dataclass
class DistillConfig(SFTConfig):
    """Arguments of :class:`DistillTrainer`.

    Names and defaults are those of TRL's ``GKDConfig`` where it has the same thing, so that a ``beta`` means what it
    means there; the two weights are those of its ``GOLDConfig`` without the prefix. ``temperature`` is the loss's (that
    of ``GKDConfig`` is of sampling alone, and its loss is at 1).
    """

    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "The teacher. With an adapter (--use_peft) and none, the model without the adapter."},
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Passed to from_pretrained for the teacher, such as {"dtype": "bfloat16"}.'}
    )
    teacher_file: str | None = field(
        default=None,
        metadata={"help": "Folder that `rlhf teacher` wrote for these rows, in place of a teacher in memory."},
    )
    teacher_estimate: str = field(
        default="tail",
        metadata={
            "help": "Of the divergence, from that folder: docs/teacher-cache.md.",
            "choices": [*get_args(Estimate)],
        },
    )
    divergence: str = field(
        default="generalized_jsd",
        metadata={"help": "Between teacher and student; `rlhf losses NAME` explains it.", "choices": [*DIVERGENCES]},
    )
    temperature: float = field(default=1.0, metadata={"help": "Divides the logits of both sides in the divergence."})
    scale_by_temperature: bool = field(
        default=False, metadata={"help": "Multiply it by the temperature squared, so that gradients keep their size."}
    )
    beta: float | None = field(
        default=None, metadata={"help": "Of generalized_jsd (0.5): 0 is KL(teacher, student), 1 KL(student, teacher)."}
    )
    alpha: float | None = field(default=None, metadata={"help": "Of skew_kl (0.1) and alpha_divergence (0.5)."})
    reverse: bool = field(
        default=False, metadata={"help": "Of kl_divergence and skew_kl: the student's first, which seeks modes."}
    )
    distillation_weight: float = field(default=1.0, metadata={"help": "Weight of the divergence."})
    crossentropy_weight: float = field(
        default=0.0, metadata={"help": "Weight of the tokens themselves, the hard labels, at temperature 1."}
    )
    hidden_state_weight: float = field(
        default=0.0, metadata={"help": "Weight of the distance between the layers' outputs, student's and teacher's."}
    )
    hidden_state_distance: str = field(
        default="squared", metadata={"help": "Mean square of the difference, or 1 - cosine.", "choices": [*DISTANCES]}
    )
    attention_weight: float = field(
        default=0.0, metadata={"help": "Weight of KL(teacher, student) of attention; both with eager attention."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Train without dropout; the teacher never has any."})

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]  # noqa: RUF012  # not a field

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_file is not None:
            if self.teacher_model_name_or_path is not None:
                raise ValueError("teacher_file stands for a teacher: leave teacher_model_name_or_path out, or the file")
            if self.hidden_state_weight or self.attention_weight:
                raise ValueError(
                    "teacher_file holds neither hidden states nor attention: leave hidden_state_weight and "
                    "attention_weight out, or give the teacher itself (--teacher_model_name_or_path)"
                )
            self.loss().of_top_k()
        self.loss()
        checkpointing: Any = self.activation_checkpointing_kwargs or {}
        if self.matching().attention and checkpointing.get("use_reentrant"):
            raise ValueError("attention_weight has no gradient through checkpoints with use_reentrant: turn it off")
        if self.attention_weight and not self.disable_dropout:
            raise ValueError("attention_weight compares attention without dropout: leave disable_dropout on")

    def matching(self) -> Weights:
        """The terms beside the divergence; raises for what is out of range."""
        return Weights(self.hidden_state_weight, self.attention_weight, self.hidden_state_distance)

    def loss(self) -> Divergence:
        """The loss of a token; raises for what does not fit together."""
        options = dict(beta=self.beta, alpha=self.alpha)
        switches = dict(reverse=self.reverse, scale_by_temperature=self.scale_by_temperature)
        return Divergence(
            self.divergence,
            self.temperature,
            {name: value for name, value in options.items() if value is not None}
            | {name: value for name, value in switches.items() if value},
            self.distillation_weight,
            self.crossentropy_weight,
            estimate=self.teacher_estimate,
        )


class DistillTrainer(SFTTrainer):
    r"""Train a causal LM to predict what a teacher predicts, on rows as for :class:`SFTTrainer`.

    .. math:: L = \frac{1}{N} \sum_{t} \big(w_d\,D(p_t, q_t) - w_c \log q_t(y_t)\big),\;
              N = \text{scored tokens of the optimizer step}

    The teacher is a model of its own, frozen and without dropout; or the student's own trunk with its adapter off, or
    with another adapter, which needs no second copy of the weights; or a file of what it said (``args.teacher_file``),
    and no teacher is in memory. Evaluation is then of the rows themselves, as supervised fine-tuning has it.

    Args:
        model: the student: a model, a PEFT model, or a name or folder to load one from.
        teacher_model: the teacher, as a model or by name; ``args.teacher_model_name_or_path`` by default. With neither,
            the student without its adapter.
        args: the configuration. train_dataset, eval_dataset: rows in any of the known columns.
        teacher_processing_class: the teacher's tokenizer; by default that of the teacher's name or folder.
        teacher_adapter: name of an adapter on the student's trunk that is the teacher.
        kwargs: ``processing_class``, ``peft_config``, ``callbacks``, … as in :class:`SFTTrainer`.
    Logs:
        ``loss``; ``kl``, KL(teacher, student) at temperature 1 in nats a token, whatever the divergence; ``agreement``
        (share of tokens for which both find the same token likeliest); ``perplexity`` and ``teacher_perplexity`` of
        the same tokens; ``num_tokens``, ``grad_norm``, ``learning_rate``. All but the last three in evaluation too.
        From a file: ``divergence``, as it is estimated, and ``perplexity``. With a weight of its own
        ``hidden_state_loss`` and ``attention_loss``, before the weight, per token.
    Raises:
        ValueError: no teacher, a teacher with another tokenizer, or bad data; before any step.

    Source: arXiv 1503.02531, 2306.13649.
    """

    wrapper = MatchingPolicy
    beside = "projections.safetensors"
    config_class: ClassVar[type[BaseConfig]] = DistillConfig
    exponentials: ClassVar[frozenset[str]] = frozenset({"perplexity", "teacher_perplexity"})

    def __init__(
        self,
        model: str | nn.Module,
        teacher_model: str | nn.Module | None = None,
        args: DistillConfig | None = None,
        *,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        teacher_adapter: str | None = None,
        **kwargs: Any,
    ) -> None:
        args = args if args is not None else DistillConfig(output_dir="runs")
        teacher_model = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
        has_adapter = kwargs.get("peft_config") is not None or hasattr(model, "get_base_model")
        if teacher_model is model:
            raise ValueError("the student is its own teacher: pass a copy, or train an adapter and no teacher_model")
        if teacher_model is None and not has_adapter and args.teacher_file is None:
            raise ValueError(
                "no teacher: pass --teacher_model_name_or_path; or train an adapter (--use_peft), and the model "
                "without it is the teacher"
            )
        if teacher_adapter is not None and (teacher_model is not None or teacher_adapter not in _adapters(model)):
            raise ValueError(
                f"teacher_adapter {teacher_adapter!r} is for no other teacher and a model that has it; "
                f"adapters: {', '.join(_adapters(model)) or 'none'}"
            )
        super().__init__(model, args, **kwargs)
        self.divergence = args.loss()
        self.teacher: Teacher | None = None
        if args.teacher_file is not None:
            self._open(args.teacher_file)
        elif teacher_model is None:
            self.teacher = OwnTrunk(teacher_adapter)
            self._match(self.model)
        else:
            self.teacher = self._separate(teacher_model, teacher_processing_class)

    def _match(self, teacher: Policy) -> None:
        """Compare what is inside the student with what is inside ``teacher``, if the configuration says so."""
        if not (self.args.hidden_state_weight or self.args.attention_weight):
            return
        self.model.match(teacher.without_adapter, self.args.matching(), self.args.seed)
        if len(self.model.projections) and self.optimizer is not None:
            raise ValueError(
                "the student's hidden states have another width than the teacher's, and the optimizer that was given "
                "does not hold the projections between them: leave optimizers out"
            )

    def _open(self, folder: str) -> None:
        """Give the training rows what was kept of a teacher for them."""
        rows = self.train_dataset
        if rows is None:
            raise ValueError(f"teacher_file {folder}: there are no training rows for it to belong to")
        marked, file = open_teacher_file(folder, rows.rows if isinstance(rows, Packed) else rows, self.processing_class)  # type: ignore[arg-type]
        if (kept := file.key["temperature"]) != self.args.temperature:
            raise ValueError(
                f"{folder}: kept at temperature {kept}, and training is at {self.args.temperature}: pass --temperature "
                f"{kept}, or write the folder again (the mass of the rest is known at no other)"
            )
        if self.args.teacher_estimate == "sample" and file.samples is None:
            raise ValueError(f"{folder}: holds no samples of the teacher: write it again with rlhf teacher --samples 8")
        if isinstance(rows, Packed):
            rows.rows = marked
        else:
            self.train_dataset = marked
        self.data_collator = replace(self.data_collator, teacher=file)  # type: ignore[type-var]

    def _separate(self, model: str | nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> Teacher:
        """A frozen teacher, checked to speak of the same tokens."""
        own = self.args.teacher_model_init_kwargs
        name = model if isinstance(model, str) else str(getattr(model.config, "_name_or_path", ""))
        if tokenizer is None and name:
            tokenizer = load_tokenizer(name)
        if tokenizer is None:
            logger.warning("the teacher's tokenizer is not known (teacher_processing_class); taken to be the student's")
        elif (difference := tokenizer_difference(self.processing_class, tokenizer)) is not None:  # type: ignore[arg-type]
            raise ValueError(f"the teacher has another tokenizer: {difference}")
        if isinstance(model, str):
            model = load_model(model, **(own if isinstance(own, dict) else {}))
        teacher = self.freeze(model)
        self.share_layout(teacher.model)
        sizes = [policy.without_adapter.get_output_embeddings().weight.size(0) for policy in (self.model, teacher)]
        if sizes[0] != sizes[1]:
            if tokenizer is None:
                raise ValueError(
                    f"the student has {sizes[0]} tokens, the teacher {sizes[1]}: pass teacher_processing_class, its "
                    "tokenizer, to show that they differ by padding alone"
                )
            known = max(tokenizer.get_vocab().values()) + 1
            self.divergence = replace(self.divergence, vocab_size=known)
            logger.info("student and teacher are padded to %d and %d tokens; the %d real ones count", *sizes, known)
        self._match(teacher)
        return lambda student, batch: teacher.predictions(batch)

    def measure(self, model: nn.Module, batch: Batch) -> Measures:
        if batch.teacher is None and self.teacher is None:  # other rows than those that a file is of
            return super().measure(model, batch)
        scores = model(batch, divergence=self.divergence, teacher=self.teacher)
        targets, beside = batch.targets, scores.teacher
        tokens, logps = targets.counts(), scores.logps.detach()
        nll = -targets.sum(logps)
        metrics = {"perplexity": nll}
        if beside.kl is None:
            metrics["divergence"] = targets.sum(beside.divergence)
        else:
            metrics["kl"] = targets.sum(beside.kl)
            metrics["agreement"] = targets.sum(beside.agrees.to(nll.dtype))
            metrics["teacher_perplexity"] = -targets.sum(beside.logps)
        loss = targets.sum(self.divergence.loss(beside.divergence, logps))
        if beside.matched is not None:
            matched = {name: targets.sum(values) for name, values in beside.matched.items()}
            metrics |= matched
            loss = loss + self.args.matching().sum(matched)
        return Measures(loss, tokens, {name: (value, tokens) for name, value in metrics.items()}, scores.loss)


@dataclass
class OwnTrunk:
    """The student's own weights with its adapter off, or under another adapter."""

    adapter: str | None = None

    def __call__(self, student: Policy, batch: Batch) -> Predictions:
        way = student.adapter_off() if self.adapter is None else student.adapter(self.adapter)
        with still(student), way:
            return student.predictions(batch)


def _adapters(model: Any) -> list[str]:
    return list(getattr(model, "peft_config", {}))
