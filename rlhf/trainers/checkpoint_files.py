"""Folders that are written whole or not at all: a mark that lists the files, and one rename at the end.

A folder is written as ``.partial/NAME`` beside its final place. Its mark is written once all files are on the disk, and
then the folder is renamed. A folder without a mark was not written to its end.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError

from rlhf.models.adapter_base import PARTIAL

MARK = "complete.json"  # in each whole folder: names, sizes and hashes of its files
FORMAT_VERSION = 1

_HASH = "xxh3_128"  # finds damage, not forgery; a fortieth of the time that writing takes
_BLOCK = 1 << 20  # bytes
_CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
# What torch says when a file cannot be written: a RuntimeError without the reason.
_TORCH_WRITE_ERROR = re.compile(r"PytorchStreamWriter|inline_container|file write failed")


def partial_path(final: Path) -> Path:
    """Where a folder is written before it is renamed.

    Args:
        final: its path once it is whole.

    Returns:
        A path on the same file system.
    """
    return final.parent / PARTIAL / final.name


def write_mark(folder: Path, step: int | None = None, num_processes: int = 1) -> None:
    """Put all files of a folder on the disk, and list them in its mark.

    Args:
        folder: holds all its files; they get the permissions of an ordinary new file.
        step: the number of optimizer steps that were taken.
        num_processes: that wrote the folder.

    Raises:
        OSError: a file cannot be read or written.
    """
    mark_file, temporary_mark = folder / MARK, folder / f".{MARK}"
    for file in (mark_file, temporary_mark):
        file.unlink(missing_ok=True)
    file_names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    mark = {
        "format": FORMAT_VERSION,
        "step": step,
        "num_processes": num_processes,
        "files": {name: _file_entry(folder / name) for name in file_names},
    }
    temporary_mark.write_text(json.dumps(mark, indent=1) + "\n", encoding="utf-8")
    # safetensors makes files that nobody else may read. The mark has the permissions that the user's umask gives.
    mode = temporary_mark.stat().st_mode
    for name in [*file_names, temporary_mark.name]:
        os.chmod(folder / name, mode)
        sync(folder / name)
    for path in folder.rglob("*"):
        if path.is_dir():
            sync(path)
    temporary_mark.rename(mark_file)
    sync(folder)


def read_mark(folder: Path) -> dict[str, Any]:
    """Read the mark of a folder.

    Args:
        folder: a checkpoint, or a model.

    Returns:
        Its ``files`` by name, each with ``size`` and hash, ``step`` and ``num_processes``.

    Raises:
        ValueError: there is none, or it is damaged or of another version; the message does not name the folder.
    """
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no {MARK}, so it was not written to its end, or by an older version") from None
    except (OSError, ValueError, RecursionError) as error:  # brackets may be too deep
        raise ValueError(f"{MARK} cannot be read ({error})") from error
    if not isinstance(mark, dict) or mark.get("format") != FORMAT_VERSION:
        raise ValueError(f"{MARK} is not of format {FORMAT_VERSION}")
    files = mark.get("files")
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise ValueError(f"{MARK} does not list files")
    return mark


def problem_of(folder: Path | str) -> str | None:
    """What is wrong with the files of a folder; all of them are read.

    Args:
        folder: a checkpoint, or a model that a run saved.

    Returns:
        One line that names the file; None if the folder is whole.
    """
    folder = Path(folder)
    try:
        files = read_mark(folder)["files"]
        for name, entry in files.items():
            if (problem := _problem_of_file(folder / name, entry)) is not None:
                return f"{name} {problem}"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def checkpoint_step(folder: Path | str) -> int | None:
    """The step of a checkpoint.

    Args:
        folder: a path, whose last part is read.

    Returns:
        The number in its name; None for any other folder.
    """
    match = _CHECKPOINT_NAME.fullmatch(Path(folder).name)
    return int(match[1]) if match else None


def checkpoints_by_step(output_dir: Path | str) -> dict[int, Path]:
    """Folders with the name of a checkpoint, whole or not.

    Args:
        output_dir: of the run; it may be missing.

    Returns:
        Paths by step, ascending.
    """
    folder = Path(output_dir)
    paths = list(folder.iterdir()) if folder.is_dir() else []
    by_step = {step: path for path in paths if (step := checkpoint_step(path)) is not None and path.is_dir()}
    return dict(sorted(by_step.items()))


def whole_checkpoints(output_dir: Path | str) -> list[Path]:
    """Checkpoints whose files are all as they were written; all files are read.

    Args:
        output_dir: of the run; it may be missing.

    Returns:
        Paths by step number, ascending.
    """
    return [path for path in checkpoints_by_step(output_dir).values() if problem_of(path) is None]


def last_whole_checkpoint(output_dir: Path | str) -> tuple[Path | None, dict[Path, str]]:
    """The checkpoint that a run goes on from.

    Args:
        output_dir: of the run; it may be missing.

    Returns:
        Its path, or None where there is none; and the problem of each later checkpoint that is passed over.
    """
    passed_over: dict[Path, str] = {}
    for path in reversed(checkpoints_by_step(output_dir).values()):
        problem = problem_of(path)
        if problem is None:
            return path, passed_over
        passed_over[path] = problem
    return None, passed_over


@contextmanager
def atomic_folder(final: Path, step: int | None = None) -> Iterator[Path]:
    """Write a folder of one process whole or not at all; a folder that was there is replaced at the end.

    Args:
        final: its path once it is whole.
        step: the number of optimizer steps that were taken.

    Yields:
        An empty folder to write into.

    Raises:
        OSError: a file could not be written; nothing is left of the new folder.
    """
    partial = partial_path(final)
    shutil.rmtree(partial, ignore_errors=True)
    with writing(final):
        try:
            partial.mkdir(parents=True)
            yield partial
            write_mark(partial, step)
            put_in_place(partial, final)
        except BaseException:
            discard(partial)
            raise


@contextmanager
def writing(final: Path) -> Iterator[None]:
    """Turn each library's error about a file that cannot be written into an OSError of one line.

    Args:
        final: the folder that is written.

    Raises:
        OSError: the folder could not be written.
    """
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{final}: could not be saved: {error}") from error
    except RuntimeError as error:
        if not _TORCH_WRITE_ERROR.search(str(error)):
            raise
        raise OSError(f"{final}: could not be saved: {_space_left(final)}") from error
    except OSError as error:
        raise type(error)(f"{final}: could not be saved: {error.strerror or error}") from error


def put_in_place(partial: Path, final: Path) -> None:
    """Rename a marked folder; a folder that has its name already is deleted.

    Args:
        partial: as :func:`partial_path` gives it, with its mark.
        final: its final path.
    """
    replaced = partial.with_name(f"replaced-{partial.name}")
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    _remove_if_empty(partial.parent)


def discard(partial: Path) -> None:
    """Delete a folder that will not be finished.

    Args:
        partial: as :func:`partial_path` gives it.
    """
    shutil.rmtree(partial, ignore_errors=True)
    _remove_if_empty(partial.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk.

    Args:
        path: of the file or the folder.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _file_entry(file: Path) -> dict[str, Any]:
    return {"size": file.stat().st_size, _HASH: _hash_of(file)}


def _problem_of_file(file: Path, entry: dict[str, Any]) -> str | None:
    if not file.is_file():
        return "is missing"
    size = file.stat().st_size
    if size != entry.get("size"):
        return f"has {size} bytes, and {entry.get('size')} were written"
    if _hash_of(file) != entry.get(_HASH):
        return "is damaged: its content differs from what was written"
    return None


def _hash_of(file: Path) -> str:
    state, block = xxhash.xxh3_128(), memoryview(bytearray(_BLOCK))
    with file.open("rb", buffering=0) as stream:
        while num_bytes := stream.readinto(block):
            state.update(block[:num_bytes])
    return state.hexdigest()


def _space_left(folder: Path) -> str:
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    return f"{shutil.disk_usage(existing).free / 2**20:.0f} MiB are left on the disk"


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
