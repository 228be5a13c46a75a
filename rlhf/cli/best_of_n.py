"""``rlhf best-of-n``."""

from rlhf.cli.ppo import run_as
from rlhf.online import BestOfNTrainer


def run(argv: list[str]) -> None:
    run_as("best-of-n", BestOfNTrainer, argv)
