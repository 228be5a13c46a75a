"""The engine that samples from a policy as it is now: in this process, or a server that is sent the weights first."""

import copy
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf.models import Policy
from rlhf.rollouts.arguments import ServerArguments
from rlhf.rollouts.colocated import ColocatedEngine, ColocatedOptions
from rlhf.rollouts.engine import RolloutEngine
from rlhf.rollouts.local import LocalEngine, end_ids
from rlhf.rollouts.policy_weights import adapter_rank, adapter_weights, merged_weights, unties_head, whole_model_reason
from rlhf.rollouts.replicas import PATIENCE, ReplicatedEngine, servers_of
from rlhf.rollouts.server import MAX_RESTARTS, TOKENIZER_PROBE, ServerEngine
from rlhf.rollouts.server_proof import check_served_weights
from rlhf.rollouts.server_weights import WRONG_MODEL_HINT, VersionFolders

logger = logging.getLogger(__name__)

API_KEY = "ROLLOUT_SERVER_API_KEY"  # in the environment
SHARED_HEAD = (
    "the adapter changes the head or the embedding alone, and the server has one matrix for both: leave them out of "
    "the adapter, pass ensure_weight_tying=True to LoraConfig, or sample in this process"
)
_TOO_SHORT = "lower --max_length, which a prompt with its completion may have"

Drawn = TypeVar("Drawn")


