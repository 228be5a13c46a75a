"""Groups of options: the model, the data, and what a trainer needs besides its configuration."""

import re
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from transformers import TrainingArguments

from rlhf.losses.registry import load_object
from rlhf.models import load_model
from rlhf.rollouts.arguments import option
from rlhf.trainers.ranges import check_ranges

DTYPES = ["auto", "float32", "bfloat16", "float16", "float64"]


@dataclass
class ModelArguments:
    """The model, its bits and, with ``use_peft``, the adapter; names are TRL's."""

    # The heading of the group in the help. A class variable, so that it is no option itself.
    title: ClassVar[str] = "model and adapter"

    model_name_or_path: str | None = option(None, "A folder, or a name on the hub.")
    model_revision: str = option("main", "Branch, tag or commit on the hub.")
    # Trained in float32: most updates of AdamW are smaller than a bfloat16 weight resolves.
    dtype: str = option("float32", "dtype of the weights; auto keeps the checkpoint's.", choices=DTYPES)
    attn_implementation: str | None = option(None, "sdpa, eager, flash_attention_2, …")
    use_peft: bool = option(False, "Train a LoRA adapter instead of the weights.")
    lora_r: int = option(16, "Rank of the adapter.")
    lora_alpha: int = option(32, "Scale of the adapter: lora_alpha / rank.")
    lora_dropout: float = option(0.05, "Dropout on the input of the adapter.")
    lora_target_modules: list[str] | None = option(
        None, "Layers with an adapter, by name or as one pattern; default: all-linear."
    )
    lora_target_parameters: list[str] | None = option(
        None, "Parameters with an adapter that are not layers, such as stacked experts."
    )
    lora_modules_to_save: list[str] | None = option(None, "Layers that are trained in full and saved with the adapter.")
    lora_task_type: str = option("CAUSAL_LM", "Task in the adapter's config; SEQ_CLS for rewards.")
    use_rslora: bool = option(False, "Scale by lora_alpha / sqrt(lora_r).")
    use_dora: bool = option(False, "Also train the magnitudes of the weights (DoRA).")
    load_in_8bit: bool = option(False, "Store the frozen weights in 8 bits; needs use_peft.")
    load_in_4bit: bool = option(False, "Store the frozen weights in 4 bits (QLoRA); needs use_peft.")
    bnb_4bit_quant_type: str = option("nf4", "Number format of the 4 bits.", choices=["fp4", "nf4"])
    use_bnb_nested_quant: bool = option(False, "Quantise the scales of the 4 bits too.")
    bnb_4bit_quant_storage: str | None = option(None, "dtype of the tensor that stores the 4-bit values.")

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("--load_in_8bit and --load_in_4bit exclude each other: pass one")
        # On the command line names are separate words; people also join them with commas, as other tools want it.
        for name in ("lora_target_modules", "lora_target_parameters", "lora_modules_to_save"):
            setattr(self, name, split_names(getattr(self, name)))
        if not self.use_peft:
            self._refuse_adapter_options()

    def _refuse_adapter_options(self) -> None:
        """An option of an adapter that is not trained would be ignored without a word."""
        for argument in fields(ModelArguments):
            about_adapter = argument.name.startswith("lora_") or argument.name in ("use_rslora", "use_dora")
            if about_adapter and getattr(self, argument.name) != argument.default:
                raise ValueError(f"--{argument.name} is of an adapter: add --use_peft to train one, or leave it out")

    def load_kwargs(self, trust_remote_code: bool = False) -> dict[str, Any]:
        """Keyword arguments of ``from_pretrained`` for the model to train.

        Args:
            trust_remote_code: whether model code from the hub may run.

        Returns:
            Keyword arguments of ``from_pretrained``.
        """
        return dict(
            revision=self.model_revision,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            trust_remote_code=trust_remote_code,
            **self.quantization(),
        )

    def other_kwargs(self, trust_remote_code: bool = False) -> dict[str, Any]:
        """The same for another model, which has branches and tags of its own.

        Args:
            trust_remote_code: whether model code from the hub may run.

        Returns:
            Keyword arguments of ``from_pretrained``.
        """
        # A branch or tag means nothing in another repository.
        return {key: value for key, value in self.load_kwargs(trust_remote_code).items() if key != "revision"}

    def quantization(self) -> dict[str, Any]:
        """``quantization_config`` of bitsandbytes, where fewer bits are asked for."""
        if not (self.load_in_4bit or self.load_in_8bit):
            return {}
        # A dictionary, as the class of transformers needs bitsandbytes to be installed.
        config: dict[str, Any] = {"quant_method": "bitsandbytes", "load_in_8bit": self.load_in_8bit}
        if self.load_in_4bit:
            # float32 products would undo what 4 bits save on a GPU.
            default_dtype = "bfloat16" if torch.cuda.is_available() else "float32"
            config |= {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": self.bnb_4bit_quant_type,
                "bnb_4bit_compute_dtype": default_dtype if self.dtype in ("auto", "float32") else self.dtype,
                "bnb_4bit_use_double_quant": self.use_bnb_nested_quant,
            }
            if self.bnb_4bit_quant_storage is not None:
                config["bnb_4bit_quant_storage"] = self.bnb_4bit_quant_storage
        return {"quantization_config": config}

    def peft_config(self) -> LoraConfig | None:
        """The adapter to train; None without ``use_peft``.

        Returns:
            The configuration; None without ``--use_peft``.

        Raises:
            ValueError: fewer bits and no adapter: such weights cannot be trained.
        """
        if not self.use_peft:
            # No optimizer can move weights of so few bits.
            if self.load_in_4bit or self.load_in_8bit:
                bits = 4 if self.load_in_4bit else 8
                raise ValueError(f"--load_in_{bits}bit: weights of {bits} bits are not trained, add --use_peft")
            return None
        return LoraConfig(
            task_type=self.lora_task_type,
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=name_or_pattern(self.lora_target_modules),
            target_parameters=self.lora_target_parameters,
            modules_to_save=self.lora_modules_to_save,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            # Whoever loads the adapter needs the same revision; what is saved beside an adapter has none.
            revision=None if self.model_revision == "main" else self.model_revision,
        )


