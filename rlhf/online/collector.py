"""From prompts to scored samples: which prompts come next, what is sampled for them, and their rewards."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerState

from rlhf.data import Dialogue, encode_prompt
from rlhf.data.columns import RowFormat
from rlhf.data.formats import canonical, prompt_dialogue
from rlhf.data.messages import Turns
from rlhf.models import Policy
from rlhf.online.config import PPOConfig
from rlhf.online.prompts import Prompts
from rlhf.online.rollout import Rollout
from rlhf.online.samples import Sample, groups_with_reward_variance, zero_std_groups
from rlhf.rewards import RewardSet
from rlhf.rewards.scoring import Scored
from rlhf.rollouts import Environment, Sampling, play
from rlhf.rollouts.policy_sampler import PolicySampler

NumberedRow = tuple[int, dict[str, Any]]  # a row of the data, and the number of its prompt in the rollout


class RolloutCollector:
    """Samples completions and scores them; knows how far in the prompts it is.

    Prompts come in the order of their epoch, and a rollout goes on where the last one ended. Prompt i of a rollout and
    its random numbers are the same for any number of processes; process r trains on its share of each minibatch.

    Args:
        args: the configuration.
        sampler: samples from the current policy.
        prompts: in their order.
        tokenizer: decodes completions and renders environments' replies.
        row_format: how rows of the data are read.
        rewards: score completions; None where an environment alone does.
        environment_factory: makes the environment of each sample; None for completions of one turn.
    """

    def __init__(
        self,
        args: PPOConfig,
        sampler: PolicySampler,
        prompts: Prompts,
        tokenizer: PreTrainedTokenizerBase,
        row_format: RowFormat,
        rewards: RewardSet | None = None,
        environment_factory: Callable[[], Environment] | None = None,
    ) -> None:
        self.args, self.sampler, self.prompts, self.rewards = args, sampler, prompts, rewards
        self.tokenizer, self.row_format = tokenizer, row_format
        self.environment_factory = environment_factory
        self.num_rollouts = 0  # so far
        self.version = 0  # of the weights that sample now: the rollouts that the policy was trained on
        # A step takes a fixed number of completions, so a rollout takes the prompts that give so many.
        completions_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self.prompts_per_step = completions_per_step // args.completions_used  # of this process
        self.prompts_per_rollout = self.prompts_per_step * args.world_size * args.num_mini_batches

    @property
    def reward_names(self) -> list[str]:
        """Components of a reward; the same on every process, whether it has samples or not."""
        of_environment = [] if self.environment_factory is None else ["environment"]
        return of_environment + ([] if self.rewards is None else list(self.rewards.names))

    @property
    def reward_weights(self) -> dict[str, float]:
        """The weight of each component of a reward."""
        weights = {} if self.rewards is None else dict(zip(self.rewards.names, self.rewards.weights, strict=True))
        return weights if self.environment_factory is None else weights | {"environment": 1.0}

    def collect(self, policy: Policy, trained_model: nn.Module, state: TrainerState) -> Rollout:
        """The next rollout.

        Args:
            policy: samples the completions.
            trained_model: what accelerate made of it.
            state: the trainer's state, with ``global_step``; reward functions may ask for it.
        Returns:
            This process's share.
        """
        started_at = time.perf_counter()
        place = self.state()

        def draw() -> Rollout:
            if self.state() != place:  # called again
                self.load_state(place)
            self.version = self.num_rollouts
            return self.next_rollout(state)

        rollout = self.sampler.sample(policy, trained_model, state.global_step, draw)
        rollout.seconds = time.perf_counter() - started_at  # with the time that sending the weights took
        return rollout

    def next_rollout(self, state: TrainerState) -> Rollout:
        """The next rollout, from the weights that the engine has.

        Args:
            state: the trainer's state; reward functions may ask for it.
        Returns:
            This process's share.
        """
        started_at = time.perf_counter()
        self.num_rollouts += 1
        # Every process draws all prompts, and samples for its share: so the order needs no communication.
        rows = list(enumerate(self.prompts.draw(self.prompts_per_rollout)))
        rollout = Rollout([], number=self.num_rollouts)
        rollout.samples = self._sample_and_score(self._share_of_minibatches(rows), state, rollout)
        rollout.zero_std_groups = zero_std_groups(rollout.samples)
        if self.args.dynamic_sampling:
            self._resample_zero_std_groups(rollout, state)
        if self.args.uses_baselines:
            rollout.greedy_rewards = self._greedy_rewards(rollout, state)
        rollout.drawn = self.prompts.drawn
        rollout.seconds = time.perf_counter() - started_at
        return rollout

    def check(self) -> None:
        """Nothing goes on between rollouts that could fail."""

    def during_training(self) -> AbstractContextManager[None]:
        """As :meth:`PolicySampler.during_training`."""
        return self.sampler.during_training()

    def state(self) -> dict[str, Any]:
        """What is needed to go on with the next rollout."""
        return {"rollouts": self.num_rollouts, "drawn": self.prompts.drawn}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` returned.

        Args:
            state: with ``rollouts`` and ``drawn``.
        """
        self.num_rollouts = state["rollouts"]
        self.prompts.go_to(state["drawn"])

    def answer(self, policy: Policy, trained_model: nn.Module, rows: Any, state: TrainerState) -> list[Sample]:
        """Scored completions of each of these rows, for evaluation.

        Args:
            policy: samples the completions.
            trained_model: what accelerate made of it.
            rows: with ``prompt_ids``.
            state: the trainer's state.
        Returns:
            This process's share.
        """
        numbers = range(self.args.process_index, len(rows), self.args.world_size)
        numbered_rows = [(number, rows[number]) for number in numbers]
        num_samples = self.args.num_generations_eval or 1
        batch_size = self.args.per_device_eval_batch_size

        def draw() -> list[Sample]:
            # No rollout has the number 0, so evaluation shares its random numbers with none.
            samples = self._sample(numbered_rows, self.args.sampling(), num_samples, 0, batch_size)
            self._score(samples, state)
            return samples

        return self.sampler.sample(policy, trained_model, state.global_step, draw)

    # Which rows

    def _share_of_minibatches(self, items: Sequence[Any]) -> list[Any]:
        """This process's share of each minibatch, of the items of all processes in order."""
        size, rank, world_size = self.prompts_per_step, self.args.process_index, self.args.world_size
        starts = [(minibatch * world_size + rank) * size for minibatch in range(self.args.num_mini_batches)]
        return [item for start in starts for item in items[start : start + size]]

    def _resample_zero_std_groups(self, rollout: Rollout, state: TrainerState) -> None:
        """Replace groups of equal rewards by those of further prompts (DAPO).

        All processes share their groups, so that the choice does not depend on their number. Groups of equal rewards
        stay where no further prompt gave a better one.
        """
        num_samples = self.args.num_generations
        next_number = self.prompts_per_rollout
        groups_with_variance: list[list[Sample]] = []
        equal_groups: list[list[Sample]] = []
        new_samples = rollout.samples
        for attempts_left in reversed(range(self.args.dynamic_sampling + 1)):
            # In the order of prompts, whichever process sampled them.
            everyone = sorted(gather_object(new_samples), key=lambda sample: sample.group)
            for start in range(0, len(everyone), num_samples):
                group = everyone[start : start + num_samples]
                (groups_with_variance if groups_with_reward_variance(group) else equal_groups).append(group)
            rollout.zero_std_groups = len(equal_groups), len(equal_groups) + len(groups_with_variance)
            missing = self.prompts_per_rollout - len(groups_with_variance)
            if missing <= 0 or not attempts_left:
                break
            rows = list(enumerate(self.prompts.draw(missing), start=next_number))
            next_number += missing
            process_rows = rows[self.args.process_index :: self.args.world_size]
            new_samples = self._sample_and_score(process_rows, state, rollout)
        groups_used = (groups_with_variance + equal_groups)[: self.prompts_per_rollout]
        # Groups are numbered anew, as two prompts of different draws must not share a number.
        for number, group in enumerate(groups_used):
            for sample in group:
                sample.group = number
        rollout.samples = [sample for group in self._share_of_minibatches(groups_used) for sample in group]

    def _greedy_rewards(self, rollout: Rollout, state: TrainerState) -> Tensor:
        """ReMax's baseline: the reward of the most probable completion of each sample's prompt, [S]."""
        row_of_group = {sample.group: sample.row for sample in rollout.samples}
        greedy_sampling = replace(self.args.sampling(), temperature=0.0)
        samples = self._sample(list(row_of_group.items()), greedy_sampling, 1, self.num_rollouts)
        rollout.scored += self._score(samples, state)
        reward_of_group = {sample.group: sample.reward for sample in samples}
        return torch.tensor([reward_of_group[sample.group] for sample in rollout.samples])

    # Completions

    def _sample_and_score(self, rows: list[NumberedRow], state: TrainerState, rollout: Rollout) -> list[Sample]:
        samples = self._sample(rows, self.args.sampling(), self.args.num_generations, self.num_rollouts)
        rollout.scored += self._score(samples, state)
        return samples

    def _sample(
        self,
        rows: list[NumberedRow],
        sampling: Sampling,
        num_samples: int,
        rollout_number: int,
        batch_size: int | None = None,
    ) -> list[Sample]:
        """Completions of each row, at most ``batch_size`` at once."""
        # A bound on the memory of the cache; random numbers do not depend on it.
        batch_size = batch_size or self.args.rollout_batch_size or len(rows) * num_samples
        rows_at_once = max(1, batch_size // num_samples)
        sample_rows = self._complete if self.environment_factory is None else self._converse
        samples: list[Sample] = []
        for start in range(0, len(rows), rows_at_once):
            version = self.version  # before the request: newer weights may come in the middle
            new_samples = sample_rows(rows[start : start + rows_at_once], sampling, num_samples, rollout_number)
            for sample in new_samples:
                sample.version = version
            samples += new_samples
        return samples

    def _complete(
        self, rows: list[NumberedRow], sampling: Sampling, num_samples: int, rollout_number: int
    ) -> list[Sample]:
        numbers = [number for number, _ in rows]
        prompt_ids = [row["prompt_ids"] for _, row in rows]
        seed = self._seed(rollout_number, 0)
        completions_of_prompts = self.sampler.engine.generate(prompt_ids, num_samples, sampling, seed, numbers)
        return [
            Sample(
                group=number,
                row=row,
                prompt_ids=row["prompt_ids"],
                ids=completion.ids,
                sampled=None,
                completion=self._as_completion(row, completion.ids),
                truncated=completion.finish_reason == "length",
                tokens={"sampler_logps": torch.tensor(completion.logps)},
            )
            for (number, row), completions in zip(rows, completions_of_prompts, strict=True)
            for completion in completions
        ]

    def _converse(
        self, rows: list[NumberedRow], sampling: Sampling, num_samples: int, rollout_number: int
    ) -> list[Sample]:
        """Play an episode for each sample; its environment may begin with another prompt than the row's."""
        assert self.environment_factory is not None
        rows_of_samples = [numbered for numbered in rows for _ in range(num_samples)]
        environments: list[Environment] = []
        dialogues: list[Dialogue] = []
        prompts: list[list[int]] = []
        for _, row in rows_of_samples:
            environment = self.environment_factory()
            prompt = environment.reset(row)
            dialogue = self._dialogue(row)
            if prompt is not None:
                dialogue = replace(dialogue, prompt=prompt)
            environments.append(environment)
            dialogues.append(dialogue)
            # The row's own prompt is tokenised already, and stays as it is.
            prompts.append(row["prompt_ids"] if prompt is None else encode_prompt(self.tokenizer, dialogue))
        episodes = play(
            environments,
            prompts,
            self.sampler.engine,
            self.tokenizer,
            sampling,
            lambda turn: self._seed(rollout_number, turn),
            [number * num_samples + sample for number, _ in rows for sample in range(num_samples)],
            dialogues=dialogues,
            max_turns=self.args.max_turns,
            max_length=self.args.limit(),
        )
        return [
            Sample(
                group=number,
                row=row,
                prompt_ids=episode.prompt_ids,
                ids=episode.ids,
                sampled=episode.sampled,
                completion=list(episode.turns),
                truncated=episode.truncated,
                tokens={"sampler_logps": torch.tensor(episode.logps)},
                reward_components={"environment": episode.reward},
            )
            for (number, row), episode in zip(rows_of_samples, episodes, strict=True)
        ]

    def _as_completion(self, row: Mapping[str, Any], ids: list[int]) -> Turns:
        """Text for a prompt that is text, a message for a conversation."""
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        is_text = isinstance(self._dialogue(row).prompt, str)
        return text if is_text else [{"role": "assistant", "content": text}]

    def _seed(self, rollout_number: int, turn: int) -> int:
        # The engine adds the numbers of the prompt and the sample, so this is the same on every process.
        return int(np.random.SeedSequence((self.args.seed, rollout_number, turn)).generate_state(1)[0])

    def _dialogue(self, row: Mapping[str, Any]) -> Dialogue:
        return prompt_dialogue(canonical(row, self.row_format), self.row_format)

    # Rewards

    def _score(self, samples: list[Sample], state: TrainerState) -> list[Scored]:
        """Give samples their rewards; returns what the reward functions returned, if there are any.

        Rewards of the environment and of functions are added up, then bounded; a cut completion is penalised last.
        """
        # NaN is no reward at all, which is not a reward of 0.
        for sample in samples:
            sample.reward = sample.reward_components.get("environment", float("nan"))
        scored_calls = []
        if self.rewards is not None and samples:
            scored = self._call_rewards(self.rewards, samples, state)
            scored_calls.append(scored)
            components = scored.reward_components.tolist()
            for index, (sample, reward) in enumerate(zip(samples, scored.rewards.tolist(), strict=True)):
                sample.reward = reward + sample.reward_components.get("environment", 0.0)
                sample.reward_components |= dict(zip(scored.names, components[index], strict=True))
                sample.extra = {name: column[index] for name, column in scored.extra.items()}
        for sample in samples:
            # NaN stays NaN in both.
            if self.args.reward_bounds is not None:
                sample.reward = float(np.clip(sample.reward, *self.args.reward_bounds))
            if self.args.missing_eos_penalty is not None and sample.truncated:
                sample.reward -= self.args.missing_eos_penalty
        return scored_calls

    def _call_rewards(self, rewards: RewardSet, samples: list[Sample], state: TrainerState) -> Scored:
        rows = [sample.row for sample in samples]
        # Prompts are passed on in their own argument, as text or messages.
        columns = {name: [row[name] for row in rows] for name in rows[0] if name not in ("prompt", "prompt_ids")}
        return rewards(
            [self._dialogue(row).prompt for row in rows],
            [sample.completion for sample in samples],
            [sample.ids for sample in samples],
            state,
            **columns,
        )
