"""Prompts from lines: of a terminal, or of a file or pipe."""

from collections.abc import Callable, Iterator

QUOTES = '"""'


def read_prompt(read_line: Callable[[bool], str]) -> str:
    r'''Read a prompt of one line or several.

    A line that ends with a backslash goes on. Lines between ``"""`` and ``"""`` are one prompt.

    Args:
        read_line: gives the next line without its line break; it is told whether the prompt goes on.

    Returns:
        The prompt.

    Raises:
        EOFError: the lines end.

    Example:
        >>> lines = iter(["one \\", "two"])
        >>> read_prompt(lambda goes_on: next(lines))
        'one \ntwo'
    '''
    line = read_line(False)
    if line.startswith(QUOTES):
        return _read_quoted(line.removeprefix(QUOTES), read_line)
    lines = []
    while line.endswith("\\"):
        lines.append(line.removesuffix("\\"))
        line = read_line(True)
    return "\n".join([*lines, line])


def _read_quoted(line: str, read_line: Callable[[bool], str]) -> str:
    lines = []
    while not line.rstrip().endswith(QUOTES):
        lines.append(line)
        line = read_line(True)
    lines.append(line.rstrip().removesuffix(QUOTES))
    return "\n".join(lines).strip("\n")


def lines_of(stream: Iterator[str]) -> Callable[[bool], str]:
    """Read lines from a file or a pipe.

    Args:
        stream: an open text file.

    Returns:
        A function for :func:`read_prompt`.
    """

    def read_line(_goes_on: bool) -> str:
        try:
            return next(stream).rstrip("\r\n")
        except StopIteration:
            raise EOFError from None

    return read_line