def split_names(given: list[str] | str | None) -> list[str] | None:
    """Names as a list, whether they were separate words, one word with commas, or one value in a file.

    Args:
        given: as it was on the command line or in a file.

    Returns:
        A list of names; None if nothing is given.
    """
    if given is None:
        return None
    parts = [given] if isinstance(given, str) else given
    names = [name.strip() for part in parts for name in part.split(",")]
    # A comma at the end leaves an empty name.
    return [name for name in names if name]


def name_or_pattern(names: list[str] | None) -> list[str] | str | None:
    """Names of layers as PEFT takes them: a pattern, or its word for all linear layers, must not be in a list.

    Args:
        names: as :func:`split_names` returns them.

    Returns:
        Names, or a pattern; None if nothing is given.
    """
    if names is None or len(names) != 1:
        return names
    (name,) = names
    is_pattern = name == "all-linear" or re.search(r"[*+?()\[\]|^$\\]", name)
    return name if is_pattern else names


@dataclass
class LoadArguments(ModelArguments):
    """The same for commands that do not train: in the dtype of the checkpoint."""

    # Nothing is updated here, so no bits are lost in half precision.
    dtype: str = option("auto", "dtype of the weights; auto keeps the checkpoint's.", choices=DTYPES)
    trust_remote_code: bool = option(False, "Run model code from the hub.")


