"""Everything that touches the inside of ``transformers.Trainer``; a trainer itself defines only its rows and its loss.

Sums are divided by what counts (scored tokens, pairs) in the *whole* optimizer step, over micro-batches and ranks.
Metrics are sums and counts on the device, reduced once at each logging step. Evaluation adds up sums and counts
over the data set, so nothing depends on the batch size.
"""

import copy
import logging
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import TrainOutput

from rlhf.data import Batch, Collator, Mixture, Packed, answer_ends, as_rows, in_memory, sample
from rlhf.data.packing import num_tokens
from rlhf.models import (
    Policy,
    add_answer_ends,
    add_embedding_noise,
    choose_layout,
    disable_dropout,
    load_model,
    mend_generation_config,
)
from rlhf.models.adapter_off import adapter_off_is_start
from rlhf.models.adapters import check_adapter
from rlhf.models.policy import Wrapper
from rlhf.models.vocabulary import grown_size
from rlhf.trainers.balancing import balancer
from rlhf.trainers.config import BaseConfig
from rlhf.trainers.evaluating import Evaluating, Measures
from rlhf.trainers.metric_sums import Metrics, MetricSums, known, means
from rlhf.trainers.nonfinite import RowSource
from rlhf.trainers.options import accepting, as_config, refuse_arguments
from rlhf.trainers.parallelism import SharedBatches, cp_size
from rlhf.trainers.preparation import (
    check_drop_last,
    check_positions,
    check_rows,
    for_each_set,
    load_model_and_tokenizer,
    padding_token,
    prepare_model,
    repeat_stream,
    unchanged_use_cache,
    wrapped,
)
from rlhf.trainers.processes import load_models_whole
from rlhf.trainers.recording import data_sources
from rlhf.trainers.reference import Reference, SyncReference
from rlhf.trainers.sharding import can_shard, check_whole, checkpoint_without_wrappers, keep_single_precision, shard
from rlhf.trainers.step_checks import CheckedSteps
from rlhf.trainers.trackers import Trackers, set_places

logger = logging.getLogger(__name__)


