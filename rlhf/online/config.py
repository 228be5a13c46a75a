"""Arguments of on-policy training, and the family's presets."""

import logging
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlhf.data.columns import check_prompt_columns
from rlhf.losses import (
    ADVANTAGE_ESTIMATORS,
    POLICY_LOSSES,
    PREFERENCE_LOSSES,
    AdaptiveKLController,
    AdvantageEstimator,
    arguments_of,
    dpo_loss,
)
from rlhf.losses.registry import Registry
from rlhf.online.objective import Objective, make_objective
from rlhf.online.trl_names import TRLNames, take_over_names
from rlhf.rollouts import Sampling
from rlhf.trainers.base import BaseConfig
from rlhf.trainers.reference import ReferenceSyncArguments

logger = logging.getLogger(__name__)
COMPLETIONS_USED = {"best_of_n": 1, "pairs": 2}  # of each prompt, chosen by their rewards before anything is learned
LENGTHS = ("chosen_lengths", "rejected_lengths")
ESTIMATOR_HELP = f"One of {', '.join(ADVANTAGE_ESTIMATORS)}, or file.py:name."
POLICY_LOSS_HELP = f"One of {', '.join(POLICY_LOSSES)}, or file.py:name."


@dataclass
class PPOConfig(TRLNames, ReferenceSyncArguments, BaseConfig):
    """Arguments of :class:`PPOTrainer`; names are TRL's where TRL has the same thing.

    A rollout is ``per_device_train_batch_size * gradient_accumulation_steps * processes * num_mini_batches``
    completions, ``num_generations`` of each prompt; it is learned from in ``num_iterations`` passes of
    ``num_mini_batches`` optimizer steps.
    """

    learning_rate: float = field(default=3e-6, metadata={"help": "Peak learning rate of AdamW."})
    disable_dropout: bool = field(default=True, metadata={"help": "Train without dropout."})
    # Rewards
    reward_weights: list[float] | None = field(default=None, metadata={"help": "One for each reward; 1 by default."})
    on_reward_error: str = field(
        default="stop", metadata={"help": "stop, or drop the sample.", "choices": ["stop", "drop"]}
    )
    reward_timeout: float | None = field(default=300.0, metadata={"help": "Seconds for one call of a reward."})
    reward_clip: float | None = field(default=None, metadata={"help": "Bound on the absolute reward, before KL."})
    reward_clip_range: list[float] | None = field(default=None, metadata={"help": "Its least and largest value."})
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Taken off the reward of a completion that is cut by length."}
    )
    mask_truncated_completions: bool = field(
        default=False, metadata={"help": "Learn nothing from cut completions; they stay in the baseline."}
    )
    whiten_rewards: bool = field(default=False, metadata={"help": "Scale rewards to variance 1, keeping their mean."})
    # Sampling
    num_generations: int = field(default=1, metadata={"help": "Completions of each prompt."})
    num_generations_eval: int | None = field(default=None, metadata={"help": "In evaluation; 1 by default."})
    max_completion_length: int = field(default=256, metadata={"help": "Longest completion in tokens."})
    min_completion_length: int = field(default=0, metadata={"help": "No end before this many tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling; the log-probs are taken at it too."})
    stop: list[str] | None = field(default=None, metadata={"help": "Strings that end a completion."})
    shuffle_dataset: bool = field(default=True, metadata={"help": "Another order of prompts in each epoch."})
    dynamic_sampling: int = field(
        default=0,
        metadata={"help": "Draw further prompts, at most this many times, in place of groups of equal rewards (DAPO)."},
    )
    rollout_batch_size: int | None = field(
        default=None, metadata={"help": "Completions that each device samples at once; a whole rollout by default."}
    )
    max_turns: int = field(default=1, metadata={"help": "Answers in an episode, with an environment."})
    # Learning
    num_mini_batches: int = field(default=1, metadata={"help": "Optimizer steps in a pass over a rollout."})
    num_iterations: int = field(default=4, metadata={"help": "Passes over a rollout."})
    advantage_estimator: str = field(default="gae", metadata={"help": ESTIMATOR_HELP})
    gamma: float = field(default=1.0, metadata={"help": "Discount of a token (gae, reinforce++)."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of gae."})
    whiten_advantages: bool = field(default=True, metadata={"help": "Of gae and reinforce++: mean 0, variance 1."})
    normalize_advantages: bool = field(
        default=False, metadata={"help": "Of rloo, group and remax: mean 0, variance 1 over the whole rollout."}
    )
    scale_rewards: str = field(
        default="group",
        metadata={"help": "Deviation that group advantages are divided by: group (True), batch, or none (False)."},
    )
    multi_objective_aggregation: str = field(
        default="sum_then_normalize",
        metadata={
            "help": "Of several rewards in group advantages; the other way is GDPO's, each in its group first.",
            "choices": ["sum_then_normalize", "normalize_then_sum"],
        },
    )
    loss_type: str = field(default="ppo", metadata={"help": POLICY_LOSS_HELP})
    loss_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'What the loss takes besides, such as {"dual_clip": 3}.'}
    )
    epsilon: float | None = field(default=None, metadata={"help": "Clip of the ratio; the loss's own by default."})
    epsilon_high: float | None = field(
        default=None, metadata={"help": "Clip above; as below by default. The largest ratio of cispo."}
    )
    delta: float | None = field(
        default=None, metadata={"help": "Largest ratio that counts at all (two-sided clip); above 1 + epsilon."}
    )
    importance_sampling_level: str = field(
        default="token",
        metadata={"help": "A ratio for each token, or one for each sequence (GSPO).", "choices": ["token", "sequence"]},
    )
    top_entropy_quantile: float = field(
        default=1.0, metadata={"help": "Share of the tokens that are learned: those of the highest entropy. 1: all."}
    )
    off_policy_mask_threshold: float | None = field(
        default=None,
        metadata={"help": "Leave out a bad sequence whose log-probs fell by more than this a token since sampling."},
    )
    importance_sampling_cap: float | None = field(
        default=None, metadata={"help": "Weigh tokens by min(trainer / sampler, this); 2 is usual. With a server: 2."}
    )
    beta: float = field(default=0.05, metadata={"help": "Weight of the KL to the reference; 0 needs none."})
    kl_in: str = field(default="reward", metadata={"help": "Where KL goes.", "choices": ["reward", "loss"]})
    kl_estimator: str | None = field(default=None, metadata={"help": "k1 (in the reward, always), k2 or k3."})
    adaptive_kl_target: float | None = field(
        default=None, metadata={"help": "Change beta so that the KL of a completion comes to this."}
    )
    adaptive_kl_horizon: int = field(default=10_000, metadata={"help": "Completions over which beta follows."})
    early_stop_kl: float | None = field(
        default=None, metadata={"help": "Leave a rollout once KL(old, new) of a token passes this."}
    )
    entropy_coef: float = field(default=0.0, metadata={"help": "Bonus for entropy; costs a pass over the logits."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the critic's loss."})
    cliprange_value: float | None = field(default=0.2, metadata={"help": "Clip of the critic; None for none."})
    value_model: str = field(
        default="shared",
        metadata={"help": "Critic: shared (a head on the policy), or a model's folder, such as the reward model's."},
    )
    # What is shown
    log_completions: bool = field(
        default=True, metadata={"help": "Keep the last rollout of each line of the log in completions.jsonl."}
    )
    num_completions_to_print: int | None = field(
        default=0, metadata={"help": "Print this many of them as well; None prints all."}
    )
    log_unique_prompts: bool = field(default=False, metadata={"help": "Keep and print one completion of each prompt."})

    _VALID_DICT_FIELDS = [  # noqa: RUF012  # not a field
        *BaseConfig._VALID_DICT_FIELDS, "loss_kwargs", "generation_kwargs", "transformers_continuous_batching_config",
    ]  # fmt: skip

    best_metric: ClassVar[str] = "reward"

    def check_columns(self, columns: list[str]) -> None:
        check_prompt_columns(columns, self.reading().form)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_sampling_strategy != "random":
            raise ValueError(
                f"train_sampling_strategy {self.train_sampling_strategy}: prompts are drawn in a random order, or with "
                "shuffle_dataset false in their own"
            )
        self.advantage_estimator = ADVANTAGE_ESTIMATORS.name_of(self.advantage_estimator)
        losses: Registry[Any] = PREFERENCE_LOSSES if self.advantage_estimator == "pairs" else POLICY_LOSSES
        self.loss_type = losses.name_of(self.loss_type)
        take_over_names(self)
        self._check_experience()
        if self.advantage_estimator == "pairs":
            self._check_pair_loss()
        else:
            self.objective()

    def _check_pair_loss(self) -> None:
        columns = PREFERENCE_LOSSES.find(self.loss_type).columns
        if missing := [name for name in columns if name not in (*LENGTHS, *self._loss_options())]:
            raise ValueError(f"loss_type {self.loss_type} reads {missing[0]}, which sampled pairs do not have")
        one = torch.ones(1)
        try:
            self.pair_loss(one, one, one, one, **dict.fromkeys(LENGTHS, one))
        except TypeError as error:
            raise ValueError(f"loss_type {self.loss_type}: {error}") from error

    def _loss_options(self) -> dict[str, Any]:
        return self.loss_kwargs if isinstance(self.loss_kwargs, dict) else {}

    def _check_experience(self) -> None:
        estimator, group = self.advantage_estimator, self.num_generations
        if self.estimator().needs_group and group < 2:
            raise ValueError(f"{estimator} compares completions of a prompt: num_generations must be 2 or more")
        if self.tokens_per_batch is not None:
            raise ValueError("tokens_per_batch is for data that is there before training: leave it out")
        if self.kl_in not in ("reward", "loss"):
            raise ValueError(f"kl_in must be reward or loss, got {self.kl_in!r}")
        if self.kl_estimator is None:
            self.kl_estimator = "k1" if self.kl_in == "reward" else "k3"
        if self.kl_in == "reward" and self.kl_estimator != "k1":
            raise ValueError(f"in the reward only k1 has the gradient of the KL, not {self.kl_estimator}: --kl_in loss")
        self._check_ignored()
        self._check_advantages()
        self.check_sync()
        for name in ("num_mini_batches", "num_iterations", "num_generations", "max_turns"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive to explore, got {self.temperature}")
        if self.max_completion_length >= self.limit():
            raise ValueError(
                f"max_completion_length {self.max_completion_length} leaves no room for a prompt in max_length "
                f"{self.max_length}: raise max_length"
            )
        if self.sampling().reshapes:
            logger.warning(
                "top_p, top_k, min_p or repetition_penalty: samples come from another distribution than the policy's "
                "own, which the loss takes them for; sampler_kl shows how far they are apart"
            )
        if self.adaptive_kl_target is not None:
            self.kl_controller()
        step = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if step % self.completions_used:
            raise ValueError(
                f"a step takes {step} completions on each device (per_device_train_batch_size * "
                f"gradient_accumulation_steps), which is no multiple of the {self.completions_used} of a prompt"
            )
        if estimator == "pairs" and self.per_device_train_batch_size % 2:
            raise ValueError("pairs need an even per_device_train_batch_size")

    def _check_advantages(self) -> None:
        estimator = self.advantage_estimator
        if self.scale_rewards not in ("group", "batch", "none"):
            raise ValueError(f"scale_rewards must be group (True), batch or none (False), got {self.scale_rewards!r}")
        if self.multi_objective_aggregation not in ("sum_then_normalize", "normalize_then_sum"):
            raise ValueError(
                f"multi_objective_aggregation must be sum_then_normalize or normalize_then_sum, got "
                f"{self.multi_objective_aggregation!r}"
            )
        if self.multi_objective_aggregation == "normalize_then_sum":
            if estimator not in ("group", "gdpo"):
                raise ValueError("normalize_then_sum is for the group estimator, with KL in the loss")
            estimator = self.advantage_estimator = "gdpo"
        if "reward_components" in self.estimator().reads and self.kl_in_reward:
            raise ValueError("normalize_then_sum is for the group estimator, with KL in the loss")
        if self.normalize_advantages and (self.estimator().is_per_token or estimator in COMPLETIONS_USED):
            raise ValueError(f"normalize_advantages is for rloo, group and remax; {estimator} has whiten_advantages")
        if not 0 <= self.top_entropy_quantile <= 1:
            raise ValueError(f"top_entropy_quantile must be in [0, 1], got {self.top_entropy_quantile}")
        if self.reward_clip_range is not None and (
            len(self.reward_clip_range) != 2 or not self.reward_clip_range[0] < self.reward_clip_range[1]
        ):
            raise ValueError(f"reward_clip_range is a least and a largest value, got {self.reward_clip_range}")
        if self.importance_sampling_level == "sequence" and self._sums_over_tokens():
            logger.warning(
                "importance_sampling_level sequence with loss_type %s weights each sequence by its completion length; "
                "GSPO is loss_type grpo", self.loss_type,
            )  # fmt: skip

    def _check_ignored(self) -> None:
        """Refuse what would be dropped in silence."""
        estimator = self.advantage_estimator
        if estimator == "pairs":
            for name in ("adaptive_kl_target", "early_stop_kl", "importance_sampling_cap", "off_policy_mask_threshold"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is for losses of tokens, and pairs have none: leave it out")
            if self.entropy_coef:
                raise ValueError("entropy_coef is for losses of tokens, and pairs have none: leave it out")
            if self.top_entropy_quantile < 1 or self.importance_sampling_level != "token":
                raise ValueError("top_entropy_quantile and importance_sampling_level are for losses of tokens")
        if self.uses_baselines and self.whiten_rewards:
            raise ValueError(
                f"{estimator} subtracts the rewards of greedy answers, which are not whitened: no whiten_rewards"
            )
        if self.dynamic_sampling and self.num_generations < 2:
            raise ValueError("dynamic_sampling looks for groups of different rewards: num_generations must be above 1")
        loss = None if estimator == "pairs" else POLICY_LOSSES.find(self.loss_type)
        reads_ratios = loss is None or loss.token_ratios or loss.coupled
        if not reads_ratios and estimator != "best_of_n" and not self.one_step_per_rollout:
            raise ValueError(
                f"loss_type {self.loss_type} has no ratio to the policy that sampled, so a rollout serves one step: "
                "set num_iterations and num_mini_batches to 1, or take ppo"
            )

    def _sums_over_tokens(self) -> bool:
        """Whether a longer sequence has more terms in the loss, so that a ratio of the sequence counts more often."""
        if self.advantage_estimator == "pairs":
            return False
        loss = POLICY_LOSSES.find(self.loss_type)
        # luspo is meant for ratios of sequences, weighted by length.
        return loss.token_ratios and (loss.mean == "tokens" or "max_completion_length" in loss.hyper_parameters)

    def estimator(self) -> AdvantageEstimator:
        """The function that ``advantage_estimator`` names."""
        return ADVANTAGE_ESTIMATORS.find(self.advantage_estimator)

    @property
    def uses_critic(self) -> bool:
        """Whether the estimator reads the values of a critic."""
        return "values" in self.estimator().reads

    @property
    def uses_baselines(self) -> bool:
        """Whether the estimator reads the rewards of greedy completions."""
        return "baselines" in self.estimator().reads

    @property
    def completions_used(self) -> int:
        """Completions of each prompt that are learned from."""
        return COMPLETIONS_USED.get(self.advantage_estimator, self.num_generations)

    @property
    def one_step_per_rollout(self) -> bool:
        """Whether each rollout serves one step: then log-probs before it are those of it."""
        return self.num_mini_batches == self.num_iterations == 1

    @property
    def reward_bounds(self) -> tuple[float, float] | None:
        if self.reward_clip_range is not None:
            return self.reward_clip_range[0], self.reward_clip_range[1]
        return None if self.reward_clip is None else (-self.reward_clip, self.reward_clip)

    @property
    def kl_in_reward(self) -> bool:
        return self.beta > 0 and self.kl_in == "reward" and self.advantage_estimator != "pairs"

    def sampling(self) -> Sampling:
        own: dict[str, Any] = dict(min_tokens=self.min_completion_length, stop=tuple(self.stop or ()))
        lengths = dict(temperature=self.temperature, max_tokens=self.max_completion_length)
        return Sampling(**own | self.generation_options() | lengths)

    def objective(self, beta: float | None = None) -> Objective:
        return make_objective(
            self.loss_type,
            epsilon=self.epsilon,
            epsilon_high=self.epsilon_high,
            delta=self.delta,
            max_completion_length=self.max_completion_length,
            loss_kwargs=self._loss_options(),
            beta=(self.beta if beta is None else beta) if self.kl_in == "loss" else 0.0,
            kl_estimator=str(self.kl_estimator),
            entropy_coef=self.entropy_coef,
            level=self.importance_sampling_level,
            off_policy_threshold=self.off_policy_mask_threshold,
        )

    def pair_loss(self, *logps: Tensor, **lengths: Tensor) -> Tensor:
        """Loss of each pair for ``pairs``, from the four sums of log-probs."""
        taken = arguments_of(PREFERENCE_LOSSES.find(self.loss_type), lengths)
        options = taken | self._loss_options()
        return dpo_loss(*logps, self.beta, loss_type=self.loss_type, reduction="none", **options)

    def kl_controller(self) -> AdaptiveKLController | None:
        if self.adaptive_kl_target is None:
            return None
        return AdaptiveKLController(self.beta, self.adaptive_kl_target, self.adaptive_kl_horizon)


@dataclass
class GRPOConfig(PPOConfig):
    """:class:`PPOConfig` as GRPO has it: groups as the baseline, no critic, KL in the loss if there is any.

    ``loss_type`` is ``dapo``, as in TRL; ``grpo``, ``dr_grpo`` (with ``scale_rewards`` none), ``gspo``, ``cispo``, …
    are a word away.
    """

    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate of AdamW."})
    num_generations: int = field(default=8, metadata={"help": "Completions of each prompt."})
    num_iterations: int = field(default=1, metadata={"help": "Passes over a rollout."})
    advantage_estimator: str = field(default="group", metadata={"help": ESTIMATOR_HELP})
    loss_type: str = field(default="dapo", metadata={"help": POLICY_LOSS_HELP})
    beta: float = field(default=0.0, metadata={"help": "Weight of the KL to the reference; 0 needs none."})
    kl_in: str = field(default="loss", metadata={"help": "Where KL goes.", "choices": ["reward", "loss"]})


@dataclass
class RLOOConfig(PPOConfig):
    """:class:`PPOConfig` as RLOO has it: the others of the group as the baseline, KL in the reward."""

    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate of AdamW."})
    num_generations: int = field(default=2, metadata={"help": "Completions of each prompt."})
    num_iterations: int = field(default=1, metadata={"help": "Passes over a rollout."})
    advantage_estimator: str = field(default="rloo", metadata={"help": ESTIMATOR_HELP})
    loss_type: str = field(default="rloo", metadata={"help": POLICY_LOSS_HELP})


@dataclass
class OnlineDPOConfig(PPOConfig):
    """:class:`PPOConfig` as online DPO has it: the best and the worst completion of a prompt are a pair."""

    learning_rate: float = field(default=5e-7, metadata={"help": "Peak learning rate of AdamW."})
    num_generations: int = field(default=2, metadata={"help": "Completions of each prompt."})
    num_iterations: int = field(default=1, metadata={"help": "Passes over a rollout."})
    advantage_estimator: str = field(default="pairs", metadata={"help": "pairs"})
    loss_type: str = field(
        default="sigmoid", metadata={"help": f"One of {', '.join(PREFERENCE_LOSSES)}, or file.py:name."}
    )
    beta: float = field(default=0.1, metadata={"help": "Larger stays nearer the reference."})

    def __post_init__(self) -> None:
        if self.advantage_estimator != "pairs":
            raise ValueError(f"online DPO learns from pairs, not from {self.advantage_estimator!r}")
        super().__post_init__()


@dataclass
class BestOfNConfig(PPOConfig):
    """:class:`PPOConfig` as rejection-sampling fine-tuning has it: supervised, on the best completion of a prompt."""

    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate of AdamW."})
    num_generations: int = field(default=8, metadata={"help": "Completions of each prompt."})
    num_iterations: int = field(default=1, metadata={"help": "Passes over a rollout."})
    advantage_estimator: str = field(default="best_of_n", metadata={"help": ESTIMATOR_HELP})
    loss_type: str = field(default="reinforce", metadata={"help": POLICY_LOSS_HELP})
    beta: float = field(default=0.0, metadata={"help": "Weight of the KL to the reference; 0 needs none."})
    kl_in: str = field(default="loss", metadata={"help": "Where KL goes.", "choices": ["reward", "loss"]})
