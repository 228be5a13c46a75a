"""An audit of a data file on a terminal."""

from itertools import groupby

from rich import markup
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rlhf.evaluation.audit import Audit
from rlhf.evaluation.audit_facts import facts, histogram, interval_label
from rlhf.evaluation.pieces import Piece, middle_left_out
from rlhf.visible import visible

_LEARNED = ("black on pale_green3", "black on dark_sea_green3")  # two shades show where tokens end
_CONTEXT = ("", "on grey19")
_SPECIAL = "bold magenta"
_BAR = 40  # characters of the longest bar
_SHOWN_ERRORS = 5
_PIECES = 400  # of a row, shown at its beginning and at its end


def _escape(text: str) -> str:
    """A text of the data for rich, which reads words in square brackets as styles."""
    return markup.escape(visible(text))


def show_audit(audit: Audit, console: Console | None = None) -> None:
    """Print columns, roles, figures, lengths, faults and the first rows.

    Args:
        audit: The audit.
        console: Where to print; a new one by default.
    """
    console = console or Console()
    console.print(f"[bold]{_escape(audit.name)}[/bold] as rows for [bold]rlhf {audit.command}[/bold]")
    column_table = Table("column", "read as")
    for name, read_as in audit.columns.items():
        column_table.add_row(_escape(name), _escape(read_as) if read_as else "[dim]not read[/dim]")
    console.print(column_table)
    if audit.roles:
        role_table = Table("role", "turns")
        for role, num_turns in audit.roles.most_common():
            role_table.add_row(_escape(role), f"{num_turns:,}")
        console.print(role_table)
    figure_table = Table(show_header=False)
    for name, value in facts(audit):
        figure_table.add_row(_escape(name), _escape(value))
    console.print(figure_table)
    for row_number, error in audit.errors[:_SHOWN_ERRORS]:
        # Errors quote the data, so they are printed as they are.
        console.print(Text(visible(f"row {row_number}: {error}"), "red"))
    _show_lengths(audit, console)
    _show_samples(audit, console)


def _show_lengths(audit: Audit, console: Console) -> None:
    """Print a histogram of lengths, if there are any."""
    intervals = histogram(audit.lengths)
    if not intervals:
        return
    largest_count = max(num_rows for _, _, num_rows in intervals)
    length_table = Table(f"length in {audit.unit}", "", "", show_edge=False)
    for interval_start, interval_end, num_rows in intervals:
        bar_length = round(_BAR * num_rows / largest_count)
        bar_length = max(bar_length, num_rows > 0)  # a bar for a single row, too
        length_table.add_row(interval_label(interval_start, interval_end), "█" * bar_length, f"{num_rows:,}")
    console.print(length_table)


def _show_samples(audit: Audit, console: Console) -> None:
    # Colours are lost in a pipe or a log file: there, brackets show what is learned.
    has_colours = console.color_system is not None
    for row_number, sequences in audit.samples:
        for sequence in sequences:
            shown_pieces = middle_left_out(sequence, _PIECES)
            panel_text = _shaded(shown_pieces) if has_colours else _bracketed(shown_pieces)
            console.print(Panel(panel_text, title=f"row {row_number}", title_align="left"))
    if audit.samples:
        console.print(f"Tokens {'on green' if has_colours else 'between ⟦ and ⟧'} are trained.")


def _shaded(pieces: list[Piece]) -> Text:
    """The pieces as one text, learned ones on green."""
    shaded_text = Text()
    for piece_index, piece in enumerate(pieces):
        shades = _LEARNED if piece.learned else _CONTEXT
        style = shades[piece_index % 2]
        if piece.special:
            # The magenta of special tokens would replace the black that is readable on green.
            style = f"{'bold' if piece.learned else _SPECIAL} {style}".strip()
        shaded_text.append(visible(piece.text), style)
    return shaded_text


def _bracketed(pieces: list[Piece]) -> Text:
    """The pieces as one text, learned ones in brackets."""
    bracketed_text = Text()
    # Neighbours are joined: a pair of brackets around each token would hide the text.
    for is_learned, neighbours in groupby(pieces, key=lambda piece: piece.learned):
        joined_text = visible("".join(piece.text for piece in neighbours))
        bracketed_text.append(f"⟦{joined_text}⟧" if is_learned else joined_text)
    return bracketed_text
