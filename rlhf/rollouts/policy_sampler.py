"""Who samples for a trainer: this process, or a server that is sent the weights first."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from rlhf.models import Policy
from rlhf.rollouts import LocalEngine, RolloutEngine, ServerEngine
from rlhf.rollouts.local import end_ids
from rlhf.rollouts.server import SAME
from rlhf.rollouts.weights import plain_weights


@dataclass
class ServerArguments:
    """Of a configuration: where to sample."""

    rollout_server_url: str | None = field(default=None, metadata={"help": "Sample there (vLLM, SGLang), not here."})
    rollout_server_model: str | None = field(default=None, metadata={"help": "Name that it serves the policy under."})
    rollout_weights_dir: str | None = field(default=None, metadata={"help": "Folder that both see, for new weights."})


class PolicySampler:
    """An engine that samples from a trainer's policy as it is now.

    Args:
        trainer: with ``policy``. engine: by default this process, or the server of the configuration.
        reads_logps: whether the log-probs of what is sampled matter, so that a server's are checked.
    Raises:
        ValueError: weights are sharded and this process samples; no token ends a completion; a server's address
            without the rest, or one with another tokenizer.
    """

    def __init__(self, trainer: Any, engine: RolloutEngine | None = None, reads_logps: bool = True) -> None:
        self.trainer, self.reads_logps = trainer, reads_logps
        self._sent: int | None = None  # optimizer steps behind the weights that a server has
        self._versions = 0
        self.engine: RolloutEngine = engine or self._server() or self._local()
        self.is_here = isinstance(self.engine, LocalEngine)

    def _server(self) -> RolloutEngine | None:
        args: ServerArguments = self.trainer.args
        if args.rollout_server_url is None:
            return None
        if args.rollout_server_model is None or args.rollout_weights_dir is None:
            raise ValueError("--rollout_server_url needs --rollout_server_model and --rollout_weights_dir")
        policy, tokenizer = self.trainer.policy, self.trainer.processing_class
        ends = end_ids(policy.without_adapter, tokenizer)  # the server ends an answer where the model does
        engine = ServerEngine(
            args.rollout_server_url, args.rollout_server_model, weights_dir=args.rollout_weights_dir,
            vocab_size=policy.config.get_text_config().vocab_size, reads_logps=self.reads_logps, end_ids=ends,
        )  # fmt: skip
        if (difference := engine.tokenizer_difference(tokenizer)) is not None:
            raise ValueError(f"{engine.url} has another tokenizer than the policy: {difference}; {SAME}")
        return engine

    def _local(self) -> RolloutEngine:
        trainer, accelerator = self.trainer, self.trainer.accelerator
        sharded = trainer.is_deepspeed_enabled and accelerator.state.deepspeed_plugin.zero_stage == 3
        if trainer.is_fsdp_enabled or sharded:
            raise ValueError(
                "the weights are sharded, and sampling in this process needs them whole: use DDP or ZeRO-2, or a "
                "server (--rollout_server_url)"
            )
        autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
        return LocalEngine(trainer.policy.model, trainer.processing_class, autocast=autocast)

    @contextmanager
    def awake(self, policy: Policy) -> Iterator[RolloutEngine]:
        """The engine with the policy's weights; what all processes share, the first one asks."""
        if self.is_here or self.trainer.is_world_process_zero():
            self.engine.wake()
        if not self.is_here and self._sent != self.trainer.state.global_step:
            self._send_weights(policy)
            self._sent = self.trainer.state.global_step
        yield self.engine
        self.trainer.accelerator.wait_for_everyone()  # nobody is sampling any more
        if self.is_here or self.trainer.is_world_process_zero():
            self.engine.sleep()

    def _send_weights(self, policy: Policy) -> None:
        """The policy's weights under the names of a checkpoint, an adapter merged into them."""
        trainer = self.trainer
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        own = {key.removeprefix("model."): tensor for key, tensor in state.items() if key.startswith("model.")}
        weights = plain_weights(policy.model, own)
        self._versions += 1
        if trainer.is_world_process_zero():
            self.engine.update_weights(weights.items(), self._versions)
        trainer.accelerator.wait_for_everyone()
