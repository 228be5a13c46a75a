"""On-policy training: PPO and its family. The training dataloader yields the policy's own samples."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import TrainOutput

from rlhf.data import in_memory, tokenize_prompts
from rlhf.logprobs import TokenLoss
from rlhf.losses import truncated_importance_weights, value_loss
from rlhf.models import ActorCritic, Policy, vocabulary_size
from rlhf.online.ahead import RolloutsAhead
from rlhf.online.collector import RolloutCollector
from rlhf.online.completions import COMPLETIONS, show_completions
from rlhf.online.config import PPOConfig
from rlhf.online.critic_rate import with_critic_rate
from rlhf.online.evaluation import EvaluatesBySampling
from rlhf.online.judges import check_tokenizers, load_critic, load_rewards
from rlhf.online.metrics import (
    Diagnosis,
    StepStatistics,
    as_metrics,
    derived_metrics,
    policy_metrics,
    reward_function_metrics,
    sample_metrics,
    staleness_metrics,
    step_metrics,
)
from rlhf.online.model_scores import add_model_scores
from rlhf.online.objective import Objective, loss_of_tokens
from rlhf.online.prompts import Prompts
from rlhf.online.rollout import Rollout
from rlhf.online.samples import (
    MinibatchSchedule,
    RolloutBatch,
    Sample,
    add_advantages,
    collate_samples,
    kl_penalties,
    mark_high_entropy,
    plain_samples,
    samples_of,
    select_of_groups,
)
from rlhf.online.trl_names import refuse_trainer_arguments
from rlhf.rollouts import Environment, RolloutEngine
from rlhf.rollouts.policy_sampler import PolicySampler, make_engine, probe_ids
from rlhf.trainers.config import BaseConfig
from rlhf.trainers.evaluating import Measures
from rlhf.trainers.preparation import for_each_set

logger = logging.getLogger(__name__)


class PPOTrainer(EvaluatesBySampling):
    r"""Learn from rewards of the policy's own completions.

    A rollout: completions of the next prompts are sampled and scored. The log-probs of the current policy (with the
    reference's, and the critic's values) are recorded in the batches that training will use. Then advantages are
    computed, and one optimizer step follows for each minibatch of each pass.

    Args:
        model: a model, a PEFT model, or a name or folder to load one from.
        reward_funcs: functions ``reward(prompts, completions, **columns)``, or what
            :func:`rlhf.rewards.load_reward` loads by name: a built-in, a file, a reward model's folder, an address.
        args: the configuration.
        train_dataset: rows with a ``prompt`` (text or messages); other columns go to the rewards. A stream
            (``IterableDataset``) needs ``max_steps``.
        eval_dataset: the same, or several by name.
        processing_class: the tokenizer; by default the model's.
        reward_processing_classes: tokenizers of reward models, one for each of ``reward_funcs`` (None elsewhere).
        ref_model: another reference than the model as it is now (under a new adapter: with the adapter off).
        engine: another :class:`RolloutEngine` than this process.
        environment_factory: makes an :class:`Environment` for each sample: several turns, rewarded by it.
        kwargs: ``peft_config``, ``callbacks``, … as in :class:`SFTTrainer`.
    Logs:
        As ``docs/metrics.md`` lists them; ``completions.jsonl`` in the run's folder has samples.
    Raises:
        ValueError: bad data, a reward that cannot be called so, a model that cannot end a completion; before any step.
    Example:
        ```python
        def is_short(completions, **columns):
            return [-len(text) for text in completions]

        rows = [{"prompt": "What is 2 + 2?"}, {"prompt": "What is 3 + 3?"}]
        args = rlhf.PPOConfig("runs/ppo", max_steps=100)
        trainer = rlhf.PPOTrainer("HuggingFaceTB/SmolLM2-135M-Instruct", is_short, args, train_dataset=rows)
        trainer.train()
        ```

    Source: arXiv 1707.06347 (PPO), 1909.08593 and 2009.01325 (for language models).
    """

    config_class: ClassVar[type[BaseConfig]] = PPOConfig
    balances: ClassVar[bool] = True
    appended_files: ClassVar[tuple[str, ...]] = (*EvaluatesBySampling.appended_files, COMPLETIONS)

    def __init__(
        self,
        model: str | nn.Module,
        reward_funcs: Callable[..., Any] | str | Sequence[Callable[..., Any] | str] | None = None,
        args: PPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        *,
        ref_model: str | nn.Module | None = None,
        engine: RolloutEngine | None = None,
        environment_factory: Callable[[], Environment] | None = None,
        **kwargs: Any,
    ) -> None:
        refuse_trainer_arguments(kwargs)
        args = args if args is not None else self.config_class(output_dir="runs")  # type: ignore[assignment]
        assert isinstance(args, PPOConfig)
        if reward_funcs is None and environment_factory is None:
            raise ValueError(
                "No reward source provided, nothing to learn from: pass reward_funcs (--reward_funcs), or an "
                "environment_factory"
            )
        if train_dataset is None and eval_dataset is None:
            raise ValueError("`train_dataset` is required: rows with a prompt (--dataset_name)")
        # Tokenising checks the rewards against a row, so they come first.
        self.rewards = None if reward_funcs is None else load_rewards(reward_funcs, reward_processing_classes, args)
        # A critic is a part of the wrapper, so it is loaded before the model is wrapped.
        has_critic = args.uses_critic
        critic_folder = args.value_model if has_critic and args.value_model != "shared" else None
        if has_critic:
            critic = None if critic_folder is None else load_critic(critic_folder, args)
            self.wrapper = partial(ActorCritic, critic=critic)
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=for_each_set(in_memory, eval_dataset),  # evaluation answers all of its rows
            processing_class=processing_class,
            **kwargs,
        )
        if critic_folder is not None:
            check_tokenizers(self.processing_class, critic_folder)
        self.policy: Policy = self.model
        self._prepare_policy(args.temperature)
        # The frozen policy of the KL and of pairs.
        if args.beta > 0 or args.advantage_estimator == "pairs":
            self.reference = self.make_reference(ref_model)
        if self.ref_policy is not None:
            self.ref_policy.temperature = args.temperature
        self.sync_reference()
        self.controller = args.kl_controller()
        self.collector = self._make_collector(engine, environment_factory)
        self.rollouts = RolloutsAhead(self.collector, args.max_staleness) if args.max_staleness else self.collector
        self.schedule = MinibatchSchedule(
            args.per_device_train_batch_size, args.gradient_accumulation_steps, args.num_iterations
        )
        self.step_statistics = StepStatistics()
        self.diagnosis = Diagnosis()
        self._unlogged_samples: list[Sample] = []  # of the last rollout
        self._tokens_to_train = 0  # of the last rollout, each pass counted
        self._training_since = 0.0  # when the last rollout ended; 0 before the first one

    @property
    def reward_processing_classes(self) -> list[Any]:
        """The tokenizer of each reward model, None for other rewards."""
        if self.rewards is None:
            return []
        return [getattr(function, "tokenizer", None) for function in self.rewards.functions]

    # What training needs

    def _prepare_policy(self, temperature: float) -> None:
        folder = str(self.policy.config._name_or_path)
        if self.policy.value_head is not None and self._load_extra_weights(Path(folder)):
            logger.info("%s: going on with the value head that was saved beside the model", folder)
        if self.policy.critic is not None:
            self.share_layout(self.policy.critic.model)
        # Log-probs are those of the distribution that is sampled from.
        self.policy.temperature = temperature

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        return with_critic_rate(super().create_optimizer(*args, **kwargs), self.policy, self.args)

    @property
    def beta(self) -> float:
        """The weight of the KL to the reference now."""
        return self.controller.value if self.controller is not None else self.args.beta

    @property
    def importance_cap(self) -> float | None:
        """The largest weight that corrects for the sampler; None for no correction."""
        # A server computes log-probs in another way than the trainer, so its samples are always corrected.
        default = None if self.collector.sampler.is_local else 2.0
        return default if self.args.importance_sampling_cap is None else self.args.importance_sampling_cap

    def _make_collector(
        self, engine: RolloutEngine | None, environment_factory: Callable[[], Environment] | None
    ) -> RolloutCollector:
        args = self.args
        tokenizer: Any = self.processing_class
        if engine is None:
            engine = make_engine(args, self.policy, tokenizer, self.accelerator, max_length=args.limit())
        order_seed = args.seed if args.data_seed is None else args.data_seed
        tokenize = partial(self.tokenize, tokenizer=tokenizer, args=args, vocab_size=vocabulary_size(self.policy))
        return RolloutCollector(
            args,
            PolicySampler(engine, self.accelerator, probe_ids(tokenizer)),
            Prompts(self.train_dataset, order_seed, args.shuffle_dataset, tokenize),
            tokenizer,
            args.reading().for_tokenizer(tokenizer).form,
            self.rewards,
            environment_factory,
        )

    # Rows

    def tokenize(
        self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: Any, vocab_size: int
    ) -> Dataset:  # fmt: skip
        rows = tokenize_prompts(
            dataset,
            tokenizer,
            max_prompt_length=args.max_length - args.max_completion_length,
            vocab_size=vocab_size,
            drop_long_prompts=args.drop_long_prompts,
            num_proc=args.dataset_num_proc,
            reading=args.reading(),
        )
        if self.rewards is not None:
            self.rewards.check(rows[0])
        return rows

    def _prepare_rows(self, dataset: Any, tokenizer: PreTrainedTokenizerBase, args: Any, vocab_size: int) -> Any:
        if not isinstance(dataset, IterableDataset):
            return super()._prepare_rows(dataset, tokenizer, args, vocab_size)
        # A stream is tokenised as it is read; its first row is checked now.
        self.tokenize(Dataset.from_list(list(dataset.take(1))), tokenizer, args, vocab_size)
        return dataset

    def _repeat_stream(self, stream: IterableDataset, args: Any) -> Any:
        return stream  # :class:`Prompts` begins it again

    def get_train_dataloader(self) -> DataLoader[Any]:
        args, rows = self.args, self.train_dataset
        if isinstance(rows, IterableDataset):  # it has no length, and transformers asks for max_steps
            steps = args.max_steps
        else:
            # An epoch is as many rollouts as draw each prompt once, rounded up.
            rollouts = -(-len(rows) // self.collector.prompts_per_rollout)  # type: ignore[arg-type]
            steps = rollouts * args.num_iterations * args.num_mini_batches
        micro_batches = range(steps * args.gradient_accumulation_steps)
        # A micro-batch is made when it is asked for: by then the policy has taken the steps before it.
        return DataLoader(micro_batches, batch_size=1, collate_fn=lambda _: self._next_micro_batch())  # type: ignore[arg-type]

    # Rollouts

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As :class:`BaseTrainer`; a server that sleeps between rollouts is awake afterwards."""
        with self.rollouts.during_training():
            return super().train(*args, **kwargs)

    def _next_micro_batch(self) -> RolloutBatch:
        schedule = self.schedule
        self.rollouts.check()
        if not schedule.remaining_micro_batches:
            schedule.is_first_step = False
            is_too_far = self.step_statistics.exceeds_kl_limit(self.args.early_stop_kl, self.accelerator)
            if is_too_far or not schedule.remaining_steps:
                self._start_rollout()
            schedule.next_step()
        samples = schedule.remaining_micro_batches.pop(0)
        return collate_samples(samples, self.data_collator, schedule.is_first_step)

    def _start_rollout(self) -> None:
        args = self.args
        started_at = time.perf_counter()
        training_seconds = started_at - self._training_since if self._training_since else 0.0
        with self.label("rollout"):
            rollout = self.rollouts.collect(self.policy, self.model_wrapped, self.state)
        # Before selection: a masked sample can still be the best or the worst of its group, and is then left out.
        if args.mask_truncated_completions:
            for sample in rollout.samples:
                sample.in_loss = not sample.truncated
        samples = rollout.samples
        if args.advantage_estimator in ("best_of_n", "pairs"):
            samples = select_of_groups(samples, with_worst=args.advantage_estimator == "pairs")
        self.schedule.divide(samples)
        # The current policy's log-probs are the old ones of all steps of this rollout.
        add_model_scores(
            [micro_batch for minibatch in self.schedule.minibatches for micro_batch in minibatch],
            self.model_wrapped,
            self.data_collator,
            self.accelerator,
            reference=self.reference,
            old_logps=self._needs_old_logps,
            entropy=args.top_entropy_quantile < 1,
        )
        if args.top_entropy_quantile < 1:
            mark_high_entropy(samples, args.top_entropy_quantile, gather_object)
        add_advantages(
            samples,
            args.advantage_estimator,
            kl_coef=self.beta if args.kl_in_reward else 0.0,
            gamma=args.gamma,
            lam=args.lam,
            scale=args.scale_rewards,
            whitened=args.whiten_advantages,
            whitened_rewards=args.whiten_rewards,
            baselines=rollout.greedy_rewards,
            normalized=args.normalize_advantages,
            reward_weights=self.collector.reward_weights,
            device=args.device,
        )
        # Metrics come before beta moves: they report the beta that this rollout's rewards used.
        self._add_rollout_metrics(rollout, samples, training_seconds)
        self._update_beta(samples)
        # The order follows the seed and the rollout alone, so that a resumed run and all processes agree.
        self.schedule.order_steps(args.num_mini_batches, args.seed + rollout.number)
        self._training_since = time.perf_counter()

    @property
    def _needs_old_logps(self) -> bool:
        """Whether log-probs before the first step are needed; otherwise they are those of the step itself."""
        args = self.args
        if self.importance_cap is not None:
            return True
        if args.advantage_estimator == "pairs":
            return False
        in_advantages = args.uses_critic or args.kl_in_reward or self.controller is not None
        return in_advantages or not args.one_step_per_rollout or args.top_entropy_quantile < 1

    def _update_beta(self, samples: list[Sample]) -> None:
        """Let an adaptive beta follow the KL of all processes' completions."""
        if self.controller is None:
            return
        kl = torch.stack([penalty.sum() for penalty in kl_penalties(samples)]).to(self.args.device)
        total = self.accelerator.reduce(torch.stack([kl.sum(), kl.new_tensor(float(len(kl)))]))
        self.controller.update(float(total[0] / total[1]), int(total[1]))

    # State of a checkpoint

    def resume_state(self) -> dict[str, Any]:
        schedule, diagnosis = self.schedule, self.diagnosis
        state: dict[str, Any] = (
            super().resume_state()
            | self.rollouts.state()
            | {
                "processes": self.args.world_size,
                "kl_coef": None if self.controller is None else self.controller.value,
                "steps": schedule.remaining_steps,
                # The samples are needed only in the middle of a rollout.
                "minibatches": plain_samples(schedule.minibatches) if schedule.remaining_steps else [],
                "report": {
                    "kl": self.step_statistics.last_step_kl,
                    "peaks": self.step_statistics.peaks,
                    "entropy": diagnosis.first_entropy,
                    "said": diagnosis.already_warned,
                    "unlogged_samples": plain_samples(self._unlogged_samples),
                    "tokens_to_train": self._tokens_to_train,
                    "seconds_since_rollout": time.perf_counter() - self._training_since
                    if self._training_since
                    else None,
                },
            }
        )
        if self.args.sync_ref_model and self.ref_policy is not None:
            state["ref_model"] = self.ref_policy.model.state_dict()
        return state

    def load_resume_state(self, state: dict[str, Any]) -> None:
        if state["processes"] != self.args.world_size:
            raise ValueError(
                f"the checkpoint was saved by {state['processes']} processes, these are {self.args.world_size}: its "
                "rollout cannot be shared out anew; resume with as many"
            )
        super().load_resume_state(state)
        self.rollouts.load_state(state)
        self.schedule.remaining_steps = state["steps"]
        self.schedule.minibatches = samples_of(state["minibatches"])
        report = state["report"]
        self.step_statistics.last_step_kl = report["kl"]
        self.step_statistics.peaks = {name: peak.to(self.args.device) for name, peak in report["peaks"].items()}
        self.diagnosis = Diagnosis(report["entropy"], report["said"])
        self._unlogged_samples = samples_of(report["unlogged_samples"])
        self._tokens_to_train = report["tokens_to_train"]
        if report["seconds_since_rollout"] is not None:
            self._training_since = time.perf_counter() - report["seconds_since_rollout"]
        if self.ref_policy is not None and "ref_model" in state:
            self.ref_policy.model.load_state_dict(state["ref_model"])
        if self.controller is not None:
            self.controller.value = state["kl_coef"]

    # The loss

    def count(self, batch: Any) -> int:
        return self._objective().count(batch.lengths)

    def _objective(self) -> Objective:
        return self.args.objective(self.beta)

    def measure(self, model: nn.Module, batch: Any) -> Measures:
        objective, targets, tokens = self._objective(), batch.targets, batch.per_token
        advantages, old_logps = tokens["advantages"], tokens.get("old_logps")
        weight = objective.token_weights(batch.lengths, targets.sequence) * tokens["in_loss"]
        correction = self._importance_weights(tokens)
        ref_logps = tokens.get("ref_logps", torch.zeros_like(advantages))

        # A loss of single tokens is computed while the logits of a chunk are in memory.
        head_objective = None
        if not objective.is_coupled:
            columns = [advantages, weight, correction, ref_logps, *([] if old_logps is None else [old_logps])]
            head_objective = TokenLoss(partial(loss_of_tokens, objective), tuple(columns))
        scores = model(batch, head_objective, self.args.entropy_coef > 0)
        # With one step for each rollout, the policy before the step is this one.
        before = scores.logps.detach() if old_logps is None else old_logps
        total = scores.loss
        if objective.is_coupled:
            total = objective.sequence_loss(
                scores, advantages, weight, correction, before, ref_logps, targets.sequence, batch.lengths
            )

        # The policy's part of the loss, before the critic's is added.
        divisor = torch.full((), float(objective.count(batch.lengths)), device=weight.device)
        metrics, peaks = step_metrics(batch, scores.logps, before, objective.clip)
        self.step_statistics.add(metrics, peaks)
        metrics["policy_loss"] = total.detach(), divisor
        if scores.values is not None and "returns" in tokens:
            clip = self.args.cliprange_value
            losses = value_loss(scores.values, tokens["values"], tokens["returns"], clip, reduction="none")
            critic_loss = (losses * weight).sum()
            metrics["value_loss"] = critic_loss.detach(), divisor
            total = self.args.policy_weight(self.rollouts.num_rollouts) * total + self.args.vf_coef * critic_loss
        num_sequences = len(batch.lengths)
        # The gradient is that of `total`; these shares only add up to it, as base classes expect.
        loss_of_sequences = (total.detach() / num_sequences).expand(num_sequences)
        counts = torch.full((num_sequences,), objective.count(batch.lengths) / num_sequences)
        return Measures(loss_of_sequences, counts, metrics, total, scores.router_logits)

    def undo_step(self) -> list[Callable[[], None]]:
        return [*super().undo_step(), self.step_statistics.undo()]

    def _importance_weights(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """The factor of each token for where it comes from and for its entropy, [N]."""
        weights = torch.ones_like(tokens["advantages"])
        if self.importance_cap is not None and "old_logps" in tokens:
            weights = truncated_importance_weights(tokens["old_logps"], tokens["sampler_logps"], self.importance_cap)
        return weights * tokens["high_entropy"] if "high_entropy" in tokens else weights

    # Evaluation

    @property
    def reward_names(self) -> list[str]:  # type: ignore[override]
        return self.collector.reward_names

    def answer_rows(self, rows: Any) -> list[Sample]:
        started_at = time.perf_counter()
        samples = self.rollouts.answer(self.policy, self.model_wrapped, rows, self.state)
        if self._training_since:  # the time of evaluation is no time of training
            self._training_since += time.perf_counter() - started_at
        return samples

    # What is logged

    def _add_rollout_metrics(self, rollout: Rollout, used: list[Sample], training_seconds: float) -> None:
        """Add the metrics of a rollout, of which the samples ``used`` are trained on."""
        args = self.args
        self.add_metrics(sample_metrics(rollout.samples, self.reward_names, args.device))
        sums = reward_function_metrics(rollout.scored, with_failures=args.on_reward_error == "drop")
        sums |= policy_metrics(used)
        if args.num_generations > 1:
            sums["frac_reward_zero_std"] = rollout.zero_std_groups
        sums["tokens_per_second/rollout"] = sum(map(len, rollout.samples)), rollout.seconds
        if args.max_staleness:
            sums |= staleness_metrics(rollout)
            self.step_statistics.add_staleness(rollout, args.device)
        if training_seconds:
            sums["tokens_per_second/training"] = self._tokens_to_train, training_seconds
        if args.beta > 0:
            sums["beta"] = self.beta, 1
        if args.entropy_coef:
            sums["entropy_coef"] = args.entropy_coef, 1
        self.add_metrics(as_metrics(sums, args.device))
        self._tokens_to_train = sum(map(len, used)) * args.num_iterations
        self._unlogged_samples = rollout.samples

    def reduce_metrics(self, sums: dict[str, tuple[float, float]]) -> dict[str, float]:
        return derived_metrics(super().reduce_metrics(sums))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Lines of training; those of evaluation come through here too.
        if "loss" in logs or "train_loss" in logs:
            logs |= self.step_statistics.pop_peaks(self.accelerator)
        super().log(logs, start_time)
        if "loss" in logs:
            self._warn_of_troubles(logs)
            if self.is_world_process_zero():
                show_completions(self._unlogged_samples, self.args, self.state.global_step)
            if self.args.log_completions:
                self._unlogged_samples = []

    def _warn_of_troubles(self, logs: dict[str, float]) -> None:
        has_half_weights = self.policy.dtype in (torch.bfloat16, torch.float16)
        half_precision = self.accelerator.mixed_precision != "no" or has_half_weights
        for trouble in self.diagnosis.new_troubles(logs, half_precision):
            if self.is_world_process_zero():
                logger.warning("step %d: %s", self.state.global_step, trouble)
