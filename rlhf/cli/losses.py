"""``rlhf losses``: which loss for which problem, one loss in full, or the whole catalogue."""

import difflib
import textwrap
from argparse import Namespace, RawDescriptionHelpFormatter

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf.cli.docstring_text import fold, without_markup
from rlhf.cli.options import RaisingParser

# The tasks of rlhf.losses.catalogue, which imports torch: options are checked without it.
PROBLEMS = {
    "regression": "a number",
    "binary": "yes or no, also for several labels of a row",
    "multiclass": "one class among several",
    "language-model": "the next token",
    "embeddings": "which items belong together",
    "distillation": "what a teacher model predicts",
    "preferences": "the better of two answers",
    "reward": "a score for answers, from preferences",
    "rl": "actions, from rewards",
}
ACTIONS = ("list", "show", "advise")
_COMMANDS = """\
rlhf losses NAME                                   one loss: formula, arguments
rlhf losses advise --task binary --imbalance 0.05  where to start, and why
rlhf losses list                                   all losses, by family"""


def run(argv: list[str]) -> None:
    """List the losses by problem or by family, show one, or recommend some.

    Args:
        argv: words of the command line, after the command.

    Raises:
        ValueError: an unknown loss, task or option.
    """
    # A name alone shows the loss.
    if argv and not argv[0].startswith("-") and argv[0] not in ACTIONS:
        argv = ["show", *argv]
    options = _parser().parse_args(argv)
    # From here on torch is needed.
    if options.action == "show":
        _show(options.name)
    elif options.action == "advise":
        _advise(options)
    elif options.action == "list":
        _list()
    elif options.markdown:
        from rlhf.cli.losses_table import markdown

        print(markdown(), end="")
    else:
        _by_problem()


def _parser() -> RaisingParser:
    parser = RaisingParser(
        "rlhf losses",
        usage="rlhf losses [NAME | ACTION ...] [--markdown]",
        description="Alone: which loss for which problem. With the name of a loss: its formula\nand arguments.",
        epilog=_COMMANDS,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--markdown", action="store_true", help="all losses, as the table of docs/losses.md")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", prog="rlhf losses", parser_class=RaisingParser)
    actions.add_parser("list", help="all losses by family, with what they do")
    show_parser = actions.add_parser("show", help="one loss: formula, arguments, paper and a worked number")
    show_parser.add_argument("name", metavar="NAME")
    advise_parser = actions.add_parser("advise", help="from a problem to losses, with starting values")
    advise_parser.add_argument("--task", required=True, metavar="TASK", help=", ".join(PROBLEMS))
    advise_parser.add_argument("--imbalance", type=float, metavar="SHARE", help="share of the rarer class")
    advise_parser.add_argument("--outliers", action="store_true", help="some targets are far off")
    advise_parser.add_argument("--noise", type=float, default=0.0, metavar="SHARE", help="share of wrong labels")
    advise_parser.add_argument("--unpaired", action="store_true", help="answers marked good or bad, not pairs")
    return parser


def _by_problem() -> None:
    from rlhf.losses.catalogue import advise

    console = Console(highlight=False)
    console.print("Which loss for which problem; start with the first\n")
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for task, description in PROBLEMS.items():
        names = ", ".join(dict.fromkeys(advice.loss for advice in advise(task)))
        table.add_row(Text(task), Text(f"{description}: {names}"))
    console.print(table)
    console.print(Text(f"\n{_COMMANDS}"), soft_wrap=True)


def _list() -> None:
    from rlhf.losses.catalogue import entries

    catalogue = entries()
    name_width = max(len(entry.name) for entry in catalogue)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, min_width=name_width)
    table.add_column(overflow="fold")
    family = ""
    for entry in catalogue:
        if entry.family != family:
            # A blank line in front of each family but the first.
            table.add_row(Text(f"{family and chr(10)}{entry.family}", style="bold"), "")
            family = entry.family
        table.add_row(Text(entry.name), Text(without_markup(entry.summary)))
    Console(highlight=False).print(table)


def _show(name: str) -> None:
    from rlhf.losses.catalogue import find

    try:
        entry = find(name)
    except ValueError:
        if near_actions := difflib.get_close_matches(name, ACTIONS, n=1, cutoff=0.7):
            raise ValueError(f"no loss {name!r}; did you mean `rlhf losses {near_actions[0]}`?") from None
        raise
    width = Console().width
    signature = textwrap.fill(entry.signature, width, subsequent_indent="    ", break_long_words=False)
    print(f"{entry.family}\n\n{signature}\n\n{fold(without_markup(entry.documentation), width)}")


def _advise(options: Namespace) -> None:
    from rlhf.losses.catalogue import advise

    advices = advise(
        options.task,
        imbalance=options.imbalance,
        outliers=options.outliers,
        noise=options.noise,
        pairs=not options.unpaired,
    )
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for number, advice in enumerate(advices, 1):
        lines = [line for line in (advice.start, advice.why) if line]
        table.add_row(f"{number}.", Text("\n".join((advice.loss, *lines))))
    Console(highlight=False).print(table)
