"""The options that all trainers share, on top of ``transformers.TrainingArguments``."""

import json
import logging
import os
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments

from rlhf.data import Reading, RowFormat
from rlhf.trainers.options import check_options, check_packages, greater_is_better
from rlhf.trainers.parallelism import check_context_parallel, parallel_sizes
from rlhf.trainers.processes import check_processes, load_models_whole, trains_on_cpus
from rlhf.trainers.ranges import check_finite, check_ranges
from rlhf.trainers.secret_options import SecretOptions
from rlhf.trainers.trackers import name_run

logger = logging.getLogger(__name__)

BAD_ROWS = "bad_rows.jsonl"  # in output_dir, with drop_bad_rows
# Text in these is always JSON. transformers' own dictionaries may also name a file.
_NEVER_A_FILE = (
    "model_init_kwargs",
    "chat_template_kwargs",
    "loss_kwargs",
    "teacher_model_init_kwargs",
    "parallelism_config",
)


@dataclass
class BaseConfig(SecretOptions, TrainingArguments):
    """The options that all trainers share; names and defaults are TRL's where TRL has the same thing."""

    max_length: int | None = field(
        default=1024,
        metadata={"help": "Longest sequence in tokens. Longer ones are cut at the end; prompts are never cut."},
    )
    drop_long_prompts: bool = field(
        default=False, metadata={"help": "Drop rows whose prompt fills max_length, instead of stopping."}
    )
    chat_template_path: str | None = field(
        default=None, metadata={"help": "Chat template: a .jinja file, or a model folder."}
    )
    # How rows are read
    columns: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Rename columns: question=prompt,answer=completion."}
    )
    roles: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Rename roles: customer=user,agent=assistant."}
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Further arguments of the chat template, such as {"enable_thinking": false}.'}
    )
    drop_bad_rows: bool = field(
        default=False,
        metadata={
            "help": "Drop rows that cannot be read, instead of stopping; they are listed in output_dir/bad_rows.jsonl."
        },
    )
    eos_token: str | None = field(
        default=None, metadata={"help": "Token that ends an answer; default: the tokenizer's."}
    )
    pad_token: str | None = field(default=None, metadata={"help": "Padding token; default: the tokenizer's."})
    add_tokens: list[str] | None = field(
        default=None, metadata={"help": "New special tokens; the embeddings are resized."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code from the hub."})
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the load-balancing loss of a mixture's routers; 0 for none. By default the model's own, "
            "where its config has output_router_logits on."
        },
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
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Number of processes that tokenise."})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of from_pretrained if the model is given by name."}
    )
    allow_changes: bool = field(
        default=False,
        metadata={"help": "Resume although options or rows have changed that affect the results."},
    )
    on_nonfinite: str = field(
        default="stop",
        metadata={
            "help": "Where a loss or a gradient is not finite: stop, before it changes the weights; or skip the step.",
            "choices": ["stop", "skip"],
        },
    )
    max_nonfinite_steps: int = field(
        default=10, metadata={"help": "Steps that --on_nonfinite skip may leave out; the next one stops the run."}
    )
    profile: int = field(
        default=0, metadata={"help": "Profile this many steps after the first two, and print where the time went."}
    )
    log_all: bool = field(
        default=False, metadata={"help": "Show all metrics at each line of the log, not only those that matter most."}
    )
    num_sample_answers: int = field(
        default=2,
        metadata={"help": "Prompts of the evaluation rows to answer at each evaluation of the run; 0 for none."},
    )
    optimize_model: bool = field(
        default=True,
        metadata={"help": "Use faster norms, MLPs and linear layers with the same results (rlhf.kernels)."},
    )
    # TRL's, for what is always so here
    padding_free: bool = field(
        default=False, metadata={"help": "A name of TRL; batches without padding are the default."}
    )
    truncation_mode: str = field(
        default="keep_start", metadata={"help": "A name of TRL; rows are always cut at the end."}
    )
    pad_to_multiple_of: int | str | None = field(
        default=None, metadata={"help": "A name of TRL; has no effect on results here."}
    )
    max_seq_length: int | None = field(default=None, metadata={"help": "Old name of max_length."})
    # Defaults that differ from transformers'.
    report_to: list[str] = field(  # a name by itself is taken too
        default_factory=lambda: ["none"], metadata={"help": "Trackers, such as wandb and tensorboard; or all, or none."}
    )
    bf16: bool | None = field(  # type: ignore[assignment]  # never None after __post_init__
        default=None,
        metadata={"help": "Mixed precision in bfloat16; default: on if the GPU supports it. Weights stay float32."},
    )
    parallelism_config: dict[str, int] | str | None = field(
        default=None,
        metadata={
            "help": "Sizes of groups of processes under FSDP2: dp_replicate_size, dp_shard_size, and cp_size, which "
            'divides long rows; as {"cp_size": 2}.'
        },
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of the log."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay false: the collator needs all columns."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide NaN losses in the log; waits for the device at each step."}
    )

    _VALID_DICT_FIELDS = [  # noqa: RUF012  # not a field
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "chat_template_kwargs",
        "parallelism_config",
    ]

    divides_rows: ClassVar[bool] = False  # whether the loss needs nothing but scores of targets (context parallelism)
    best_metric: ClassVar[str] = "loss"  # of evaluation, where nobody names another

    def __post_init__(self) -> None:
        self.given_options = changed_options(self)  # before any is filled in
        # Before transformers' own checks, whose errors do not name the option.
        self._check_dictionaries()
        self._check_choices()
        check_ranges(self)
        self._set_defaults()
        check_packages(self)
        self.use_cpu = self.use_cpu or trains_on_cpus(self)
        super().__post_init__()
        name_run(self)
        check_processes(self)
        load_models_whole()
        # After transformers' own checks, which make an object of accelerator_config.
        check_options(self)
        self.parallelism_config = parallel_sizes(self.parallelism_config, self.world_size)
        check_context_parallel(self)
        self.columns = renames(self.columns, "columns")
        self.roles = renames(self.roles, "roles")
        if self.max_seq_length is not None:
            logger.warning("max_seq_length is now called max_length; using max_length=%d", self.max_seq_length)
            self.max_length, self.max_seq_length = self.max_seq_length, None
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # all are used; looking for others walks the graph at each step
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        accelerator: Any = self.accelerator_config
        # A blocking copy would wait for all work that is queued on the device.
        accelerator.non_blocking |= self.dataloader_pin_memory
        self._check_batches()
        if self.truncation_mode != "keep_start":
            raise ValueError(f"truncation_mode {self.truncation_mode!r}: rows are cut at their end (keep_start)")

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, which expects an object of accelerate where these options have sizes."""
        sizes, self.parallelism_config = self.parallelism_config, None
        try:
            return super().to_dict() | {"parallelism_config": sizes}
        finally:
            self.parallelism_config = sizes

    def _check_batches(self) -> None:
        plans_rows = self.tokens_per_batch is not None or getattr(self, "packing", False)
        by_length = self.train_sampling_strategy in ("group_by_length", "batch_rebalance")
        if by_length and plans_rows:
            raise ValueError(
                f"train_sampling_strategy {self.train_sampling_strategy}: packing and tokens_per_batch plan rows by "
                "their length already; leave one out"
            )
        if self.tokens_per_batch is not None:
            self.per_device_train_batch_size = 1  # one planned batch

    def _set_defaults(self) -> None:
        """Defaults that differ from transformers', which decides in its own ``__post_init__``."""
        tracker_lists = [self.report_to] if isinstance(self.report_to, str) else self.report_to or ["none"]
        trackers = [name.strip() for names in tracker_lists for name in names.split(",")]
        self.report_to = [name for name in trackers if name]
        if self.bf16 is None:
            # `accelerate launch --mixed_precision` decides where it is used.
            set_by_launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no"
            has_bf16 = not self.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
            self.bf16 = has_bf16 and not self.fp16 and not set_by_launcher
        if self.load_best_model_at_end or self.save_strategy == "best":
            self.metric_for_best_model = self.metric_for_best_model or self.best_metric
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            self.greater_is_better = greater_is_better(self.metric_for_best_model)

    def _check_dictionaries(self) -> None:
        """Refuse what is no JSON among options that are dictionaries; the command line passes text."""
        for name in self._VALID_DICT_FIELDS:
            value = getattr(self, name)
            check_finite(name, value)
            is_text = isinstance(value, str)
            # transformers' own dictionaries may also be the name of a file, such as fsdp_config.
            if not is_text or not (value.startswith("{") or name in _NEVER_A_FILE):
                continue
            try:
                parsed = json.loads(value)
            except json.JSONDecodeError as error:
                raise ValueError(f"--{name} {value}: not valid JSON ({error.msg} at {error.pos + 1})") from error
            except RecursionError:
                raise ValueError(f"--{name} {value[:100]}: its brackets are too deep inside each other") from None
            if not isinstance(parsed, dict):
                raise ValueError(f'--{name} {value}: expected a JSON object, such as {{"name": 1}}')
            check_finite(name, parsed)

    def _check_choices(self) -> None:
        """Options that have a list of values, as the command line checks them."""
        for option in fields(self):
            choices = option.metadata.get("choices")
            value = getattr(self, option.name)
            if choices and value is not None and value not in choices:
                raise ValueError(f"{option.name} must be one of {', '.join(choices)}, got {value!r}")

    def check_columns(self, columns: list[str]) -> None:
        """Raise where rows with these columns hold nothing to train on; before a model is loaded."""

    def limit(self) -> int:
        """``max_length``, for a trainer that samples.

        Returns:
            A number of tokens.
        Raises:
            ValueError: it is None.
        """
        if self.max_length is None:
            raise ValueError("max_length is None: sampling needs a longest sequence, pass a number")
        return self.max_length

    def tokenize_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of the functions in ``rlhf.data`` that tokenise, but for the size of the vocabulary."""
        return {
            "max_length": self.max_length,
            "drop_long_prompts": self.drop_long_prompts,
            "num_proc": self.dataset_num_proc,
            "reading": self.reading(),
        }

    def model_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of ``from_pretrained``; weights are trained in float32 unless another dtype is given."""
        init_kwargs = self.model_init_kwargs if isinstance(self.model_init_kwargs, dict) else {}
        hub_options = {"trust_remote_code": True} if self.trust_remote_code else {}
        return {"dtype": "float32", **hub_options, **init_kwargs}

    def reading(self) -> Reading:
        """How rows are read: names of columns and roles, arguments of the chat template, what happens to bad rows."""
        template_kwargs = self.chat_template_kwargs
        row_format = RowFormat(
            columns=self.columns,  # type: ignore[arg-type]  # renames() made a dict of it
            roles=self.roles,  # type: ignore[arg-type]
            template_kwargs=template_kwargs if isinstance(template_kwargs, dict) else {},
        )
        bad_rows = str(Path(str(self.output_dir)) / BAD_ROWS) if self.drop_bad_rows else None
        return Reading(row_format, split_turns=getattr(self, "split_turns", False), bad_rows=bad_rows)