@dataclass
class DataArguments:
    """The rows, and what to do with a folder that is not empty."""

    title: ClassVar[str] = "data and output"

    dataset_name: list[str] | None = option(
        None,
        "File (JSON, JSONL, Parquet, CSV, TSV, text; .gz and others too), pattern, folder, or hub name; "
        "several are mixed, with shares after a colon: a.jsonl:0.7 b.parquet:0.3.",
    )
    mixture: str = option("rows", "Unit of the shares: rows, or tokens.", choices=["rows", "tokens"])
    streaming: bool = option(False, "Read rows during training and keep none in memory; needs --max_steps.")
    shuffle_buffer_size: int = option(1000, "Size of a stream's shuffle buffer in rows; 0 keeps the order.")
    dataset_config: str | None = option(None, "Configuration of a hub data set.")
    # A file has a single split, which `datasets` calls train.
    dataset_train_split: str = option("train", "Split, or a slice of it such as train[:1000].")
    eval_dataset_name: list[str] | None = option(None, "Rows to evaluate on, like dataset_name.")
    dataset_test_split: str | None = option(None, "Split to evaluate on.")
    # Without a value it is true.
    resume: str | None = field(
        default=None,
        metadata={
            "help": "Resume from the last checkpoint in output_dir; auto: start if there is none.",
            "nargs": "?",
            "const": "true",
        },
    )
    # Read before anything is imported: rlhf.cli.main moves the caches.
    cache_dir: str | None = option(None, "Folder for all caches, instead of ~/.cache/huggingface and others.")
    overwrite: bool = option(False, "Replace the run in output_dir.")
    dry_run: bool = option(
        False, "Make all checks and print rows, steps, memory, disk and time; train nothing and write nothing."
    )

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass
class ReferenceArguments:
    """Another reference than the model at the start."""

    title: ClassVar[str] = "reference"

    ref_model_name_or_path: str | None = option(None, "Reference model; default: the model at the start of training.")

    def trainer_kwargs(self, model: ModelArguments, config: TrainingArguments) -> dict[str, Any]:
        """Keyword arguments of the trainer.

        Args:
            model: the model's options.
            config: the trainer's configuration.

        Returns:
            Keyword arguments of the trainer.

        Raises:
            ValueError, OSError: there is no such model.
        """
        if self.ref_model_name_or_path is None:
            return {}
        # Loaded now, so that a wrong name is found before rows are read and the model is loaded.
        trust_remote_code = config.trust_remote_code  # type: ignore[attr-defined]
        return {"ref_model": load_model(self.ref_model_name_or_path, **model.other_kwargs(trust_remote_code))}


@dataclass
class ExperienceArguments:
    """Where rewards come from, in on-policy training."""

    title: ClassVar[str] = "rewards"

    reward_funcs: list[str] | None = option(
        None,
        "Rewards: a built-in such as numeric_answer or length_reward(target=200), file.py:function, a "
        "reward model's folder, https://…; several add up.",
    )
    environment: str | None = option(None, "Environment class for several turns (--max_turns), as file.py:Class.")

    def trainer_kwargs(self, model: ModelArguments, config: TrainingArguments) -> dict[str, Any]:
        """Keyword arguments of the trainer.

        Args:
            model: the model's options.
            config: the trainer's configuration.

        Returns:
            Keyword arguments of the trainer.

        Raises:
            ValueError: neither rewards nor an environment, or the environment cannot be imported.
        """
        if self.reward_funcs is None and self.environment is None:
            raise ValueError(
                "--reward_funcs is missing: a built-in, file.py:function, a reward model's folder, https://…"
            )
        if self.environment is None and config.max_turns > 1:  # type: ignore[attr-defined]
            raise ValueError("--max_turns has no effect without --environment: leave it out, or name an environment")
        # Imported now, so that a mistake in the file is found before rows and weights are loaded.
        environment = None
        if self.environment is not None:
            environment = load_object(self.environment, f"environment {self.environment!r}")
        return {"reward_funcs": self.reward_funcs, "environment_factory": environment}


@dataclass
class TeacherAdapterArguments:
    """A teacher that is an adapter on the student's own weights."""

    title: ClassVar[str] = "teacher"

    teacher_adapter: str | None = option(
        None, "Folder of an adapter of this very model: under it the model is the teacher (--use_peft)."
    )

    def trainer_kwargs(self, model: ModelArguments, config: TrainingArguments) -> dict[str, Any]:
        """Keyword arguments of :func:`rlhf.cli.training.make_distill_trainer`.

        Args:
            model: the model's options.
            config: the trainer's configuration.

        Returns:
            Keyword arguments of the trainer.

        Raises:
            ValueError: two teachers, or no adapter for the student.
        """
        if self.teacher_adapter is None:
            return {}
        for other in ("teacher_model_name_or_path", "teacher_file", "teacher_server_url"):
            if getattr(config, other) is not None:
                raise ValueError(f"--teacher_adapter and --{other} exclude each other: pass one teacher")
        # Trained whole, the weights under the teacher's adapter would change with the student.
        if not model.use_peft:
            raise ValueError("--teacher_adapter needs --use_peft: the student is another adapter on the same model")
        return {"teacher_adapter": self.teacher_adapter}
