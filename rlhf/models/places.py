"""Where a model is: a folder here or a name on the hub, and one line where there is none."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def loading(name_or_path: str, kind: str) -> Iterator[None]:
    """Say in one line what cannot be loaded."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{name_or_path}: {_missing(error)}") from error
    except (OSError, ValueError, RuntimeError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{name_or_path}: cannot be loaded as {kind} ({first})") from error


def _missing(error: ImportError) -> str:
    text = " ".join(str(error).split())
    if "bitsandbytes" in text:
        return "4 and 8 bits need bitsandbytes: install the extra `quant`, or pip install bitsandbytes"
    return f"a package is missing ({text[:200]})"


def resolve(name_or_path: str) -> str:
    """A folder that exists, or what may be a name on the hub; raises for a path to nothing."""
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return str(folder)
    if folder.exists() or name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        raise FileNotFoundError(f"{name_or_path}: no such model folder")
    return name_or_path
