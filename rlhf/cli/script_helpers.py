"""What people's own training scripts start from: arguments, data and adapters by the names that TRL gives them."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig

from rlhf.cli.arguments import DataArguments, ModelArguments, parse
from rlhf.data import load_datasets


@dataclass
class ModelConfig(ModelArguments):
    """The model and its adapter: pass ``get_peft_config(config)`` to a trainer."""

    dtype: str = field(default="float32", metadata={"help": "float32, bfloat16, float16, or auto (the checkpoint's)."})


@dataclass
class ScriptArguments(DataArguments):
    """The data set of a script; :func:`get_dataset` loads it."""


class TrlParser:
    """Data classes from the command line, after a YAML file given with ``--config``; the command line wins.

    ``env`` in the file, a dictionary, sets environment variables.

    Args:
        dataclass_types: one data class or several, such as ``(ScriptArguments, SFTConfig, ModelConfig)``.
    """

    def __init__(self, dataclass_types: Any) -> None:
        self.dataclass_types = [dataclass_types] if isinstance(dataclass_types, type) else list(dataclass_types)

    def parse_args_and_config(self, args: Sequence[str] | None = None) -> tuple[Any, ...]:
        """The filled data classes, in the order in which they were given.

        Raises:
            ValueError: an unknown option or key (with the nearest known one), or a value that does not fit.
        """
        return parse("SCRIPT", self.dataclass_types, list(sys.argv[1:] if args is None else args))


def get_dataset(arguments: DataArguments) -> dict[str, Any]:
    """The rows to train on, and those to evaluate on where there are some, under the names of their splits.

    Raises:
        FileNotFoundError, ValueError: nothing there, or it cannot be read.
    """
    train, test = arguments.dataset_train_split, arguments.dataset_test_split
    given: dict[str, Any] = dict(name=arguments.dataset_config, mixture=arguments.mixture)
    found = {train: load_datasets(arguments.dataset_name or [], train, **given)}
    if arguments.eval_dataset_name is not None:
        given["name"] = None
    if test is not None or arguments.eval_dataset_name is not None:
        names = arguments.eval_dataset_name or arguments.dataset_name or []
        found[test or "test"] = load_datasets(names, test or "train", **given)
    return found


def get_peft_config(model_args: ModelArguments) -> LoraConfig | None:
    """The adapter that ``use_peft`` and ``lora_*`` ask for; None without ``use_peft``."""
    return model_args.peft_config()


def get_quantization_config(model_args: ModelArguments) -> Any:
    """What ``from_pretrained`` and trainers take as ``quantization_config``; None without ``load_in_4bit`` or 8."""
    return model_args.load_kwargs().get("quantization_config")
