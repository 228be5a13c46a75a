"""Where a model is: a folder here or a name on the hub; and one line if it cannot be loaded."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

# Read before anything is loaded. tokenizer.json may be large, and is read only to explain an error.
_SMALL_FILES = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "adapter_config.json",
    "model.safetensors.index.json",
)  # fmt: skip
_LONGEST_REASON = 300  # characters
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
    # Nothing but the loading code of other packages runs inside, and it raises anything for a damaged file.
    except Exception as error:
        broken = broken_file(Path(name_or_path).expanduser())
        raise ValueError(broken or f"{name_or_path}: cannot be loaded as {kind} ({reason_of(error)})") from error


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


def reason_of(error: Exception) -> str:
    """What an error of another package says, in one short line.

    Args:
        error: Raised while something was loaded.

    Returns:
        Its first line, or two where the first only announces the second.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Further lines of transformers are general advice, or one line for each weight.
    first_line = lines[0] if lines else type(error).__name__
    if first_line.endswith(":") and len(lines) > 1:
        first_line = f"{first_line} {lines[1]}"
    if "ignore_mismatched_sizes" in first_line:
        return "its weights have other shapes than its config.json says; the report above lists them"
    # The message names the class with its module, and not what is wrong with it.
    match = re.search(r"Unrecognized configuration class <class '[\w.]*\.(\w+)'>", first_line)
    if match:
        return f"its config is a {match[1]}, of no such model"
    # A KeyError is the key alone.
    kind = f"{type(error).__name__} " if isinstance(error, KeyError) else ""
    return kind + first_line[:_LONGEST_REASON]


def broken_file(folder: Path) -> str | None:
    """Find the file of a model's folder that is no JSON object.

    Args:
        folder: Of a model, a tokenizer or an adapter.

    Returns:
        What is wrong with the first such file; None if there is none.
    """
    for name in (*_SMALL_FILES, "tokenizer.json"):
        try:
            check_json(folder / name)
        except ValueError as error:
            return str(error)
    return None


def resolve(name_or_path: str) -> str:
    """Find a model's folder.

    Args:
        name_or_path: A folder, or a name on the hub.

    Returns:
        The path of a folder that exists, or what may be a name on the hub.

    Raises:
        FileNotFoundError: A path to nothing.
        ValueError: One of its files is no JSON object.
    """
    model_folder = Path(name_or_path).expanduser()
    if model_folder.is_dir():
        for name in _SMALL_FILES:
            check_json(model_folder / name)
        return str(model_folder)
    # A name on the hub is `model` or `owner/model`.
    # A path to nothing must not be looked for there: the error would be about the network.
    is_path = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    if is_path or model_folder.exists():
        raise FileNotFoundError(f"{name_or_path}: no such model folder")
    return name_or_path


def _constant(name: str) -> float:
    """Of NaN and the infinities, which Python's JSON allows: some configs have an infinite limit."""
    if name == "NaN":
        raise ValueError("it holds NaN")
    return float(name)


def check_json(file: Path) -> None:
    """Check that a file holds a JSON object.

    Args:
        file: May be missing.

    Raises:
        ValueError: It holds no JSON, or another kind of value.
    """
    if not file.is_file():
        return
    try:
        value = json.loads(file.read_text(encoding="utf-8"), parse_constant=_constant)
    # Too many brackets inside each other.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON ({error}); copy or download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected a JSON object, got a {type(value).__name__}; copy or download it again")
