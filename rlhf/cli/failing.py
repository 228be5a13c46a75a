"""How a command fails: one line for what a user can mend, also where it runs in several processes.

A launcher ends the other processes once one has ended. So the first process speaks for an error that all have, another
process gives its number, and one that only lost the connection to it stays silent.
"""

import json
import logging
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

from rlhf.cli.exit_codes import ExitCode
from rlhf.visible import visible

# How long a process that fails waits for the first one, which may fail for the same reason.
SECONDS_FOR_THE_FIRST = 3.0
# How long a process that lost the connection waits for the launcher to end it.
SECONDS_FOR_THE_LAUNCHER = 15.0
# What a user can mend; a loss that is not finite too. Any other error is a bug, and keeps its traceback.
MENDABLE = (ValueError, OSError, ImportError, FloatingPointError)


def fail(command: str, error: Exception, debug: bool) -> int:
    """Tell an error that ends the command, and give its exit status.

    Several processes that have formed a group end here: left to the interpreter's exit, threads of the group may wait
    for the others or abort.

    Args:
        command: its name.
        error: what was raised.
        debug: whether to print the traceback too; that of a bug is printed anyway.
    Returns:
        2 for what a user can mend, 3 for a number that is not finite, 1 for a bug.
    """
    is_bug = not isinstance(error, MENDABLE)
    status = _status_of(error)
    if not in_several_processes():
        _print(command, error, is_bug or debug)
        return status
    # From now on the launcher may end this process at any moment.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    rank = os.environ.get("RANK", "0")
    lost_connection = _lost_connection(error)
    if lost_connection:
        time.sleep(SECONDS_FOR_THE_LAUNCHER)
    elif rank != "0":
        time.sleep(SECONDS_FOR_THE_FIRST)
    # Still here, so no other process has told it.
    _print(command if rank == "0" else f"{command} (process {rank})", error, is_bug or debug)
    # As late as this: the launcher takes the earliest error, not one of a process that it ends while it waits.
    if not lost_connection:
        _record(error)
    _end_at_once_in_a_group(status)
    return status


def interrupted(command: str) -> int:
    """Tell that Ctrl-C ended the command, and give its exit status.

    Args:
        command: its name.
    Returns:
        130.
    """
    if os.environ.get("RANK", "0") == "0":  # all processes get it
        print(f"rlhf {command}: interrupted", file=sys.stderr)
    _end_at_once_in_a_group(ExitCode.INTERRUPTED)
    return ExitCode.INTERRUPTED


def in_several_processes() -> bool:
    """Whether a launcher started this process among others."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _status_of(error: Exception) -> int:
    if isinstance(error, FloatingPointError):
        return ExitCode.NOT_FINITE
    return ExitCode.BAD_INPUT if isinstance(error, MENDABLE) else ExitCode.BUG


def _end_at_once_in_a_group(status: int) -> None:
    if _has_group():
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _print(speaker: str, error: Exception, with_traceback: bool) -> None:
    if with_traceback:
        traceback.print_exception(error)
    kind = "" if isinstance(error, MENDABLE) else f"{type(error).__name__}: "
    # Errors quote data.
    print(visible(f"rlhf {speaker}: {kind}{' '.join(str(error).split())}"), file=sys.stderr)


def _has_group() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _lost_connection(error: Exception) -> bool:
    """Whether this is what a collective operation raises once another process has ended."""
    if not _has_group() or not isinstance(error, RuntimeError):
        return False
    of_torch = isinstance(error, sys.modules["torch.distributed"].DistError)  # NCCL, and the store of the group
    # gloo raises nothing but its place in the source and a text.
    return of_torch or "gloo/transport" in str(error) or "by peer" in str(error)


def _record(error: Exception) -> None:
    """Note the error and its time for torch's launcher, which takes the exit status of the first that failed."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None:
        return
    line = f"{type(error).__name__}: {' '.join(str(error).split())}"
    # The launcher shows what is here. A traceback would be longer than what a user can mend.
    shown = line if isinstance(error, MENDABLE) else "".join(traceback.format_exception(error))
    details = {"py_callstack": shown, "timestamp": str(int(time.time()))}
    with suppress(OSError):  # a full disk must not hide the error
        Path(file).write_text(json.dumps({"message": {"message": line, "extraInfo": details}}), encoding="utf-8")
