"""Distillation: a student learns the teacher's distribution at each scored token, besides or instead of the token."""

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import TrainOutput

from rlhf.data import Batch
from rlhf.distillation.config import DistillConfig
from rlhf.distillation.cross_tokenizer import CrossTokenizer, CrossTokenizerTeacher
from rlhf.distillation.matching import MatchingPolicy
from rlhf.distillation.on_policy import Metrics, StudentRollouts, mark_prompts, measure_reward
from rlhf.distillation.server_teacher import ServerTeacher, connect
from rlhf.distillation.teacher_setup import (
    adapter_off_teaches,
    check_teacher,
    check_tokenizer,
    known_tokenizer,
    load_if_named,
    open_rows,
    shared_vocabulary,
)
from rlhf.distillation.teachers import AdapterTeacher, FileTeacher, LiveTeacher, RunningTeacher, TeacherSource
from rlhf.models import Policy
from rlhf.rollouts import RolloutEngine
from rlhf.rollouts.policy_sampler import PolicySampler, make_engine, probe_ids
from rlhf.trainers.config import BaseConfig
from rlhf.trainers.evaluating import Measures
from rlhf.trainers.sft import TextTrainer


class DistillTrainer(TextTrainer):
    r"""Train a causal LM towards a teacher's predictions, on rows as for :class:`SFTTrainer`.

    .. math:: L = \frac{1}{N} \sum_{t} \big(w_d\,D(p_t, q_t) - w_c \log q_t(y_t)\big),\;
              N = \text{scored tokens of the optimizer step}

    The teacher is one of :mod:`rlhf.distillation.teachers`: a separate model, frozen and without dropout; the
    student's own weights with the adapter off or with another adapter, which needs no second copy of the weights; a
    folder of kept predictions (``args.teacher_file``); or a server (``args.teacher_server_url``). With a folder or a
    server, evaluation is that of supervised fine-tuning.

    Args:
        model: the student: a model, a PEFT model, or a name or folder to load one from.
        teacher_model: the teacher, as a model or by name; ``args.teacher_model_name_or_path`` by default. With neither,
            the student without its adapter.
        args: the configuration.
        teacher_processing_class: the teacher's tokenizer; by default that of the teacher's name or folder.
        teacher_adapter: name of an adapter on the student's model that is the teacher.
        engine: samples the student's own answers; by default this process, or ``args.rollout_server_url``.
        kwargs: ``train_dataset``, ``eval_dataset``, ``processing_class``, ``peft_config``, ``callbacks``, … as in
            :class:`SFTTrainer`.
    Logs:
        ``loss``; ``kl``, KL(teacher, student) at temperature 1 in nats a token, for any divergence; ``agreement``
        (share of tokens for which both find the same token most likely); ``perplexity`` and ``teacher_perplexity`` of
        the same tokens; ``num_tokens``, ``grad_norm``, ``learning_rate``. All but the last three in evaluation too.
        From a folder or a server: ``divergence``, as it is estimated, and ``perplexity``. With
        ``args.hidden_state_weight``: ``hidden_state_loss``, before the weight, per token. With ``args.align``: ``uld``
        or ``span``, its mean over aligned tokens or spans; ``aligned``, the share of scored tokens in one; both
        perplexities, the teacher's of its own tokens (with ``uld``, of the aligned ones). With ``args.lmbda``:
        ``own_answers``, the share of rows; ``completions/mean_length``, ``completions/clipped_ratio``,
        ``tokens_per_second/rollout``; ``reverse_kl`` of the reward form.
    Raises:
        ValueError: no teacher, a teacher with another tokenizer and no ``align``, or bad data; before any step.
    Example:
        ```python
        rows = [{"prompt": "What is 2 + 2?", "completion": " It is 4."}]
        args = rlhf.DistillConfig("runs/distill", max_steps=100)
        student = "HuggingFaceTB/SmolLM2-135M-Instruct"
        trainer = rlhf.DistillTrainer(student, "HuggingFaceTB/SmolLM2-1.7B-Instruct", args, train_dataset=rows)
        trainer.train()
        ```

    Source: arXiv 1503.02531, 2306.13649; with ``align`` 2402.12030, 2503.20083.
    """

    wrapper = MatchingPolicy
    # Projections between hidden states are trained, but are no part of the student.
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
        # The argument wins over the configuration, as for the student.
        teacher_model = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
        adapter_is_new = kwargs.get("peft_config") is not None
        check_teacher(args, model, teacher_model, teacher_adapter, adapter_is_new)
        # Loaded first: rows are tokenised for both models while the trainer is built.
        self._cross_tokenizer: CrossTokenizer | None = None
        if args.align is not None:
            self._cross_tokenizer = CrossTokenizer.load(args, teacher_model, teacher_processing_class)
        super().__init__(model, args, **kwargs)
        self.policy: Policy = self.model
        self.teacher = self._open_teacher(teacher_model, teacher_processing_class, teacher_adapter, adapter_is_new)
        # A teacher that cannot take segments gets padded rows, and so does the student: they read the same batch.
        if isinstance(self.teacher, LiveTeacher):
            self.share_layout(self.teacher.policy.model)
        self.data_collator = self.teacher.collator(self.data_collator)
        if args.hidden_state_weight:
            self._match_layers()
        self.rollouts: StudentRollouts | None = None
        if args.lmbda and self.train_dataset is not None:
            self.rollouts = self._open_rollouts(engine)

    def _open_teacher(
        self,
        model: str | nn.Module | None,
        tokenizer: PreTrainedTokenizerBase | None,
        adapter: str | None,
        adapter_is_new: bool,
    ) -> TeacherSource:
        """The source of predictions that the configuration and the arguments ask for."""
        args, divergence = self.args, self.args.loss()
        student_tokenizer: Any = self.processing_class
        cross_tokenizer = self._cross_tokenizer
        if cross_tokenizer is not None:
            return CrossTokenizerTeacher(
                divergence, self.freeze(cross_tokenizer.model), cross_tokenizer.align, cross_tokenizer.pad_token_id
            )
        if args.teacher_file is not None:
            self.train_dataset, file = open_rows(args, self.train_dataset, student_tokenizer)
            return FileTeacher(divergence, file)
        if args.teacher_server_url is not None:
            engine = connect(
                args.teacher_server_url, args.teacher_server_model, student_tokenizer, args.server_startup_timeout
            )
            return ServerTeacher(divergence, engine, args.teacher_top_k)
        if model is None:
            if adapter is not None or adapter_off_teaches(self.policy.model, adapter_is_new):
                return AdapterTeacher(divergence, adapter)
            # The new adapter changes the model even when it is off (PiSSA, say), so the start is kept as a copy.
            model, tokenizer = copy.deepcopy(self.policy.model), student_tokenizer
        return self._live_teacher(model, tokenizer)

    def _live_teacher(self, model: str | nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> LiveTeacher:
        """A frozen teacher that has the student's tokenizer."""
        student_tokenizer: Any = self.processing_class
        tokenizer = known_tokenizer(model, tokenizer)
        check_tokenizer(student_tokenizer, tokenizer)
        # Loaded only now: another tokenizer is found before minutes are spent on weights.
        policy = self.freeze(load_if_named(model, self.args.teacher_model_init_kwargs))
        vocab_size = shared_vocabulary(self.policy, policy, tokenizer)
        if vocab_size is not None and self.args.reverse_kl_reward:
            raise ValueError(
                "reverse_kl_reward reads log-probs over whole heads, and the student's and the teacher's differ in "
                f"size: use --beta 1, which compares the {vocab_size} tokens that both know"
            )
        return LiveTeacher(replace(self.args.loss(), vocab_size=vocab_size), policy)

    def _match_layers(self) -> None:
        """Compare hidden states with the teacher's, too."""
        assert isinstance(self.teacher, RunningTeacher)  # checked with the options
        self.teacher.matching = self.args.matching()
        with self.teacher.policy_of(self.policy) as teacher:
            self.model.match(teacher.without_adapter, self.teacher.matching, self.args.seed)
        # Projections are parameters that were not there when the caller made the optimizer.
        if len(self.model.projections) and self.optimizer is not None:
            raise ValueError(
                "the student's hidden states have another width than the teacher's, and the optimizer that was given "
                "does not hold the projections between them: leave optimizers out"
            )

    def _open_rollouts(self, engine: RolloutEngine | None) -> StudentRollouts:
        """The student's own answers; marks the prompts of the training rows."""
        args, rows = self.args, self.train_dataset
        # The answers' log-probs come from the training pass, so those that the engine reports are not read.
        max_prompt_length = args.limit() - args.max_completion_length
        self.train_dataset = mark_prompts(rows, max_prompt_length, args.drop_long_prompts, args.dataset_num_proc)
        tokenizer: Any = self.processing_class
        if engine is None:
            engine = make_engine(
                args, self.policy, tokenizer, self.accelerator, max_length=args.limit(), reads_logps=False
            )
        return StudentRollouts(
            PolicySampler(engine, self.accelerator, probe_ids(tokenizer)),
            args.sampling(),
            share=args.lmbda,
            seed=args.seed,
            vocab_size=self.teacher.divergence.vocab_size,
        )

    def tokenize(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: Any, vocab_size: int) -> Dataset:
        if self._cross_tokenizer is not None:
            return self._cross_tokenizer.tokenize(dataset, tokenizer, args, vocab_size)
        return super().tokenize(dataset, tokenizer, args, vocab_size)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As :class:`BaseTrainer`; a server that sleeps between rollouts is awake afterwards."""
        with nullcontext() if self.rollouts is None else self.rollouts.sampler.during_training():
            return super().train(*args, **kwargs)

    # Some batches cannot be made by a worker ahead of time: the student answers its rows as it is at that step, and a
    # server is asked about these answers. Until then, the data loader hands on the rows as they are.

    @property
    def _collates_late(self) -> bool:
        return self.rollouts is not None or self.teacher.collates_late

    def get_train_dataloader(self) -> DataLoader[Any]:
        collator = self.data_collator
        if self._collates_late:
            self.data_collator = list  # type: ignore[assignment]
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches of an optimizer step and their number of scored tokens, as ``transformers.Trainer``."""
        if not self._collates_late:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        micro_batches = list(islice(epoch_iterator, num_batches))
        if self.rollouts is not None:
            step = self.state.global_step
            micro_batches, metrics = self.rollouts.answer(micro_batches, self.policy, self.model_wrapped, step)
            self._log_rollout(metrics)
        batches = []
        for rows in micro_batches:
            batch: Any = self.data_collator(rows)
            batches.append(self.teacher.complete(batch, rows))
        return batches, self._get_num_items_in_batch(batches, device)

    def _log_rollout(self, metrics: Metrics) -> None:
        sums = {}
        for name, sum_and_count in metrics.items():
            total, count = torch.tensor(sum_and_count, device=self.args.device).unbind()
            sums[name] = (total, count)
        self.add_metrics(sums)

    def measure(self, model: nn.Module, batch: Batch) -> Measures:
        if not self.teacher.covers(batch):
            return super().measure(model, batch)
        # Evaluation has the divergence in any case: its rows are not sampled from the student.
        if self.args.reverse_kl_reward and torch.is_grad_enabled():
            return measure_reward(model, batch, self.teacher.token_logps(self.policy, batch))
        return self.teacher.measure(model, batch)