def changed_options(config: Any) -> dict[str, Any]:
    """The options of a data class that are not its defaults.

    Args:
        config: an instance.
    Returns:
        Values by name.
    """
    changed = {}
    for option in fields(config):
        default = option.default_factory() if option.default_factory is not MISSING else option.default
        value = getattr(config, option.name)
        if option.init and value != default:
            changed[option.name] = _as_text(value)
    return changed


def _as_text(value: Any) -> Any:
    """A function, or those in a list, by name: a configuration is saved, and a function of a notebook cannot be."""
    if isinstance(value, list | tuple):
        return [_as_text(item) for item in value]
    if callable(value):
        return f"{value.__module__}:{getattr(value, '__qualname__', type(value).__name__)}"
    return value


def renames(given: Any, option: str) -> dict[str, str]:
    """Read other names of columns or roles.

    Args:
        given: ``theirs=ours,…``; a list of such texts; a dictionary; or None.
        option: its name, for messages.
    Returns:
        From their names to ours.
    Raises:
        ValueError: a part without one ``=``.
    """
    if given is None:
        return {}
    if isinstance(given, dict):
        return {str(their_name): str(our_name) for their_name, our_name in given.items()}
    names: dict[str, str] = {}
    for text in [given] if isinstance(given, str) else given:
        for pair in text.split(","):
            if not pair.strip():
                continue
            if pair.count("=") != 1:
                raise ValueError(f"--{option} takes pairs such as theirs=ours, got {pair!r}")
            their_name, our_name = pair.split("=")
            names[their_name.strip()] = our_name.strip()
    return names
