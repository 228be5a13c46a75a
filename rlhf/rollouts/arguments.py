"""Options of a configuration for sampling: how tokens are drawn, and where. TRL's names for them are accepted."""

import logging
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger(__name__)

MEMORY_SHARE = 0.3  # of a GPU, for vLLM in the process of the trainer
_SERVER_COMMAND = "start `vllm serve MODEL` and pass rollout_server_url, rollout_server_model and rollout_weights_dir"
_OPTION_OF_SERVER = "an option of `vllm serve` itself: give it there"
# Options that are refused, and options that change nothing; `--help` has the reason of each.
_REFUSED = (
    "vllm_model_impl", "vllm_tensor_parallel_size", "vllm_structured_outputs_regex", "vllm_group_port",
)  # fmt: skip
# Options of vLLM in this process, which a server has itself.
_OF_COLOCATED = ("vllm_gpu_memory_utilization", "vllm_max_model_length")
# Options of a server: with one of them, `use_vllm` means a server.
_OF_SERVER = (
    "rollout_server_url", "rollout_server_model", "vllm_server_base_url", "vllm_server_host", "vllm_server_port",
)  # fmt: skip
_WITHOUT_EFFECT = ("cache_implementation", "use_transformers_paged", "use_transformers_continuous_batching")
# Keys of generation_kwargs, and their names in a :class:`rlhf.rollouts.Sampling`.
_GENERATION_KEYS = {
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "min_new_tokens": "min_tokens",
    "min_tokens": "min_tokens",
    "stop": "stop",
    "stop_strings": "stop",
}
# Keys that the loss needs to know, so they are options of the configuration itself.
_CONFIG_KEYS = {
    "temperature": "temperature",
    "max_new_tokens": "max_completion_length",
    "max_tokens": "max_completion_length",
}


def option(default: Any, help_text: str, choices: list[str] | None = None) -> Any:
    """A field of a configuration with its text in ``--help``.

    Args:
        default: not mutable.
        help_text: one sentence.
        choices: the values that are allowed; None for any.
    Returns:
        What :func:`dataclasses.field` returns.
    """
    metadata: dict[str, Any] = {"help": help_text}
    if choices is not None:
        metadata["choices"] = choices
    return field(default=default, metadata=metadata)


def old_name(meaning: str) -> Any:
    """An option under TRL's name; None where it is not given.

    Args:
        meaning: what it is called here, or why it is not offered.
    Returns:
        What :func:`dataclasses.field` returns.
    """
    return option(None, f"TRL's name: {meaning}.")


@dataclass
class ServerArguments:
    """Where completions are sampled."""

    rollout_server_url: list[str] | None = option(
        None, "Addresses of rollout servers (vLLM, SGLang), one or several; a key: ROLLOUT_SERVER_API_KEY."
    )
    rollout_server_model: str | None = option(None, "Name of the policy on the server.")
    rollout_weights_dir: str | None = option(None, "Shared folder for new weights; not needed where they go by NCCL.")
    rollout_server_sleep: bool = option(
        False,
        "Let the server free its memory while the policy trains. vLLM on a server moves its weights to host memory "
        "(sleep level 1); vLLM in this process drops them (level 2), because they are sent again.",
    )
    server_startup_timeout: float = option(240.0, "Seconds to wait for a server that is still loading.")

    def server_urls(self) -> list[str]:
        """The addresses of the rollout servers.

        Returns:
            In their order; a single one may be given as a text.
        Raises:
            ValueError: one is there twice.
        """
        given = self.rollout_server_url or []
        urls = [given] if isinstance(given, str) else list(given)
        repeated = sorted({url for url in urls if urls.count(url) > 1})
        if repeated:
            raise ValueError(f"rollout_server_url: {repeated[0]} is there twice")
        return urls

    def colocated_vllm(self) -> tuple[float, int | None] | None:
        """How vLLM runs in this process.

        Returns:
            Its share of the GPU's memory, and the tokens of a sequence at most; None if it does not run here.
        """
        return None


