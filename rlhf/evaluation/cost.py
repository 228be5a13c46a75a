"""What models cost to run: their size, and their speed side by side."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf.data import Batch
from rlhf.models import Policy
from rlhf.rollouts import LocalEngine, Sampling

ROUNDS = 3
_UNLIMITED = 2**30  # tokens of a context, for a model without a limit


def model_size(model: nn.Module) -> dict[str, float]:
    """Measure the size of a model; tied parameters count once.

    Args:
        model: Any module.

    Returns:
        Parameters in millions, and their memory in MiB.
    """
    # `parameters()` yields a shared tensor once, so that tied embeddings are not counted twice.
    parameters = list(model.parameters())
    num_parameters = sum(parameter.numel() for parameter in parameters)
    memory_bytes = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    return {"million parameters": num_parameters / 1e6, "MiB": memory_bytes / 2**20}


def tokens_per_second(work: Mapping[str, Callable[[], int]]) -> dict[str, float]:
    """Measure the speed of several pieces of work: the median of three rounds, after one to warm up.

    In each round each of them has its turn, so that a machine that slows down on the way slows all of them.

    Args:
        work: From a name to a function that does the work and returns how many tokens that were. On an accelerator the
            whole computation is timed, not its launch.

    Returns:
        From each name to tokens per second.
    """
    seconds: dict[str, list[float]] = {work_name: [] for work_name in work}
    token_counts: dict[str, int] = {}
    for _ in range(1 + ROUNDS):
        for work_name, run_work in work.items():
            _synchronize()
            # Before the clock starts, the queue of the accelerator is empty: earlier work must not count.
            start_time = time.perf_counter()
            token_counts[work_name] = run_work()
            _synchronize()
            seconds[work_name].append(time.perf_counter() - start_time)
    # The first round compiles kernels and fills caches.
    return {
        work_name: token_counts[work_name] / statistics.median(round_seconds[1:])
        for work_name, round_seconds in seconds.items()
    }


def model_speed(
    models: Mapping[str, Policy],
    tokenizer: PreTrainedTokenizerBase,
    batch: Batch,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> dict[str, dict[str, float]]:
    """Measure the speed of models: the same batch and the same number of new tokens for all.

    * forward: ``batch`` to the log-probs of its targets; all of its tokens count, those of prompts too.
    * generation: :class:`LocalEngine` answers all prompts at once, greedily, without an early end. New tokens count,
      and the time to read the prompts is included. Where the shortest context of a model has no space, answers are
      shorter and prompts lose their beginning.

    Args:
        models: From a name to the model.
        tokenizer: The tokenizer of all models.
        batch: On the device of the models, in a layout that all take.
        prompts: Ids, at least one each.
        max_new_tokens: Length of each answer.

    Returns:
        For each model, ``"forward tokens/s"`` and ``"generation tokens/s"``.

    Raises:
        ValueError: No token ends a completion.
    """
    context_length = _shortest_context(models)
    # At least half of the context stays for the prompt.
    new_tokens = min(max_new_tokens, context_length // 2)
    prompts = [prompt_ids[-(context_length - new_tokens) :] for prompt_ids in prompts]
    # A model that ends its answers early would be timed on less work than the others.
    sampling = Sampling(temperature=0.0, min_tokens=new_tokens, max_tokens=new_tokens)
    engines = {model_name: LocalEngine(policy.model, tokenizer) for model_name, policy in models.items()}
    forward_speeds = tokens_per_second(
        {model_name: partial(_forward, policy, batch) for model_name, policy in models.items()}
    )
    generation_speeds = tokens_per_second(
        {model_name: partial(_generate, engine, prompts, sampling) for model_name, engine in engines.items()}
    )
    return {
        model_name: {
            "forward tokens/s": forward_speeds[model_name],
            "generation tokens/s": generation_speeds[model_name],
        }
        for model_name in models
    }


def _shortest_context(models: Mapping[str, Policy]) -> int:
    # A vision model keeps the limits of its language model in a config of its own.
    configs = [policy.config.get_text_config() for policy in models.values()]
    # A model without positions, such as Mamba, names no limit.
    context_lengths = [getattr(config, "max_position_embeddings", None) for config in configs]
    return min((context_length for context_length in context_lengths if context_length is not None), default=_UNLIMITED)


@torch.no_grad()
def _forward(policy: Policy, batch: Batch) -> int:
    policy.eval()
    policy(batch)
    return int(batch.num_tokens())


def _generate(engine: LocalEngine, prompts: Sequence[Sequence[int]], sampling: Sampling) -> int:
    completion_groups = engine.generate(prompts, 1, sampling, seed=0)
    return sum(len(completion.ids) for (completion,) in completion_groups)


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
