"""Options from a YAML file and the command line, into data classes."""

import difflib
import os
import re
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from peft import LoraConfig
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

SHIPPED_CONFIGS = Path(__file__).parents[1] / "configs"  # in an installed wheel

DTYPES = ["auto", "float32", "bfloat16", "float16", "float64"]


@dataclass
class ModelArguments:
    """The model, its bits and, with ``use_peft``, the adapter; names are TRL's."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "A folder, or a name on the hub."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the hub."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Of the weights; auto is the checkpoint's.", "choices": DTYPES},
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager, flash_attention_2, …"})
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of the weights."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Its scale, times rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout in front of it."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers it sits on, by name or as one pattern; all-linear by default."}
    )
    lora_target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Weights it sits on that are no layers, such as experts in one tensor."}
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Layers that are trained whole and saved with it."}
    )
    lora_task_type: str = field(default="CAUSAL_LM", metadata={"help": "What its config says; SEQ_CLS for rewards."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(lora_r)."})
    use_dora: bool = field(default=False, metadata={"help": "Learn the lengths of the weights besides (DoRA)."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Hold the frozen weights in 8 bits; with use_peft."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Hold the frozen weights in 4 bits; with use_peft."})
    bnb_4bit_quant_type: str = field(
        default="nf4", metadata={"help": "What the 4 bits stand for.", "choices": ["fp4", "nf4"]}
    )
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Quantise the scales of the 4 bits too."})
    bnb_4bit_quant_storage: str | None = field(default=None, metadata={"help": "dtype that holds the 4 bits."})

    def __post_init__(self) -> None:
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("--load_in_8bit and --load_in_4bit exclude each other: pass one")
        for name in ("lora_target_modules", "lora_target_parameters", "lora_modules_to_save"):
            setattr(self, name, words(getattr(self, name)))
        adapter = ("use_rslora", "use_dora")
        for option in fields(ModelArguments):
            given = getattr(self, option.name) != option.default
            if given and not self.use_peft and (option.name in adapter or option.name.startswith("lora_")):
                raise ValueError(f"--{option.name} is of an adapter: add --use_peft to train one, or leave it out")

    def load_kwargs(self, trust_remote_code: bool = False) -> dict[str, Any]:
        """What ``from_pretrained`` gets for the model that is trained."""
        return dict(
            revision=self.model_revision,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            trust_remote_code=trust_remote_code,
            **self.quantization(),
        )

    def other_kwargs(self, trust_remote_code: bool = False) -> dict[str, Any]:
        """The same for another model, whose branches and tags are its own."""
        return {key: value for key, value in self.load_kwargs(trust_remote_code).items() if key != "revision"}

    def quantization(self) -> dict[str, Any]:
        """``quantization_config`` of bitsandbytes, where fewer bits are asked for."""
        if not (self.load_in_4bit or self.load_in_8bit):
            return {}
        config: dict[str, Any] = {"quant_method": "bitsandbytes", "load_in_8bit": self.load_in_8bit}
        if self.load_in_4bit:
            on_gpu = "bfloat16" if torch.cuda.is_available() else "float32"
            config |= {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": self.bnb_4bit_quant_type,
                "bnb_4bit_compute_dtype": on_gpu if self.dtype in ("auto", "float32") else self.dtype,
                "bnb_4bit_use_double_quant": self.use_bnb_nested_quant,
            }
            if self.bnb_4bit_quant_storage is not None:
                config["bnb_4bit_quant_storage"] = self.bnb_4bit_quant_storage
        return {"quantization_config": config}

    def peft_config(self) -> LoraConfig | None:
        """
        Raises:
            ValueError: fewer bits and no adapter: such weights cannot be trained.
        """
        if not self.use_peft:
            if self.load_in_4bit or self.load_in_8bit:
                bits = 4 if self.load_in_4bit else 8
                raise ValueError(f"--load_in_{bits}bit: weights of {bits} bits are not trained, add --use_peft")
            return None
        return LoraConfig(
            task_type=self.lora_task_type,
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=targets(self.lora_target_modules),
            target_parameters=self.lora_target_parameters,
            modules_to_save=self.lora_modules_to_save,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            # Whoever loads the adapter needs the same one; what is beside an adapter has none.
            revision=None if self.model_revision == "main" else self.model_revision,
        )


def words(given: list[str] | str | None) -> list[str] | None:
    """Names that were given apart, or with commas; one alone in a file."""
    if given is None:
        return None
    parts = [given] if isinstance(given, str) else given
    return [word.strip() for part in parts for word in part.split(",") if word.strip()]


def targets(names: list[str] | None) -> list[str] | str | None:
    """Names of layers; one that is a pattern, or PEFT's word for all of them, by itself."""
    if names is not None and len(names) == 1 and (names[0] == "all-linear" or re.search(r"[*+?()\[\]|^$\\]", names[0])):
        return names[0]
    return names


