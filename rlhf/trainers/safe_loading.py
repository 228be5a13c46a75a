"""What a checkpoint holds besides weights is read as plain data: a file that could run code is refused in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

from torch import Tensor
from transformers import Trainer


@contextmanager
def plain_data(checkpoint: str | None, files: str) -> Iterator[None]:
    """Name what torch refuses to read with ``weights_only``.

    Args:
        checkpoint: Its folder.
        files: What is read inside.

    Raises:
        ValueError: A file holds objects besides tensors, numbers and text, or is no such file at all.
    """
    try:
        yield
    except UnpicklingError as error:
        raise ValueError(
            f"{checkpoint}: {files} is damaged, or holds objects that could run code; resume from another checkpoint"
        ) from error


def _address(weight: Tensor | None) -> int | None:
    return None if weight is None else weight.data_ptr()


class SafeLoading(Trainer):
    """A ``transformers.Trainer`` that names the file of a checkpoint that is refused."""

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """As transformers, but for weights that are another name of one in the checkpoint, such as a tied head."""
        model: Any = self.model
        state = model.state_dict() if load_result.missing_keys else {}
        loaded = {weight.data_ptr() for name, weight in state.items() if name not in load_result.missing_keys}
        missing = [name for name in load_result.missing_keys if _address(state.get(name)) not in loaded]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with plain_data(checkpoint, "optimizer.pt or scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with plain_data(checkpoint, "scaler.pt"):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with plain_data(checkpoint, "rng_state.pth"):
            super()._load_rng_state(checkpoint)
