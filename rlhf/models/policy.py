"""The modules that are trained: around a transformers model, with a :class:`Batch` going in."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils.environment import parse_flag_from_env
from torch import nn

from rlhf.data import Batch
from rlhf.kernels.linear import restore_lora
from rlhf.kernels.recompute import fewer_activations
from rlhf.logprobs import HeadObjective, Predictions, Scores, model_predictions, model_scores, verified_settings
from rlhf.models.activations import checkpoint_arguments, enable_checkpointing
from rlhf.models.attention import reads_segments
from rlhf.models.context_parallel import ContextParallel, own_objective
from rlhf.models.positions import finds_own_positions, inputs_of, reads_padding, sees_ahead
from rlhf.models.routing import Balancing

logger = logging.getLogger(__name__)


class Wrapper(nn.Module):
    """A transformers model (plain, or PEFT around one) under a forward of our own.

    This is what accelerate wraps, so that the hooks of DDP, FSDP2 and ZeRO fire. Everything else about the model
    (``config``, ``generate``, ``save_pretrained``, …) is reached through it as if it were the model itself.
    """

    _hf_peft_config_loaded = True  # Trainer asks this of quantised weights; BaseTrainer asks the model itself

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        _detach_buffers(model)
        # Asked now, before anything shards the weights; the answer is kept.
        with eval_mode(model):
            finds_own_positions(model)

    @property
    def has_adapter(self) -> bool:
        """Whether PEFT is around the transformers model."""
        return hasattr(self.model, "get_base_model")

    @property
    def without_adapter(self) -> Any:
        """The transformers model, also where PEFT is around it."""
        return self.model.get_base_model() if self.has_adapter else self.model  # type: ignore[operator]

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters under the names that they have in the model; what else is trained keeps its own name.

        Under FSDP the names stay those of this module, because torch's checkpoints look parameters up by them.
        """
        # Set by accelerate. transformers' own `is_fsdp_enabled` also asks how weights were loaded.
        model_prefix = "" if parse_flag_from_env("ACCELERATE_USE_FSDP") else "model."
        caller_prefix = f"{prefix}." if prefix else ""
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            yield caller_prefix + name.removeprefix(caller_prefix).removeprefix(model_prefix), parameter

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """As the model's own; ``{"selective": true}`` is taken too.

        Args:
            activation_checkpointing_kwargs: of torch's ``checkpoint``, see :mod:`rlhf.models.activations`.
            kwargs: of the model's own method.
        """
        checkpoint_kwargs = checkpoint_arguments(activation_checkpointing_kwargs or {})
        if "context_fn" in checkpoint_kwargs:
            # LoRA's product is added in place to a result that is to be kept.
            restore_lora(self.model)
        enable_checkpointing(self.model, checkpoint_kwargs or None, **kwargs)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The name of :meth:`activation_checkpointing_enable` in older transformers (5.19), whose Trainer calls it.

        Args:
            gradient_checkpointing_kwargs: of torch's ``checkpoint``.
            kwargs: of the model's own method.
        """
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def get_submodule(self, target: str) -> nn.Module:
        """As ``nn.Module``; a name that the model has is found too."""
        try:
            return super().get_submodule(target)
        except AttributeError:
            return self.model.get_submodule(target)

    @property
    def _no_split_modules(self) -> set[str]:
        """The classes of layers that FSDP2 shards one by one: of those that transformers lists, those that occur.

        Beside the layers of a vision tower it lists those of the text model they were trained with, and accelerate
        refuses a class that it does not find.
        """
        listed = getattr(self.model, "_no_split_modules", None) or ()
        return {type(module).__name__ for module in self.model.modules()} & set(listed)

    def __getattr__(self, name: str) -> Any:
        """An attribute of the model, where this module has none of that name."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Not `self.model`: before it is set, that would come back here without end.
            return getattr(super().__getattr__("model"), name)