@dataclass
class LoadArguments(ModelArguments):
    """The same for commands that do not train: in the dtype of the checkpoint."""

    dtype: str = field(
        default="auto", metadata={"help": "Of the weights; auto is the checkpoint's.", "choices": DTYPES}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code from the hub."})


@dataclass
class DataArguments:
    """The rows, and what to do with a folder that is not empty."""

    dataset_name: list[str] | None = field(
        default=None,
        metadata={
            "help": "File (JSON, JSONL, Parquet, CSV, TSV, text; .gz and others too), pattern, folder, or hub name; "
            "several are mixed, with shares after a colon: a.jsonl:0.7 b.parquet:0.3."
        },
    )
    mixture: str = field(
        default="rows", metadata={"help": "What the shares are of: rows, or tokens.", "choices": ["rows", "tokens"]}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read the rows while training, and keep none; needs --max_steps."}
    )
    shuffle_buffer_size: int = field(
        default=1000, metadata={"help": "Rows of a stream that the next one is drawn from; 0 keeps their order."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split; a slice such as train[:1000] too."})
    eval_dataset_name: list[str] | None = field(
        default=None, metadata={"help": "Rows to evaluate on, like dataset_name."}
    )
    dataset_test_split: str | None = field(default=None, metadata={"help": "Split to evaluate on."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in output_dir."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the run in output_dir."})


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse(command: str, classes: Sequence[Any], argv: list[str]) -> tuple[Any, ...]:
    """Fill ``classes`` from ``--config`` and then from ``argv``, which wins.

    Raises:
        ValueError: an unknown option or key (with the nearest known one), or a value that does not fit.
    """
    parser = _Parser(
        list(classes),
        prog=f"rlhf {command}",
        usage=f"rlhf {command} [--config FILE] [--OPTION VALUE ...]",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of these options; the command line wins.")
    for action in parser._actions:
        if action.type is string_to_bool and action.nargs is None:  # of a switch that is None by default
            action.nargs, action.const = "?", True
    known = {name for cls in classes for name in (f.name for f in fields(cls) if f.init)}
    _group(parser, command, classes)
    config = _Parser([], add_help=False, allow_abbrev=False)
    config.add_argument("--config")
    file = config.parse_known_args(argv)[0].config
    if file is not None:
        parser.set_defaults(**_read_yaml(file, known, parser))
    *parsed, _, rest = parser.parse_args_into_dataclasses(argv, look_for_args_file=False, return_remaining_strings=True)
    if rest:
        raise ValueError(f"unknown option {rest[0]}{_nearest(rest[0].lstrip('-').split('=')[0], known, '--')}")
    return tuple(parsed)


def _nearest(name: str, known: set[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def _read_yaml(file: str, known: set[str], parser: ArgumentParser) -> dict[str, Any]:
    path = Path(file)
    if not path.exists() and (SHIPPED_CONFIGS / path.name).exists():
        path = SHIPPED_CONFIGS / path.name
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such config file") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected `option: value` lines, found a {type(values).__name__}")
    os.environ.update({str(name): str(value) for name, value in (values.pop("env", None) or {}).items()})
    types = {action.dest: action for action in parser._actions}
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{file}: unknown key {key!r}{_nearest(str(key), known)}")
        if isinstance(value, dict) and key.endswith("dataset_name"):
            value = values[key] = [f"{name}:{weight}" for name, weight in value.items()]
        if isinstance(value, list) and key in ("columns", "roles"):
            value = values[key] = ",".join(map(str, value))
        if isinstance(value, list) and types[key].nargs not in ("+", "*"):
            raise ValueError(f"{file}: {key!r} takes one value, got a list")
        if isinstance(value, (bool, int, float)):
            values[key] = str(value)  # as if typed on the command line: argparse then converts and checks it
    return values


def _group(parser: ArgumentParser, command: str, classes: Sequence[type]) -> None:
    """List our own options first and what transformers brings after."""
    inherited = {f.name: f.default for f in fields(TrainingArguments)}
    own = {f.name for cls in classes for f in fields(cls) if f.name not in inherited or f.default != inherited[f.name]}
    own |= {"config", "help", "output_dir", "max_steps", "num_train_epochs"}
    own |= {"per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"}
    first = parser.add_argument_group(f"options of rlhf {command}")
    after = parser.add_argument_group("inherited from transformers.TrainingArguments")
    for group in parser._action_groups:
        group._group_actions.clear()
    for action in parser._actions:
        (first if action.dest.removeprefix("no_") in own else after)._group_actions.append(action)
