"""Distillation: a student learns what a teacher says of each scored token, next to or instead of the token itself."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from rlhf.data import Batch, Packed, tokenizer_difference
from rlhf.distillation.config import DistillConfig
from rlhf.distillation.cross_tokenizer import OtherTokenizer, measure_aligned
from rlhf.distillation.matching import MatchingPolicy
from rlhf.distillation.on_policy import OwnAnswers, with_prompts
from rlhf.distillation.server_teacher import ServerTeacher
from rlhf.distillation.teacher_file import open_teacher_file
from rlhf.logprobs import Scores
from rlhf.models import Policy, load_model, load_tokenizer
from rlhf.models.adapter_off import adapter_off_is_start, adapter_off_stays
from rlhf.models.policy import Teacher, still
from rlhf.rollouts import RolloutEngine
from rlhf.trainers.base import BaseConfig, Measures
from rlhf.trainers.sft import TextTrainer

logger = logging.getLogger(__name__)


class DistillTrainer(TextTrainer):
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
        From a file or a server: ``divergence``, as it is estimated, and ``perplexity``. With a weight of its own
        ``hidden_state_loss``, before the weight, per token. With ``args.align``: ``uld`` or
        ``span``, its mean over pairs of tokens or spans; ``aligned``, the share of scored tokens in one; both
        perplexities, the teacher's of its own tokens (of those in a pair). With
        ``args.lmbda``: ``own_answers``, the share of rows; ``completions/mean_length``, ``completions/clipped_ratio``,
        ``tokens_per_second/rollout``; ``reverse_kl`` of the reward form.
    Raises:
        ValueError: no teacher, a teacher with another tokenizer and no ``align``, or bad data; before any step.

    Source: arXiv 1503.02531, 2306.13649; with ``align`` 2402.12030, 2503.20083.
    """

    wrapper = MatchingPolicy
    extra_state_file = "projections.safetensors"
    config_class: ClassVar[type[BaseConfig]] = DistillConfig
    exp_metrics: ClassVar[frozenset[str]] = frozenset({"perplexity", "teacher_perplexity"})

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
        if elsewhere and (teacher_model is not None or teacher_adapter is not None):
            raise ValueError(
                "teacher_file and teacher_server_url stand for a teacher: leave the model and teacher_adapter out"
            )
        if teacher_adapter is not None and teacher_adapter == getattr(model, "active_adapter", None):
            raise ValueError(f"teacher_adapter {teacher_adapter!r} is the one that learns: activate another one")
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
        elif teacher_model is None and (teacher_adapter is not None or self._off_teaches(kwargs.get("peft_config"))):
            self.teacher = OwnTrunk(teacher_adapter)
            self._match(self.model)
        elif teacher_model is None:
            self.teacher = self._separate(copy.deepcopy(self.model.model), self.processing_class)  # type: ignore[arg-type]
        else:
            self.teacher = self._separate(teacher_model, teacher_processing_class)
        if args.lmbda and self.train_dataset is not None:
            rows: Any = self.train_dataset
            room = args.limit() - args.max_completion_length
            self.train_dataset = with_prompts(rows, room, args.drop_long_prompts, args.dataset_num_proc)
            self.answers = OwnAnswers(self, engine)

    def _off_teaches(self, new: Any) -> bool:
        """Whether the trunk with its adapter off is the model without one; under a ``new`` adapter, it as it is now."""
        if new is not None:
            return adapter_off_is_start(self.model.model)
        if not adapter_off_stays(self.model.model):
            raise ValueError(
                "the model with its adapter off would learn too (bias='all', or another kind that stays on), and it is "
                "the teacher: pass teacher_model"
            )
        return True

    def _match(self, teacher: Policy) -> None:
        """Compare what is inside the student with what is inside ``teacher``, if the configuration says so."""
        if not self.args.hidden_state_weight:
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
        if isinstance(rows, Packed):
            rows.rows = marked
        else:
            self.train_dataset = marked
        self.data_collator = replace(self.data_collator, extras={"teacher": file.of_examples})  # type: ignore[type-var]

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
            if self.args.reverse_kl_reward:
                raise ValueError(
                    f"reverse_kl_reward reads log-probs over whole heads, and the student's has {sizes[0]} tokens, the "
                    f"teacher's {sizes[1]}: use --beta 1, which compares the {known} that both know"
                )
            self.divergence = replace(self.divergence, vocab_size=known)
            logger.info("student and teacher are padded to %d and %d tokens; the %d real ones count", *sizes, known)
        self._match(teacher)
        return lambda student: nullcontext(teacher)

    # Rows of the data stay rows until a step needs them: by then the student is the one that answers

    @property
    def _waits(self) -> bool:
        return self.answers is not None or self.server is not None

    def get_train_dataloader(self) -> DataLoader[Any]:
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
        kept, logps = self.server.take([example for row in rows for example in row.get("examples", [row])])
        return replace(batch, per_token={"teacher_logps": logps}, extras={"teacher": kept})

    def tokenize(
        self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: Any, vocab_size: int
    ) -> Dataset:  # fmt: skip
        if self.other is not None:
            return self.other.tokenize(dataset, tokenizer, args, vocab_size)
        return super().tokenize(dataset, tokenizer, args, vocab_size)

    def measure(self, model: nn.Module, batch: Batch) -> Measures:
        if self.other is not None:
            return measure_aligned(self, model, batch)
        if "teacher" not in batch.extras and self.teacher is None:  # other rows than those that a file is of
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
        if "teacher_logps" in batch.per_token:
            metrics["teacher_perplexity"] = -targets.sum(batch.per_token["teacher_logps"])
        loss = targets.sum(self.divergence.loss(beside.divergence, logps))
        if beside.hidden_states is not None:
            metrics["hidden_state_loss"] = targets.sum(beside.hidden_states)
            loss = loss + self.args.hidden_state_weight * metrics["hidden_state_loss"]
        return Measures(loss, tokens, {name: (value, tokens) for name, value in metrics.items()}, scores.loss)

    def _rewarded(self, model: nn.Module, batch: Batch) -> Measures:
        targets, taught = batch.targets, batch.per_token.get("teacher_logps")
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
