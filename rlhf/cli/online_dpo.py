"""``rlhf online-dpo``."""

from rlhf.cli.ppo import run_as
from rlhf.online import OnlineDPOTrainer


def run(argv: list[str]) -> None:
    run_as("online-dpo", OnlineDPOTrainer, argv)
