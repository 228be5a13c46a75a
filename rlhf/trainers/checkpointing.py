"""Saving and loading as an ordinary checkpoint: the model inside the policy, never the wrapper."""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rlhf.models import configured_dropout
from rlhf.models.adapter_base import keep_base, name_lengths
from rlhf.trainers.safe_loading import SafeLoading


class Checkpointing(SafeLoading):
    """A ``transformers.Trainer`` whose model is a wrapper (:class:`rlhf.models.policy.Wrapper`).

    A folder holds the model inside the wrapper, so that ``from_pretrained`` loads it. Other weights that the wrapper
    trains, such as a value head, are in a file beside it.
    """

    extra_state_file: ClassVar[str] = "value_head.safetensors"
    model: Any  # the wrapper, or what accelerate made of it
    args: Any  # a configuration of rlhf

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bases: set[Path] = set()  # folders where this run saved the base of its adapter

    @contextmanager
    def _inner_model(self) -> Iterator[nn.Module]:
        """Let ``self.model`` be the model inside the wrapper, for methods of ``Trainer`` that save or load it."""
        outer_model = self.model
        self.model = self.accelerator.unwrap_model(outer_model).model
        try:
            yield self.model
        finally:
            self.model = outer_model

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """As ``transformers.Trainer``, under the names that the wrapper gives its parameters."""
        # transformers names parameters by the tree of modules, in which the model is a child of the wrapper.
        decayed = set(super().get_decay_parameter_names(model))
        wrapper_names = {id(parameter): name for name, parameter in model.named_parameters()}
        module_tree = nn.Module.named_parameters(model)
        return [wrapper_names[id(parameter)] for name, parameter in module_tree if name in decayed]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # All processes come here: one writes.
        if not self.args.should_save:
            return
        weights = self.accelerator.unwrap_model(self.model).state_dict() if state_dict is None else state_dict
        # safetensors stores contiguous tensors only.
        extra_weights = {name: weight.contiguous() for name, weight in weights.items() if not name.startswith("model.")}
        if state_dict is not None:
            state_dict = {
                name.removeprefix("model."): weight for name, weight in weights.items() if name.startswith("model.")
            }
        run_folder = Path(str(self.args.output_dir))
        folder = Path(output_dir) if output_dir else run_folder
        # A run and all its checkpoints share the base of their adapters.
        is_checkpoint = run_folder.resolve() in folder.resolve().parents
        with self._inner_model() as inner_model, configured_dropout(inner_model):
            keep_base(inner_model, run_folder.resolve() if is_checkpoint else folder, self.bases, state_dict)
            super()._save(output_dir, state_dict)
            name_lengths(inner_model, folder)
        if extra_weights:
            save_file(extra_weights, folder / self.extra_state_file)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:  # whose checkpoints hold the wrapper, in shards
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_extra_weights(Path(resume_from_checkpoint))
        with self._inner_model() as inner_model:
            super()._load_from_checkpoint(resume_from_checkpoint, inner_model)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_best_model()
        self._load_extra_weights(Path(str(self.state.best_model_checkpoint)))
        with self._inner_model():
            super()._load_best_model()

    def _load_extra_weights(self, folder: Path) -> bool:
        """Load what the wrapper trains besides the model; returns whether the folder has it."""
        file = folder / self.extra_state_file
        if file.exists():
            wrapper = self.accelerator.unwrap_model(self.model)
            wrapper.load_state_dict(load_file(file), strict=False)  # the file holds nothing of the model
        return file.exists()

    # State that transformers does not know of, saved with the optimizer's in each checkpoint

    @abstractmethod
    def resume_state(self) -> dict[str, Any]:
        """What a resumed run needs besides weights, optimizer and the number of steps; of this process."""

    @abstractmethod
    def load_resume_state(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`resume_state` returned."""

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        torch.save(self.resume_state(), self._resume_file(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        file = self._resume_file(checkpoint)
        if not file.exists():
            raise FileNotFoundError(
                f"{checkpoint}: no {file.name}; it was saved by fewer processes, or by another trainer: resume with as "
                "many processes as before"
            )
        self.load_resume_state(torch.load(file, weights_only=False))

    def _resume_file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"trainer_state_{self.args.process_index}.pt"
