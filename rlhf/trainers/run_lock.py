"""A lock on a folder, so that no two runs write into it."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from rlhf.trainers.checkpoint_files import writing

LOCK_FILE = "_run.lock"  # uploads to the hub leave out names that begin so


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the folder of a run; it is made where it is missing.

    The kernel releases the lock when the process ends, however it ends. Over NFS the lock holds only where the server
    and its mount options support locks.

    Args:
        folder: of the run.
    Raises:
        ValueError: another run holds it.
        OSError: the folder cannot be written.
    """
    is_new = not folder.exists()
    file = folder / LOCK_FILE
    lock = FileLock(file)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{folder}: another run writes into it{_holder(file)}; choose another folder") from None
    # A read-only file system, a file in the place of a folder, a name that is too long.
    except OSError as error:
        raise OSError(f"{folder}: cannot be written ({error.strerror or error}); choose another folder") from error
    try:
        started = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
        with writing(folder):
            file.write_text(json.dumps(holder) + "\n", encoding="utf-8")
        yield
    finally:
        # Removed while it is held: whoever waits for it then sees that the file is gone, and makes another one.
        file.unlink(missing_ok=True)
        lock.release()
        # A run that failed before it wrote anything leaves no folder. One that holds files is not removed.
        if is_new:
            with suppress(OSError):
                folder.rmdir()


def check_unlocked(folder: Path) -> None:
    """Refuse a folder that a run holds; nothing is written.

    Args:
        folder: of a run; may be missing.
    Raises:
        ValueError: a run holds it.
    """
    file = folder / LOCK_FILE
    # Windows has no such call; there the run itself finds it.
    if fcntl is None or not file.exists():
        return
    # Opened for reading, because FileLock would empty it.
    with file.open(encoding="utf-8") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{folder}: another run writes into it{_holder(file)}; choose another folder") from None


def _holder(file: Path) -> str:
    """Who holds the lock, as far as that is known."""
    try:
        holder = json.loads(file.read_text(encoding="utf-8"))
        return f" (process {holder['pid']} on {holder['host']} since {holder['started']})"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # nothing is written yet
        return ""