class PolicySampler:
    """Keeps an engine's weights those of the policy.

    An engine in this process exists once in each process. A server is shared by all processes, so the first one alone
    pauses it, resumes it and sends it weights.

    Args:
        engine: from :func:`make_engine`, or another one.
        accelerator: of the training run.
        probe_ids: a prompt of a few tokens; with a server, each update is checked on it.
    """

    def __init__(self, engine: RolloutEngine, accelerator: Accelerator, probe_ids: Sequence[int] = ()) -> None:
        self.engine, self.accelerator, self.probe_ids = engine, accelerator, list(probe_ids)
        self.is_local = isinstance(engine, LocalEngine)  # it samples from the policy's own weights
        is_in_process = self.is_local or isinstance(engine, ColocatedEngine)
        self._is_responsible = is_in_process or accelerator.is_main_process
        self.num_restarts = 0  # of servers, as the processes have noticed together
        for server in servers_of(engine):
            server.is_shared = accelerator.num_processes > 1
        # Step and changes of the weights: evaluation and a rollout after the same step need one transfer.
        self._sent_state: tuple[int, int] | None = None
        self._version = 0
        self._adapter_alone: bool | None = None  # not known yet
        self._trains = False

    @contextmanager
    def during_training(self) -> Iterator[None]:
        """Let the engine sleep between rollouts, and wake it in the end, also after an error."""
        self._trains = True
        self._sent_state = None  # steps are counted anew
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
        for server in servers_of(self.engine) if self._version and not self._adapter_alone else []:
            logger.warning(
                "%s goes on serving the trained weights under the name %r: start it again to have the original ones",
                server.url,
                server.model,
            )

    def sample(self, policy: Policy, trained_model: nn.Module, step: int, draw: Callable[[], Drawn]) -> Drawn:
        """Sample from the policy, and once more if a server was started again meanwhile.

        Args:
            policy: the policy itself.
            trained_model: what accelerate made of it.
            step: optimizer steps so far.
            draw: asks the engine. It is called again if a server had its original weights meanwhile.
        Returns:
            What ``draw`` returns.
        Raises:
            ConnectionError: servers are started again and again.
        """
        for _ in range(MAX_RESTARTS):
            with self.synced_engine(policy, trained_model, step):
                drawn = draw()
            if not self.has_lost_weights():
                return drawn
        raise ConnectionError(f"the connection to a rollout server was lost in each of {MAX_RESTARTS} tries to sample")

    def has_lost_weights(self) -> bool:
        """Whether a server may have been started again since it was sent weights; all processes ask together.

        Returns:
            True if any process noticed it. The next :meth:`sync` sends the weights again.
        """
        is_lost = getattr(self.engine, "has_lost_weights", None)
        if is_lost is None:
            return False  # an engine in this process
        if self.accelerator.num_processes > 1:
            num_noticed = torch.tensor(float(is_lost), device=self.accelerator.device)
            is_lost = bool(self.accelerator.reduce(num_noticed))
        if not is_lost:
            return False
        if self.accelerator.is_main_process:
            logger.warning(
                "the connection to a rollout server was lost, and a server that was started again has its original "
                "weights: it is sent the policy's again, and the rollout is sampled anew"
            )
        self.engine.forget_weights()  # type: ignore[attr-defined]
        self._sent_state = None
        self.num_restarts += 1
        return True

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
        self.sync(policy, trained_model, step)
        yield self.engine
        # A server must not be paused while another process still samples.
        self.accelerator.wait_for_everyone()
        if self._is_responsible and self._trains:
            self.engine.sleep()

    def sync(
        self,
        policy: Policy,
        trained_model: nn.Module,
        step: int,
        pausing: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Give the engine the policy's weights, unless it has them.

        Args:
            policy: the policy itself.
            trained_model: what accelerate made of it.
            step: optimizer steps so far.
            pausing: holds the engine's requests while it loads the weights; needed where some are under way.
        """
        if self.is_local:
            return
        # Weights change without a step too: the best ones are loaded, or a user sets others.
        state = step, sum(weight._version for weight in policy.parameters())
        has_weights = self._sent_state == state and getattr(self.engine, "has_weights", True)
        # All processes send weights, or none.
        if not all(gather_object([has_weights])):
            self._send_weights(policy, trained_model, pausing)
            self._sent_state = state

    def _send_weights(
        self, policy: Policy, trained_model: nn.Module, pausing: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """Send the policy's weights under the names of a checkpoint, an adapter merged into them."""
        # All processes take part in gathering sharded weights.
        # Under ZeRO-3 only the first process gets them, the others None.
        state = self.accelerator.get_state_dict(trained_model) or {}
        model_state = {
            name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")
        }
        self._version += 1
        if self._sends_adapter_alone(policy):
            assert isinstance(self.engine, ServerEngine | ReplicatedEngine)
            if self._is_responsible:
                adapter = adapter_weights(policy.model, model_state)
                with pausing():
                    self.engine.update_adapter(adapter, self._version)
        else:
            if servers_of(self.engine) and unties_head(policy.model):
                raise ValueError(SHARED_HEAD)
            # All processes: the changes of an adapter may be sharded too.
            weights = merged_weights(policy.model, model_state)
            if self._is_responsible:
                with pausing():
                    self.engine.update_weights(weights.items(), self._version)
        if not self._is_responsible:
            for server in servers_of(self.engine):
                server.expect_update(is_adapter=self._sends_adapter_alone(policy))
        self.accelerator.wait_for_everyone()
        if isinstance(self.engine, ReplicatedEngine):
            lost_urls = [self.engine.lost_urls]
            broadcast_object_list(lost_urls)  # of the first process
            self.engine.leave_out(lost_urls[0])
        updated = [self.engine] if isinstance(self.engine, ColocatedEngine) else servers_of(self.engine)
        if self.probe_ids and updated:
            check_served_weights(updated, policy, trained_model, self.accelerator, self.probe_ids)

    def _sends_adapter_alone(self, policy: Policy) -> bool:
        """Whether the server has the model under the adapter, and takes the adapter; decided once."""
        if self._adapter_alone is None:
            self._adapter_alone = hasattr(policy.model, "peft_config") and self._takes_adapter(policy.model)
        return self._adapter_alone

    def _takes_adapter(self, model: nn.Module) -> bool:
        largest_rank = getattr(self.engine, "max_adapter_rank", 0)
        if not largest_rank:
            return False
        reason = whole_model_reason(model)
        if reason is None and adapter_rank(model) > largest_rank:
            reason = f"has rank {adapter_rank(model)}, and the server's --max-lora-rank is {largest_rank}"
        if reason is not None:
            logger.warning("the server gets the whole model at each update: the adapter %s", reason)
        return reason is None


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
    max_length: int,
    reads_logps: bool = True,
) -> RolloutEngine:
    """The engine that a configuration asks for: a server, or by default this process.

    Args:
        args: with the server's address, or without one.
        policy: samples in this process; its tokens and end tokens are those that a server must know.
        tokenizer: the policy's.
        accelerator: of the training run.
        max_length: of a prompt with its completion.
        reads_logps: whether the log-probs of samples are used, so that a server's are checked.
    Returns:
        An engine of one or several servers, a :class:`ColocatedEngine` (vLLM in this process), or a
        :class:`LocalEngine`.
    Raises:
        ValueError: sharded weights in this process; no end token; a server's address without its other options; a
            server with another tokenizer, or with a shorter context than ``max_length``.
    """
    if args.rollout_server_url is not None:
        return _server_engine(args, policy, tokenizer, accelerator.device, reads_logps, max_length)
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
    colocated = args.colocated_vllm()
    if colocated is None:
        return LocalEngine(policy.model, tokenizer, autocast=autocast)
    memory_share, context_length = colocated
    if context_length is not None and context_length < max_length:
        raise ValueError(
            f"vllm_max_model_length {context_length} is less than max_length {max_length}: raise it, or {_TOO_SHORT}"
        )
    options = ColocatedOptions(
        memory_share=memory_share,
        max_length=context_length,
        sleeps=args.rollout_server_sleep,
        dtype=autocast or next(policy.without_adapter.parameters()).dtype,
        processes=accelerator.num_processes,
    )
    model = policy.without_adapter
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]  # a checkpoint may name another class, or none
    if unties_head(policy.model):
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
    return ColocatedEngine(config, tokenizer, end_ids(model, tokenizer), options)


