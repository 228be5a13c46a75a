"""With which status a command ends. ``docs/exit-codes.md`` says what each means."""

from enum import IntEnum

SIGNAL_BASE = 128  # shells report a process that a signal ended as 128 and the signal's number


class ExitCode(IntEnum):
    """The exit status of a command."""

    SUCCESS = 0
    BUG = 1  # Python's own, after a traceback
    BAD_INPUT = 2
    NOT_FINITE = 3
    INTERRUPTED = 130  # SIGINT
    TERMINATED = 143  # SIGTERM

    @classmethod
    def of_signal(cls, number: int) -> "ExitCode":
        """The status of a run that a signal stopped.

        Args:
            number: of the signal.
        Returns:
            130 or 143.
        """
        return cls(SIGNAL_BASE + number)
