"""Where a model is: a folder here or a name on the hub; and one line if it cannot be loaded."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

from safetensors import SafetensorError

# What transformers, PEFT and safetensors raise for files that they cannot read.
_LOADING_ERRORS = (OSError, ValueError, RuntimeError, TypeError, AttributeError, KeyError, SafetensorError)
_PEFT_ERRORS = (ValueError, TypeError, NotImplementedError, RuntimeError, ImportError)


@contextmanager
def loading(name_or_path: str, kind: str) -> Iterator[None]:
    """Turn the errors of loading into one line.

    Args:
        name_or_path: What is loaded, for the message.
        kind: As what, such as ``"a causal LM"``.

    Raises:
        ValueError: It cannot be loaded, or a package is missing.
    """
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{name_or_path}: {_missing_package(error)}") from error
    except UnpicklingError as error:
        raise ValueError(
            f"{name_or_path}: its weights are damaged, or hold objects that could run code; use safetensors"
        ) from error
    except _LOADING_ERRORS as error:
        raise ValueError(f"{name_or_path}: cannot be loaded as {kind} ({_reason(error)})") from error


@contextmanager
def one_line(location: str) -> Iterator[None]:
    """Turn the errors of PEFT into one line.

    Args:
        location: Begins the message.

    Raises:
        ValueError: As raised inside.
    """
    try:
        yield
    except _PEFT_ERRORS as error:
        message = " ".join(str(error).split())
        # PEFT may list every layer of the model.
        raise ValueError(f"{location}: {message[:400]}") from error


def _missing_package(error: ImportError) -> str:
    message = " ".join(str(error).split())
    if "bitsandbytes" in message:
        return "4 and 8 bits need bitsandbytes: install the extra `quant`, or pip install bitsandbytes"
    return f"a package is missing ({message[:200]})"


def _reason(error: Exception) -> str:
    lines = str(error).splitlines()
    # Further lines of transformers are general advice, or one line for each weight.
    first_line = lines[0] if lines else type(error).__name__
    if "ignore_mismatched_sizes" in first_line:
        return "its weights have other shapes than its config.json says; the report above lists them"
    # The message names the class with its module, and not what is wrong with it.
    match = re.search(r"Unrecognized configuration class <class '[\w.]*\.(\w+)'>", first_line)
    if match:
        return f"its config is a {match[1]}, of no such model"
    return first_line


def resolve(name_or_path: str) -> str:
    """Find a model's folder.

    Args:
        name_or_path: A folder, or a name on the hub.

    Returns:
        The path of a folder that exists, or what may be a name on the hub.

    Raises:
        FileNotFoundError: A path to nothing.
        ValueError: The folder's ``config.json`` is no JSON.
    """
    model_folder = Path(name_or_path).expanduser()
    if model_folder.is_dir():
        _check_config(model_folder / "config.json")
        return str(model_folder)
    # A name on the hub is `model` or `owner/model`.
    # A path to nothing must not be looked for there: the error would be about the network.
    is_path = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    if is_path or model_folder.exists():
        raise FileNotFoundError(f"{name_or_path}: no such model folder")
    return name_or_path


def _check_config(file: Path) -> None:
    if not file.exists():
        return
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error}); copy or download it again") from error
