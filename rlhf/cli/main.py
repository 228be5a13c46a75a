"""``rlhf COMMAND``: pick the command; its module is imported only then, so that help answers at once."""

import argparse
import os
import sys
import traceback
from importlib import import_module

COMMANDS = {
    "sft": "fine-tune on text, conversations, or prompts with completions",
    "dpo": "align with preference pairs (prompt, chosen, rejected)",
    "kto": "align with answers marked good or bad, without partners",
    "distill": "train a student to say what a teacher says",
    "reward": "train a reward model on preference pairs",
    "ppo": "learn from rewards, with a critic (prompts and --reward_funcs)",
    "grpo": "learn from rewards, against the mean of a group (DAPO, GSPO, …)",
    "rloo": "learn from rewards, against the others of a group",
    "online-dpo": "DPO on pairs of own completions, judged by rewards",
    "best-of-n": "fine-tune on the best of own completions",
    "student": "make a smaller model: some of a teacher's layers, or fresh",
    "teacher": "keep what a teacher says of a data set, to distill from",
    "eval": "perplexity; preferences beside a reference, or KL to a teacher",
    "data": "what a file becomes before training: columns, lengths, tokens",
    "losses": "the catalogue of losses: list, show one, advise",
}

_EXAMPLE = "on several processes: accelerate launch scripts/COMMAND.py --config FILE"


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 on success, 2 for bad input (one line on stderr; the traceback with ``--debug``)."""
    # Large tensors in pages of 2 MiB: page faults take a tenth of a training step on a CPU otherwise. torch reads this
    # at its first tensor.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        "rlhf",
        usage="rlhf [-h | --version] COMMAND ...",
        add_help=False,
        epilog=_EXAMPLE,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=15),
    )
    # Both are in the usage line, which leaves the screen to the commands.
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="store_true", help=argparse.SUPPRESS)
    title = "Fine-tune language models on text and on preferences (rlhf COMMAND --help)"
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title=title)
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    args, rest = parser.parse_known_args(argv[:1])
    if args.version:
        from rlhf import __version__

        print(__version__)
        return 0
    if args.command is None:
        parser.print_help()
        return 2 if rest else 0
    rest = argv[1:]
    debug = _take_debug(rest)
    try:
        import_module(f"rlhf.cli.{args.command.replace('-', '_')}").run(rest)
    except (ValueError, OSError, ImportError) as error:
        # Of a job's processes only the first speaks.
        if debug:
            traceback.print_exc()
        elif os.environ.get("RANK", "0") == "0":
            print(f"rlhf {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _take_debug(argv: list[str]) -> bool:
    """Remove a bare ``--debug``; with a value it is transformers' own option and stays."""
    for index, word in enumerate(argv):
        if word == "--debug" and (index + 1 == len(argv) or argv[index + 1].startswith("-")):
            del argv[index]
            return True
    return False


if __name__ == "__main__":
    sys.exit(main())
