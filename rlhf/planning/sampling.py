"""Rollouts before a run begins: the batch that training gets from one, and the memory and the time of sampling."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from rlhf.online import PPOTrainer
from rlhf.online.rollout import Rollout
from rlhf.online.samples import MinibatchSchedule, Sample
from rlhf.planning.batches import Micro
from rlhf.planning.layers import LayerStack
from rlhf.planning.step import at_full_depth
from rlhf.planning.tracking import MemoryRecorder
from rlhf.trainers.base import BaseTrainer

FEW_TOKENS = 2  # that are sampled to measure the memory of a rollout; the cache of the others is computed
TIMED_TOKENS = 8


def longest_prompts(trainer: PPOTrainer, count: int) -> list[dict[str, Any]]:
    """The rows with the longest prompts.

    Args:
        trainer: of the run.
        count: how many; they repeat where there are not so many.

    Returns:
        Rows with ``prompt_ids``.
    """
    rows: Any = trainer.train_dataset
    if not hasattr(rows, "select"):
        rows = trainer.collector.prompts.draw(count)
    ordered = sorted(rows, key=lambda row: -len(row["prompt_ids"]))
    return [ordered[index % len(ordered)] for index in range(count)]


def largest_rollout_micro(trainer: PPOTrainer) -> Micro:
    """The micro-batch of the longest prompts with completions of full length.

    Args:
        trainer: of the run; its collector is replaced, so it can no longer be trained.

    Returns:
        The micro-batch, with log-probs and advantages as the trainer computes them.
    """
    args = trainer.args
    size = args.per_device_train_batch_size
    num_groups = max(1, -(-size // args.completions_used))
    samples = []
    for group, row in enumerate(longest_prompts(trainer, num_groups)):
        for number in range(args.num_generations):
            # Rewards that differ, so that no group is left out.
            rewards = dict.fromkeys(trainer.collector.reward_names, float(number))
            samples.append(_full_sample(group, row, rewards, args.max_completion_length))
    rollout = Rollout(samples, greedy_rewards=torch.zeros(len(samples)))
    trainer.collector.collect = lambda *_: rollout  # type: ignore[method-assign]
    # One micro-batch and no more: a step repeats it.
    trainer.schedule = MinibatchSchedule(size, 1, 1)
    batch = next(iter(trainer.get_train_dataloader()))
    (batch,), count = trainer.get_batch_samples(iter([batch]), 1, args.device)
    return Micro(batch.to(args.device), count)


def _full_sample(group: int, row: dict[str, Any], rewards: dict[str, float], length: int) -> Sample:
    """A completion of full length whose tokens are those of its prompt."""
    prompt_ids = list(row["prompt_ids"])
    repeats = -(-length // len(prompt_ids))
    ids = (prompt_ids * repeats)[:length]
    return Sample(
        group=group,
        row=row,
        prompt_ids=prompt_ids,
        ids=ids,
        sampled=None,
        completion="",
        truncated=False,
        tokens={"sampler_logps": torch.zeros(len(ids))},
        reward=sum(rewards.values()),
        reward_components=rewards,
    )


class RolloutWork:
    """One call of the engine, as large as a rollout makes it.

    Args:
        engine: samples.
        prompts: ids of each.
        num_samples: completions of each prompt.
        sampling: how tokens are drawn.
    """

    def __init__(self, engine: Any, prompts: Sequence[list[int]], num_samples: int, sampling: Any) -> None:
        self.engine, self.prompts, self.num_samples, self.sampling = engine, prompts, num_samples, sampling

    @classmethod
    def of(cls, trainer: BaseTrainer) -> "RolloutWork | None":
        """The rollouts of a trainer.

        Args:
            trainer: of the run.

        Returns:
            None where it samples nothing in this process.
        """
        if isinstance(trainer, PPOTrainer):
            if not trainer.collector.sampler.is_local:
                return None
            args = trainer.args
            num_prompts = trainer.collector.prompts_per_step * args.num_mini_batches
            if args.rollout_batch_size:
                num_prompts = min(num_prompts, max(1, args.rollout_batch_size // args.num_generations))
            prompts = [list(row["prompt_ids"]) for row in longest_prompts(trainer, num_prompts)]
            return cls(trainer.collector.sampler.engine, prompts, args.num_generations, args.sampling())
        return None

    def run(self, num_tokens: int) -> None:
        """Sample this many tokens of each completion."""
        sampling = type(self.sampling)(
            **vars(self.sampling) | {"max_tokens": num_tokens, "min_tokens": num_tokens},
        )
        self.engine.generate(self.prompts, self.num_samples, sampling, seed=0)

    def peak(self, stacks: Sequence[LayerStack], device: torch.device, config: Any, element_size: int) -> int:
        """The memory of a rollout with completions of full length.

        Args:
            stacks: of the models.
            device: where it samples.
            config: of the model.
            element_size: bytes of a number in the cache.

        Returns:
            Bytes beside weights.
        """

        def sample_few(_: Any) -> dict[str, int]:
            recorder = MemoryRecorder(device)

            def work() -> None:
                recorder.mark("rollout")
                self.run(FEW_TOKENS)

            recorder.record(work)
            return {"rollout": recorder.phases["rollout"].peak}

        measured = at_full_depth(stacks, sample_few)["rollout"]
        more_tokens = max(self.sampling.max_tokens - FEW_TOKENS, 0)
        rows = len(self.prompts) * self.num_samples
        return measured + rows * more_tokens * cache_bytes_of_token(config, element_size)

    def seconds(self) -> float:
        """The time of a rollout with completions of full length."""
        # The first call warms up.
        self.run(1)
        times = []
        for num_tokens in (1, 1 + TIMED_TOKENS):
            started_at = time.perf_counter()
            self.run(num_tokens)
            times.append(time.perf_counter() - started_at)
        per_token = max(times[1] - times[0], 0.0) / TIMED_TOKENS
        return times[0] + per_token * self.sampling.max_tokens


def cache_bytes_of_token(config: Any, element_size: int) -> int:
    """Keys and values of one token, in all layers.

    Args:
        config: of the model.
        element_size: bytes of a number.

    Returns:
        Bytes.
    """
    text_config = config.get_text_config()
    heads = text_config.num_attention_heads
    kv_heads = getattr(text_config, "num_key_value_heads", None) or heads
    head_size = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    return int(2 * text_config.num_hidden_layers * kv_heads * head_size * element_size)
