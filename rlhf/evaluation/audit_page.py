"""An audit of a data file as one page of HTML that needs nothing else."""

from html import escape

from rlhf.evaluation.audit import Audit
from rlhf.evaluation.audit_facts import facts, histogram
from rlhf.evaluation.pieces import Piece, middle_left_out

_PIECES = 2000
_STYLE = """
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


def audit_page(found: Audit) -> str:
    """The page: columns, roles, figures, lengths, faults and the first rows, learned tokens on green."""
    title = f"{escape(found.name)} as rows for rlhf {escape(found.command)}"
    parts = [f"<h1>{title}</h1>"]
    columns = [
        (escape(theirs), escape(ours) or '<span class="no">not read</span>') for theirs, ours in found.columns.items()
    ]
    parts.append(_table("Columns", ("column", "read as"), columns))
    if found.roles:
        parts.append(
            _table("Roles", ("role", "turns"), [(escape(role), f"{n:,}") for role, n in found.roles.most_common()])
        )
    parts.append(_table("Rows", (), [(escape(name), escape(value)) for name, value in facts(found)]))
    if found.errors:
        lines = [(f"row {number}", f'<span class="bad">{escape(error)}</span>') for number, error in found.errors[:20]]
        parts.append(_table("Rows that cannot be read", (), lines))
    parts.append(_lengths(found))
    for number, shown in found.samples:
        parts += [f"<h2>Row {number}</h2><pre>{_spans(own)}</pre>" for own in shown]
    if found.samples:
        parts.append('<p>Learned is what stands on <span style="background: var(--learned)">green</span>.</p>')
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _table(title: str, heads: tuple[str, ...], rows: list[tuple[str, str]]) -> str:
    head = "<tr>" + "".join(f"<th>{name}</th>" for name in heads) + "</tr>" if heads else ""
    body = "".join(f'<tr><td class="w">{name}</td><td>{value}</td></tr>' for name, value in rows)
    return f"<h2>{title}</h2><table>{head}{body}</table>"


def _lengths(found: Audit) -> str:
    bins = histogram(found.lengths)
    most = max((count for _, _, count in bins), default=0)
    if not most:
        return ""
    rows = "".join(
        f'<tr><td class="n">{low if high == low + 1 else f"{low}–{high - 1}"}</td>'
        f'<td><div class="bar" style="width: {100 * count / most:.1f}%"></div></td><td class="n">{count:,}</td></tr>'
        for low, high, count in bins
    )
    return f"<h2>Length in {found.unit}</h2><table>{rows}</table>"


def _spans(shown: list[Piece]) -> str:
    found = []
    for piece in middle_left_out(shown, _PIECES):
        names = " ".join(name for name, on in (("l", piece.learned), ("s", piece.special)) if on)
        found.append(
            f'<span class="{names}">{escape(piece.text)}</span>' if names else f"<span>{escape(piece.text)}</span>"
        )
    return "".join(found)