class BaseTrainer(SharedBatches, Evaluating, CheckedSteps):
    """A ``transformers.Trainer`` around a :class:`Policy`, or another :class:`Wrapper`.

    A subclass defines :meth:`tokenize`, :meth:`count` and :meth:`measure`.
    """

    config_class: ClassVar[type[BaseConfig]] = BaseConfig
    wrapper: Callable[[Any], Wrapper] = Policy
    balances: ClassVar[bool] = False  # `measure` hands on the router logits of a mixture
    args: Any  # of config_class
    reference: Reference | None = None  # of a loss that compares the policy with one
    loss_is_scaled_for_ga = True  # ours is normalised over the whole step already

    def __init__(
        self,
        model: Any,
        args: BaseConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: PeftConfig | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        quantization_config: Any = None,
        compute_metrics: Callable[[Any], dict[str, float]] | None = None,
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        compute_loss_func: Any = None,
        model_init: Any = None,
    ) -> None:
        # These exist so that they are refused by name; the rest is transformers.Trainer's, or TRL's.
        refuse_arguments(compute_loss_func=compute_loss_func, model_init=model_init)
        args = as_config(args, self.config_class)
        self._check_call(args, compute_metrics)
        if tokenizer is not None:
            logger.warning("tokenizer= is now called processing_class=")
            processing_class = tokenizer
        model, processing_class = load_model_and_tokenizer(model, processing_class, args, quantization_config)
        check_adapter(model, peft_config)
        peft_config = copy.deepcopy(peft_config)  # what is filled in belongs to this model
        mend_generation_config(model)
        train_dataset, eval_dataset, first_rows = self._prepare_data(
            train_dataset, eval_dataset, model, processing_class, args
        )
        model = prepare_model(model, processing_class, args, peft_config, train_dataset)
        if train_dataset is not None:
            add_answer_ends(model, answer_ends(first_rows, processing_class))
            if (capacity := self.capacity(args)) is not None:
                train_dataset = Packed(train_dataset, capacity)
        pad_token = padding_token(processing_class)
        set_places(args)
        with unchanged_use_cache(model):
            super().__init__(
                model=wrapped(model, self.wrapper, args),
                args=args,
                data_collator=data_collator or Collator(pad_token),
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                compute_metrics=compute_metrics,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            )
        self.trackers, self._metric_sums = Trackers(self.callback_handler.callbacks), MetricSums()
        self._replace_neftune()
        # Only now is the model where it will be trained, which decides whether its attention takes segments.
        if data_collator is None and choose_layout(model, self._layout()) == "segments":
            self.data_collator = Collator(pad_token, layout="segments")  # type: ignore[assignment]
        self._spread_over_processes()
        self.balancer = balancer(self.model, args, self.accelerator, self.balances)
        self._finish_setup()

    def _prepare_data(
        self, train_dataset: Any, eval_dataset: Any, model: Any, tokenizer: PreTrainedTokenizerBase, args: BaseConfig
    ) -> tuple[Any, Any, Any]:
        """Tokenised training rows, evaluation rows, and the first training rows, to look at."""
        train_dataset, eval_dataset = as_rows(train_dataset), for_each_set(as_rows, eval_dataset)
        self.row_source = RowSource.of(train_dataset)
        self.data_sources = data_sources(train_dataset, eval_dataset)
        eval_rows = eval_dataset  # as text
        vocab_size = grown_size(model, tokenizer)

        def prepare(rows: Any) -> Any:
            return self._prepare_rows(rows, tokenizer, args, vocab_size)

        with args.main_process_first(desc="tokenising"):
            train_dataset = prepare(train_dataset)
            eval_dataset = for_each_set(lambda rows: in_memory(prepare(rows)), eval_dataset)
        first_rows = sample(train_dataset)
        if isinstance(train_dataset, IterableDataset):
            train_dataset = self._repeat_stream(train_dataset, args)
        check_positions(model, first_rows, eval_dataset)
        self.choose_prompts(eval_rows, tokenizer, args)
        return train_dataset, eval_dataset, first_rows

    def _finish_setup(self) -> None:
        self.compile(self.model)
        self.add_profiler()
        self.show_run()

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        load_models_whole()  # once more, as accelerate has read the configuration of DeepSpeed again
        keep_single_precision(self.accelerator)
        checkpoint_without_wrappers(self.args, self.accelerator)

    def _replace_neftune(self) -> None:
        """Noise on the embeddings scaled by each sequence's length; transformers' own takes the row's length."""
        if self.args.neftune_noise_alpha is not None:
            self.neftune_noise_alpha = None
            add_embedding_noise(self.model, self.args.neftune_noise_alpha)

    def _check_call(self, args: BaseConfig, compute_metrics: Any) -> None:
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process: start with `accelerate launch`, "
                "or show it one (CUDA_VISIBLE_DEVICES=0)"
            )
        if compute_metrics is not None and not self.has_logits:
            raise ValueError(f"{type(self).__name__} takes no compute_metrics: its metrics are in docs/metrics.md")

    # A subclass defines these

    @abstractmethod
    def tokenize(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: Any, vocab_size: int) -> Dataset:
        """Rows of token ids.

        Args:
            dataset: rows as they are in a file.
            tokenizer: with all special tokens.
            args: the configuration; ``self.args`` does not exist yet when training rows are tokenised.
            vocab_size: ids from it on are refused.
        Returns:
            Tokenised rows, as the collator reads them.
        """

    @abstractmethod
    def count(self, batch: Batch) -> int:
        """The number that the loss of a batch is divided by: scored tokens, or pairs."""

    @abstractmethod
    def measure(self, model: nn.Module, batch: Batch) -> Measures:
        """The loss of each item of a batch, and the metrics that come with it."""

    @staticmethod
    def capacity(args: Any) -> int | None:
        """Tokens of a planned row of the training data; None where rows are batched by their number."""
        return args.tokens_per_batch

    # Rows

    def _prepare_rows(self, rows: Any, tokenizer: PreTrainedTokenizerBase, args: BaseConfig, vocab_size: int) -> Any:
        """Tokenise a data set, a stream, or each part of a mixture; None stays None."""
        if rows is None:
            return None
        if isinstance(rows, Mixture):
            seed = args.seed if args.data_seed is None else args.data_seed
            return rows.tokenised(lambda part: self._prepare_rows(part, tokenizer, args, vocab_size), seed)
        check_rows(rows)
        return self.tokenize(rows, tokenizer, args, vocab_size)

    def _repeat_stream(self, stream: IterableDataset, args: BaseConfig) -> Any:
        return repeat_stream(stream, args, plans_rows=self.capacity(args) is not None)

    def _layout(self) -> str:
        layout = self.args.layout
        # Logits of whole rows need rows.
        return "rows" if self.compute_metrics is not None and layout == "auto" else layout

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As ``transformers.Trainer``; by default from ``args.resume_from_checkpoint``."""
        self.check_before_training()
        with self.progress:
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def check_before_training(self, checkpoint: str | None = None) -> None:
        """Make the checks that need rows and model, but no step.

        Args:
            checkpoint: to go on from; :meth:`train` checks its own.
        Raises:
            ValueError: an option has no effect on these rows, or the checkpoint is of another run.
        """
        self._check_best_metric()
        check_drop_last(self.train_dataset, self.args)
        self.check_nonfinite_options()
        if checkpoint is not None:
            self.check_checkpoint(checkpoint)

    def resume_state(self) -> dict[str, Any]:
        return super().resume_state() | {
            "metric_sums": self._metric_sums.state(),
            "nonfinite_steps": self.nonfinite_steps,
        }

    def load_resume_state(self, state: dict[str, Any]) -> None:
        super().load_resume_state(state)
        self._metric_sums.load_state(state["metric_sums"], self.args.device)
        self.nonfinite_steps = state["nonfinite_steps"]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        with accepting("optim_args", self.args.optim_args):
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        with accepting("lr_scheduler_kwargs", self.args.lr_scheduler_kwargs):
            return super().create_scheduler(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows = self.train_dataset if train_dataset is None else train_dataset
        by_length = self.args.train_sampling_strategy in ("group_by_length", "batch_rebalance")
        if by_length and isinstance(rows, Dataset):
            # transformers' sampler looks for a column of lengths: rows of pairs have several sequences.
            rows = Dataset.from_dict({self.args.length_column_name: num_tokens(rows)})
        return super()._get_train_sampler(rows)

    # The loss, and the metrics that come with it

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor:
        self.begin_step(batch_samples)
        # Written on the device: a copy to it would wait for all that is under way there.
        count = torch.full((), sum(self.count(batch) for batch in batch_samples), device=device)
        if self.balancer is not None:
            # The shares of the batches add up to the loss of a step, so a step counts once over all processes.
            self.add_metrics({"aux_loss": (count * 0, torch.ones_like(count) / self.accelerator.num_processes)})
            batches = [inputs.to(self.args.device) for inputs in batch_samples]
            self.balancer.look_ahead(self.model_wrapped, batches)
        return self.accelerator.reduce(count)

    @property
    def aux_loss_enabled(self) -> bool:
        """Whether a load-balancing loss of routers is added."""
        return self.balancer is not None

    def _balancing_loss(self, measures: Measures, inputs: Any) -> Tensor | float:
        """This batch's share of the load-balancing loss of the step, weighted."""
        if self.balancer is None or measures.router_logits is None:
            return 0.0
        share = self.balancer.share(measures.router_logits, inputs)
        self.add_metrics({"aux_loss": (share, torch.zeros_like(share))})
        return self.balancer.balancing.coef * share

    def _prepare_inputs(self, inputs: Batch) -> Batch:  # type: ignore[override]
        return inputs.to(self.args.device)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        measures = self.measure(model, inputs)
        # Without a number, as where somebody calls this alone, the batch is the step.
        count = num_items_in_batch if num_items_in_batch is not None else measures.counts.sum()
        # Gradients are averaged over ranks, so each adds its share of the sum times their number.
        total = measures.total if measures.total is not None else measures.loss.sum()
        # A step may count nothing, as where on-policy samples are all dropped: its loss is 0 and not NaN.
        loss = total / torch.clamp(count, min=1) + self._balancing_loss(measures, inputs)
        loss = loss * self.accelerator.num_processes
        self.step_record.add(loss, measures.loss)
        tokens = inputs.num_tokens()
        self.add_metrics({**measures.metrics, "num_tokens": (tokens, torch.zeros_like(tokens))})
        return (loss, measures) if return_outputs else loss

    def add_metrics(self, metrics: Metrics) -> None:
        """Add sums and counts to those of the next line of the log."""
        self._metric_sums.add(metrics)

    def reduce_metrics(self, sums: dict[str, tuple[float, float]]) -> dict[str, float]:
        """The values to report, from the sum and the count of each metric."""
        return means(sums, self.exp_metrics)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # The last line, with `train_loss`, has the steps since the line before it.
        if ("loss" in logs or "train_loss" in logs) and self._metric_sums:
            sums = self._metric_sums.reduce(self.accelerator)
            # Kept in the trainer's state, so that a resumed run goes on counting.
            # Processes that share a batch count the same tokens.
            self.state.num_input_tokens_seen += int(sums.pop("num_tokens")[0]) // cp_size(self.args)
            logs |= known(self.reduce_metrics(sums), sums)
            logs["num_tokens"] = self.state.num_input_tokens_seen
        super().log(logs, start_time)

    # Other models that a loss reads

    def make_reference(self, ref_model: str | nn.Module | None, *, copies: bool = True) -> Reference | None:
        """The policy as it is at the start, frozen.

        Args:
            ref_model: another reference, as a model or by name.
            copies: whether to copy the weights where neither ``ref_model`` nor the adapter gives a reference.
        Returns:
            ``ref_model``; or the model with its adapter off, where that is the model at the start, as under a new
            LoRA adapter; or a copy; or None.
        """
        policy = self.model
        if ref_model is None:
            if policy.has_adapter and adapter_off_is_start(policy.model):
                return Reference(policy, None)
            if not copies:
                return None
            frozen_model = copy.deepcopy(policy.model)
        else:
            frozen_model = (
                load_model(ref_model, **self.args.model_kwargs()) if isinstance(ref_model, str) else ref_model
            )
        # One that is asked before training alone stays whole until then.
        shards = copies and can_shard(self.accelerator)
        frozen = self.freeze(frozen_model, shards=shards)
        if ref_model is not None:
            self.share_layout(frozen.model)
        return Reference(policy, frozen, shard(frozen, self.accelerator) if shards else None)

    @property
    def ref_policy(self) -> Policy | None:
        """The reference as a policy, if it has its own weights."""
        return None if self.reference is None else self.reference.frozen

    @property
    def ref_model(self) -> Any:
        """The reference's transformers model, if it has its own weights."""
        return None if self.ref_policy is None else self.ref_policy.model

    def sync_reference(self) -> None:
        """Let the reference follow the policy, if the configuration asks for it."""
        if self.args.sync_ref_model:
            is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
            self.add_callback(SyncReference(self.ref_policy, self.args, is_sharded))

    def share_layout(self, model: nn.Module) -> None:
        """Make another model ready for the batches of the policy; if it cannot take segments, nobody gets them."""
        if isinstance(self.data_collator, Collator) and self.data_collator.layout == "segments":
            self.data_collator = replace(self.data_collator, layout=choose_layout(model, self.args.layout))

    def freeze(self, model: nn.Module, *, shards: bool = False) -> Policy:
        """A policy to compare with.

        Args:
            model: whole on this process.
            shards: whether its weights will be sharded, from where they are; otherwise they move to this device.
        Returns:
            The policy, in evaluation mode and without gradients.
        Raises:
            ValueError: this process has only a part of the weights.
        """
        check_whole(model)
        if can_shard(self.accelerator) and not shards:
            logger.warning(
                "a frozen model that is asked for whole predictions is not sharded: each rank holds it whole"
            )
        disable_dropout(model)
        model = model.requires_grad_(False).eval()
        policy = wrapped(model if shards else model.to(self.args.device), Policy, self.args)
        self.compile(policy)
        self._share_batches(policy, self.data_collator)
        return policy

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        """Nothing: columns that nobody reads were left out when rows were tokenised."""
        return dataset

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Nothing: :meth:`log` counts them anyway, without padding."""

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # transformers' estimate reads a dict of inputs
