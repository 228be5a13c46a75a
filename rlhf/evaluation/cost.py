"""What models cost to run: their size, and how fast they are side by side."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf.data import Batch
from rlhf.models import Policy
from rlhf.rollouts import LocalEngine, Sampling

ROUNDS = 3


def model_size(model: nn.Module) -> dict[str, float]:
    """Parameters in millions, and what they take in memory in MiB; tied ones count once."""
    parameters = list(model.parameters())
    size = sum(p.numel() * p.element_size() for p in parameters)
    return {"million parameters": sum(p.numel() for p in parameters) / 1e6, "MiB": size / 2**20}


def tokens_per_second(work: Mapping[str, Callable[[], int]]) -> dict[str, float]:
    """How fast each piece of work is, by its name: the median of three rounds, after one to warm up.

    In a round each has its turn, so that a machine that slows down on the way does not choose between them.

    Args:
        work: does it, and returns how many tokens that were. On an accelerator all of it counts, not its launch.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    tokens = {}
    for _ in range(1 + ROUNDS):
        for name, do in work.items():
            _wait()
            began = time.perf_counter()
            tokens[name] = do()
            _wait()
            seconds[name].append(time.perf_counter() - began)
    return {name: tokens[name] / statistics.median(spent[1:]) for name, spent in seconds.items()}


def model_speed(
    models: Mapping[str, Policy],
    tokenizer: PreTrainedTokenizerBase,
    batch: Batch,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> dict[str, dict[str, float]]:
    """Tokens a second of each model, by its name: the same batch and the same number of new tokens for all.

    * forward: of ``batch``, to the log-probs of its targets, counting each of its tokens, prompts too.
    * generation: :class:`LocalEngine` answers all ``prompts`` at once, greedily, with ``max_new_tokens`` each and no
      end before; new tokens are counted, and the time to read the prompts is in it. Where the shortest context has no
      room, answers are shorter, and a prompt keeps its end.

    Args:
        batch: on the device of the models, in a layout that all take. prompts: ids, none empty.
    Raises:
        ValueError: no token ends a completion.
    """
    contexts = [getattr(m.config.get_text_config(), "max_position_embeddings", None) for m in models.values()]
    room = min((length for length in contexts if length is not None), default=2**30)
    new = min(max_new_tokens, room // 2)
    prompts = [ids[-(room - new) :] for ids in prompts]
    sampling = Sampling(temperature=0.0, min_tokens=new, max_tokens=new)
    engines = {name: LocalEngine(policy.model, tokenizer) for name, policy in models.items()}
    forward = tokens_per_second({name: partial(_read, policy, batch) for name, policy in models.items()})
    generation = tokens_per_second({name: partial(_answer, e, prompts, sampling) for name, e in engines.items()})
    return {name: {"forward tokens/s": forward[name], "generation tokens/s": generation[name]} for name in models}


@torch.no_grad()
def _read(policy: Policy, batch: Batch) -> int:
    policy.eval()
    policy(batch)
    return int(batch.num_tokens())


def _answer(engine: LocalEngine, prompts: Any, sampling: Sampling) -> int:
    return sum(len(one.ids) for (one,) in engine.generate(prompts, 1, sampling, seed=0))


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