@dataclass
class GenerationArguments(ServerArguments):
    """How tokens are drawn. TRL's names are taken over, or refused with what to do instead."""

    top_p: float = option(1.0, "Nucleus sampling: most likely tokens up to this probability; 1: off.")
    top_k: int | None = option(0, "Sample from this many most likely tokens; 0: off.")
    min_p: float | None = option(None, "Drop tokens below this share of the highest probability.")
    repetition_penalty: float = option(1.0, "Penalty for tokens that occurred before, also in the prompt; 1: off.")
    generation_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": f"The sampling options in one mapping: {', '.join(_GENERATION_KEYS)}."}
    )
    use_vllm: bool = option(False, "Sample with vLLM, in this process or on a server (vllm_mode).")
    vllm_mode: str | None = option(
        None, "With use_vllm: colocate (in this process) or server; default: a server if one is named."
    )
    vllm_server_base_url: str | None = old_name("rollout_server_url")
    vllm_server_host: str | None = old_name("of rollout_server_url")
    vllm_server_port: int | None = old_name("of rollout_server_url")
    vllm_model_impl: str | None = old_name(_OPTION_OF_SERVER)
    vllm_enable_sleep_mode: bool | None = old_name("rollout_server_sleep")
    vllm_gpu_memory_utilization: float | None = option(
        None, f"Share of the GPU's memory for vLLM in this process; default: {MEMORY_SHARE}."
    )
    vllm_tensor_parallel_size: int | None = old_name(_OPTION_OF_SERVER)
    vllm_max_model_length: int | None = option(
        None, "Tokens of a prompt and its completion for vLLM in this process; default: the model's context."
    )
    vllm_structured_outputs_regex: str | None = old_name("not offered: a constrained policy is not the one that learns")
    vllm_server_timeout: float | None = old_name("server_startup_timeout")
    vllm_group_port: int | None = old_name("not needed: weights go through rollout_weights_dir")
    cache_implementation: str | None = old_name("not needed: the cache is the engine's own")
    use_transformers_continuous_batching: bool | None = old_name("not needed: ended rows always make room")
    use_transformers_paged: bool | None = old_name("not needed: ended rows always make room")
    transformers_continuous_batching_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "TRL's name: not supported."}
    )
    ds3_gather_for_generation: bool | None = old_name("ZeRO-3 samples on a server (rollout_server_url)")

    def take_over_generation(self) -> None:
        """Replace TRL's names by those here, in place.

        Raises:
            ValueError: an option that has no meaning here, or a value out of its range.
        """
        # A configuration file may hold null, which no later check could compare.
        if not isinstance(self.top_p, float | int):
            raise ValueError(f"top_p must be a number in (0, 1], got {self.top_p!r}")
        for name in _REFUSED:
            if getattr(self, name) is not None:
                raise ValueError(f"{name}: {self._reason(name)}; leave it out")
        for name in _WITHOUT_EFFECT:
            if getattr(self, name):
                logger.info("%s changes nothing: %s", name, self._reason(name))
        if self.transformers_continuous_batching_config is not None:
            raise ValueError("transformers_continuous_batching_config: there is no such engine here: leave it out")
        if self.ds3_gather_for_generation is False:
            raise ValueError("ds3_gather_for_generation=False: under ZeRO-3 sample on a server: " + _SERVER_COMMAND)
        if self.vllm_enable_sleep_mode:
            self.rollout_server_sleep = True
        if self.vllm_server_timeout is not None:
            self.server_startup_timeout = self.vllm_server_timeout
        if self.use_vllm:
            self._take_over_vllm()
        for name in _OF_COLOCATED:
            if getattr(self, name) is not None and self.colocated_vllm() is None:
                raise ValueError(f"{name}: {_OPTION_OF_SERVER}; leave it out, or pass vllm_mode=colocate")
        # Called for its checks alone: the values are read where a Sampling is made.
        self.generation_options()

    @classmethod
    def _reason(cls, name: str) -> str:
        help_text: str = cls.__dataclass_fields__[name].metadata["help"]
        return help_text.removeprefix("TRL's name: ").rstrip(".")

    def colocated_vllm(self) -> tuple[float, int | None] | None:
        """See :meth:`ServerArguments.colocated_vllm`."""
        if not self.use_vllm or self.vllm_mode != "colocate":
            return None
        share = self.vllm_gpu_memory_utilization
        return MEMORY_SHARE if share is None else share, self.vllm_max_model_length

    def _take_over_vllm(self) -> None:
        given_of_server = [name for name in _OF_SERVER if getattr(self, name) is not None]
        if self.vllm_mode is None:
            self.vllm_mode = "server" if given_of_server else "colocate"
        if self.vllm_mode not in ("server", "colocate"):
            raise ValueError(f"vllm_mode must be server or colocate, got {self.vllm_mode!r}")
        if self.vllm_mode == "server":
            self._take_over_server()
        elif given_of_server:
            raise ValueError(f"vllm_mode=colocate runs vLLM in this process: leave {given_of_server[0]} out")

    def _take_over_server(self) -> None:
        if self.rollout_server_url is None:  # the name here wins
            address = f"http://{self.vllm_server_host or '127.0.0.1'}:{self.vllm_server_port or 8000}"
            self.rollout_server_url = [self.vllm_server_base_url or address]
        if self.rollout_server_model is None or self.rollout_weights_dir is None:
            raise ValueError(f"use_vllm: {_SERVER_COMMAND}")

    def generation_options(self) -> dict[str, Any]:
        """Arguments of :class:`rlhf.rollouts.Sampling`, without lengths and the temperature.

        Returns:
            Name to value; what ``generation_kwargs`` has comes last.
        Raises:
            ValueError: a key of ``generation_kwargs`` that is not offered.
        """
        options: dict[str, Any] = dict(
            top_p=self.top_p,
            # TRL writes None where top_k or min_p is off.
            top_k=self.top_k or 0,
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty,
        )
        mapping = self.generation_kwargs if isinstance(self.generation_kwargs, dict) else {}
        for name, value in mapping.items():
            if name in _CONFIG_KEYS:
                raise ValueError(f"generation_kwargs: give {name} as {_CONFIG_KEYS[name]}, which the loss reads too")
            if name == "do_sample" and value:  # always so
                continue
            if name not in _GENERATION_KEYS:
                raise ValueError(
                    f"generation_kwargs: {name}={value!r} is not offered: samples are drawn from the policy, with "
                    f"{', '.join(_GENERATION_KEYS)}"
                )
            options[_GENERATION_KEYS[name]] = value
        return options
