"""``rlhf COMMAND``: choose the command, check the names of its options, and only then import what it needs."""

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from rlhf import __version__
from rlhf.cli.cache_folder import move_caches
from rlhf.cli.commands import COMMANDS, GROUPS, LAUNCH, Command, TrainingCommand
from rlhf.cli.exit_codes import ExitCode
from rlhf.cli.failing import MENDABLE, fail, in_several_processes, interrupted
from rlhf.cli.field_names import names_of_options
from rlhf.cli.launch import LaunchArguments, launch, launch_words, split_launch_options
from rlhf.cli.options import check_options, expand_aliases, read_config, value_of
from rlhf.cli.quiet import is_debugging, leave_out_bars, leave_out_messages
from rlhf.secret_names import without_secret_words
from rlhf.visible import VisibleFormatter

# What torch reads from the environment when it first needs it; a user's own value stays.
TORCH_ENVIRONMENT = {
    # Large tensors in pages of 2 MiB: page faults take a tenth of a training step on a CPU otherwise.
    "THP_MEM_ALLOC_ENABLE": "1",
    # oneDNN, and torch in front of it, keep an operator for each shape of its inputs, 1024 in each of two caches. Each
    # length of a batch is a new shape, so that memory grows for thousands of steps. One step of a Llama needs 15.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    "LRU_CACHE_CAPACITY": "128",
}
_EXAMPLE = """from a file to a model in use:
  rlhf data FILE → rlhf sft … --dry_run → rlhf sft … → rlhf report RUN
  → rlhf compare RUN BASE → rlhf chat RUN → rlhf merge, rlhf export
in several processes: rlhf COMMAND --config FILE --num_processes N"""


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: words of the command line; by default those of this process.

    Returns:
        The exit status, one of :class:`rlhf.cli.exit_codes.ExitCode`. One line on stderr says what is wrong with bad
        input (the traceback with ``--debug``).
    """
    for variable, value in TORCH_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    if argv is None:
        argv = sys.argv[1:]
        # wandb stores these words.
        sys.argv[1:] = without_secret_words(argv)
    argv = list(argv)
    parser = _parser()
    # The first word alone: all that follows belongs to the command.
    options, unknown = parser.parse_known_args(argv[:1])
    if options.version:
        print(__version__)
        return ExitCode.SUCCESS
    if options.command is None:
        parser.print_help()
        return ExitCode.BAD_INPUT if unknown else ExitCode.SUCCESS
    name, words = options.command, argv[1:]
    debug = _remove_debug(words)
    try:
        return _run(name, COMMANDS[name], words, debug)
    except MENDABLE as error:
        return fail(name, error, debug)
    except KeyboardInterrupt:
        return interrupted(name)
    except Exception as error:
        # A bug keeps its traceback; among several processes it also needs the number of the one that had it.
        if not in_several_processes():
            raise
        return fail(name, error, debug)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "rlhf",
        usage="rlhf [-h | --version] COMMAND ...",
        add_help=False,
        description=_description(),
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # Both are in the usage line, which leaves the screen to the commands.
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="store_true", help=argparse.SUPPRESS)
    # The description lists them under headings, which argparse has for options only.
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", help=argparse.SUPPRESS)
    for name in COMMANDS:
        commands.add_parser(name, add_help=False)
    return parser


def _description() -> str:
    lines = ["Fine-tune language models on text and on preferences (rlhf COMMAND --help)"]
    for group in GROUPS:
        lines += ["", f"{group}:"]
        lines += [f"  {name:10}  {command.summary}" for name, command in COMMANDS.items() if command.group == group]
    return "\n".join(lines)


def _run(name: str, command: Command | TrainingCommand, words: list[str], debug: bool) -> int:
    values = {}
    # Names first, as they are known without importing torch; values are checked when the command reads them.
    if command.option_classes and not {"-h", "--help"} & set(words):
        known_names = names_of_options(command.option_classes)
        words = expand_aliases(words, known_names)
        file = check_options(words, known_names | {"config"})
        values = {} if file is None else read_config(file, known_names)
        # Before a package is imported that reads where its cache is.
        move_caches(value_of("cache_dir", words) or values.get("cache_dir"))
    if LAUNCH in command.option_classes:
        launch_options, words = split_launch_options([*launch_words(values), *words])
        if launch_options != LaunchArguments():
            return launch(name, [*words, "--debug"] if debug else words, launch_options)
    _log_plain_lines()
    if isinstance(command, TrainingCommand):
        with _nothing_to_save():
            status: int = _module("rlhf.cli.training", debug).run(name, command, words)
            return status
    # Most commands return nothing; one that starts others returns their status.
    return _module(command.module, debug).run(words) or ExitCode.SUCCESS


def _module(name: str, debug: bool) -> Any:
    """Import the module of a command, and leave out what other packages tell needlessly."""
    if is_debugging(debug):
        return import_module(name)
    leave_out_messages()
    module = import_module(name)
    leave_out_bars()
    return module


@contextmanager
def _nothing_to_save() -> Iterator[None]:
    """Ignore the signal that asks to save until training begins: it would end a process that does not know it."""
    number = getattr(signal, "SIGUSR1", None)  # not on Windows
    if number is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    previous_handler = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, previous_handler)


class _StandardError(logging.StreamHandler[Any]):
    """Writes to what ``sys.stderr`` is at the time: a live bar puts messages above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _log_plain_lines() -> None:
    """Our own messages as plain lines, from the first process only."""
    handler = _StandardError()
    handler.setFormatter(VisibleFormatter("%(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("rlhf").setLevel(logging.INFO if _is_first_process() else logging.ERROR)


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _remove_debug(words: list[str]) -> bool:
    """Remove a bare ``--debug``; with a value it is an option of transformers, and stays."""
    for index, word in enumerate(words):
        if word == "--debug" and (index + 1 == len(words) or words[index + 1].startswith("-")):
            del words[index]
            return True
    return False


if __name__ == "__main__":
    sys.exit(main())
