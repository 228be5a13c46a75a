"""``--dry_run``: all checks of a training command and a prediction of what it takes, without training."""

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf.cli.exit_codes import ExitCode
from rlhf.planning import plan_lines, plan_run
from rlhf.trainers.base import BaseTrainer
from rlhf.trainers.config import BaseConfig
from rlhf.trainers.reference_logps import without_reference_pass
from rlhf.trainers.run_lock import check_unlocked
from rlhf.visible import visible


def dry_run(args: BaseConfig, checkpoint: str | None, make_trainer: Callable[[], BaseTrainer]) -> int:
    """Build the trainer, make its checks, and print what the run would take.

    Args:
        args: the trainer's configuration. Its output folder is another one from here on.
        checkpoint: that the run would go on from.
        make_trainer: loads rows and weights; reads ``args``.

    Returns:
        The exit status.

    Raises:
        ValueError, OSError: what the run itself would raise before its first step.
    """
    output_folder = Path(str(args.output_dir))
    check_unlocked(output_folder)
    with tempfile.TemporaryDirectory(prefix="rlhf-dry-run-") as elsewhere, _noted() as notes:
        # A trainer makes its folder, and bad rows are listed in it: the run's own folder stays as it is.
        args.output_dir = elsewhere
        with without_reference_pass():
            trainer = make_trainer()
        args.output_dir = str(output_folder)
        trainer.check_before_training(checkpoint)
        plan = plan_run(trainer, output_folder)
        plan.notes.extend(dict.fromkeys(note.replace(elsewhere, str(output_folder)) for note in notes))
        if args.process_index == 0:
            print(visible(f"dry run of {output_folder}: nothing is trained, and nothing is written there"))
            if checkpoint is not None:
                print(visible(f"it would go on from {checkpoint}; the figures are those of the whole run"))
            print()
            print("\n".join(plan_lines(plan, str(args.device))))
    return ExitCode.SUCCESS


@contextmanager
def _noted() -> Iterator[list[str]]:
    """Collect what the package logs, instead of printing it."""
    notes: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            notes.append(record.getMessage())

    logger, handler = logging.getLogger("rlhf"), Collector()
    logger.addHandler(handler)
    propagates, logger.propagate = logger.propagate, False
    try:
        yield notes
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates
