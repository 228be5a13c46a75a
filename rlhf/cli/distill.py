"""``rlhf distill``."""

from rlhf.cli.arguments import DataArguments, ModelArguments, parse
from rlhf.cli.training import train
from rlhf.trainers import DistillConfig, DistillTrainer


def run(argv: list[str]) -> None:
    data, model, args = parse("distill", (DataArguments, ModelArguments, DistillConfig), argv)
    train(data, model, args, DistillTrainer)
