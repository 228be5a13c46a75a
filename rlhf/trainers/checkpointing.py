"""Saving and loading as an ordinary checkpoint: the model inside the policy, never the wrapper."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from rlhf.models import configured_dropout
from rlhf.models.adapter_base import keep_base, name_lengths

logger = logging.getLogger(__name__)

RESUME_STATE = "trainer_state_{}.pt"  # of each process


class Checkpointing(Trainer):
    """A ``transformers.Trainer`` whose model is a wrapper (:class:`rlhf.models.policy.Wrapper`)."""

    extra_state_file: ClassVar[str] = "value_head.safetensors"  # what the wrapper learns besides the model
    model: Any  # the wrapper, or what accelerate made of it

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bases: set[Path] = set()  # folders where this run saved what its adapter sits on

    @contextmanager
    def _inner_model(self) -> Iterator[nn.Module]:
        outer = self.model
        self.model = self.accelerator.unwrap_model(outer).model
        try:
            yield self.model
        finally:
            self.model = outer

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """As ``transformers.Trainer``, under the names that the wrapper gives its parameters."""
        named = {id(parameter): name for name, parameter in model.named_parameters()}
        decayed = set(super().get_decay_parameter_names(model))
        inner = {id(p): name for name, p in nn.Module.named_parameters(model)}
        return [named[key] for key, name in inner.items() if name in decayed]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        whole = self.accelerator.unwrap_model(self.model).state_dict() if state_dict is None else state_dict
        beside = {key: value.contiguous() for key, value in whole.items() if not key.startswith("model.")}
        if state_dict is not None:
            state_dict = {k.removeprefix("model."): v for k, v in state_dict.items() if k.startswith("model.")}
        folder, run = Path(output_dir or str(self.args.output_dir)), Path(str(self.args.output_dir)).resolve()
        with self._inner_model() as inner, configured_dropout(inner):
            # A run and all its checkpoints share what their adapters sit on.
            keep_base(inner, run if run in folder.resolve().parents else folder, self.bases, state_dict)
            super()._save(output_dir, state_dict)
            name_lengths(inner, folder)
        if beside:
            save_file(beside, folder / self.extra_state_file)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_extra_weights(Path(resume_from_checkpoint))
        with self._inner_model() as inner:
            super()._load_from_checkpoint(resume_from_checkpoint, inner)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_best_model()
        self._load_extra_weights(Path(str(self.state.best_model_checkpoint)))
        with self._inner_model():
            super()._load_best_model()

    def _load_extra_weights(self, folder: Path) -> bool:
        """What the wrapper learned besides the model, from a folder that has it."""
        file = folder / self.extra_state_file
        if file.exists():
            self.accelerator.unwrap_model(self.model).load_state_dict(load_file(file), strict=False)
        return file.exists()

    # State of a trainer's own, kept with the optimizer's in each checkpoint

    def resume_state(self) -> dict[str, Any] | None:
        """What a resumed run must know besides weights, optimizer and the number of steps; of this process."""
        return None

    def load_resume_state(self, state: dict[str, Any]) -> None: ...

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if (state := self.resume_state()) is not None:
            torch.save(state, Path(output_dir) / RESUME_STATE.format(self.args.process_index))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.resume_state() is None:
            return
        file = Path(checkpoint) / RESUME_STATE.format(self.args.process_index)
        if not file.exists():
            raise FileNotFoundError(
                f"{checkpoint}: no {file.name}; it was saved by fewer processes, or by another trainer: resume with as "
                "many processes as before"
            )
        self.load_resume_state(torch.load(file, weights_only=False))


def checkpoint_to_resume(given: str | bool | None, output_dir: str) -> str | None:
    """The folder that training goes on from; ``True`` (or the text ``true``) is the last one in ``output_dir``.

    Raises:
        ValueError: there is no checkpoint.
    """
    if given in (None, False, "") or str(given).lower() in ("false", "no"):
        return None
    if given is True or str(given).lower() in ("true", "yes", "last"):
        last = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
        if last is None:
            raise ValueError(f"{output_dir}: no checkpoint to resume from; leave out --resume to start")
        return last
    folder = Path(str(given)).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{given}: no such folder to resume from (--resume_from_checkpoint)")
    if not (folder / "trainer_state.json").exists():
        last = get_last_checkpoint(str(folder))
        hint = f"; did you mean {last}?" if last else ""
        raise ValueError(f"{given}: not a checkpoint of a run (no trainer_state.json){hint}")
    kept = [path.name for path in folder.iterdir()]
    if not any(name.startswith(("optimizer", "global_step")) for name in kept):
        last = get_last_checkpoint(str(folder))
        hint = (
            f"did you mean {last}?" if last else "it was saved with --save_only_model; train from it as a model instead"
        )
        raise ValueError(f"{given}: holds no state of the optimizer to go on with; {hint}")
    return str(folder)


def tell_of_resuming(checkpoint: str, max_steps: int) -> None:
    """Say where a run goes on, and whether anything is left of it."""
    step = int(json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])
    logger.info("%s: going on after step %d", checkpoint, step)
    if 0 < max_steps <= step:
        logger.warning("%s: step %d of %d, so nothing is left to train; raise --max_steps", checkpoint, step, max_steps)
