"""On-policy training: PPO and its family. The training dataloader is experience."""

import copy
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from rlhf.data import tokenize_prompts
from rlhf.kernels import optimize
from rlhf.losses import truncated_importance_weights, value_loss
from rlhf.models import ActorCritic, Policy, load_model
from rlhf.models.adapter_off import adapter_off_is_start
from rlhf.online.answering import Answering
from rlhf.online.collector import Roller
from rlhf.online.config import BestOfNConfig, GRPOConfig, PPOConfig, RLOOConfig
from rlhf.online.critic import check_tokenizers, load_critic
from rlhf.online.metrics import RolloutReport
from rlhf.online.objective import Objective
from rlhf.online.prompts import in_memory
from rlhf.online.samples import (
    RolloutBatch,
    Sample,
    add_advantages,
    collate_samples,
    keep_high_entropy,
    keep_of_groups,
    kl_penalties,
)
from rlhf.online.trl_names import refuse_others
from rlhf.rewards import ModelReward, RewardSet, reward_functions
from rlhf.rollouts import Environment, RolloutEngine
from rlhf.trainers.base import BaseConfig, Measures
from rlhf.trainers.reference_sync import SyncReference

logger = logging.getLogger(__name__)


class PPOTrainer(Answering):
    r"""Learn from rewards of the policy's own completions.

    A rollout: prompts are sampled from, scored, and the current policy's log-probs (with the reference's, and the
    critic's values) taken in the batches that training will use; then advantages are computed, and minibatches follow.
    A minibatch keeps its members from pass to pass, so that nothing depends on the number of processes.

    Args:
        model: a model, a PEFT model, or a name or folder to load one from.
        reward_funcs: functions ``reward(prompts, completions, **columns)``, or what
            :func:`rlhf.rewards.load_reward` loads by name: a built-in, a file, a reward model's folder, an address.
        args: the configuration.
        train_dataset, eval_dataset: rows with a ``prompt`` (text or messages); other columns go to the rewards. Streams
            (``IterableDataset``) need ``max_steps``.
        reward_processing_classes: tokenizers of reward models, one for each of ``reward_funcs`` (None elsewhere).
        ref_model: another reference than the model as it is now (under a new adapter: with the adapter off).
        engine: another :class:`RolloutEngine` than this process.
        environment_factory: makes an :class:`Environment` for each sample: several turns, rewarded by it.
        kwargs: ``peft_config``, ``callbacks``, … as in :class:`SFTTrainer`.
    Logs:
        As ``docs/metrics.md`` lists them; ``completions.jsonl`` in the run's folder has samples.
    Raises:
        ValueError: bad data, a reward that cannot be called so, a model that cannot end a completion; before any step.

    Source: arXiv 1707.06347 (PPO), 1909.08593 and 2009.01325 (for language models).
    """

    config_class: ClassVar[type[BaseConfig]] = PPOConfig
    balances: ClassVar[bool] = True

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
        refuse_others(kwargs)
        args = args if args is not None else self.config_class(output_dir="runs")  # type: ignore[assignment]
        assert isinstance(args, PPOConfig)
        if reward_funcs is None and environment_factory is None:
            raise ValueError(
                "No reward source provided, nothing to learn from: pass reward_funcs (--reward_funcs), or an "
                "environment_factory"
            )
        if train_dataset is None and eval_dataset is None:
            raise ValueError("`train_dataset` is required: rows with a prompt (--dataset_name)")
        self.rewards = None
        if reward_funcs is not None:
            functions = reward_functions(reward_funcs, reward_processing_classes)
            if args.optimize_model:
                for reward_model in (f.model for f in functions if isinstance(f, ModelReward)):
                    optimize(reward_model)
            self.reward_processing_classes = [getattr(function, "tokenizer", None) for function in functions]
            self.rewards = RewardSet(
                functions, args.reward_weights, on_error=args.on_reward_error, timeout=args.reward_timeout  # type: ignore[arg-type]
            )  # fmt: skip
        if args.advantage_estimator == "gae":
            critic = None if args.value_model == "shared" else load_critic(args)
            self.wrapper = partial(ActorCritic, critic=critic)
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=in_memory(eval_dataset),
            processing_class=processing_class,
            **kwargs,
        )
        if args.advantage_estimator == "gae" and args.value_model != "shared":
            check_tokenizers(self.processing_class, args.value_model)
        self.policy: Policy = self.model
        start = str(self.policy.config._name_or_path)
        if self.policy.value_head is not None and self._load_extra_weights(Path(start)):
            logger.info("%s: going on with the value head that was saved beside the model", start)
        if self.policy.critic is not None:
            self.share_layout(self.policy.critic.model)
        self.policy.temperature = args.temperature
        own = self.policy.has_adapter and ref_model is None and self._wants_reference
        self.has_adapter = own and adapter_off_is_start(self.policy.model)
        self.ref_policy = self._reference(ref_model) if self._wants_reference else None
        if args.sync_ref_model:
            self._sync_reference()
        self.controller = args.kl_controller()
        self.report = RolloutReport(self)
        self.roller = Roller(self, engine, environment_factory)
        self._steps: list[int] = []  # minibatches of the current rollout that are still to come
        self._minibatches: list[list[list[Sample]]] = []  # of micro-batches
        self._micro: list[list[Sample]] = []  # what is left of the current step
        self._fresh = False  # no step was taken since the rollout
        self._trained_since = 0.0

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

    def _reference(self, ref_model: str | nn.Module | None) -> Policy | None:
        """A frozen policy; None where the adapter is switched off instead."""
        if ref_model is None and self.has_adapter:
            return None
        if isinstance(ref_model, str):
            ref_model = load_model(ref_model, **self.args.model_kwargs())
        reference = self.freeze(copy.deepcopy(self.policy.model) if ref_model is None else ref_model)
        if ref_model is not None:
            self.share_layout(reference.model)
        reference.temperature = self.policy.temperature
        return reference

    def _prepare_rows(self, dataset: Any, tokenizer: PreTrainedTokenizerBase, args: Any, vocab_size: int) -> Any:
        if not isinstance(dataset, IterableDataset):
            return super()._prepare_rows(dataset, tokenizer, args, vocab_size)
        self.tokenize(Dataset.from_list(list(dataset.take(1))), tokenizer, args, vocab_size)  # checks one row
        return dataset

    def _repeat_stream(self, stream: IterableDataset, args: Any) -> Any:
        return stream  # who hands out the prompts begins it again

    def _sync_reference(self) -> None:
        if self.ref_policy is None:
            raise ValueError("sync_ref_model moves a copy of the weights: it needs beta above 0, and no adapter")
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("sync_ref_model cannot read sharded weights: leave it off under FSDP and DeepSpeed")
        alpha, steps = self.args.ref_model_mixup_alpha, self.args.ref_model_sync_steps
        self.add_callback(SyncReference(self.ref_policy, alpha, steps))

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference, where it is a model of its own."""
        return None if self.ref_policy is None else self.ref_policy.model

    @property
    def beta(self) -> float:
        return self.controller.value if self.controller is not None else self.args.beta

    # Experience

    def get_train_dataloader(self) -> DataLoader[Any]:
        args, rows = self.args, self.train_dataset
        if isinstance(rows, IterableDataset):  # it has no length, and transformers asks for max_steps
            steps = args.max_steps
        else:
            rollouts = -(-len(rows) // self.roller.prompts_in_rollout)  # type: ignore[arg-type]
            steps = rollouts * args.num_iterations * args.num_mini_batches
        places = range(steps * args.gradient_accumulation_steps)
        return DataLoader(places, batch_size=1, collate_fn=lambda _: self._next())  # type: ignore[arg-type]

    def _next(self) -> RolloutBatch:
        """The next micro-batch, made when it is asked for: by then the policy is the one that it needs."""
        if not self._micro:
            self._fresh, strayed = False, self.report.strayed(self.args.early_stop_kl)
            if strayed or not self._steps:
                self._collect()
            self._micro = list(self._minibatches[self._steps.pop(0)])
        return collate_samples(self._micro.pop(0), self.data_collator, self._fresh)

    def _collect(self) -> None:
        args = self.args
        began = time.perf_counter()
        trained = began - self._trained_since if self._trained_since else 0.0
        with self.label("rollout"):
            samples, baselines = self.roller.rollout(self.policy, self.beta)
        rolled = time.perf_counter() - began
        if args.mask_truncated_completions:
            for sample in samples:
                sample.learned = not sample.truncated
        chosen = args.advantage_estimator in ("best_of_n", "pairs")
        kept = keep_of_groups(samples, args.advantage_estimator) if chosen else samples
        self._minibatches = self._divide(kept)
        self._record()
        if args.top_entropy_quantile < 1:
            keep_high_entropy(kept, args.top_entropy_quantile, gather_object)
        add_advantages(
            kept,
            args.advantage_estimator,
            kl_coef=self.beta if args.penalised else 0.0,
            gamma=args.gamma,
            lam=args.lam,
            scale=args.scale_rewards,
            whitened=args.whiten_advantages,
            whitened_rewards=args.whiten_rewards,
            baselines=baselines,
            normalized=args.normalize_advantages,
            weights=self._reward_weights() if args.multi_objective_aggregation == "normalize_then_sum" else None,
            device=args.device,
        )
        self.add_metrics(self.report.of_rollout(samples, kept, rolled, trained, self.beta))
        if self.controller is not None:
            kl = torch.stack([x.sum() for x in kl_penalties(kept)]).to(args.device)
            total = self.accelerator.reduce(torch.stack([kl.sum(), kl.new_tensor(float(len(kl)))]))
            self.controller.update(float(total[0] / total[1]), int(total[1]))
        order = torch.Generator().manual_seed(args.seed + self.roller.rollouts)
        first, count = list(range(args.num_mini_batches)), args.num_mini_batches
        again = [torch.randperm(count, generator=order).tolist() for _ in range(args.num_iterations - 1)]
        self._steps = first + [index for order_ in again for index in order_]
        self._fresh = True
        self._trained_since = time.perf_counter()

    def _reward_weights(self) -> dict[str, float]:
        own = {} if self.rewards is None else dict(zip(self.rewards.names, self.rewards.weights, strict=True))
        return own | ({"environment": 1.0} if self.roller.environment_factory is not None else {})

    def _divide(self, samples: list[Sample]) -> list[list[list[Sample]]]:
        size, steps = self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps
        micro = [samples[start : start + size] for start in range(0, len(samples), size)]
        return [micro[start : start + steps] for start in range(0, len(micro), steps)]

    def _record(self) -> None:
        """What the current policy, the critic and the reference make of the samples, in the batches of training."""
        args = self.args
        own = args.advantage_estimator == "gae" or args.penalised or self.controller is not None
        own |= not args.on_policy or self.importance_cap is not None or args.top_entropy_quantile < 1
        own &= args.advantage_estimator != "pairs" or self.importance_cap is not None
        if not own and self.ref_policy is None and not self._asks_adapter_off:
            return
        model = self.model_wrapped
        training = model.training
        model.eval()
        for samples in (micro for step in self._minibatches for micro in step):
            batch = collate_samples(samples, self.data_collator).to(args.device)
            lengths = [len(sample) for sample in samples]
            found: dict[str, Tensor] = {}
            with torch.no_grad(), self.accelerator.autocast():
                if own:
                    scores = model(batch, entropy=args.top_entropy_quantile < 1)
                    found["old_logps"] = scores.logps
                    if scores.entropy is not None:
                        found["entropy"] = scores.entropy
                    if scores.values is not None:
                        found["values"] = scores.values
                if self.ref_policy is not None:
                    found["ref_logps"] = self.ref_policy(batch).logps
                elif self._asks_adapter_off:
                    with self.policy.adapter_off():
                        found["ref_logps"] = model(batch).logps
            for name, vector in found.items():
                for sample, part in zip(samples, vector.cpu().split(lengths), strict=True):
                    sample.tokens[name] = part
        model.train(training)

    @property
    def _wants_reference(self) -> bool:
        return self.args.beta > 0 or self.args.advantage_estimator == "pairs"

    @property
    def _asks_adapter_off(self) -> bool:
        return self._wants_reference and self.ref_policy is None and self.has_adapter

    @property
    def importance_cap(self) -> float | None:
        cap = self.args.importance_sampling_cap
        return 2.0 if cap is None and not self.roller.sampler.is_local else cap

    def resume_state(self) -> dict[str, Any]:
        rest = self._minibatches if self._steps else []
        kl_coef = None if self.controller is None else self.controller.value
        place: dict[str, Any] = dict(
            rollouts=self.roller.rollouts, drawn=self.roller.prompts.drawn, kl_coef=kl_coef, steps=self._steps
        )
        if self.args.sync_ref_model and self.ref_policy is not None:
            place["ref_model"] = self.ref_policy.model.state_dict()
        return place | dict(minibatches=rest, processes=self.args.world_size, report=self.report.state())

    def load_resume_state(self, state: dict[str, Any]) -> None:
        if state["processes"] != self.args.world_size:
            raise ValueError(
                f"the checkpoint was saved by {state['processes']} processes, these are {self.args.world_size}: its "
                "rollout cannot be shared out anew; resume with as many"
            )
        self.roller.rollouts, self.roller.prompts.drawn = state["rollouts"], state["drawn"]
        if self.ref_policy is not None and "ref_model" in state:
            self.ref_policy.model.load_state_dict(state["ref_model"])
        self._steps, self._minibatches = state["steps"], state["minibatches"]
        self.report.load(state["report"])
        if self.controller is not None:
            self.controller.value = state["kl_coef"]

    # The loss

    def count(self, batch: Any) -> int:
        return self._objective().count(batch.lengths)

    def _objective(self) -> Objective:
        return self.args.objective(self.beta)

    def measure(self, model: nn.Module, batch: Any) -> Measures:
        objective, targets, tokens = self._objective(), batch.targets, batch.per_token
        weight = objective.token_weights(batch.lengths, targets.sequence) * tokens["in_loss"]
        advantages = tokens["advantages"]
        correction, old = torch.ones_like(advantages), tokens.get("old_logps")
        if self.importance_cap is not None and old is not None:
            correction = truncated_importance_weights(old, tokens["sampler_logps"], self.importance_cap)
        if "kept" in tokens:
            correction = correction * tokens["kept"]
        ref = tokens.get("ref_logps", torch.zeros_like(advantages))
        entropy = self.args.entropy_coef > 0
        if objective.is_coupled:
            scores = model(batch, entropy=entropy)
            before = scores.logps.detach() if old is None else old
            total = objective.sequence_loss(
                scores, advantages, weight, correction, before, ref, targets.sequence, batch.lengths
            )
        elif old is None:  # one step a rollout: the policy before it is this one
            scores = model(batch, _local(objective, True), entropy, (advantages, weight, correction, ref))
            total, before = scores.loss, scores.logps.detach()
        else:
            scores = model(batch, _local(objective, False), entropy, (advantages, weight, correction, old, ref))
            total, before = scores.loss, old
        critic = torch.zeros((), device=weight.device)
        if scores.values is not None and "returns" in tokens:
            losses = value_loss(
                scores.values, tokens["values"], tokens["returns"], self.args.cliprange_value, reduction="none"
            )
            critic = (losses * weight).sum()
            total = total + self.args.vf_coef * critic
        metrics = self.report.of_step(batch, scores, before, weight, total, critic, objective)
        size = len(batch.lengths)
        share = (total.detach() / size).expand(size)
        return Measures(
            share, torch.full((size,), objective.count(batch.lengths) / size), metrics, total, scores.router_logits
        )

    # What is shown

    def reduce_metrics(self, sums: dict[str, tuple[float, float]]) -> dict[str, float]:
        return self.report.derive(super().reduce_metrics(sums))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs or "train_loss" in logs:
            logs |= self.report.maxima()
        super().log(logs, start_time)
        if "loss" in logs:
            self.report.line(logs)


def _local(objective: Objective, on_policy: bool) -> Callable[..., Tensor]:
    if on_policy:
        return lambda scores, advantages, weight, correction, ref: objective.token_loss(
            scores, advantages, weight, correction, scores.logps.detach(), ref
        )
    return objective.token_loss


class GRPOTrainer(PPOTrainer):
    """:class:`PPOTrainer` under :class:`GRPOConfig`."""

    config_class: ClassVar[type[BaseConfig]] = GRPOConfig


class RLOOTrainer(PPOTrainer):
    """:class:`PPOTrainer` under :class:`RLOOConfig`."""

    config_class: ClassVar[type[BaseConfig]] = RLOOConfig


class BestOfNTrainer(PPOTrainer):
    """:class:`PPOTrainer` under :class:`BestOfNConfig`: rejection-sampling fine-tuning."""

    config_class: ClassVar[type[BaseConfig]] = BestOfNConfig
