"""The family of PPO: each member is :class:`PPOTrainer` with other defaults."""

from dataclasses import Field, dataclass, field
from typing import ClassVar, TypeVar, dataclass_transform

from rlhf.losses import PREFERENCE_LOSSES
from rlhf.online.config import PPOConfig
from rlhf.online.trainer import PPOTrainer
from rlhf.rollouts.arguments import option
from rlhf.trainers.config import BaseConfig

Config = TypeVar("Config", bound=PPOConfig)


@dataclass_transform()
def preset(config: type[Config]) -> type[Config]:
    """Make a data class whose new defaults keep the text that the options have in ``--help``.

    Args:
        config: a subclass of :class:`PPOConfig`; its annotated attributes are the new defaults.
    Returns:
        The same class, as a data class.
    """
    for name in config.__annotations__:
        default = getattr(config, name)
        # A field was written out, because its text differs as well.
        if not isinstance(default, Field):
            metadata = PPOConfig.__dataclass_fields__[name].metadata
            setattr(config, name, field(default=default, metadata=metadata))
    return dataclass(config)


@preset
class GRPOConfig(PPOConfig):
    """:class:`PPOConfig` for GRPO: groups as the baseline, no critic, KL in the loss if there is any.

    ``loss_type`` is ``dapo``, as in TRL. Others are ``grpo``, ``dr_grpo`` (with ``scale_rewards`` none), ``gspo``,
    ``cispo``, …
    """

    learning_rate: float = 1e-6
    num_generations: int = 8
    num_iterations: int = 1
    advantage_estimator: str = "group"
    loss_type: str = "dapo"
    # As in TRL: no reference, and no memory for one.
    beta: float = 0.0
    kl_in: str = "loss"


class GRPOTrainer(PPOTrainer):
    """Learn from rewards, against the mean of a group of completions of the same prompt.

    It is :class:`PPOTrainer` under :class:`GRPOConfig`, and takes the same arguments: ``model``, ``reward_funcs``,
    ``args``, ``train_dataset``, ``eval_dataset``, ``processing_class``, ``peft_config`` and so on.

    Example:
        ```python
        def is_short(completions, **columns):
            return [-len(text) for text in completions]

        rows = [{"prompt": "What is 2 + 2?"}, {"prompt": "What is 3 + 3?"}]
        args = rlhf.GRPOConfig("runs/grpo", max_steps=100)
        trainer = rlhf.GRPOTrainer("HuggingFaceTB/SmolLM2-135M-Instruct", is_short, args, train_dataset=rows)
        trainer.train()
        ```
    """

    config_class: ClassVar[type[BaseConfig]] = GRPOConfig


@preset
class RLOOConfig(PPOConfig):
    """:class:`PPOConfig` for RLOO: the others of the group as the baseline, KL in the reward."""

    learning_rate: float = 1e-6
    num_generations: int = 2
    num_iterations: int = 1
    advantage_estimator: str = "rloo"
    loss_type: str = "rloo"  # no ratio: each rollout is used for one step


class RLOOTrainer(PPOTrainer):
    """Learn from rewards, against the mean of the other completions of the same prompt.

    It is :class:`PPOTrainer` under :class:`RLOOConfig`, and takes the same arguments: ``model``, ``reward_funcs``,
    ``args``, ``train_dataset``, ``eval_dataset``, ``processing_class``, ``peft_config`` and so on.

    Example:
        ```python
        def is_short(completions, **columns):
            return [-len(text) for text in completions]

        rows = [{"prompt": "What is 2 + 2?"}, {"prompt": "What is 3 + 3?"}]
        args = rlhf.RLOOConfig("runs/rloo", max_steps=100)
        trainer = rlhf.RLOOTrainer("HuggingFaceTB/SmolLM2-135M-Instruct", is_short, args, train_dataset=rows)
        trainer.train()
        ```
    """

    config_class: ClassVar[type[BaseConfig]] = RLOOConfig


@preset
class BestOfNConfig(PPOConfig):
    """:class:`PPOConfig` for rejection-sampling fine-tuning: supervised, on the best completion of each prompt."""

    learning_rate: float = 1e-5
    num_generations: int = 8
    num_iterations: int = 1
    advantage_estimator: str = "best_of_n"
    loss_type: str = "reinforce"  # with an advantage of 1 this is cross-entropy
    beta: float = 0.0
    kl_in: str = "loss"


class BestOfNTrainer(PPOTrainer):
    """Fine-tune on the best of several completions of each prompt, by their rewards.

    It is :class:`PPOTrainer` under :class:`BestOfNConfig`, and takes the same arguments: ``model``, ``reward_funcs``,
    ``args``, ``train_dataset``, ``eval_dataset``, ``processing_class``, ``peft_config`` and so on.

    Example:
        ```python
        def is_short(completions, **columns):
            return [-len(text) for text in completions]

        rows = [{"prompt": "What is 2 + 2?"}, {"prompt": "What is 3 + 3?"}]
        args = rlhf.BestOfNConfig("runs/best-of-n", max_steps=100)
        trainer = rlhf.BestOfNTrainer("HuggingFaceTB/SmolLM2-135M-Instruct", is_short, args, train_dataset=rows)
        trainer.train()
        ```
    """

    config_class: ClassVar[type[BaseConfig]] = BestOfNConfig


@preset
class OnlineDPOConfig(PPOConfig):
    """:class:`PPOConfig` for online DPO: the best and the worst completion of each prompt are a pair."""

    learning_rate: float = 5e-7
    num_generations: int = 2
    num_iterations: int = 1
    advantage_estimator: str = "pairs"
    loss_type: str = option("sigmoid", f"One of {', '.join(PREFERENCE_LOSSES)}, or file.py:name.")
    beta: float = option(0.1, "Larger values keep the policy closer to the reference.")

    def __post_init__(self) -> None:
        if self.advantage_estimator != "pairs":
            raise ValueError(f"online DPO learns from pairs, not from {self.advantage_estimator!r}")
        super().__post_init__()
