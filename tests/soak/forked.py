"""A command in a forked child that ends itself in front of a chosen write: a kill at every write can be tried.

The parent has imported all that the command needs, so that a start costs no imports.
"""

import importlib
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

KILLED, HUNG = -int(signal.SIGKILL), -1000
LONGEST = 300.0  # seconds after which a child counts as hung
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_RENAMES = ("os.rename", "os.link", "os.symlink")
_CHANGES = (*_RENAMES, "os.remove", "os.mkdir", "os.rmdir")
# Functions and classes that write files without Python's `open`: module, name, position of the path.
_LIBRARY_WRITERS = (("safetensors.torch", "serialize_file", 1), ("torch._C", "PyTorchFileWriter", 0), ("pyarrow", "OSFile", 0))  # noqa: E501  # fmt: skip


class Write(NamedTuple):
    """A change of a file: what is done, and to which file below the watched folder."""

    kind: str
    file: str


@dataclass(frozen=True)
class Kill:
    """When a child ends.

    Attributes:
        before: number of the write in front of which it ends, from 1; 0 for none.
        torn: whether the file that was opened just before is cut to half, as by a kill in the middle of a write.
        after: seconds after which it is killed from outside; 0 for never.
    """

    before: int = 0
    torn: bool = False
    after: float = 0.0


NONE = Kill()


@dataclass(frozen=True)
class Outcome:
    """How a child ended: its status (-9 where it was killed), what it printed, what it wrote, how long it took."""

    status: int
    output: str
    writes: list[Write]
    seconds: float


class _Watch:
    """Counts the changes of files below a folder, in a child."""

    def __init__(self, folder: Path, kill: Kill, journal: Path) -> None:
        self.root, self.kill = f"{folder}{os.sep}", kill
        self.journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.number, self.opened, self.size_before = 0, "", 0

    def install(self) -> None:
        os.fsync = self._noted(os.fsync, "fsync", lambda args: _path_of(args[0]))
        for module_name, name, position in _LIBRARY_WRITERS:
            module = importlib.import_module(module_name)
            setattr(module, name, self._noted(getattr(module, name), "open", lambda args, at=position: args[at]))
        memmap = importlib.import_module("numpy").memmap
        memmap.flush = self._noted(memmap.flush, "flush", lambda args: args[0].filename or "")
        sys.addaudithook(self._on_event)

    def _on_event(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            # A file that is opened to be changed in place has nothing that a kill could leave out.
            if flags & _WRITING:
                kind = "open" if flags & (os.O_CREAT | os.O_TRUNC) else "update"
                self._note(kind, path, appends=bool(flags & os.O_APPEND))
        elif event in _RENAMES:
            self._note(event, _within(args[1], args[3] if event == "os.rename" else -1))
        elif event in _CHANGES:
            # The last argument is the folder that a relative path begins in, by its number; -1 is the current one.
            path = _within(args[0], args[-1])
            # A folder that is made "if it is not there" is no change where it is there.
            if not (event == "os.mkdir" and os.path.isdir(path)):
                self._note(event, path)

    def _note(self, kind: str, path: Any, appends: bool = False) -> None:
        if not isinstance(path, str | bytes | os.PathLike):  # an open file, by its number
            return
        file = os.path.abspath(os.fsdecode(path))
        if not file.startswith(self.root):
            return
        self.number += 1
        if self.number == self.kill.before:
            self._die()
        os.write(self.journal, f"{kind} {file.removeprefix(self.root)}\n".encode())
        self.opened = file if kind == "open" else ""
        # What is appended to stays as it was.
        self.size_before = os.path.getsize(file) if appends and os.path.exists(file) else 0

    def _die(self) -> None:
        if self.kill.torn and os.path.isfile(self.opened):
            os.truncate(self.opened, (self.size_before + os.path.getsize(self.opened)) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    def _noted(self, original: Callable[..., Any], kind: str, path_of: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            self._note(kind, path_of(args))
            return original(*args, **kwargs)

        return noted


def _within(path: Any, folder: Any) -> Any:
    return os.path.join(_path_of(folder), os.fsdecode(path)) if isinstance(folder, int) and folder >= 0 else path


def _path_of(file: Any) -> str:
    return os.readlink(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}")


def run(function: Callable[[], int], folder: Path, kill: Kill = NONE) -> Outcome:
    """Call a function in a forked child.

    Args:
        function: gives the status to exit with.
        folder: whose files are watched; a file with what the child printed, and one with its writes, lie beside it.
        kill: when the child ends before its time.
    Returns:
        How it ended.
    """
    output, journal = (folder.with_name(f"{folder.name}.{name}") for name in ("output", "writes"))
    # A child may be killed before it opens them.
    for file in (output, journal):
        file.write_bytes(b"")
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        _be_the_child(function, _Watch(folder, kill, journal), output)
    status = _wait(child, begin + (kill.after or LONGEST))
    if status is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        status = KILLED if kill.after else HUNG
    writes = [Write(*line.split(" ", 1)) for line in journal.read_text().splitlines()]
    return Outcome(status, output.read_text(errors="replace"), writes, time.monotonic() - begin)


def _be_the_child(function: Callable[[], int], watch: _Watch, output: Path) -> None:
    """Never returns: what belongs to the parent, such as its tests and its exit handlers, must not run twice."""
    status = 1
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        # Under pytest both are objects of its own.
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        watch.install()
        status = function()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(child: int, deadline: float) -> int | None:
    """The status of a child; None if it is still running at the deadline."""
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def points(writes: list[Write], torn: bool = True) -> list[Kill]:
    """A kill in front of every write, and one that leaves each opened file half written.

    Args:
        writes: of a run that was not killed.
        torn: whether to have the second kind too.
    Returns:
        The kills, in the order of the writes.
    """
    kills = []
    for number in range(1, len(writes) + 1):
        kills.append(Kill(before=number))
        if torn and number > 1 and writes[number - 2].kind == "open":
            kills.append(Kill(before=number, torn=True))
    return kills


def random_kill(generator: random.Random, seconds: float) -> Kill:
    """A kill at a random moment of a run.

    Args:
        generator: of random numbers.
        seconds: how long the run takes.
    Returns:
        The kill.
    """
    return Kill(after=generator.uniform(0.01, seconds))
