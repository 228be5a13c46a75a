"""An audit of a data file on a terminal."""

from itertools import groupby

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rlhf.evaluation.audit import Audit
from rlhf.evaluation.audit_facts import facts, histogram
from rlhf.evaluation.pieces import Piece, middle_left_out

_LEARNED = ("black on pale_green3", "black on dark_sea_green3")  # two shades show where tokens end
_CONTEXT = ("", "on grey19")
_SPECIAL = "bold magenta"
_BAR = 40
_PIECES = 400  # of a row, shown at its beginning and at its end


def show_audit(found: Audit, console: Console | None = None) -> None:
    """Print columns, roles, figures, lengths, faults and the first rows."""
    console = console or Console()
    console.print(f"[bold]{escape(found.name)}[/bold] as rows for [bold]rlhf {found.command}[/bold]")
    columns = Table("column", "read as")
    for theirs, ours in found.columns.items():
        columns.add_row(escape(theirs), escape(ours) if ours else "[dim]not read[/dim]")
    console.print(columns)
    if found.roles:
        roles = Table("role", "turns")
        for role, count in found.roles.most_common():
            roles.add_row(escape(role), f"{count:,}")
        console.print(roles)
    figures = Table(show_header=False)
    for name, value in facts(found):
        figures.add_row(escape(name), escape(value))
    console.print(figures)
    for number, error in found.errors[:5]:
        console.print(Text(f"row {number}: {error}", "red"))
    _show_lengths(found, console)
    for number, shown in found.samples:
        for own in shown:
            console.print(
                Panel(_text(own, marked=console.color_system is None), title=f"row {number}", title_align="left")
            )
    if found.samples:
        legend = "between ⟦ and ⟧" if console.color_system is None else "on green"
        console.print(f"Learned is what stands {legend}.")


def _show_lengths(found: Audit, console: Console) -> None:
    bins = histogram(found.lengths)
    most = max((count for _, _, count in bins), default=0)
    if not most:
        return
    table = Table(f"length in {found.unit}", "", "", show_edge=False)
    for low, high, count in bins:
        label = str(low) if high == low + 1 else f"{low}–{high - 1}"
        table.add_row(label, "█" * max(round(_BAR * count / most), count > 0), f"{count:,}")
    console.print(table)


def _text(shown: list[Piece], marked: bool) -> Text:
    """The pieces as one text, learned ones on green; ``marked`` puts brackets around them instead."""
    text = Text()
    for number, piece in enumerate(middle_left_out(shown, _PIECES)):
        shade = (_LEARNED if piece.learned else _CONTEXT)[number % 2]
        style = f"{_SPECIAL} {shade}".strip() if piece.special and not piece.learned else shade
        text.append(piece.text, f"bold {shade}" if piece.special and piece.learned else style)
    if not marked:
        return text
    plain = Text()
    for learned, run in groupby(middle_left_out(shown, _PIECES), key=lambda piece: piece.learned):
        joined = "".join(piece.text for piece in run)
        plain.append(f"⟦{joined}⟧" if learned else joined)
    return plain
