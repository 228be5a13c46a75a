"""A docstring as text for a terminal: without the marks of Sphinx, folded to its width."""

import re
import textwrap


def without_markup(documentation: str) -> str:
    """Remove what only Sphinx understands.

    Args:
        documentation: text with roles, double backquotes and ``.. math::``.

    Returns:
        The text; a formula stays TeX.
    """
    text = re.sub(r"\.\. math::\s*", "", documentation)
    return re.sub(r"(?::[a-z]+:)?`+([^`]+)`+", r"\1", text)


def fold(text: str, width: int) -> str:
    """Fold a docstring to the width of a terminal.

    Args:
        text: paragraphs and sections in Google form, without a common indentation.
        width: of the terminal, in columns.

    Returns:
        The same words. Examples keep their lines.
    """
    return "\n".join(_fold_block(block, width) for block in _blocks(text.splitlines()))


def _blocks(lines: list[str]) -> list[list[str]]:
    """Lines that are folded together: a paragraph, an argument with its further lines, or a line of an example."""
    blocks: list[list[str]] = []
    in_example = False
    for line in lines:
        in_example = bool(line.strip()) and (in_example or line.lstrip().startswith(">>>"))
        if blocks and not in_example and _continues(blocks[-1], line):
            blocks[-1].append(line)
        else:
            blocks.append([line])
    return blocks


def _continues(block: list[str], line: str) -> bool:
    first = block[0]
    is_separate = not line.strip() or not first.strip() or _is_heading(line) or _is_heading(first)
    if is_separate or first.lstrip().startswith(">>>"):
        return False
    # Text of a paragraph has one indentation; the further lines of an argument are indented more than its first.
    return _indentation(line) > _indentation(first) or _indentation(line) == 0


def _is_heading(line: str) -> bool:
    return re.fullmatch(r"[A-Z][a-z]+:", line) is not None


def _indentation(line: str) -> int:
    return len(line) - len(line.lstrip())


def _fold_block(block: list[str], width: int) -> str:
    # Code is not text: a line of it would no longer run.
    is_code = block[0].lstrip().startswith(">>>")
    if is_code or (len(block[0]) <= width and len(block) == 1):
        return block[0]
    first_indent = " " * _indentation(block[0])
    words = " ".join(line.strip() for line in block)
    further_indent = first_indent * 2
    return textwrap.fill(
        words,
        width,
        initial_indent=first_indent,
        subsequent_indent=further_indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
