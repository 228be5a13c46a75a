"""Everything that touches the inside of ``transformers.Trainer``; a trainer itself says only what its loss is.

Sums are divided by what counts (scored tokens, pairs) in the *whole* optimizer step, over micro-batches and ranks.
Metrics are sums and counts on the device, reduced once at each logging step. Evaluation adds up sums and counts
over the data set, so nothing depends on the batch size.
"""

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, set_seed

from rlhf.data import Batch, Collator, Packed
from rlhf.models import Policy, add_adapter, choose_layout, disable_dropout, load_model, load_tokenizer
from rlhf.models.policy import Wrapper
from rlhf.trainers.profiling import Profiler

logger = logging.getLogger(__name__)

OWN_STATE = "trainer_state_{}.pt"  # of each process


@dataclass
class BaseConfig(TrainingArguments):
    """What all trainers share, on top of ``transformers.TrainingArguments``."""

    max_length: int = field(
        default=1024, metadata={"help": "Longest sequence in tokens. What is longer loses its end, never its prompt."}
    )
    drop_long_prompts: bool = field(
        default=False, metadata={"help": "Leave out rows whose prompt alone reaches max_length, instead of stopping."}
    )
    chat_template_path: str | None = field(
        default=None, metadata={"help": "A .jinja file, or a model folder, to take the chat template from."}
    )
    layout: str = field(
        default="auto",
        metadata={
            "help": "segments: no padding, a shared prompt once; rows: padded, any model; auto: what fits.",
            "choices": ["auto", "segments", "rows"],
        },
    )
    tokens_per_batch: int | None = field(
        default=None,
        metadata={"help": "Plan batches by tokens: as many rows as fit, instead of per_device_train_batch_size rows."},
    )
    disable_dropout: bool = field(default=False, metadata={"help": "Train without dropout."})
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenise."})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Passed to from_pretrained where the model is given by name."}
    )
    profile: int = field(
        default=0, metadata={"help": "Time this many steps after the first two, print where their time went."}
    )
    verbose: bool = field(default=False, metadata={"help": "Say what the first batch holds and takes."})
    max_seq_length: int | None = field(default=None, metadata={"help": "Old name of max_length."})
    # Defaults that differ from transformers'.
    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of the log."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave this off: the collator reads."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide a loss that is NaN; a sync a step."})

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]  # noqa: RUF012  # not a field

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_seq_length is not None:
            logger.warning("max_seq_length is now called max_length; using max_length=%d", self.max_seq_length)
            self.max_length, self.max_seq_length = self.max_seq_length, None
        if self.ddp_find_unused_parameters is None:  # all are used; looking for others costs a walk of the graph a step
            self.ddp_find_unused_parameters = False
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        accelerator: Any = self.accelerator_config
        accelerator.non_blocking |= self.dataloader_pin_memory  # a copy that waits, waits for all that is under way
        if self.layout not in ("auto", "segments", "rows"):
            raise ValueError(f"layout must be auto, segments or rows, got {self.layout!r}")
        if self.tokens_per_batch is not None:
            if self.tokens_per_batch < 1:
                raise ValueError(f"tokens_per_batch must be at least 1, got {self.tokens_per_batch}")
            self.per_device_train_batch_size = 1  # of planned batches
        if self.profile < 0:
            raise ValueError(f"profile must be a number of steps, got {self.profile}")
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2 tokens, got {self.max_length}")

    def model_kwargs(self) -> dict[str, Any]:
        return self.model_init_kwargs if isinstance(self.model_init_kwargs, dict) else {}


class Measures(NamedTuple):
    """What one batch adds up to, for each item ([S]: a sequence, or a pair)."""

    loss: Tensor  # [S], summed over what counts; carries the gradient, unless `total` does
    counts: Tensor  # [S], what the loss is divided by
    metrics: dict[str, tuple[Tensor, Tensor]]  # name to ([S] sums, [S] counts)
    total: Tensor | None = None  # scalar sum of `loss`, with the gradient