def _detach_buffers(model: nn.Module) -> None:
    """Cut the graph of buffers that were computed from a weight: only one backward pass could go through it."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.grad_fn is not None:
                is_persistent = name not in module._non_persistent_buffers_set
                module.register_buffer(name, buffer.detach(), is_persistent)


class Policy(Wrapper):
    """A causal LM (plain, or PEFT around one) whose forward takes a :class:`Batch` and returns :class:`Scores`.

    ``temperature`` divides its logits: that of sampling, in on-policy training.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.temperature = 1.0
        self.value_head: nn.Module | None = None
        self.critic: Any = None  # of an ActorCritic
        self.balancing: Balancing | None = None  # set where router logits are wanted
        self.context_parallel: ContextParallel | None = None  # set where several processes share each batch
        # Asked now, before anything shards the weights: the head is checked against the model's own logits.
        verified_settings(self.without_adapter)
        self._warn_of_unusual_models()

    def _warn_of_unusual_models(self) -> None:
        model = self.without_adapter
        with eval_mode(self.model):
            if sees_ahead(model):
                logger.warning(
                    "%s sees the tokens that it is to predict: no causal model, or is_decoder is off in its config",
                    type(model).__name__,
                )
            elif reads_padding(model):
                logger.warning(
                    "%s reads padding: only texts of one length go together, pass --per_device_train_batch_size 1",
                    type(model).__name__,
                )

    def forward(self, batch: Batch, objective: HeadObjective | None = None, entropy: bool = False) -> Scores:
        """Score the targets of a batch.

        Args:
            batch: the tokens, and which of them are scored.
            objective: a loss that is taken with the head; without one, log-probs carry the gradient.
            entropy: score the entropy of each prediction too.
        Returns:
            Scores of [N] vectors.
        Raises:
            ValueError: the batch is laid out in segments, and the model is not ready for them.
        """
        self._check_layout(batch)
        if self.context_parallel is None:
            return self._scores(batch, objective, entropy)
        part = self.context_parallel.part_of(batch)
        own_scores = self._scores(part.batch, own_objective(objective, part.targets), entropy)
        return self.context_parallel.whole_scores(own_scores, part, batch)

    def _scores(self, batch: Batch, objective: HeadObjective | None, entropy: bool) -> Scores:
        with fewer_activations():
            # First: beside the policy's saved activations, a teacher's forward would need more memory at its peak.
            prepared = None if objective is None else objective.prepare(self, batch)
            return model_scores(
                self.model,
                batch.targets,
                objective=prepared,
                entropy=entropy,
                temperature=self.temperature,
                value_head=self.value_head,
                **self._inputs(batch),
            )

    def predictions(self, batch: Batch) -> Predictions:
        """The model's predictions of the targets of a batch before the softmax, with gradient where one is wanted."""
        self._check_layout(batch)
        if self.context_parallel is not None:
            raise NotImplementedError("predictions of whole vocabularies are not gathered under context parallelism")
        return model_predictions(self.model, batch.targets, temperature=self.temperature, **self._inputs(batch))

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        inputs = inputs_of(self.without_adapter, batch)
        # Where nobody wants them, a config that asks for router logits would make the model compute them in vain.
        if self.balancing is not None or getattr(self.config.get_text_config(), "output_router_logits", False):
            inputs["output_router_logits"] = self.balancing is not None
        return inputs

    def _check_layout(self, batch: Batch) -> None:
        # Another attention function would ignore the spans, and sequences would attend to each other.
        if batch.segments is None and self.context_parallel is not None:
            raise ValueError("context parallelism divides a row without padding, and this batch has padded rows")
        if batch.segments is not None and not reads_segments(self.config):
            raise ValueError("the batch is laid out in segments, the model is not ready for them: use_segments(model)")

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """The model as it was before the adapter: under LoRA, the reference."""
        trained_before = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        with self.model.disable_adapter():  # type: ignore[operator]
            # PEFT freezes the adapter. FSDP2 asks at its first forward pass, which may be this one, what is trained.
            for parameter, was_trained in trained_before:
                parameter.requires_grad_(was_trained)
            yield

    @contextmanager
    def adapter(self, name: str) -> Iterator[None]:
        """The model under another of its adapters.

        Args:
            name: of the adapter.
        """
        # PEFT's `set_adapter` trains the adapter that it activates and freezes the others.
        trained_before = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        active_before = self.model.active_adapter
        self.model.set_adapter(name)  # type: ignore[operator]
        try:
            yield
        finally:
            self.model.set_adapter(active_before)  # type: ignore[operator]
            for parameter, was_trained in trained_before:
                parameter.requires_grad_(was_trained)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while: no dropout. Afterwards each part of ``module`` has the mode it had."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, was_training in modes:
            # Not by `train`, which sets all parts below as well.
            submodule.training = was_training
