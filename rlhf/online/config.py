"""Options of on-policy training."""

from dataclasses import dataclass
from typing import Any, ClassVar

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
from rlhf.online.checks import check_config
from rlhf.online.objective import Objective, make_objective
from rlhf.online.trl_names import TRLNames, take_over_names
from rlhf.rollouts import Sampling
from rlhf.rollouts.arguments import option
from rlhf.trainers.config import BaseConfig
from rlhf.trainers.reference import ReferenceSyncArguments

COMPLETIONS_USED = {"best_of_n": 1, "pairs": 2}  # of each prompt, selected by their rewards
ESTIMATOR_HELP = f"One of {', '.join(ADVANTAGE_ESTIMATORS)}, or file.py:name."
POLICY_LOSS_HELP = f"One of {', '.join(POLICY_LOSSES)}, or file.py:name."


@dataclass
class PPOConfig(TRLNames, ReferenceSyncArguments, BaseConfig):
    """Arguments of :class:`PPOTrainer`; names are TRL's where TRL has the same thing.

    A rollout is ``per_device_train_batch_size * gradient_accumulation_steps * processes * num_mini_batches``
    completions, ``num_generations`` of each prompt. It is used for ``num_iterations`` passes of ``num_mini_batches``
    optimizer steps.
    """

    learning_rate: float = option(3e-6, "Peak learning rate of AdamW.")
    disable_dropout: bool = option(True, "Train without dropout.")

    # Rewards
    reward_weights: list[float] | None = option(None, "Weight of each reward; default 1.")
    on_reward_error: str = option("stop", "If a reward function fails: stop, or drop the sample.", ["stop", "drop"])
    reward_timeout: float | None = option(300.0, "Time limit of one call of a reward function, in seconds.")
    reward_clip: float | None = option(None, "Bound on the absolute reward, before KL.")
    reward_clip_range: list[float] | None = option(None, "Smallest and largest reward, before KL.")
    missing_eos_penalty: float | None = option(None, "Penalty, subtracted from the reward of a truncated completion.")
    mask_truncated_completions: bool = option(
        False, "Leave truncated completions out of the loss, but not out of the baseline."
    )
    whiten_rewards: bool = option(False, "Scale rewards to variance 1, keeping their mean.")
    # Sampling
    num_generations: int = option(1, "Completions of each prompt.")
    num_generations_eval: int | None = option(None, "Completions of each prompt in evaluation; 1 by default.")
    max_completion_length: int = option(256, "Longest completion in tokens.")
    min_completion_length: int = option(0, "Shortest completion in tokens.")
    temperature: float = option(1.0, "Temperature of sampling, and of all log-probs.")
    stop: list[str] | None = option(None, "Strings that end a completion.")
    shuffle_dataset: bool = option(True, "Shuffle the prompts in each epoch.")
    dynamic_sampling: int = option(0, "Rounds of new prompts that replace groups of equal rewards (DAPO).")
    rollout_batch_size: int | None = option(None, "Completions sampled at once on a device; default: all.")
    max_turns: int = option(1, "Answers in an episode, with an environment.")
    max_staleness: int = option(0, "Rollouts that a server samples ahead, while the policy trains; 0: none.")
    # Training
    num_mini_batches: int = option(1, "Optimizer steps in a pass over a rollout.")
    num_iterations: int = option(4, "Passes over a rollout.")
    advantage_estimator: str = option("gae", ESTIMATOR_HELP)
    gamma: float = option(1.0, "Discount of a token (gae, reinforce++).")
    lam: float = option(0.95, "Lambda of gae.")
    whiten_advantages: bool = option(True, "Normalise advantages to mean 0, variance 1 (gae, reinforce++).")
    normalize_advantages: bool = option(False, "Normalise advantages over the whole rollout (rloo, group, remax).")
    scale_rewards: str = option("group", "Divide group advantages by the standard deviation of: group, batch, none.")
    multi_objective_aggregation: str = option(
        "sum_then_normalize",
        "Order for several rewards in group advantages; normalize_then_sum is GDPO's.",
        ["sum_then_normalize", "normalize_then_sum"],
    )
    loss_type: str = option("ppo", POLICY_LOSS_HELP)
    loss_kwargs: dict[str, Any] | str | None = option(None, 'Further options of the loss, such as {"dual_clip": 3}.')
    epsilon: float | None = option(None, "Clip range of the ratio; default: that of the loss.")
    epsilon_high: float | None = option(None, "Upper clip range; default: epsilon. For cispo, the largest ratio.")
    delta: float | None = option(
        None, "Upper bound of the ratio for negative advantages (two-sided clip); above 1 + epsilon."
    )
    importance_sampling_level: str = option(
        "token", "One ratio for each token, or sequence (GSPO).", ["token", "sequence"]
    )
    top_entropy_quantile: float = option(1.0, "Share of tokens in the loss, those of highest entropy; 1: all.")
    off_policy_mask_threshold: float | None = option(
        None, "Leave out a bad sequence whose log-probs fell by more than this a token since sampling."
    )
    importance_sampling_cap: float | None = option(
        None, "Cap of the importance weight trainer / sampler of a token; 2 is usual, and the default with a server."
    )
    beta: float = option(0.05, "Weight of the KL to the reference; with 0, no reference is loaded.")
    kl_in: str = option("reward", "Where the KL term enters.", ["reward", "loss"])
    kl_estimator: str | None = option(None, "k1 (in the reward, always), k2 or k3.")
    adaptive_kl_target: float | None = option(None, "Adapt beta so that the KL of a completion approaches this.")
    adaptive_kl_horizon: int = option(10_000, "Completions over which beta adapts.")
    early_stop_kl: float | None = option(None, "Stop training on a rollout once KL(old, new) per token exceeds this.")
    entropy_coef: float = option(0.0, "Weight of an entropy bonus; needs one more pass over the logits.")
    vf_coef: float = option(0.1, "Weight of the critic's loss.")
    cliprange_value: float | None = option(0.2, "Clip range of the value; None: no clipping.")
    value_model: str = option("shared", "Critic: shared (a head on the policy), or a model's folder.")
    critic_head: str = option(
        "zeros", "Start of the head of a value_model: zeros, or the model's own.", ["zeros", "model"]
    )
    critic_learning_rate: float | None = option(None, "Peak learning rate of the critic; default: learning_rate.")
    critic_warmup: int = option(0, "Rollouts at the start that train the critic alone; it needs a value_model.")
    # Completions
    log_completions: bool = option(True, "Write the last rollout before each line of the log to completions.jsonl.")
    num_completions_to_print: int | None = option(0, "Print this many of them too; None prints all.")
    log_unique_prompts: bool = option(False, "Write and print one completion for each prompt.")

    _VALID_DICT_FIELDS = [  # noqa: RUF012  # not a field
        *BaseConfig._VALID_DICT_FIELDS, "loss_kwargs", "generation_kwargs", "transformers_continuous_batching_config",
    ]  # fmt: skip

    best_metric: ClassVar[str] = "reward"

    def check_columns(self, columns: list[str]) -> None:
        check_prompt_columns(columns, self.reading().form)

    def __post_init__(self) -> None:
        super().__post_init__()
        # A function becomes a name, so that a configuration can be written to a file.
        self.advantage_estimator = ADVANTAGE_ESTIMATORS.name_of(self.advantage_estimator)
        losses: Registry[Any] = PREFERENCE_LOSSES if self.advantage_estimator == "pairs" else POLICY_LOSSES
        self.loss_type = losses.name_of(self.loss_type)
        # Before all that follows, which knows the names here alone.
        take_over_names(self)
        if self.multi_objective_aggregation == "normalize_then_sum" and self.advantage_estimator == "group":
            self.advantage_estimator = "gdpo"
        # In the loss k3 has the lower variance; in the reward only k1 has the right gradient.
        if self.kl_estimator is None:
            self.kl_estimator = "k1" if self.kl_in == "reward" else "k3"
        check_config(self)

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
        """Completions of each prompt that are trained on."""
        return COMPLETIONS_USED.get(self.advantage_estimator, self.num_generations)

    @property
    def one_step_per_rollout(self) -> bool:
        """Whether each rollout is used for one step; then the old log-probs are those of the step itself."""
        return self.num_mini_batches == self.num_iterations == 1

    @property
    def reward_bounds(self) -> tuple[float, float] | None:
        """The smallest and the largest reward; None without bounds."""
        if self.reward_clip_range is not None:
            return self.reward_clip_range[0], self.reward_clip_range[1]
        return None if self.reward_clip is None else (-self.reward_clip, self.reward_clip)

    @property
    def kl_in_reward(self) -> bool:
        """Whether the KL to the reference is subtracted from rewards."""
        # A loss of pairs bounds the KL by itself.
        return self.beta > 0 and self.kl_in == "reward" and self.advantage_estimator != "pairs"

    @property
    def loss_options(self) -> dict[str, Any]:
        """``loss_kwargs`` as a dictionary."""
        return self.loss_kwargs if isinstance(self.loss_kwargs, dict) else {}

    def sampling(self) -> Sampling:
        """How completions are drawn."""
        options: dict[str, Any] = {"min_tokens": self.min_completion_length, "stop": tuple(self.stop or ())}
        options |= self.generation_options()  # generation_kwargs may set min_tokens and stop too
        return Sampling(**options, temperature=self.temperature, max_tokens=self.max_completion_length)

    def objective(self, beta: float | None = None) -> Objective:
        """The loss of tokens or sequences.

        Args:
            beta: weight of the KL to the reference now; by default that of the start.
        Returns:
            The objective, with its options checked.
        """
        beta = self.beta if beta is None else beta
        return make_objective(
            self.loss_type,
            epsilon=self.epsilon,
            epsilon_high=self.epsilon_high,
            delta=self.delta,
            max_completion_length=self.max_completion_length,
            loss_kwargs=self.loss_options,
            # In the reward the KL is part of the advantages already.
            beta=beta if self.kl_in == "loss" else 0.0,
            kl_estimator=str(self.kl_estimator),
            entropy_coef=self.entropy_coef,
            level=self.importance_sampling_level,
            off_policy_threshold=self.off_policy_mask_threshold,
        )

    def pair_loss(self, *logps: Tensor, **lengths: Tensor) -> Tensor:
        """The loss of pairs.

        Args:
            logps: sums of log-probs, [pairs] each: chosen, rejected, and both under the reference.
            lengths: tokens of the chosen and of the rejected completions, [pairs] each.
        Returns:
            [pairs].
        """
        lengths_read = arguments_of(PREFERENCE_LOSSES.find(self.loss_type), lengths)
        options = lengths_read | self.loss_options
        return dpo_loss(*logps, self.beta, loss_type=self.loss_type, reduction="none", **options)

    def policy_weight(self, rollout: int) -> float:
        """The factor of the policy's loss: 0 while the critic warms up.

        Args:
            rollout: its number, from 1.
        Returns:
            0 or 1. With 0 the policy's gradient is zeros, not missing: under DDP each parameter needs one.
        """
        return 0.0 if 0 < rollout <= self.critic_warmup else 1.0

    def kl_controller(self) -> AdaptiveKLController | None:
        """What adapts beta; None where it is constant."""
        if self.adaptive_kl_target is None:
            return None
        return AdaptiveKLController(self.beta, self.adaptive_kl_target, self.adaptive_kl_horizon)
