"""The figures of an audit, each with its name: for the terminal and for the page."""

from collections import Counter
from collections.abc import Sequence

from rlhf.data.tokenised_rows import TOO_LONG
from rlhf.evaluation.audit import Audit


def facts(audit: Audit) -> list[tuple[str, str]]:
    """List the figures of an audit.

    Args:
        audit: The audit.

    Returns:
        Names and values, as text.
    """
    figures = [("rows", f"{audit.rows:,}")]
    # Of prompts nothing is trained: a count of 0 would look like a fault.
    if not audit.is_of_prompts:
        figures.append(("trained on", f"{audit.trained:,}"))
    for reason, row_numbers in audit.dropped.items():
        # An audit leaves these rows out by itself, training only if the user asks for it.
        remedy = "; training stops there without --drop_long_prompts" if reason == TOO_LONG else ""
        figures.append((f"dropped {reason}", _rows(row_numbers) + remedy))
    if audit.errors:
        figures.append(("cannot be read", _rows([row_number for row_number, _ in audit.errors])))
    if audit.answers:
        figures.append(("answers scored", _share(audit.scored_answers, audit.answers, ".0%")))
    if audit.tokens and not audit.is_of_prompts:
        figures.append((f"{audit.unit} scored", _share(audit.scored_tokens, audit.tokens, ".1%")))
    if audit.cut_rows:
        figures.append(("cut", f"{audit.cut_rows:,} rows to {audit.max_length:,} tokens, losing {audit.cut_tokens:,}"))
    figures += [(note, _rows(row_numbers)) for note, row_numbers in audit.notes.items()]
    return figures


def _share(part: int, whole: int, percent: str) -> str:
    return f"{part:,} of {whole:,} ({format(part / whole, percent)})"


def _rows(numbers: Sequence[int], shown: int = 5) -> str:
    """How many rows, and the first of them."""
    first_rows = dict.fromkeys(numbers[: shown + 1])  # a row may be there several times
    ellipsis = ", …" if len(numbers) > shown + 1 else ""
    return f"{len(numbers):,} (row {', '.join(map(str, first_rows))}{ellipsis})"


def histogram(lengths: Sequence[int], bins: int = 12) -> list[tuple[int, int, int]]:
    """Count lengths in intervals of equal width.

    Args:
        lengths: Any whole numbers.
        bins: How many intervals at most.

    Returns:
        Start, end (exclusive) and count of each interval.

    Example:
        >>> histogram([1, 2, 2, 9], bins=3)
        [(1, 4, 3), (4, 7, 0), (7, 10, 1)]
    """
    if not lengths:
        return []
    # The end is exclusive: plus one keeps the longest sequence inside.
    lowest, upper_end = min(lengths), max(lengths) + 1
    bin_width = -(-(upper_end - lowest) // bins)  # rounded up
    bin_counts = Counter((length - lowest) // bin_width for length in lengths)
    # Rounding up may leave the last intervals without a length; they are not listed.
    bin_starts = range(lowest, lowest + (max(bin_counts) + 1) * bin_width, bin_width)
    return [(bin_start, bin_start + bin_width, bin_counts[bin_index]) for bin_index, bin_start in enumerate(bin_starts)]


def interval_label(low: int, high: int) -> str:
    """The label of an interval of whole numbers whose end is exclusive."""
    return str(low) if high == low + 1 else f"{low}–{high - 1}"