def _server_engine(
    args: ServerArguments,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    reads_logps: bool,
    max_length: int,
) -> ServerEngine | ReplicatedEngine:
    urls = args.server_urls()
    if args.rollout_server_model is None or (args.rollout_weights_dir is None and device.type != "cuda"):
        raise ValueError("--rollout_server_url needs --rollout_server_model and --rollout_weights_dir")
    # One folder of each version for all servers.
    folders = None if args.rollout_weights_dir is None else VersionFolders(Path(args.rollout_weights_dir))
    engines = [
        ServerEngine(
            url,
            args.rollout_server_model,
            weights_dir=folders,
            device=device,
            vocab_size=policy.config.get_text_config().vocab_size,
            reads_logps=reads_logps,
            # A completion must end where it ends in this process.
            end_ids=end_ids(policy.without_adapter, tokenizer),
            startup_timeout=args.server_startup_timeout,
            # No option, which would be recorded beside the run.
            api_key=os.environ.get(API_KEY),
            sleeps=args.rollout_server_sleep,
            patience=PATIENCE if len(urls) > 1 else None,
        )
        for url in urls
    ]
    for engine in engines:
        difference = engine.tokenizer_difference(tokenizer)
        if difference is not None:
            raise ValueError(f"{engine.url} has another tokenizer than the policy: {difference}; {WRONG_MODEL_HINT}")
        # Now, and not at the first prompt that is too long, which may come after days.
        if engine.context_length is not None and engine.context_length < max_length:
            raise ValueError(
                f"{engine.url} has a context of {engine.context_length} tokens, less than max_length {max_length}: "
                f"start it with a longer one (--max-model-len), or {_TOO_SHORT}"
            )
    return engines[0] if len(engines) == 1 else ReplicatedEngine(engines)
