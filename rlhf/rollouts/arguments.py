"""How a trainer's policy generates: the options of sampling, and the names that TRL has for them and for a server."""

import logging
from dataclasses import dataclass, field
from typing import Any

from rlhf.rollouts.policy_sampler import ServerArguments

logger = logging.getLogger(__name__)

_SERVE = "start `vllm serve MODEL` and pass rollout_server_url, rollout_server_model and rollout_weights_dir"
_OF_THE_SERVER = "an option of `vllm serve` itself: give it there"
# What generation_kwargs may hold, and what it is called in a :class:`Sampling`.
_KNOWN = {
    "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "repetition_penalty": "repetition_penalty",
    "min_new_tokens": "min_tokens", "min_tokens": "min_tokens", "stop": "stop", "stop_strings": "stop",
}  # fmt: skip
_ELSEWHERE = {
    "temperature": "temperature",
    "max_new_tokens": "max_completion_length",
    "max_tokens": "max_completion_length",
}


def old_name(meaning: str) -> Any:
    """An option under TRL's name; None where it is not given."""
    return field(default=None, metadata={"help": f"TRL's name: {meaning}"})


@dataclass
class GenerationArguments(ServerArguments):
    """Of a configuration: how tokens are drawn, and where. TRL's names are taken over, or refused with what to do."""

    top_p: float = field(default=1.0, metadata={"help": "Draw from the likeliest tokens of this mass; 1: from all."})
    top_k: int | None = field(default=0, metadata={"help": "Draw from this many likeliest tokens; 0: from all."})
    min_p: float | None = field(
        default=None, metadata={"help": "Draw from tokens of at least this share of the likeliest one's probability."}
    )
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "Makes tokens less likely that were there before, prompt included; 1: does not."}
    )
    generation_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": f"The same in one mapping: {', '.join(_KNOWN)}."}
    )
    use_vllm: bool = field(default=False, metadata={"help": "TRL's name: sample on a vLLM server (vllm_server_*)."})
    vllm_mode: str | None = old_name("server; colocate is not offered.")
    vllm_server_base_url: str | None = old_name("rollout_server_url.")
    vllm_server_host: str | None = old_name("of rollout_server_url.")
    vllm_server_port: int | None = old_name("of rollout_server_url.")
    vllm_model_impl: str | None = old_name(_OF_THE_SERVER)
    vllm_enable_sleep_mode: bool | None = old_name("a server that can sleep is always asked to.")
    vllm_gpu_memory_utilization: float | None = old_name(_OF_THE_SERVER)
    vllm_tensor_parallel_size: int | None = old_name(_OF_THE_SERVER)
    vllm_max_model_length: int | None = old_name(_OF_THE_SERVER)
    vllm_structured_outputs_regex: str | None = old_name(
        "not offered: a constrained policy is not the one that learns."
    )
    vllm_server_timeout: float | None = old_name("not needed: the server must be up.")
    vllm_group_port: int | None = old_name("not needed: weights go through rollout_weights_dir.")
    cache_implementation: str | None = old_name("not needed: the cache is the engine's own.")
    use_transformers_continuous_batching: bool | None = old_name("not needed: ended rows always make room.")
    use_transformers_paged: bool | None = old_name("the same.")
    transformers_continuous_batching_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "TRL's name: not offered."}
    )
    ds3_gather_for_generation: bool | None = old_name("ZeRO-3 samples on a server (rollout_server_url).")

    def take_over_generation(self) -> None:
        """Give TRL's names their meaning here.

        Raises:
            ValueError: an option that has none.
        """
        if not isinstance(self.top_p, float | int):
            raise ValueError(f"top_p must be a number in (0, 1], got {self.top_p!r}")
        self._take_over_vllm()
        for name in ("cache_implementation", "use_transformers_paged", "use_transformers_continuous_batching"):
            if getattr(self, name):
                logger.info("%s changes nothing: %s", name, self._help(name))
        if self.transformers_continuous_batching_config is not None:
            raise ValueError("transformers_continuous_batching_config: there is no such engine here: leave it out")
        if self.ds3_gather_for_generation is False:
            raise ValueError("ds3_gather_for_generation=False: under ZeRO-3 sample on a server: " + _SERVE)
        self.generation_options()

    @classmethod
    def _help(cls, name: str) -> str:
        told: str = cls.__dataclass_fields__[name].metadata["help"]
        return told.removeprefix("TRL's name: ")

    def _take_over_vllm(self) -> None:
        for name in (
            "vllm_model_impl", "vllm_gpu_memory_utilization", "vllm_tensor_parallel_size", "vllm_max_model_length",
            "vllm_structured_outputs_regex", "vllm_server_timeout", "vllm_group_port",
        ):  # fmt: skip
            if getattr(self, name) is not None:
                raise ValueError(f"{name}: {self._help(name).rstrip('.')}; leave it out")
        if not self.use_vllm:
            return
        if self.vllm_mode not in (None, "server"):
            raise ValueError(f"vllm_mode {self.vllm_mode!r} is not offered: {_SERVE}")
        if self.rollout_server_url is None:
            place = f"http://{self.vllm_server_host or '127.0.0.1'}:{self.vllm_server_port or 8000}"
            self.rollout_server_url = self.vllm_server_base_url or place
        if self.rollout_server_model is None or self.rollout_weights_dir is None:
            raise ValueError(f"use_vllm: {_SERVE}")

    def generation_options(self) -> dict[str, Any]:
        """What :class:`rlhf.rollouts.Sampling` takes of these, besides lengths and the temperature."""
        options = dict(
            top_p=self.top_p, top_k=self.top_k or 0, min_p=self.min_p or 0.0, repetition_penalty=self.repetition_penalty
        )
        given = self.generation_kwargs if isinstance(self.generation_kwargs, dict) else {}
        for name, value in given.items():
            if name in _ELSEWHERE:
                raise ValueError(f"generation_kwargs: give {name} as {_ELSEWHERE[name]}, which the loss reads too")
            if name == "do_sample" and value:
                continue
            if name not in _KNOWN:
                raise ValueError(
                    f"generation_kwargs: {name}={value!r} is not offered: samples are drawn from the policy, with "
                    f"{', '.join(_KNOWN)}"
                )
            options[_KNOWN[name]] = value
        return options
