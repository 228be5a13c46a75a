"""Output that outlasts its reader: a run must not end because nobody reads what it prints."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class LastingStream:
    """A stream of text. Once it cannot be written to, as a pipe whose reader has ended, all goes nowhere.

    Args:
        stream: such as ``sys.stdout``. What is not about writing is left to it.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text, or drop it.

        Args:
            text: what is to be written.
        Returns:
            Its length.
        """
        try:
            return self._stream.write(text)
        except OSError:
            self._write_nowhere()
            return len(text)

    def flush(self) -> None:
        """Write what is still in memory, or drop it."""
        try:
            self._stream.flush()
        except OSError:
            self._write_nowhere()

    def _write_nowhere(self) -> None:
        # The file number stays the same, so that whoever else writes to it, Python's own exit too, sees no error.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, self._stream.fileno())
        except OSError:
            pass  # a stream in memory has no file
        finally:
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Let a pipe that is closed, or a disk that is full, not end what runs now."""
    streams = sys.stdout, sys.stderr
    lasting_streams = LastingStream(streams[0]), LastingStream(streams[1])
    sys.stdout, sys.stderr = lasting_streams
    try:
        yield
    finally:
        for stream in lasting_streams:
            stream.flush()
        sys.stdout, sys.stderr = streams
