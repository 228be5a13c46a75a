"""Worker processes end with the process that started them, also where that is killed and can tell them nothing."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux
_starting_process: int | None = None  # that starts workers now
_libc: Any = None


@contextmanager
def workers_end_with_this_process() -> Iterator[None]:
    """What is forked inside is killed by Linux when this process ends; elsewhere nothing changes."""
    global _libc, _starting_process
    if sys.platform != "linux":
        yield
        return
    if _libc is None:
        # Loaded here: a process that was just forked should do little. A hook cannot be taken back, so it is set once.
        _libc = ctypes.CDLL(None)
        os.register_at_fork(after_in_child=_end_with_parent)
    previous_process, _starting_process = _starting_process, os.getpid()
    try:
        yield
    finally:
        _starting_process = previous_process


def _end_with_parent() -> None:
    """Run in a process that was just forked."""
    if _starting_process is None:
        return
    _libc.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    # It may have ended before the call.
    if os.getppid() != _starting_process:
        os._exit(1)
