"""vLLM in the process of the trainer: on the same GPU, with memory of its own while it samples."""

import logging
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rlhf.rollouts.engine import Completion, Sampling, check_request, sample_seed

logger = logging.getLogger(__name__)

MISSING = (
    "vllm_mode=colocate needs vLLM in this environment: pip install 'rlhf-exact[vllm]', or sample on a server "
    "(rollout_server_url)"
)


@dataclass(frozen=True)
class ColocatedOptions:
    """How vLLM uses the device.

    Args:
        memory_share: of the GPU's memory, for weights, keys and values.
        max_length: tokens of a prompt and its completion; None for the context of the model.
        sleeps: free this memory while the policy trains.
        dtype: of weights and products.
        processes: of the training run.
    """

    memory_share: float = 0.3
    max_length: int | None = None
    sleeps: bool = False
    dtype: torch.dtype = torch.bfloat16
    processes: int = 1


class ColocatedEngine:
    """A :class:`~rlhf.rollouts.engine.RolloutEngine` that runs vLLM in this process.

    It starts with random weights and gets those of the policy at the first update, so that no checkpoint is read twice.
    Asleep, it has no weights: they are sent before it samples again. Each process of a training run has an engine of
    its own, on its own GPU.

    Args:
        config: of the model.
        tokenizer: finds stop strings.
        end_ids: tokens that end a completion.
        options: memory, length and precision.
    Raises:
        ImportError: vLLM is not installed.
        ValueError: it does not take the model or an option, such as sleep on a CPU.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: Sequence[int],
        options: ColocatedOptions,
    ) -> None:
        self.version = 0
        self.end_ids, self.options = list(end_ids), options
        self.has_weights = False
        self._is_cache_asleep = False
        # Otherwise the engine would run in a process of its own, which tensors of this one do not reach.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        try:
            from vllm import LLM
        except ImportError as error:
            raise ImportError(MISSING) from error
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            try:
                self._llm: Any = LLM(folder, **self._llm_options())
            except ValueError as error:  # of several lines
                raise ValueError(f"vLLM cannot start in this process: {' '.join(str(error).split())}") from error

    def _llm_options(self) -> dict[str, Any]:
        options = self.options
        external: dict[str, Any] = {}
        if options.processes > 1:
            # vLLM joins the process group of the trainer instead of making one.
            external["distributed_executor_backend"] = "external_launcher"
        return {
            "load_format": "dummy",
            "dtype": str(options.dtype).removeprefix("torch."),
            "gpu_memory_utilization": options.memory_share,
            "max_model_len": options.max_length,
            "enable_sleep_mode": options.sleeps,
            # Those of the distribution that is sampled from.
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",  # no defaults of the model
            **external,
        }

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        index: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """See :class:`~rlhf.rollouts.engine.RolloutEngine`.

        Args:
            prompt_ids: each not empty.
            n: completions of each prompt.
            sampling: how tokens are drawn.
            seed: >= 0.
            index: the number of each prompt in a larger request.
        Returns:
            ``n`` completions of each prompt.
        Raises:
            RuntimeError: the engine has no weights yet, or lost them in its sleep.
        """
        check_request(prompt_ids, n, seed)
        if not prompt_ids:
            return []
        if not self.has_weights:
            raise RuntimeError("the colocated vLLM has no weights of the policy: call update_weights first")
        if self._is_cache_asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._is_cache_asleep = False
        prompts = [{"prompt_token_ids": list(ids)} for ids in prompt_ids for _ in range(n)]
        numbers = index or range(len(prompt_ids))
        parameters = [
            self._parameters(sampling, sample_seed(seed, number, sample)) for number in numbers for sample in range(n)
        ]
        outputs = self._llm.generate(prompts, parameters, use_tqdm=False)
        completions = [self._completion(output.outputs[0]) for output in outputs]
        return [completions[start : start + n] for start in range(0, len(completions), n)]

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See :class:`~rlhf.rollouts.engine.RolloutEngine`.

        Args:
            weights: by the names of a checkpoint.
            version: of the policy.
        """
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(list(weights))})
        # Keys and values of prompts are those of the old weights.
        self._llm.reset_prefix_cache()
        self.version, self.has_weights = version, True

    def sleep(self) -> None:
        """Free the memory of weights, keys and values, if it is asked for."""
        if self.options.sleeps and self.has_weights:
            self._llm.sleep(level=2)
            self.has_weights, self._is_cache_asleep = False, True

    def wake(self) -> None:
        """Take back the memory of the weights; that of keys and values follows when it samples."""
        if self._is_cache_asleep:
            self._llm.wake_up(tags=["weights"])

    def close(self) -> None:
        """Release the memory."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm

    def _parameters(self, sampling: Sampling, seed: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            min_tokens=sampling.min_tokens,
            max_tokens=sampling.max_tokens,
            stop=list(sampling.stop),
            stop_token_ids=self.end_ids,
            seed=seed,
            logprobs=0,  # of the sampled token alone
            detokenize=bool(sampling.stop),
        )

    def _completion(self, output: Any) -> Completion:
        ids = list(output.token_ids)
        logps = [float(entry[token].logprob) for token, entry in zip(ids, output.logprobs, strict=True)]
        finish_reason: Literal["stop", "length"] = "stop" if output.finish_reason == "stop" else "length"
        return Completion(ids, logps, finish_reason, self.version)
