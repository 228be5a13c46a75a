"""``rlhf rloo``."""

from rlhf.cli.ppo import run_as
from rlhf.online import RLOOTrainer


def run(argv: list[str]) -> None:
    run_as("rloo", RLOOTrainer, argv)
