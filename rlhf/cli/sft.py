"""``rlhf sft``."""

from rlhf.cli.arguments import DataArguments, ModelArguments, parse
from rlhf.cli.training import train
from rlhf.trainers import SFTConfig, SFTTrainer


def run(argv: list[str]) -> None:
    data, model, args = parse("sft", (DataArguments, ModelArguments, SFTConfig), argv)
    train(data, model, args, SFTTrainer)
