"""``rlhf losses``: the catalogue, one loss in full, or advice."""

import argparse
import re
from typing import NoReturn

from rich.console import Console
from rich.table import Table

from rlhf.losses.catalogue import advise, entries, find


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def run(argv: list[str]) -> None:
    parser = _Parser("rlhf losses", description="The catalogue of losses; alone, a list.")
    parser.add_argument("--markdown", action="store_true", help="the list as the table of docs/losses.md")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", parser_class=_Parser)
    show = actions.add_parser("show", help="one loss: formula, paper, signature and a worked number")
    show.add_argument("name")
    guide = actions.add_parser("advise", help="from a problem to losses and where to start")
    guide.add_argument("--task", required=True, help="regression, binary, multiclass, language-model, preferences, …")
    guide.add_argument("--imbalance", type=float, help="share of the rarer class")
    guide.add_argument("--outliers", action="store_true", help="some targets are far off")
    guide.add_argument("--noise", type=float, default=0.0, help="share of labels thought wrong")
    guide.add_argument("--unpaired", action="store_true", help="preferences without partners")
    args = parser.parse_args(argv)
    if args.action == "show":
        entry = find(args.name)
        print(f"{entry.family}\n\n{entry.signature}\n\n{entry.documentation}")
    elif args.action == "advise":
        table = Table("loss", "start with", "why")
        found = advise(
            args.task, imbalance=args.imbalance, outliers=args.outliers, noise=args.noise, pairs=not args.unpaired
        )
        for advice in found:
            table.add_row(advice.loss, advice.start, advice.why)
        Console().print(table)
    elif args.markdown:
        print(markdown(), end="")
    else:
        table = Table("family", "loss", "what it does")
        for entry in entries():
            table.add_row(entry.family, entry.name, entry.summary)
        Console().print(table, markup=False)


def markdown() -> str:
    """The table of docs/losses.md."""
    lines = ["| loss | what it does | formula | source |", "|---|---|---|---|"]
    family = ""
    for entry in entries():
        if entry.family != family:
            family = entry.family
            lines.append(f"| **{family}** | | | |")
        formula = f"${entry.formula}$".replace("|", r"\vert ") if entry.formula else ""
        cells = (f"`{entry.name}`", entry.summary, formula, entry.source)
        lines.append("| " + " | ".join(cell.replace(" | ", " / ") for cell in cells) + " |")
    return re.sub(r"(?::func:|:data:)?`+([^`]+)`+", r"`\1`", "\n".join(lines) + "\n")
