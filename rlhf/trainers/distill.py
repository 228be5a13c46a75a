"""Distillation: a student learns what a teacher says of each scored token, next to or instead of the token itself."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, get_args

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from rlhf.data import Batch, Packed, open_teacher_file, tokenizer_difference
from rlhf.logprobs import Divergence, Scores
from rlhf.logprobs.topk import Estimate
from rlhf.losses import DIVERGENCES
from rlhf.models import Policy, load_model, load_tokenizer
from rlhf.models.policy import Teacher, still
from rlhf.rollouts import RolloutEngine, Sampling
from rlhf.trainers.aligned import OtherTokenizer, check_options, measure_aligned
from rlhf.trainers.base import BaseConfig, Measures
from rlhf.trainers.own_answers import OwnAnswers, with_prompts
from rlhf.trainers.sampler import ServerArguments
from rlhf.trainers.server_teacher import ServerTeacher
from rlhf.trainers.sft import SFTConfig, SFTTrainer

logger = logging.getLogger(__name__)


@dataclass
class DistillConfig(ServerArguments, SFTConfig):
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
    align: str | None = field(
        default=None,
        metadata={
            "help": "A teacher with another tokenizer: compare sorted probabilities (uld), or spans of the same text.",
            "choices": ["uld", "spans"],
        },
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Train without dropout; the teacher never has any."})
    # A teacher elsewhere
    teacher_server_url: str | None = field(default=None, metadata={"help": "The teacher is there (vLLM), not here."})
    teacher_server_model: str | None = field(default=None, metadata={"help": "Name that it is served under."})
    teacher_top_k: int = field(default=16, metadata={"help": "Likeliest tokens that the server is asked for."})
    # On-policy
    lmbda: float = field(
        default=0.0, metadata={"help": "Share of the rows that the student answers itself (GKD); 0 is offline."}
    )
    max_completion_length: int = field(default=256, metadata={"help": "Longest such answer in tokens."})
    sampling_temperature: float = field(default=1.0, metadata={"help": "Of such answers."})
    reverse_kl_reward: bool = field(
        default=False,
        metadata={"help": "Reward own answers by -KL(student, teacher) of each token, in place of the divergence."},
    )

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]  # noqa: RUF012  # not a field

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_file is not None and self.teacher_model_name_or_path is not None:
            raise ValueError("teacher_file stands for a teacher: leave teacher_model_name_or_path out, or the file")
        if self.teacher_server_url is not None:
            self._check_server()
        if self.teacher_file is not None or (self.teacher_server_url is not None and not self.reverse_kl_reward):
            self.loss().of_top_k()
        self.loss()
        self._check_on_policy()
        check_options(self)

    def _check_server(self) -> None:
        if self.teacher_server_model is None:
            raise ValueError("teacher_server_url needs teacher_server_model, the name that the teacher is served under")
        if self.teacher_model_name_or_path is not None or self.teacher_file is not None:
            raise ValueError("teacher_server_url stands for a teacher: leave teacher_model_name_or_path and _file out")
        if self.temperature != 1:
            raise ValueError(f"a server reports log-probs at temperature 1 alone, not {self.temperature}")
        if self.teacher_top_k < 1:
            raise ValueError(f"teacher_top_k must be at least 1, got {self.teacher_top_k}")
        if self.teacher_estimate == "sample":
            raise ValueError("a server gives no samples of the teacher's: teacher_estimate tail or truncate")

    def _check_on_policy(self) -> None:
        if not 0 <= self.lmbda <= 1:
            raise ValueError(f"lmbda is a share of the rows, in [0, 1]; got {self.lmbda}")
        if self.reverse_kl_reward:
            if self.lmbda != 1:
                raise ValueError("reverse_kl_reward is for the student's own answers alone: set lmbda to 1")
            if self.temperature != 1 or self.sampling_temperature != 1:
                raise ValueError(
                    "reverse_kl_reward needs temperature and sampling_temperature 1: it rewards what is drawn"
                )
        if not self.lmbda:
            return
        if self.teacher_file is not None:
            raise ValueError("teacher_file says nothing of the student's own answers: lmbda needs a teacher")
        if self.packing or self.tokens_per_batch is not None:
            raise ValueError(
                "packing and tokens_per_batch plan rows by their length, which answers to come have not yet"
            )
        if self.crossentropy_weight:
            raise ValueError("crossentropy_weight would teach the student its own answers: leave it out with lmbda")
        if self.max_completion_length >= self.max_length:
            raise ValueError(
                f"max_completion_length {self.max_completion_length} leaves no room for a prompt in max_length "
                f"{self.max_length}: raise max_length"
            )
        self.sampling()

    def sampling(self) -> Sampling:
        """Of the student's own answers."""
        return Sampling(temperature=self.sampling_temperature, max_tokens=self.max_completion_length)

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
        engine: who samples the student's own answers; by default this process, or ``args.rollout_server_url``.
        kwargs: ``processing_class``, ``peft_config``, ``callbacks``, … as in :class:`SFTTrainer`.
    Logs:
        ``loss``; ``kl``, KL(teacher, student) at temperature 1 in nats a token, whatever the divergence; ``agreement``
        (share of tokens for which both find the same token likeliest); ``perplexity`` and ``teacher_perplexity`` of
        the same tokens; ``num_tokens``, ``grad_norm``, ``learning_rate``. All but the last three in evaluation too.
        From a file: ``divergence``, as it is estimated, and ``perplexity``. With ``args.align``: ``uld`` or ``span``,
        its mean over pairs of tokens or spans; ``aligned``, the share of scored tokens in one; both perplexities, the
        teacher's of its own tokens (of those in a pair).
    Raises:
        ValueError: no teacher, a teacher with another tokenizer and no ``align``, or bad data; before any step.

    Source: arXiv 1503.02531, 2306.13649; with ``align`` 2402.12030, 2503.20083.
    """

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
        engine: RolloutEngine | None = None,
        **kwargs: Any,
    ) -> None:
        args = args if args is not None else DistillConfig(output_dir="runs")
        teacher_model = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
        has_adapter = kwargs.get("peft_config") is not None or hasattr(model, "get_base_model")
        if teacher_model is model:
            raise ValueError("the student is its own teacher: pass a copy, or train an adapter and no teacher_model")
        elsewhere = args.teacher_file is not None or args.teacher_server_url is not None
        if teacher_model is None and not has_adapter and not elsewhere:
            raise ValueError(
                "no teacher: pass --teacher_model_name_or_path; or train an adapter (--use_peft), and the model "
                "without it is the teacher"
            )
        if teacher_adapter is not None and (teacher_model is not None or teacher_adapter not in _adapters(model)):
            raise ValueError(
                f"teacher_adapter {teacher_adapter!r} is for no other teacher and a model that has it; "
                f"adapters: {', '.join(_adapters(model)) or 'none'}"
            )
        self.other = OtherTokenizer.load(args, teacher_model, teacher_processing_class)
        super().__init__(model, args, **kwargs)
        self.policy: Policy = self.model
        self.divergence = args.loss()
        self.teacher: Teacher | None = None
        self.server: ServerTeacher | None = None
        self.answers: OwnAnswers | None = None
        if self.other is not None:
            self.teacher = self.other.join(self)
        elif args.teacher_file is not None:
            self._open(args.teacher_file)
        elif args.teacher_server_url is not None:
            where = str(args.teacher_server_url), str(args.teacher_server_model)
            self.server = ServerTeacher(*where, args.teacher_top_k, self.processing_class)  # type: ignore[arg-type]
        elif teacher_model is None:
            self.teacher = OwnTrunk(teacher_adapter)
        else:
            self.teacher = self._separate(teacher_model, teacher_processing_class)
        if args.lmbda and self.train_dataset is not None:
            rows: Any = self.train_dataset
            room = args.max_length - args.max_completion_length
            self.train_dataset = with_prompts(rows, room, args.drop_long_prompts, args.dataset_num_proc)
            self.answers = OwnAnswers(self, engine)

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
            raise ValueError(
                f"the teacher has another tokenizer: {difference}; pass --align uld or --align spans to learn from it"
            )
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
        return lambda student: nullcontext(teacher)

    # Rows of the data stay rows until a step needs them: by then the student is the one that answers

    @property
    def _waits(self) -> bool:
        return self.answers is not None or self.server is not None

    def get_train_dataloader(self) -> DataLoader:
        collate = self.data_collator
        if self._waits:
            self.data_collator = list  # type: ignore[assignment]
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collate

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        if not self._waits:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        micro = [rows for _, rows in zip(range(num_batches), epoch_iterator)]  # noqa: B905  # it may end before
        if self.answers is not None:
            micro = self.answers(micro)
        batches = [self._collate(rows) for rows in micro]
        return batches, self._get_num_items_in_batch(batches, device)

    def _collate(self, rows: list[dict[str, Any]]) -> Batch:
        batch: Batch = self.data_collator(rows)  # type: ignore[assignment]
        if self.server is None:
            return batch
        kept, logps = self.server.take(rows)
        return replace(batch, teacher=kept, teacher_logps=logps)

    def tokenize(
        self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: Any, vocab_size: int
    ) -> Dataset:  # fmt: skip
        if self.other is not None:
            return self.other.tokenize(dataset, tokenizer, args, vocab_size)
        return super().tokenize(dataset, tokenizer, args, vocab_size)

    def measure(self, model: nn.Module, batch: Batch) -> Measures:
        if self.other is not None:
            return measure_aligned(self, model, batch)
        if batch.teacher is None and self.teacher is None:  # other rows than those that a file is of
            return super().measure(model, batch)
        if self.args.reverse_kl_reward and torch.is_grad_enabled():
            return self._rewarded(model, batch)
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
        if batch.teacher_logps is not None:
            metrics["teacher_perplexity"] = -targets.sum(batch.teacher_logps)
        loss = targets.sum(self.divergence.loss(beside.divergence, logps))
        return Measures(loss, tokens, {name: (value, tokens) for name, value in metrics.items()}, scores.loss)

    def _rewarded(self, model: nn.Module, batch: Batch) -> Measures:
        targets, taught = batch.targets, batch.teacher_logps
        if taught is None:
            assert self.teacher is not None
            with torch.no_grad(), self.teacher(self.policy) as teacher:
                taught = teacher(batch).logps
        scores = model(batch, _reverse_kl, per_token=(taught,))
        tokens, logps = targets.counts(), scores.logps.detach()
        sums = {"reverse_kl": logps - taught, "perplexity": -logps, "teacher_perplexity": -taught}
        metrics = {name: (targets.sum(value), tokens) for name, value in sums.items()}
        return Measures(metrics["reverse_kl"][0], tokens, metrics, scores.loss)


def _reverse_kl(scores: Scores, taught: Tensor) -> Tensor:
    """Of each sampled token: as a value log q - log p, whose mean is KL(q, p); as a gradient that of the mean."""
    logps = scores.logps.detach()
    return (logps - taught) * torch.exp(scores.logps - logps)


@dataclass
class OwnTrunk:
    """The student's own weights with its adapter off, or under another adapter."""

    adapter: str | None = None

    @contextmanager
    def __call__(self, student: Policy) -> Iterator[Policy]:
        way = student.adapter_off() if self.adapter is None else student.adapter(self.adapter)
        with still(student), way:
            yield student


def _adapters(model: Any) -> list[str]:
    return list(getattr(model, "peft_config", {}))
