"""``rlhf reward``."""

from rlhf.cli.arguments import DataArguments, ModelArguments, parse
from rlhf.cli.training import train
from rlhf.models import load_reward_model
from rlhf.trainers import RewardConfig, RewardTrainer


def run(argv: list[str]) -> None:
    data, model, args = parse("reward", (DataArguments, ModelArguments, RewardConfig), argv)
    train(data, model, args, RewardTrainer, load_reward_model)