class BaseTrainer(Trainer):
    """A ``transformers.Trainer`` around a :class:`Policy`, or another :class:`Wrapper`.

    A subclass defines :meth:`tokenize`, :meth:`count` and :meth:`measure`.
    """

    config_class: ClassVar[type[BaseConfig]] = BaseConfig
    wrapper: Callable[[Any], Wrapper] = Policy
    beside: ClassVar[str] = "value_head.safetensors"  # what the wrapper learns besides the model
    exponentials: ClassVar[frozenset[str]] = frozenset()  # metrics reported as exp(sum / count)
    args: Any  # of config_class
    model: Any  # the wrapper, or what accelerate made of it
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
    ) -> None:
        args = args if args is not None else self.config_class(output_dir="runs")
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process: start with `accelerate launch`, "
                "or show it one (CUDA_VISIBLE_DEVICES=0)"
            )
        if tokenizer is not None:
            logger.warning("tokenizer= is now called processing_class=")
            processing_class = tokenizer
        if isinstance(model, str):
            model = load_model(model, **args.model_kwargs())
        if processing_class is None:
            processing_class = load_tokenizer(model.config._name_or_path, args.chat_template_path)
        vocab_size = model.get_input_embeddings().num_embeddings
        with args.main_process_first(desc="tokenising"):
            train_dataset = self._prepare(train_dataset, processing_class, args, vocab_size)
            if isinstance(eval_dataset, dict):
                eval_dataset = {
                    k: self._prepare(v, processing_class, args, vocab_size) for k, v in eval_dataset.items()
                }
            else:
                eval_dataset = self._prepare(eval_dataset, processing_class, args, vocab_size)
        if peft_config is not None:
            set_seed(args.seed)  # transformers does so after this, and LoRA's A is drawn here
            model = add_adapter(model, peft_config)
        if args.disable_dropout:
            disable_dropout(model)
        if train_dataset is not None:
            warn_of_lost_updates(model, args)
        pad = next((i for i in (processing_class.pad_token_id, processing_class.eos_token_id) if i is not None), 0)
        use_cache = model.config.use_cache
        if train_dataset is not None and (capacity := self.capacity(args)) is not None:
            train_dataset = Packed(train_dataset, capacity)
        super().__init__(
            model=self.wrapper(model),
            args=args,
            data_collator=data_collator or Collator(pad),  # type: ignore[arg-type]  # to a Batch, not a dict
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        model.config.use_cache = use_cache  # Trainer turns it off, into the saved config
        if data_collator is None and choose_layout(model, _layout(args)) == "segments":  # where the model now is
            self.data_collator = Collator(pad, layout="segments")  # type: ignore[assignment]
        self._sums: dict[str, Tensor] = {}
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

    def _prepare(self, dataset: Any, tokenizer: PreTrainedTokenizerBase, args: Any, vocab_size: int) -> Any:
        if dataset is None:
            return None
        if not isinstance(dataset, Dataset):
            raise ValueError(f"expected a datasets.Dataset, got {type(dataset).__name__}: load it without streaming")
        return self.tokenize(dataset, tokenizer, args, vocab_size)

    # The loss, and the metrics that come with it

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor:
        # Written on the device: a copy to it would wait for all that is under way there.
        count = torch.full((), sum(self.count(batch) for batch in batch_samples), device=device)
        return self.accelerator.reduce(count)

    def _prepare_inputs(self, inputs: Batch) -> Batch:  # type: ignore[override]
        return inputs.to(self.args.device)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        measures = self.measure(model, inputs)
        count = num_items_in_batch if num_items_in_batch is not None else measures.counts.sum()
        # Gradients are averaged over ranks, so each adds its share of the sum times their number.
        total = measures.total if measures.total is not None else measures.loss.sum()
        loss = total * (self.accelerator.num_processes / torch.clamp(count, min=1))
        tokens = inputs.num_tokens()
        self._add({**measures.metrics, "num_tokens": (tokens, torch.zeros_like(tokens))})
        return (loss, measures) if return_outputs else loss

    def _add(self, metrics: dict[str, tuple[Tensor, Tensor]]) -> None:
        for name, (total, count) in metrics.items():
            kind = wide(total.device)
            both = torch.stack([total.detach().sum().to(kind), count.sum().to(kind)])
            self._sums[name] = self._sums[name] + both if name in self._sums else both

    def values(self, sums: dict[str, tuple[float, float]]) -> dict[str, float]:
        """What is reported, from the sum and the count of each metric."""
        means = {name: total / count if count else math.nan for name, (total, count) in sums.items()}
        return {n: math.exp(min(mean, 700.0)) if n in self.exponentials else mean for n, mean in means.items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._sums:
            # A reward function may log what another process's does not.
            names = sorted({name for own in gather_object([list(self._sums)]) for name in own})
            none = torch.zeros_like(next(iter(self._sums.values())))
            sums = self.accelerator.reduce(torch.stack([self._sums.get(name, none) for name in names])).tolist()
            self._sums = {}
            own = dict(zip(names, sums, strict=True))
            # Kept in the trainer's state, so that a resumed run goes on counting.
            self.state.num_input_tokens_seen += int(own.pop("num_tokens")[0])
            logs |= self.values(own)
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

    # Evaluation

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Sums and counts over the data set, each row once however it is spread over ranks."""
        model = self.model
        if not self.accelerator._models and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            model = self.model = self.model_wrapped = self.accelerator.prepare(model)
        model.eval()
        names: list[str] = []
        sums, rows = torch.zeros(0, dtype=torch.float64), 0
        for batch in dataloader:
            with torch.no_grad(), self.accelerator.autocast():
                measures = self.measure(model, batch)
            columns = {"loss": (measures.loss, measures.counts), **measures.metrics}
            names = list(columns)
            table = torch.stack([column.float() for pair in columns.values() for column in pair], dim=1)
            # Ranks are evened out by repeating rows; this drops the repeated ones.
            table = self.accelerator.gather_for_metrics(table)
            added = table.double().sum(0).cpu()
            sums = sums + added if len(sums) else added
            rows += len(table)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        pairs = sums.view(-1, 2).tolist()
        values = self.values(dict(zip(names, pairs, strict=True)))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=rows)  # type: ignore[arg-type]

    # Saving and loading as an ordinary checkpoint: the model inside the policy, never the wrapper

    @contextmanager
    def _inner_model(self) -> Iterator[nn.Module]:
        outer = self.model
        self.model = self.accelerator.unwrap_model(outer).model
        try:
            yield self.model
        finally:
            self.model = outer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        whole = self.accelerator.unwrap_model(self.model).state_dict() if state_dict is None else state_dict
        beside = {key: value.contiguous() for key, value in whole.items() if not key.startswith("model.")}
        if state_dict is not None:
            state_dict = {k.removeprefix("model."): v for k, v in state_dict.items() if k.startswith("model.")}
        with self._inner_model():
            super()._save(output_dir, state_dict)
        if beside:
            save_file(beside, Path(output_dir or str(self.args.output_dir)) / self.beside)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_beside(Path(resume_from_checkpoint))
        with self._inner_model() as inner:
            super()._load_from_checkpoint(resume_from_checkpoint, inner)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_best_model()
        self._load_beside(Path(str(self.state.best_model_checkpoint)))
        with self._inner_model():
            super()._load_best_model()

    def _load_beside(self, folder: Path) -> bool:
        """What the wrapper learned besides the model, from a folder that has it."""
        file = folder / self.beside
        if file.exists():
            self.accelerator.unwrap_model(self.model).load_state_dict(load_file(file), strict=False)
        return file.exists()

    # State of a trainer's own, kept with the optimizer's in each checkpoint

    def own_state(self) -> dict[str, Any] | None:
        """What a resumed run must know besides weights, optimizer and the number of steps; of this process."""
        return None

    def load_own_state(self, state: dict[str, Any]) -> None: ...

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if (state := self.own_state()) is not None:
            torch.save(state, Path(output_dir) / OWN_STATE.format(self.args.process_index))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.own_state() is None:
            return
        file = Path(checkpoint) / OWN_STATE.format(self.args.process_index)
        if not file.exists():
            raise FileNotFoundError(
                f"{checkpoint}: no {file.name}; it was saved by fewer processes, or by another trainer: resume with as "
                "many processes as before"
            )
        self.load_own_state(torch.load(file, weights_only=False))

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # transformers' estimate reads a dict of inputs


def wide(device: torch.device) -> torch.dtype:
    """Of sums: float64, as a mean square less a squared mean, and counts of millions, leave float32 nothing."""
    return torch.float32 if device.type == "mps" else torch.float64


def _layout(args: BaseConfig) -> str:
    if args.torch_compile and args.layout == "segments":
        logger.warning("--torch_compile with --layout segments compiles nearly every batch anew; use --layout rows")
    return "rows" if args.torch_compile and args.layout == "auto" else args.layout


def warn_of_lost_updates(model: nn.Module, args: BaseConfig) -> None:
    half = {p.dtype for p in model.parameters() if p.requires_grad} & {torch.bfloat16, torch.float16}
    if half and args.learning_rate < 1e-4:
        logger.warning(
            "training %s weights in place: an update below 1/256 of a weight is rounded away, and at learning rate %g "
            "most are; load in float32 (--dtype float32) and add --bf16 on a GPU",
            str(half.pop()).removeprefix("torch."), args.learning_rate,
        )  # fmt: skip
