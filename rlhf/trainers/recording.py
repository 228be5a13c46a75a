"""What a run records in ``run.yaml``: the options that it was given, its data, its model, and how it ended."""

import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import TrainerState

from rlhf.data import Mixture
from rlhf.data.streams import name_of, source_of
from rlhf.runs.facts import data_files, git_state, machine, versions
from rlhf.runs.record import FINISHED, RUNNING, continue_record, now, write_record
from rlhf.runs.report import write_report_at_end
from rlhf.secret_names import MASK, without_secret_words
from rlhf.trainers.option_changes import recorded_options
from rlhf.trainers.preparation import sets_of
from rlhf.trainers.secret_options import without_secrets

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CommandRecord:
    """How a command was called.

    Attributes:
        command: its name, such as ``dpo``; None where a program uses a trainer.
        words: of the command line.
        options: those that were given, in a file or as words, by name.
    """

    command: str | None = None
    words: list[str] = field(default_factory=lambda: list(sys.argv))
    options: dict[str, Any] | None = None


@dataclass(frozen=True)
class DataSource:
    """A data set as it was passed to a trainer.

    Attributes:
        name: of the data set; with the slice, where it is one.
        source: the file, folder or pattern that it was read from, or another name.
        rows: their number; None for a stream.
        use: ``train`` or ``eval``.
    """

    name: str
    source: str
    rows: int | None
    use: str

    def as_record(self) -> dict[str, Any]:
        """For ``run.yaml``; the files are hashed."""
        # A stream may be larger than anybody wants to read twice.
        files = data_files(self.source) if self.rows is not None else []
        return {"name": self.name, "use": self.use, "rows": self.rows, "files": files}


def data_sources(train_rows: Any, eval_rows: Any) -> list[DataSource]:
    """The data sets of a run.

    Args:
        train_rows: as the user passed them: a data set, a stream, a mixture, or None.
        eval_rows: alike, or a dictionary of them.

    Returns:
        One entry for each data set, of a mixture for each part.
    """
    parts = [(rows, "train") for rows in sets_of(train_rows)] + [(rows, "eval") for rows in sets_of(eval_rows)]
    whole = [
        (part, use) for rows, use in parts for part in (rows.parts if isinstance(rows, Mixture) else [rows]) if part
    ]
    return [
        DataSource(name_of(part), source_of(part), len(part) if isinstance(part, Dataset) else None, use)
        for part, use in whole
    ]


def model_facts(model: nn.Module) -> dict[str, Any]:
    """The model of a run.

    Args:
        model: of transformers, whole, with its adapter.

    Returns:
        ``name``, ``parameters``, ``trainable``, and ``dtype`` of the trained weights.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in trained}
    return {
        "name": getattr(model.config, "_name_or_path", None) or None,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trainable": sum(parameter.numel() for parameter in trained),
        "dtype": ", ".join(sorted(dtypes)),
    }


def begin_record(
    folder: Path,
    call: CommandRecord,
    config: Any,
    facts: Mapping[str, Any],
    data: Sequence[DataSource],
    continues: bool,
) -> "OpenRecord":
    """Write ``run.yaml`` of a run that begins, or goes on.

    Args:
        folder: of the run.
        call: how the command was called.
        config: the configuration of the trainer.
        facts: ``trainer`` and ``model``.
        data: its data sets.
        continues: whether the run began earlier, in this folder.

    Returns:
        The record, to be closed at the end.

    Raises:
        OSError: the file cannot be written.
    """
    given = config.given_options if call.options is None else call.options
    # A secret is no value that `--config` could take back.
    options = {name: value for name, value in recorded_options(given).items() if value != MASK}
    if config.world_size > 1 and call.command is not None:
        options.setdefault("num_processes", config.world_size)  # the launcher took it out of the words
    record = {
        "command": call.command,
        "command_line": shlex.join(without_secret_words(call.words)),
        "started": now(),
        "status": RUNNING,
        "seconds": None,
        **facts,
        "data": [source.as_record() for source in data],
        "versions": versions(),
        "git": git_state(),
        "machine": machine(config.world_size),
    }
    record = without_secrets(record)
    if continues:
        record = continue_record(folder, record)
    write_record(folder, options, record)
    return OpenRecord(folder, options, record)


@dataclass
class OpenRecord:
    """The record of a run that goes on."""

    folder: Path
    options: dict[str, Any]
    record: dict[str, Any]

    def close(self, status: str, seconds: float) -> None:
        """Write how the run ended.

        Args:
            status: in words.
            seconds: of training, with the earlier parts of the run.

        Raises:
            OSError: the file cannot be written.
        """
        self.record |= {"status": status, "seconds": round(seconds, 3)}
        write_record(self.folder, self.options, self.record)


@contextmanager
def closing(record: OpenRecord | None, state: Callable[[], TrainerState], began: Callable[[], float]) -> Iterator[None]:
    """Close a record when training ends, however it ends.

    Args:
        record: None in a process that writes none.
        state: gives the trainer's state.
        began: gives the time when training began, less that of earlier parts; 0 before it began.

    Yields:
        Nothing.
    """
    if record is None:
        yield
        return
    status = FINISHED
    try:
        yield
        if state().global_step < state().max_steps:
            status = f"stopped at step {state().global_step} of {state().max_steps}"
    except BaseException as error:
        status = f"failed at step {state().global_step}: {type(error).__name__}: {error}".splitlines()[0]
        raise
    finally:
        try:
            record.close(status, time.time() - began() if began() else 0.0)
        except OSError as error:  # the disk may be what failed the run
            logger.warning("%s: not written at the end of the run (%s)", record.folder, error)
    # Only here, as a report shows how the run ended.
    write_report_at_end(record.folder)
