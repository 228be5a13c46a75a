"""The engine that samples from a policy as it is now: in this process, or a server that is sent the weights first."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf.models import Policy
from rlhf.rollouts.arguments import ServerArguments
from rlhf.rollouts.engine import RolloutEngine
from rlhf.rollouts.local import LocalEngine, end_ids
from rlhf.rollouts.server import TOKENIZER_PROBE, ServerEngine
from rlhf.rollouts.server_proof import check_served_weights
from rlhf.rollouts.server_weights import WRONG_MODEL_HINT

logger = logging.getLogger(__name__)


class PolicySampler:
    """Keeps an engine's weights those of the policy.

    A local engine exists once in each process. A server is shared by all processes, so the first one alone pauses it,
    resumes it and sends it weights.

    Args:
        engine: from :func:`make_engine`, or another one.
        accelerator: of the training run.
        probe_ids: a prompt of a few tokens; with a server, each update is checked on it.
    """

    def __init__(self, engine: RolloutEngine, accelerator: Accelerator, probe_ids: Sequence[int] = ()) -> None:
        self.engine, self.accelerator, self.probe_ids = engine, accelerator, list(probe_ids)
        self.is_local = isinstance(engine, LocalEngine)
        self._sent_at_step: int | None = None  # evaluation and a rollout after the same step need one transfer
        self._version = 0
        self._trains = False

    @contextmanager
    def during_training(self) -> Iterator[None]:
        """Let the engine sleep between rollouts, and wake it in the end, also after an error."""
        self._trains = True
        try:
            yield
        finally:
            self._trains = False
            if self._is_responsible:
                self._end_training()

    def _end_training(self) -> None:
        try:
            self.engine.wake()
        except OSError as error:  # the training's own error must be seen, or its result kept
            logger.warning("the server could not be woken: %s", error)
        if isinstance(self.engine, ServerEngine) and self._version:
            logger.warning(
                "%s goes on serving the trained weights under the name %r: start it again to have the original ones",
                self.engine.url,
                self.engine.model,
            )

    @contextmanager
    def synced_engine(self, policy: Policy, trained_model: nn.Module, step: int) -> Iterator[RolloutEngine]:
        """The engine with the policy's weights; during training it is paused afterwards.

        Args:
            policy: the policy itself.
            trained_model: what accelerate made of it (DDP, FSDP, DeepSpeed), which can gather its weights.
            step: optimizer steps so far. Weights are sent once for each.
        Yields:
            The engine.
        """
        if self._is_responsible:
            self.engine.wake()
        if not self.is_local and self._sent_at_step != step:
            self._send_weights(policy, trained_model)
            self._sent_at_step = step
        yield self.engine
        # A server must not be paused while another process still samples.
        self.accelerator.wait_for_everyone()
        if self._is_responsible and self._trains:
            self.engine.sleep()

    @property
    def _is_responsible(self) -> bool:
        return self.is_local or self.accelerator.is_main_process

    def _send_weights(self, policy: Policy, trained_model: nn.Module) -> None:
        """Send the policy's weights under the names of a checkpoint, an adapter merged into them."""
        # All processes take part in gathering sharded weights.
        state = self.accelerator.get_state_dict(trained_model)
        model_state = {
            name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")
        }
        weights = merged_weights(policy.model, model_state)
        self._version += 1
        if self.accelerator.is_main_process:
            self.engine.update_weights(weights.items(), self._version)
        self.accelerator.wait_for_everyone()
        if isinstance(self.engine, ServerEngine) and self.probe_ids:
            check_served_weights(self.engine, policy, trained_model, self.accelerator, self.probe_ids)


