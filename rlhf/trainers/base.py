"""Everything that touches the inside of ``transformers.Trainer``; a trainer itself says only what its loss is.

Sums are divided by what counts (scored tokens, pairs) in the *whole* optimizer step, over micro-batches and ranks.
Metrics are sums and counts on the device, reduced once at each logging step. Evaluation adds up sums and counts
over the data set, so nothing depends on the batch size.
"""

import copy
import logging
import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import TrainOutput, set_seed, validate_quantization_for_training

from rlhf.data import Batch, Collator, Endless, Mixture, Packed, answer_ends, held, is_tokenised, sample
from rlhf.data.packing import largest_token, longest_sequences, num_tokens
from rlhf.models import (
    Policy,
    add_adapter,
    add_answer_ends,
    add_embedding_noise,
    choose_layout,
    disable_dropout,
    load_model,
    load_tokenizer,
    mend_generation_config,
    vocabulary_size,
)
from rlhf.models.adapters import check_adapter, learn_tokens
from rlhf.models.policy import Wrapper
from rlhf.models.positions import max_positions, trained_length
from rlhf.models.vocabulary import grow, room
from rlhf.trainers.balancing import balancer
from rlhf.trainers.checkpointing import checkpoint_to_resume, tell_of_resuming
from rlhf.trainers.config import BaseConfig
from rlhf.trainers.evaluating import Evaluating, Measures
from rlhf.trainers.options import accepting
from rlhf.trainers.predictions import logits_and_labels
from rlhf.trainers.profiling import Profiler
from rlhf.trainers.switching import as_config, refuse_arguments

logger = logging.getLogger(__name__)


