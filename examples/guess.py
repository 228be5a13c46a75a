"""A game of several turns: the policy guesses a number, and is told whether the right one is higher or lower.

    rlhf grpo --model_name_or_path MODEL --dataset_name numbers.jsonl --environment examples/guess.py:Guess \
        --max_turns 4 --max_completion_length 8 --output_dir runs/guess

A row of numbers.jsonl: {"prompt": [{"role": "user", "content": "Guess a number from 1 to 9."}], "number": 4}
"""

import re
from collections.abc import Mapping
from typing import Any

from rlhf.rollouts import Reply


class Guess:
    """One game: 1 for a hit, less a tenth for each guess before it; nothing without a hit."""

    def reset(self, row: Mapping[str, Any]) -> None:
        """Begin with the row's own prompt."""
        self.number, self.guesses = int(row["number"]), 0

    def step(self, answer: str) -> Reply:
        """Take a guess."""
        found = re.search(r"\d+", answer)
        if found is None:
            return Reply("A number, please.")
        guess = int(found[0])
        if guess == self.number:
            return Reply(reward=1.0 - 0.1 * self.guesses, done=True)
        self.guesses += 1
        return Reply("Higher." if guess < self.number else "Lower.")
