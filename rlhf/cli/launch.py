"""``--num_processes`` and ``--accelerate_config``: a command in several processes, by accelerate's own launcher."""

import os
import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any, ClassVar

from rlhf.cli.exit_codes import SIGNAL_BASE, ExitCode
from rlhf.cli.options import RaisingParser, config_folder

_BY_US = "RLHF_LAUNCHED"  # accelerate sets nothing where it starts a single process
# Each process that was launched has one of them.
_LAUNCHED = frozenset({"WORLD_SIZE", _BY_US})


@dataclass
class LaunchArguments:
    """In how many processes a command runs. These two are taken out of the command line before all others are read."""

    title: ClassVar[str] = "several processes"

    num_processes: int | None = field(default=None, metadata={"help": "Processes, one for each GPU."})
    accelerate_config: str | None = field(
        default=None,
        metadata={"help": "YAML file of accelerate, or a shipped one: fsdp2, multi_gpu, single_gpu, two_cpu, zero3."},
    )


def split_launch_options(argv: list[str]) -> tuple[LaunchArguments, list[str]]:
    """Take the options of the launcher out of a command line.

    Args:
        argv: words after the command.

    Returns:
        What was asked for, and the words that are left.
    """
    # -h and shortened names stay among the words: the command's own parser answers them.
    parser = RaisingParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--num_processes", "--num-processes", type=int)
    parser.add_argument("--accelerate_config", "--accelerate-config")
    options, rest = parser.parse_known_args(argv)
    return LaunchArguments(**vars(options)), rest


def launch_words(values: Mapping[str, Any]) -> list[str]:
    """The options of the launcher in a file of options, as words to put before those of the command line.

    Args:
        values: of the file, by the names of their options.

    Returns:
        Words; none in a process that was launched already.
    """
    if not _LAUNCHED.isdisjoint(os.environ):
        return []
    return [f"--{option.name}={values[option.name]}" for option in fields(LaunchArguments) if option.name in values]


def launch(command: str, argv: list[str], options: LaunchArguments) -> int:
    """Run ``rlhf COMMAND`` in several processes, and wait for them.

    Args:
        command: name of the command.
        argv: its words, without those of the launcher.
        options: number of processes and file for accelerate.

    Returns:
        0; the exit status of the process that failed first; or that of the signal that ended the launcher.

    Raises:
        ValueError: fewer than one process, or this is one of several already.
        FileNotFoundError: no such file for accelerate.
    """
    # Every launcher of several processes sets this for each of them.
    if "WORLD_SIZE" in os.environ:
        raise ValueError("these processes were launched already: give --num_processes to the launcher instead")
    words = _launcher_words(options)

    # Both import torch, so only here, after the options are checked.
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    arguments = launch_command_parser().parse_args([*words, "--module", "rlhf", command, *argv])
    os.environ[_BY_US] = "1"
    try:
        launch_command(arguments)
    except ChildFailedError as error:
        # The process has said what was wrong; a traceback of the launcher would hide it.
        return first_status([(failure.timestamp, failure.exitcode) for failure in error.failures.values()])
    except SignalException as error:
        # The launcher has passed the signal on, and waited for the processes.
        return ExitCode.of_signal(error.sigval)
    except CalledProcessError as error:
        return error.returncode
    finally:
        del os.environ[_BY_US]
    return 0


def first_status(failures: Iterable[tuple[int, int]]) -> int:
    """The exit status of the process that failed first.

    Args:
        failures: time in seconds, and exit status, of each process that failed; below 0 where a signal ended it.

    Returns:
        The status as a shell reports it: 128 and the signal's number where a signal ended the process.
    """
    # The launcher ends the other processes with SIGTERM, within the same second.
    by_cause = sorted((exitcode == -signal.SIGTERM, time, exitcode) for time, exitcode in failures)
    _, _, status = by_cause[0]
    return status if status >= 0 else SIGNAL_BASE - status


def _launcher_words(options: LaunchArguments) -> list[str]:
    words = []
    if options.accelerate_config is not None:
        words += ["--config_file", str(accelerate_file(options.accelerate_config))]
    if options.num_processes is not None:
        if options.num_processes < 1:
            raise ValueError(f"--num_processes must be at least 1, got {options.num_processes}")
        words += ["--num_processes", str(options.num_processes)]
        # Without a file accelerate starts several processes only when it is told how.
        if options.num_processes > 1 and options.accelerate_config is None:
            words.append("--multi_gpu")
    return words


def accelerate_file(name: str) -> Path:
    """Path of a file for accelerate.

    Args:
        name: a path, or the name of a file in ``configs/accelerate`` without its ending.

    Returns:
        The path of the file.

    Raises:
        FileNotFoundError: there is neither.
    """
    # A file of the user's wins over one of ours with the same name.
    path = Path(name)
    if path.is_file():
        return path
    shipped = sorted((config_folder() / "accelerate").glob("*.yaml"))
    for file in shipped:
        if name in (file.stem, file.name):
            return file
    names = ", ".join(file.stem for file in shipped)
    raise FileNotFoundError(f"--accelerate_config {name}: no such file, and none of {names}")
