"""``rlhf ppo``, and what the commands of its family share."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rlhf.cli.arguments import DataArguments, ModelArguments, parse
from rlhf.cli.dpo import ReferenceArguments
from rlhf.cli.training import train
from rlhf.online import PPOTrainer
from rlhf.rewards.loading import load_object


@dataclass
class ExperienceArguments:
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Rewards: a built-in such as numeric_answer or length_reward(target=200), file.py:function, a "
            "reward model's folder, https://…; several add up."
        },
    )
    environment: str | None = field(
        default=None, metadata={"help": "file.py:Class of an environment, for several turns (--max_turns)."}
    )


def run_as(command: str, trainer: Any, argv: list[str]) -> None:
    classes = (DataArguments, ModelArguments, ReferenceArguments, ExperienceArguments, trainer.config_class)
    data, model, reference, experience, args = parse(command, classes, argv)
    if experience.reward_funcs is None and experience.environment is None:
        raise ValueError("--reward_funcs is missing: a built-in, file.py:function, a reward model's folder, https://…")
    factory = experience.environment
    make = partial(
        trainer,
        reward_funcs=experience.reward_funcs,
        ref_model=reference.ref_model_name_or_path,
        environment_factory=None if factory is None else load_object(factory, f"environment {factory!r}"),
    )
    train(data, model, args, make)


def run(argv: list[str]) -> None:
    run_as("ppo", PPOTrainer, argv)
