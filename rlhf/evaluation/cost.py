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
    count = sum(parameter.numel() for parameter in parameters)
    size = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    return {"million parameters": count / 1e6, "MiB": size / 2**20}


def tokens_per_second(work: Mapping[str, Callable[[], int]]) -> dict[str, float]:
    """Measure the speed of several pieces of work: the median of three rounds, after one to warm up.

    In each round each of them has its turn, so that a machine that slows down on the way slows all of them.

    Args:
        work: From a name to a function that does the work and returns how many tokens that were. On an accelerator the
            whole computation is timed, not its launch.

    Returns:
        From each name to tokens per second.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    tokens: dict[str, int] = {}
    for _ in range(1 + ROUNDS):
        for name, run in work.items():
            _synchronize()
            # Before the clock starts, the queue of the accelerator is empty: earlier work must not count.
            began = time.perf_counter()
            tokens[name] = run()
            _synchronize()
            seconds[name].append(time.perf_counter() - began)
    # The first round compiles kernels and fills caches.
    return {name: tokens[name] / statistics.median(times[1:]) for name, times in seconds.items()}


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
    context = _shortest_context(models)
    # At least half of the context stays for the prompt.
    new_tokens = min(max_new_tokens, context // 2)
    prompts = [ids[-(context - new_tokens) :] for ids in prompts]
    # A model that ends its answers early would be timed on less work than the others.
    sampling = Sampling(temperature=0.0, min_tokens=new_tokens, max_tokens=new_tokens)
    engines = {name: LocalEngine(policy.model, tokenizer) for name, policy in models.items()}
    forward = tokens_per_second({name: partial(_forward, policy, batch) for name, policy in models.items()})
    generation = tokens_per_second(
        {name: partial(_generate, engine, prompts, sampling) for name, engine in engines.items()}
    )
    return {name: {"forward tokens/s": forward[name], "generation tokens/s": generation[name]} for name in models}


def _shortest_context(models: Mapping[str, Policy]) -> int:
    # A vision model keeps the limits of its language model in a config of its own.
    configs = [policy.config.get_text_config() for policy in models.values()]
    # A model without positions, such as Mamba, names no limit.
    lengths = [getattr(config, "max_position_embeddings", None) for config in configs]
    return min((length for length in lengths if length is not None), default=_UNLIMITED)


@torch.no_grad()
def _forward(policy: Policy, batch: Batch) -> int:
    policy.eval()
    policy(batch)
    return int(batch.num_tokens())


def _generate(engine: LocalEngine, prompts: Sequence[Sequence[int]], sampling: Sampling) -> int:
    groups = engine.generate(prompts, 1, sampling, seed=0)
    return sum(len(completion.ids) for (completion,) in groups)


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
