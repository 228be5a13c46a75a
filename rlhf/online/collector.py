"""From prompts to scored samples: which prompts come next, who samples, what rewards say."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor

from rlhf.data import Dialogue, encode_prompt
from rlhf.data.formats import Turns, canonical, prompt_dialogue
from rlhf.models import Policy, vocabulary_size
from rlhf.online.prompts import Prompts
from rlhf.online.samples import Sample, varied_groups
from rlhf.rollouts import Environment, RolloutEngine, Sampling, play
from rlhf.rollouts.policy_sampler import PolicySampler, make_engine


class Roller:
    """Samples for a trainer; knows how far in the prompts it is.

    Prompts come in the order of their epoch, and a rollout goes on where the last one ended. Prompt i of a rollout and
    its randomness are the same for any number of processes; process r learns from its share of each minibatch.

    Args:
        trainer: the :class:`PPOTrainer`.
        engine: who samples; by default this process, or the server of the configuration.
        environment_factory: makes the other side of a conversation, for each sample.
    Raises:
        ValueError: weights are sharded and this process samples; or no token ends a completion.
    """

    def __init__(
        self, trainer: Any, engine: RolloutEngine | None, environment_factory: Callable[[], Environment] | None
    ) -> None:
        self.trainer, self.args = trainer, trainer.args
        self.tokenizer = trainer.processing_class
        self.form = trainer.args.reading().for_tokenizer(self.tokenizer).form
        self.environment_factory = environment_factory
        self.rollouts = 0  # made so far
        self.equal_groups = (0, 0)  # of the last rollout, before dynamic sampling replaced them: how many of how many
        engine = engine or make_engine(trainer.args, trainer.policy, self.tokenizer, trainer.accelerator)
        self.sampler = PolicySampler(engine, trainer.accelerator)
        args = self.args
        world = args.world_size
        step = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self.in_step = step // args.kept  # prompts of this process
        order = args.seed if args.data_seed is None else args.data_seed
        self.prompts = Prompts(trainer.train_dataset, order, args.shuffle_dataset, self._with_ids)
        self.prompts_in_rollout = self.in_step * world * args.num_mini_batches

    def _mine(self, items: list[Any]) -> list[Any]:
        """This process's share of each minibatch, of what all processes have in order."""
        each, rank, world = self.in_step, self.args.process_index, self.args.world_size
        starts = (minibatch * each * world + rank * each for minibatch in range(self.args.num_mini_batches))
        return [item for start in starts for item in items[start : start + each]]

    def _with_ids(self, rows: Dataset) -> Dataset:
        trainer = self.trainer
        tokenised: Dataset = trainer.tokenize(rows, self.tokenizer, self.args, vocabulary_size(trainer.policy))
        return tokenised

    # Samples

    def rollout(self, policy: Policy, beta: float) -> tuple[list[Sample], Tensor | None]:
        """This process's samples, scored, in the order of training; with rewards of greedy answers for ``remax``."""
        self.rollouts += 1
        numbered = list(enumerate(self.prompts.draw(self.prompts_in_rollout)))
        with self.sampler.synced_engine(policy, self.trainer.model_wrapped, self.trainer.state.global_step):
            samples = self._sample(self._mine(numbered), self.args.sampling(), self.args.num_generations)
            if self.args.dynamic_sampling:
                samples = self._until_varied(samples)
            baselines = self._greedy(samples) if self.args.advantage_estimator == "remax" else None
        return samples, baselines

    def answer(self, policy: Policy, rows: Any) -> list[Sample]:
        """Answers to each of these rows, scored: this process's share."""
        mine = [(i, rows[i]) for i in range(self.args.process_index, len(rows), self.args.world_size)]
        with self.sampler.synced_engine(policy, self.trainer.model_wrapped, self.trainer.state.global_step):
            count = self.args.num_generations_eval or 1
            return self._sample(mine, self.args.sampling(), count, 0, self.args.per_device_eval_batch_size)

    def _sample(
        self,
        rows: list[tuple[int, dict[str, Any]]],
        sampling: Sampling,
        n: int,
        rollout: int | None = None,
        batch_size: int | None = None,
    ) -> list[Sample]:
        rollout = self.rollouts if rollout is None else rollout
        make = self._converse if self.environment_factory is not None else self._complete
        size = max(1, (batch_size or self.args.rollout_batch_size or len(rows) * n) // n)
        parts = (rows[start : start + size] for start in range(0, len(rows), size))
        samples = [sample for part in parts for sample in make(part, sampling, n, rollout)]
        self._score(samples, told=rollout > 0)
        return samples

    def _complete(
        self, rows: list[tuple[int, dict[str, Any]]], sampling: Sampling, n: int, rollout: int
    ) -> list[Sample]:
        ids = [row["prompt_ids"] for _, row in rows]
        groups = self.sampler.engine.generate(ids, n, sampling, self._seed(rollout, 0), [number for number, _ in rows])
        return [
            Sample(
                group=number,
                row=row,
                prompt_ids=row["prompt_ids"],
                ids=completion.ids,
                sampled=None,
                completion=self._told(row, completion.ids),
                truncated=completion.finish_reason == "length",
                tokens={"sampler_logps": torch.tensor(completion.logps)},
            )
            for (number, row), group in zip(rows, groups, strict=True)
            for completion in group
        ]

    def _converse(
        self, rows: list[tuple[int, dict[str, Any]]], sampling: Sampling, n: int, rollout: int
    ) -> list[Sample]:
        assert self.environment_factory is not None
        samples, environments, prompts, dialogues = [], [], [], []
        for number, row in rows:
            for _ in range(n):
                environment = self.environment_factory()
                prompt = environment.reset(row)
                environments.append(environment)
                own = self._dialogue(row)
                dialogues.append(own if prompt is None else replace(own, prompt=prompt))
                prompts.append(row["prompt_ids"] if prompt is None else encode_prompt(self.tokenizer, dialogues[-1]))
                samples.append((number, row))
        episodes = play(
            environments,
            prompts,
            self.sampler.engine,
            self.tokenizer,
            sampling,
            lambda turn: self._seed(rollout, turn),
            [number * n + sample for number, _ in rows for sample in range(n)],
            dialogues=dialogues,
            max_turns=self.args.max_turns,
            max_length=self.args.max_length,
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
                each={"environment": episode.reward},
            )
            for (number, row), episode in zip(samples, episodes, strict=True)
        ]

    def _told(self, row: Mapping[str, Any], ids: list[int]) -> Turns:
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        return text if isinstance(self._prompt(row), str) else [{"role": "assistant", "content": text}]

    def _score(self, samples: list[Sample], told: bool) -> None:
        """Give samples their rewards: an environment's, and what functions say; what these log is told if so."""
        for sample in samples:
            sample.reward = sample.each.get("environment", float("nan"))
        if self.trainer.rewards is not None and samples:
            rows = [sample.row for sample in samples]
            columns = {name: [row[name] for row in rows] for name in rows[0] if name not in ("prompt", "prompt_ids")}
            scored = self.trainer.rewards(
                [self._prompt(row) for row in rows],
                [sample.completion for sample in samples],
                [sample.ids for sample in samples],
                self.trainer.state,
                **columns,
            )
            components = scored.reward_components.tolist()
            for sample, reward, each in zip(samples, scored.rewards.tolist(), components, strict=True):
                sample.reward = reward + sample.each.get("environment", 0.0)
                sample.each |= dict(zip(scored.names, each, strict=True))
            if told:
                self.trainer.report.of_rewards(scored)
            for place, sample in enumerate(samples):
                sample.extra = {name: column[place] for name, column in scored.extra.items()}
        args = self.args
        for sample in samples:
            if args.reward_bounds is not None:
                sample.reward = float(np.clip(sample.reward, *args.reward_bounds))
            if args.missing_eos_penalty is not None and sample.truncated:
                sample.reward -= args.missing_eos_penalty

    def _until_varied(self, mine: list[Sample]) -> list[Sample]:
        """Replace groups of equal rewards by those of further prompts; those that are left at the end stay."""
        target, n = self.prompts_in_rollout, self.args.num_generations
        numbers = target
        varied: list[list[Sample]] = []
        equal: list[list[Sample]] = []
        for attempt in range(self.args.dynamic_sampling + 1):
            everyone = sorted(gather_object(mine), key=lambda sample: sample.group)
            groups = [everyone[start : start + n] for start in range(0, len(everyone), n)]
            for group in groups:
                (varied if varied_groups(group) else equal).append(group)
            self.equal_groups = (len(equal), len(equal) + len(varied))
            missing = target - len(varied)
            if missing <= 0 or attempt == self.args.dynamic_sampling:
                break
            rank, world = self.args.process_index, self.args.world_size
            numbered = list(enumerate(self.prompts.draw(missing), start=numbers))
            numbers += missing
            mine = self._sample(numbered[rank::world], self.args.sampling(), n)
        chosen = (varied + equal)[:target]
        for number, group in enumerate(chosen):
            for sample in group:
                sample.group = number
        return [sample for group in self._mine(chosen) for sample in group]

    def _greedy(self, samples: list[Sample]) -> Tensor:
        """Rewards of the most probable answer to each sample's prompt: [S]."""
        sampling = replace(self.args.sampling(), temperature=0.0)
        rows = {sample.group: sample.row for sample in samples}
        greedy = {sample.group: sample.reward for sample in self._sample(list(rows.items()), sampling, 1)}
        return torch.tensor([greedy[sample.group] for sample in samples])

    def _seed(self, rollout: int, turn: int) -> int:
        return int(np.random.SeedSequence((self.args.seed, rollout, turn)).generate_state(1)[0])

    def _prompt(self, row: Mapping[str, Any]) -> Turns:
        return self._dialogue(row).prompt

    def _dialogue(self, row: Mapping[str, Any]) -> Dialogue:
        return prompt_dialogue(canonical(row, self.form), self.form)
