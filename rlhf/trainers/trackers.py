"""Trackers of experiments: called by the run's name, kept in its folder, and never the end of a run."""

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

logger = logging.getLogger(__name__)

_CALLBACKS = tuple(INTEGRATION_TO_CALLBACK.values())
_EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]
_DEFAULT_PROJECT = "huggingface"  # transformers'
_UNNAMEABLE = re.compile(r"[^\w.-]+")  # what some tracker refuses in a name
# Variables that this process set: a second run in it has a folder of its own.
_set_here: dict[str, str] = {}


def name_run(args: Any) -> None:
    """Call a run by its folder, and its project by the folder above, where nobody named them.

    Args:
        args: A configuration; ``run_name`` and ``project`` are set.
    """
    folder = Path(str(args.output_dir)).resolve()
    if args.run_name is None:
        args.run_name = _as_name(folder.name)
    if args.project == _DEFAULT_PROJECT:
        args.project = _as_name(folder.parent.name)


def _as_name(text: str) -> str:
    return _UNNAMEABLE.sub("-", text).strip("-") or "run"


def set_places(args: Any) -> None:
    """Let wandb and trackio write into the run's folder, where the environment names no other place.

    Args:
        args: A configuration.
    """
    folder = Path(str(args.output_dir)).resolve()
    variables: dict[str, str] = {}
    # Both read their variable once: wandb when a run begins, trackio when it is imported.
    if "wandb" in args.report_to:
        variables |= {"WANDB_DIR": str(folder), "WANDB_PROJECT": args.project}
    if "trackio" in args.report_to:
        variables["TRACKIO_DIR"] = str(folder / "trackio")
    for name, value in variables.items():
        if os.environ.get(name) in (None, _set_here.get(name)):
            os.environ[name] = _set_here[name] = value


class Trackers:
    """The trackers among the callbacks of a trainer.

    A tracker that raises is named in one warning, and gets nothing more.
    """

    def __init__(self, callbacks: Sequence[TrainerCallback]) -> None:
        self._stays_open = False
        self._endings: list[Callable[[], Any]] = []
        for callback in callbacks:
            if isinstance(callback, _CALLBACKS):
                self._guard(callback)

    @contextmanager
    def open_to_the_end(self) -> Iterator[None]:
        """Close trackers when this block ends, not when training ends: a last evaluation belongs to the same run."""
        self._stays_open = True
        try:
            yield
        finally:
            self._stays_open = False
            endings, self._endings = self._endings, []
            for end in endings:
                end()

    def _guard(self, callback: TrainerCallback) -> None:
        """Replace the methods of a callback: a trainer looks for callbacks by their class, so it stays the same."""
        has_failed = False

        def call(method: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Any:
            nonlocal has_failed
            if has_failed:
                return None
            try:
                return method(*args, **kwargs)
            # Whatever a tracker raises, as its server may be away: the run is worth more.
            except Exception as error:
                has_failed = True
                reason = " ".join(str(error).split())
                tracker = type(callback).__name__.removesuffix("Callback")
                kind = type(error).__name__
                logger.warning("%s failed (%s: %s: %s); the run goes on without it", tracker, name, kind, reason)
                return None

        def end(*args: Any, **kwargs: Any) -> Any:
            if self._stays_open:
                self._endings.append(partial(guarded["on_train_end"], *args, **kwargs))
                return None
            return guarded["on_train_end"](*args, **kwargs)

        guarded = {name: partial(call, getattr(callback, name), name) for name in _EVENTS}
        for name, method in (guarded | {"on_train_end": end}).items():
            setattr(callback, name, method)
