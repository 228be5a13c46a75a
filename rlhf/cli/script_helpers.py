"""For training scripts of your own: arguments, data and adapters under the names that TRL gives them."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig

from rlhf.cli.arguments import DataArguments, ModelArguments
from rlhf.cli.parsing import parse
from rlhf.data import load_datasets
from rlhf.rollouts.arguments import option


@dataclass
class ModelConfig(ModelArguments):
    """The model and its adapter: pass ``get_peft_config(config)`` to a trainer."""

    dtype: str = option("float32", "float32, bfloat16, float16, or auto (the checkpoint's).")


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
        # TRL's parser takes a single class too.
        self.dataclass_types = [dataclass_types] if isinstance(dataclass_types, type) else list(dataclass_types)

    def parse_args_and_config(self, args: Sequence[str] | None = None) -> tuple[Any, ...]:
        """The filled data classes, in the order in which they were given.

        Args:
            args: words of a command line; by default those of this process.

        Returns:
            One instance of each data class.

        Raises:
            ValueError: an unknown option or key (with the nearest known one), or a value that does not fit.
        """
        words = sys.argv[1:] if args is None else args
        # The help shows this name where a command has its own.
        return parse("SCRIPT", self.dataclass_types, list(words))


def get_dataset(arguments: DataArguments) -> dict[str, Any]:
    """The rows to train on, and those to evaluate on where there are some, under the names of their splits.

    Args:
        arguments: names of data sets and splits.

    Returns:
        Data sets by the names of their splits.

    Raises:
        FileNotFoundError, ValueError: nothing there, or it cannot be read.
    """
    train_split, test_split = arguments.dataset_train_split, arguments.dataset_test_split
    names, test_names = arguments.dataset_name or [], arguments.eval_dataset_name
    config, mixture = arguments.dataset_config, arguments.mixture
    datasets = {train_split: load_datasets(names, train_split, name=config, mixture=mixture)}
    if test_names is not None:
        # Another data set; the configuration is that of the first.
        # A data set for evaluation alone often has a single split, called train.
        datasets[test_split or "test"] = load_datasets(test_names, test_split or "train", mixture=mixture)
    elif test_split is not None:
        datasets[test_split] = load_datasets(names, test_split, name=config, mixture=mixture)
    return datasets


def get_peft_config(model_args: ModelArguments) -> LoraConfig | None:
    """The adapter that ``use_peft`` and ``lora_*`` ask for; None without ``use_peft``.

    Args:
        model_args: options of the model and its adapter.

    Returns:
        The configuration; None without ``use_peft``.
    """
    return model_args.peft_config()


def get_quantization_config(model_args: ModelArguments) -> Any:
    """``quantization_config`` for ``from_pretrained`` and trainers; None without ``load_in_4bit`` or ``load_in_8bit``.

    Args:
        model_args: options of the model and its bits.

    Returns:
        The configuration; None for full precision.
    """
    return model_args.quantization().get("quantization_config")