def probe_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The prompt on which a server's weights are checked.

    Args:
        tokenizer: the policy's.
    Returns:
        Its token ids.
    """
    ids: list[int] = tokenizer(TOKENIZER_PROBE, add_special_tokens=False)["input_ids"]
    return ids


def make_engine(
    args: ServerArguments,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    *,
    reads_logps: bool = True,
) -> RolloutEngine:
    """The engine that a configuration asks for: a server, or by default this process.

    Args:
        args: with the server's address, or without one.
        policy: samples in this process; its tokens and end tokens are those that a server must know.
        tokenizer: the policy's.
        accelerator: of the training run.
        reads_logps: whether the log-probs of samples are used, so that a server's are checked.
    Returns:
        A :class:`ServerEngine` or a :class:`LocalEngine`.
    Raises:
        ValueError: sharded weights in this process; no end token; a server's address without its other options, or a
            server with another tokenizer.
    """
    if args.rollout_server_url is not None:
        return _server_engine(args, policy, tokenizer, reads_logps)
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    is_sharded = getattr(accelerator.state, "fsdp_plugin", None) is not None
    is_sharded |= deepspeed is not None and deepspeed.zero_stage == 3
    if is_sharded:
        raise ValueError(
            "the weights are sharded, and sampling in this process needs them whole: use DDP or ZeRO-2, or a "
            "server (--rollout_server_url)"
        )
    # As in training, so that both passes compute the same log-probs.
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    return LocalEngine(policy.model, tokenizer, autocast=autocast)


def _server_engine(
    args: ServerArguments, policy: Policy, tokenizer: PreTrainedTokenizerBase, reads_logps: bool
) -> ServerEngine:
    assert args.rollout_server_url is not None
    if args.rollout_server_model is None or args.rollout_weights_dir is None:
        raise ValueError("--rollout_server_url needs --rollout_server_model and --rollout_weights_dir")
    engine = ServerEngine(
        args.rollout_server_url,
        args.rollout_server_model,
        weights_dir=args.rollout_weights_dir,
        vocab_size=policy.config.get_text_config().vocab_size,
        reads_logps=reads_logps,
        # A completion must end where it ends in this process.
        end_ids=end_ids(policy.without_adapter, tokenizer),
        startup_timeout=args.server_startup_timeout,
        sleeps=args.rollout_server_sleep,
    )
    difference = engine.tokenizer_difference(tokenizer)
    if difference is not None:
        raise ValueError(f"{engine.url} has another tokenizer than the policy: {difference}; {WRONG_MODEL_HINT}")
    return engine


@torch.no_grad()
def merged_weights(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of an ordinary checkpoint, with a LoRA adapter added into new tensors.

    The model's own weights are not touched: merging in place and taking the adapter out again would leave a rounding
    error in the frozen weights each time.

    Args:
        model: a model, or PEFT around one.
        state: its whole state, by the names of its parameters.
    Returns:
        Name to tensor.
    Raises:
        ValueError: the adapter is not a plain LoRA.
    """
    if not hasattr(model, "peft_config"):
        return state
    adapter: Any = model.active_adapter
    # Under PEFT a wrapped layer's weight is in its base layer, and a copied module beside the original one.
    weights = {
        _checkpoint_name(name, adapter): tensor
        for name, tensor in state.items()
        if ".lora_" not in name and ".original_module." not in name
    }
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, LoraLayer):
            raise ValueError(f"{name}: only plain LoRA can be merged for another process, not {type(layer).__name__}")
        # Layers without this adapter are as they are in the checkpoint.
        if not isinstance(layer, LoraLayer) or adapter not in (*layer.lora_A, *layer.lora_embedding_A):
            continue
        if adapter in layer.lora_variant:
            raise ValueError(f"{name}: only plain LoRA can be merged for another process, not DoRA and the like")
        delta: Any = layer.get_delta_weight(adapter)  # type: ignore[attr-defined]
        if hasattr(delta, "full_tensor"):  # sharded by FSDP2
            delta = delta.full_tensor()
        weight_name = f"{_checkpoint_name(name, adapter)}.weight"
        # A new tensor, because those of the state are the model's own.
        weights[weight_name] = weights[weight_name] + delta.to(weights[weight_name])
    return weights


def _checkpoint_name(name: str, adapter: str) -> str:
    """A parameter's name without what PEFT puts into it."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    return name.replace(f".modules_to_save.{adapter}.", ".")
