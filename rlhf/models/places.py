"""Where a model is: a folder here or a name on the hub, and one line where there is none."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def loading(name_or_path: str, kind: str) -> Iterator[None]:
    """Say in one line what cannot be loaded."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{name_or_path}: {_missing(error)}") from error
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError, KeyError, SafetensorError) as error:
        raise ValueError(f"{name_or_path}: cannot be loaded as {kind} ({_reason(error)})") from error


def _missing(error: ImportError) -> str:
    text = " ".join(str(error).split())
    if "bitsandbytes" in text:
        return "4 and 8 bits need bitsandbytes: install the extra `quant`, or pip install bitsandbytes"
    return f"a package is missing ({text[:200]})"


def _reason(error: Exception) -> str:
    first = next(iter(str(error).splitlines()), type(error).__name__)
    if "ignore_mismatched_sizes" in first:
        return "its weights have other shapes than its config.json says; the report above lists them"
    if unfit := re.search(r"Unrecognized configuration class <class '[\w.]*\.(\w+)'>", first):
        return f"its config is a {unfit[1]}, of no such model"
    return first


def resolve(name_or_path: str) -> str:
    """A folder that exists, or what may be a name on the hub; raises for a path to nothing."""
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        _check_config(folder / "config.json")
        return str(folder)
    if folder.exists() or name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        raise FileNotFoundError(f"{name_or_path}: no such model folder")
    return name_or_path


def _check_config(file: Path) -> None:
    if file.exists():
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file}: not valid JSON ({error}); copy or download it again") from error
