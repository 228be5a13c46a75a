"""An audit of a data file as one page of HTML that needs nothing else."""

import html
from collections.abc import Sequence

from rlhf.evaluation.audit import Audit
from rlhf.evaluation.audit_facts import facts, histogram, interval_label
from rlhf.evaluation.pieces import Piece, middle_left_out
from rlhf.visible import visible

# Each token is an element of its own, so a very long row would make the page slow to open.
_PIECES = 2000  # of a row, shown at its beginning and at its end
_SHOWN_ERRORS = 20
# A part of the page, which must open offline and as a single file.
STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fff; --line: #d0d0d0; --soft: #f3f3f3;
  --learned: #bfeec0; --learned2: #9fe0a1; --special: #8a2be2; --bar: #5b8def; --bad: #b00020; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --paper: #161616; --line: #444; --soft: #222;
  --learned: #1f5d27; --learned2: #2a7434; --special: #d0a8ff; --bar: #5b8def; --bad: #ff8a80; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.3rem; overflow-wrap: anywhere; } h2 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; vertical-align: top;
  padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
td.n { text-align: right; white-space: nowrap; width: 1%; } td.w { width: 50%; }
.bar { background: var(--bar); height: .8rem; border-radius: 2px; } .no { opacity: .55; } .bad { color: var(--bad); }
pre { background: var(--soft); padding: .8rem; border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 14px/1.6 ui-monospace, monospace; }
pre span:nth-child(even) { background: color-mix(in srgb, var(--ink) 7%, transparent); }
pre .l { background: var(--learned); } pre .l:nth-child(even) { background: var(--learned2); }
pre .s { font-weight: 700; color: var(--special); }
"""


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _escape(text: str) -> str:
    """A text of the data for HTML."""
    return html.escape(visible(text))


def audit_page(audit: Audit) -> str:
    """Write an audit as HTML: columns, roles, figures, lengths, faults and the first rows, learned tokens on green.

    Args:
        audit: The audit.

    Returns:
        The page.
    """
    title = f"{_escape(audit.name)} as rows for rlhf {_escape(audit.command)}"
    # All text comes from a data file, in which HTML tags are common.
    column_cells = [
        (_escape(name), _escape(read_as) or _marked("no", "not read")) for name, read_as in audit.columns.items()
    ]
    figure_cells = [(_escape(name), _escape(value)) for name, value in facts(audit)]
    sections = [f"<h1>{title}</h1>", _table("Columns", column_cells, ("column", "read as"))]
    if audit.roles:
        role_cells = [(_escape(role), f"{num_turns:,}") for role, num_turns in audit.roles.most_common()]
        sections.append(_table("Roles", role_cells, ("role", "turns")))
    sections.append(_table("Rows", figure_cells))
    if audit.errors:
        error_cells = [
            (f"row {bad_row}", _marked("bad", _escape(error))) for bad_row, error in audit.errors[:_SHOWN_ERRORS]
        ]
        sections.append(_table("Rows that cannot be read", error_cells))
    sections.append(_lengths(audit))
    for row_number, sequences in audit.samples:
        sections += [f"<h2>Row {row_number}</h2><pre>{_spans(sequence)}</pre>" for sequence in sequences]
    if audit.samples:
        sections.append('<p>Tokens on <span style="background: var(--learned)">green</span> are trained.</p>')
    return _PAGE.format(title=title, style=STYLE, body="\n".join(sections))


# The functions below take and return HTML; text is escaped before.


def _marked(css_class: str, content: str) -> str:
    return f'<span class="{css_class}">{content}</span>'


def _table(title: str, rows: Sequence[tuple[str, str]], heads: Sequence[str] = ()) -> str:
    header_cells = "".join(f"<th>{name}</th>" for name in heads)
    table_rows = "".join(f'<tr><td class="w">{name}</td><td>{value}</td></tr>' for name, value in rows)
    return f"<h2>{title}</h2><table>{f'<tr>{header_cells}</tr>' if header_cells else ''}{table_rows}</table>"


def _lengths(audit: Audit) -> str:
    """A histogram of lengths; empty if there are none."""
    intervals = histogram(audit.lengths)
    if not intervals:
        return ""
    largest_count = max(num_rows for _, _, num_rows in intervals)
    table_rows = []
    for start, end, num_rows in intervals:
        bar_width = f"{100 * num_rows / largest_count:.1f}%"
        bar_cell = f'<td><div class="bar" style="width: {bar_width}"></div></td>'
        label_cell = f'<td class="n">{interval_label(start, end)}</td>'
        table_rows.append(f'<tr>{label_cell}{bar_cell}<td class="n">{num_rows:,}</td></tr>')
    return f"<h2>Length in {audit.unit}</h2><table>{''.join(table_rows)}</table>"


def _spans(sequence: list[Piece]) -> str:
    """A span for each piece; two shades, by turns, show where tokens end."""
    html_spans = []
    for piece in middle_left_out(sequence, _PIECES):
        css_classes = [css_class for css_class, applies in (("l", piece.learned), ("s", piece.special)) if applies]
        escaped_text = _escape(piece.text)
        # Every piece is a span: the style counts them to give neighbours different shades.
        html_spans.append(
            _marked(" ".join(css_classes), escaped_text) if css_classes else f"<span>{escaped_text}</span>"
        )
    return "".join(html_spans)