class BaseTrainer(Evaluating):
    """A ``transformers.Trainer`` around a :class:`Policy`, or another :class:`Wrapper`.

    A subclass defines :meth:`tokenize`, :meth:`count` and :meth:`measure`.
    """

    config_class: ClassVar[type[BaseConfig]] = BaseConfig
    wrapper: Callable[[Any], Wrapper] = Policy
    balances: ClassVar[bool] = False  # `measure` hands on the router logits of a mixture
    args: Any  # of config_class
    loss_is_scaled_for_ga = True  # ours is normalised over the whole step already

    def __init__(
        self,
        model: Any,
        args: BaseConfig | None = None,
        data_collator: Any = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
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
        refuse_arguments(compute_loss_func=compute_loss_func, model_init=model_init)
        args = as_config(args if args is not None else self.config_class(output_dir="runs"), self.config_class)
        assert args is not None
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process: start with `accelerate launch`, "
                "or show it one (CUDA_VISIBLE_DEVICES=0)"
            )
        if compute_metrics is not None and not self.has_logits:
            raise ValueError(f"{type(self).__name__} takes no compute_metrics: its metrics are in docs/metrics.md")
        if tokenizer is not None:
            logger.warning("tokenizer= is now called processing_class=")
            processing_class = tokenizer
        name = model if isinstance(model, str) else None
        if isinstance(model, str):
            quantized = {} if quantization_config is None else {"quantization_config": quantization_config}
            model = load_model(model, **args.model_kwargs() | quantized)
        elif quantization_config is not None:
            raise ValueError("quantization_config acts when a model is loaded: pass the model by name, or load it so")
        check_adapter(model, peft_config)
        peft_config = copy.deepcopy(peft_config)  # what is filled in is of this model
        if processing_class is None:
            hub = {key: args.model_kwargs().get(key) for key in ("revision", "trust_remote_code")}
            processing_class = load_tokenizer(name or model.config._name_or_path, args.chat_template_path, **hub)
        set_tokens(processing_class, args)
        mend_generation_config(model)
        vocab_size = room(model, processing_class)
        with args.main_process_first(desc="tokenising"):
            train_dataset = self._prepare_rows(train_dataset, processing_class, args, vocab_size)
            if isinstance(eval_dataset, dict):
                eval_dataset = {
                    k: held(self._prepare_rows(v, processing_class, args, vocab_size)) for k, v in eval_dataset.items()
                }
            else:
                eval_dataset = held(self._prepare_rows(eval_dataset, processing_class, args, vocab_size))
        known = sample(train_dataset)
        if isinstance(train_dataset, IterableDataset):
            train_dataset = self._repeat_stream(train_dataset, args)
        check_positions(model, known, eval_dataset)
        set_seed(args.seed)  # transformers does so after this, and new rows and LoRA's A are drawn here
        if args.add_tokens or uses_more(train_dataset, processing_class, vocabulary_size(model)):
            learn_tokens(model, peft_config, grow(model, processing_class))
        if peft_config is not None:
            model = add_adapter(model, peft_config)
        if args.disable_dropout:
            disable_dropout(model)
        if train_dataset is not None:
            validate_quantization_for_training(model)
            warn_of_lost_updates(model, args)
        pad = next((i for i in (processing_class.pad_token_id, processing_class.eos_token_id) if i is not None), 0)
        if train_dataset is not None:
            add_answer_ends(model, answer_ends(known, processing_class))
        text_config = model.config.get_text_config()
        use_cache = getattr(text_config, "use_cache", None)
        if train_dataset is not None and (capacity := self.capacity(args)) is not None:
            train_dataset = Packed(train_dataset, capacity)
        super().__init__(
            model=self.wrapper(model),
            args=args,
            data_collator=data_collator or Collator(pad),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        if args.neftune_noise_alpha is not None:
            self.neftune_noise_alpha = None  # transformers' own takes the row's length for the sequence's
            add_embedding_noise(self.model, args.neftune_noise_alpha)
        if use_cache is not None:
            text_config.use_cache = use_cache  # Trainer turns it off, into the saved config
        if data_collator is None and choose_layout(model, self._layout()) == "segments":  # where the model now is
            self.data_collator = Collator(pad, layout="segments")  # type: ignore[assignment]
        self._sums: dict[str, Tensor] = {}
        self.balancer = balancer(self.model, args.router_aux_loss_coef, self.accelerator, self.balances)
        if (args.profile or args.verbose) and args.process_index == 0:
            self.add_callback(Profiler(self))

    @staticmethod
    def capacity(args: Any) -> int | None:
        """Tokens of a planned row of the training data, where rows are planned."""
        return args.tokens_per_batch

    @abstractmethod
    def tokenize(
        self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: Any, vocab_size: int
    ) -> Dataset: ...  # fmt: skip

    @abstractmethod
    def count(self, batch: Batch) -> int:
        """What the loss of a batch is divided by: scored tokens, or pairs."""

    @abstractmethod
    def measure(self, model: nn.Module, batch: Batch) -> Measures: ...

    def _prepare_rows(self, dataset: Any, tokenizer: PreTrainedTokenizerBase, args: Any, vocab_size: int) -> Any:
        if dataset is None:
            return None
        if isinstance(dataset, Mixture):
            seed = args.seed if args.data_seed is None else args.data_seed
            return dataset.tokenised(lambda rows: self._prepare_rows(rows, tokenizer, args, vocab_size), seed)
        if not isinstance(dataset, Dataset | IterableDataset):
            raise ValueError(f"expected a Dataset or an IterableDataset of `datasets`, got {type(dataset).__name__}")
        if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
            raise ValueError(
                "the rows have a with_transform(), which acts when they are read: apply it with map() first"
            )
        return self.tokenize(dataset, tokenizer, args, vocab_size)

    def _repeat_stream(self, stream: IterableDataset, args: Any) -> Any:
        """A tokenised stream over and over; how long to train says ``max_steps``."""
        if args.max_steps <= 0:
            raise ValueError("a stream does not say how many rows it has: pass --max_steps")
        if self.capacity(args) is not None:
            raise ValueError("--packing and --tokens_per_batch plan batches of all rows: they need rows, not a stream")
        args.accelerator_config.dispatch_batches = False  # each process reads, and keeps what is its own
        return Endless(stream)

    def _layout(self) -> str:
        args = self.args
        if args.torch_compile and args.layout == "segments":
            logger.warning("--torch_compile with --layout segments compiles nearly every batch anew; use --layout rows")
        whole_rows = args.torch_compile or self.compute_metrics is not None
        return "rows" if whole_rows and args.layout == "auto" else args.layout

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As ``transformers.Trainer``; by default from ``args.resume_from_checkpoint``."""
        given = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        checkpoint = checkpoint_to_resume(given, self.args.output_dir)
        if checkpoint is not None:
            tell_of_resuming(checkpoint, self.args.max_steps)
        self._check_best_metric()
        self._check_drop_last()
        return super().train(checkpoint, *args, **kwargs)

    def _check_drop_last(self) -> None:
        args, rows = self.args, self.train_dataset
        batch = args.per_device_train_batch_size * args.world_size
        if args.dataloader_drop_last and isinstance(rows, Dataset | Packed) and len(rows) < batch:
            raise ValueError(
                f"--dataloader_drop_last leaves nothing to train on: {len(rows)} rows, and {batch} in a batch of all "
                "processes; use a smaller --per_device_train_batch_size"
            )

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
            rows = Dataset.from_dict({self.args.length_column_name: num_tokens(rows)})
        return super()._get_train_sampler(rows)

    # The loss, and the metrics that come with it

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor:
        # Written on the device: a copy to it would wait for all that is under way there.
        count = torch.full((), sum(self.count(batch) for batch in batch_samples), device=device)
        if self.balancer is not None:
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
        count = num_items_in_batch if num_items_in_batch is not None else measures.counts.sum()
        # Gradients are averaged over ranks, so each adds its share of the sum times their number.
        total = measures.total if measures.total is not None else measures.loss.sum()
        loss = total / torch.clamp(count, min=1) + self._balancing_loss(measures, inputs)
        loss = loss * self.accelerator.num_processes
        tokens = inputs.num_tokens()
        self.add_metrics({**measures.metrics, "num_tokens": (tokens, torch.zeros_like(tokens))})
        return (loss, measures) if return_outputs else loss

    def add_metrics(self, metrics: dict[str, tuple[Tensor, Tensor]]) -> None:
        for name, (total, count) in metrics.items():
            kind = sum_dtype(total.device)
            both = torch.stack([total.detach().sum().to(kind), count.sum().to(kind)])
            self._sums[name] = self._sums[name] + both if name in self._sums else both

    def reduce_metrics(self, sums: dict[str, tuple[float, float]]) -> dict[str, float]:
        """What is reported, from the sum and the count of each metric."""
        means = {name: total / count if count else math.nan for name, (total, count) in sums.items()}
        return {n: math.exp(min(mean, 700.0)) if n in self.exp_metrics else mean for n, mean in means.items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # The last line, with `train_loss`, has the steps since the line before it.
        if ("loss" in logs or "train_loss" in logs) and self._sums:
            # A reward function may log what another process's does not.
            names = sorted({name for own in gather_object([list(self._sums)]) for name in own})
            none = torch.zeros_like(next(iter(self._sums.values())))
            sums = self.accelerator.reduce(torch.stack([self._sums.get(name, none) for name in names])).tolist()
            self._sums = {}
            own = dict(zip(names, sums, strict=True))
            # Kept in the trainer's state, so that a resumed run goes on counting.
            self.state.num_input_tokens_seen += int(own.pop("num_tokens")[0])
            logs |= self.reduce_metrics(own)
            logs["num_tokens"] = self.state.num_input_tokens_seen
        super().log(logs, start_time)

    def share_layout(self, model: nn.Module) -> None:
        """Make another model ready for the batches of the policy; if it cannot take segments, nobody gets them."""
        if isinstance(self.data_collator, Collator) and self.data_collator.layout == "segments":
            self.data_collator = replace(self.data_collator, layout=choose_layout(model, self.args.layout))

    def freeze(self, model: nn.Module) -> Policy:
        """A policy to compare with, on this device."""
        if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise ValueError("ZeRO-3 cannot hold a frozen copy as the reference yet: use LoRA (--use_peft), or FSDP2")
        if self.is_fsdp_enabled:
            logger.warning("the frozen reference is not sharded: each rank holds a whole copy; LoRA needs none")
        disable_dropout(model)
        return Policy(model.requires_grad_(False).eval().to(self.args.device))

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        """Nothing: columns that nobody reads were left out when rows were tokenised."""
        return dataset

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Nothing: :meth:`log` counts them anyway, without padding."""

    def predictions(self, model: Any, batch: Batch) -> tuple[Any, Tensor]:
        """What ``compute_metrics`` gets of a batch: predictions and labels."""
        return logits_and_labels(model, batch)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # transformers' estimate reads a dict of inputs


def uses_more(rows: Any, tokenizer: Any, vocabulary: int) -> bool:
    """Whether training rows, their ends or their padding hold a token beyond ``vocabulary``; a stream may."""
    if rows is None:
        return False
    ends = [index for index in (tokenizer.pad_token_id, tokenizer.eos_token_id) if index is not None]
    return not isinstance(rows, Dataset) or max([largest_token(rows), *ends]) >= vocabulary


def sum_dtype(device: torch.device) -> torch.dtype:
    """Of sums: float64, as a mean square less a squared mean, and counts of millions, leave float32 nothing."""
    return torch.float32 if device.type == "mps" else torch.float64


def warn_of_lost_updates(model: nn.Module, args: BaseConfig) -> None:
    half = {p.dtype for p in model.parameters() if p.requires_grad} & {torch.bfloat16, torch.float16}
    if half and args.learning_rate < 1e-4:
        logger.warning(
            "training %s weights in place: an update below 1/256 of a weight is rounded away, and at learning rate %g "
            "most are; load in float32 (--dtype float32) and add --bf16 on a GPU",
            str(half.pop()).removeprefix("torch."), args.learning_rate,
        )  # fmt: skip


def set_tokens(tokenizer: PreTrainedTokenizerBase, args: BaseConfig) -> None:
    """The special tokens that were asked for.

    Raises:
        ValueError: a token that the tokenizer does not have.
    """
    if args.add_tokens:
        tokenizer.add_tokens(list(args.add_tokens), special_tokens=True)
    for name in ("eos_token", "pad_token"):
        token = getattr(args, name)
        if token is None:
            continue
        if token not in tokenizer.get_vocab():
            raise ValueError(f"{name} {token!r} is not in the tokenizer's vocabulary: pass --add_tokens {token!r} too")
        setattr(tokenizer, name, token)


def check_positions(model: nn.Module, *sets: Any) -> None:
    """Compare tokenised rows with what the model can read.

    Raises:
        ValueError: rows are longer than the model has positions.
    """
    limit, trained = max_positions(model), trained_length(model)
    parts = [part for rows in sets for part in (rows.values() if isinstance(rows, dict) else [rows])]
    for rows in (part for part in parts if isinstance(part, Dataset) and is_tokenised(part)):
        lengths = longest_sequences(rows)
        longest = int(lengths.max())
        if limit is not None and longest > limit:
            raise ValueError(
                f"{int((lengths > limit).sum())} of {len(rows)} rows have more tokens than the model has positions "
                f"({longest} in row {int(lengths.argmax()) + 1}, {limit} positions): pass --max_length {limit} or less"
            )
        if trained is not None and longest > trained:
            logger.warning(
                "%d of %d rows are longer than the %d tokens that the model was made for (up to %d)",
                int((lengths > trained).sum()), len(rows), trained, longest,
            )  # fmt: skip
