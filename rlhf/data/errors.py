"""Where a fault was found, in front of what it is."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def error_context(location: str) -> Iterator[None]:
    """Begin the message of a ``ValueError`` with the place where it was found.

    Args:
        location: A file, a row, or another place, for people.

    Raises:
        ValueError: As raised inside, with ``location`` in front.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{location}: {error}") from error
