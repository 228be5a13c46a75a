"""Control characters as text: what a file or a model wrote must not steer the terminal that shows it."""

import logging
import unicodedata

# Directions of writing are invisible, and make a text look like another.
_DIRECTIONS = (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C)
_LINES = ("\n", "\t")
_CONTROLS = [code for code in range(0xA0) if unicodedata.category(chr(code)) == "Cc" and chr(code) not in _LINES]


def _escaped(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


_TABLE = {code: _escaped(code) for code in (*_CONTROLS, *_DIRECTIONS, 0x2028, 0x2029)}


def visible(text: str) -> str:
    r"""Write control characters as Python does, such as ``\x1b``; line breaks and tabs stay.

    Args:
        text: Of a data file, a model or a folder's name.

    Returns:
        A text that is safe to print.
    """
    return text.translate(_TABLE)


class VisibleFormatter(logging.Formatter):
    """Log messages without control characters: they quote data."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record.

        Args:
            record: Of the log.

        Returns:
            Its text.
        """
        return visible(super().format(record))
