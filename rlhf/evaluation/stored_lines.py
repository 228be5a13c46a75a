"""Results that are stored line by line, so that an interrupted command goes on where it stopped."""

from pathlib import Path
from typing import Any

from rlhf.runs.files import append_line, read_lines


class StoredLines:
    """A file of JSON lines that is read once and then appended to.

    Args:
        file: It need not exist. A line that was not written to its end is removed.

    Raises:
        ValueError: A line is no JSON object.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.entries: list[dict[str, Any]] = read_lines(file)
        if file.exists():
            content = file.read_bytes()
            whole_length = content.rfind(b"\n") + 1
            # The next line would be appended to the unfinished one.
            if whole_length < len(content):
                file.write_bytes(content[:whole_length])

    def add(self, entry: dict[str, Any]) -> None:
        """Append an entry to the file and to :attr:`entries`.

        Args:
            entry: Values that JSON can write.

        Raises:
            OSError: The file cannot be written.
        """
        append_line(self.file, entry)
        self.entries.append(entry)
