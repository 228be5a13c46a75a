"""``rlhf init``: write a recipe into a file."""

from rlhf.cli.recipes import run_init as run

__all__ = ["run"]
