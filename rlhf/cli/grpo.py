"""``rlhf grpo``."""

from rlhf.cli.ppo import run_as
from rlhf.online import GRPOTrainer


def run(argv: list[str]) -> None:
    run_as("grpo", GRPOTrainer, argv)
