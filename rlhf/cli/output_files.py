"""Files that a command writes at its end: checked before the work, and replaced only when asked to."""

import os
import tempfile
from pathlib import Path


def check_output_file(option: str, given: str | None, overwrite: bool) -> None:
    """Refuse a file that exists or cannot be written.

    Args:
        option: Its option, for messages.
        given: The file; None for none.
        overwrite: Whether it may exist.

    Raises:
        ValueError: It exists, or there is no folder to write it to.
    """
    if given is None:
        return
    path = Path(given)
    if path.is_dir():
        raise ValueError(f"--{option} {path}: is a folder; name a file")
    if path.exists() and not overwrite:
        raise ValueError(f"--{option} {path}: exists already; choose another, or pass --overwrite to replace it")
    # Folders that are not there yet will be made.
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise ValueError(f"--{option} {path}: {folder} is a file, not a folder; choose another place")
    # Tried, as permissions do not tell all: a file system may be read-only, or hold no files.
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"--{option} {path}: cannot write to {folder} ({reason}); choose another place") from error


def write_output_file(path: Path, text: str) -> None:
    """Write a file as a whole: a full disk leaves the old one as it was.

    Args:
        path: The file; its folder is made.
        text: Its content.

    Raises:
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of this process alone, and in the same folder, as only there a rename replaces a file at once.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
