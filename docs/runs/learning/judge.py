"""Rewards for all answers of the run: python judge.py OUT DATA adds them to the files that hold the answers."""

import json
import sys
from pathlib import Path

from answers import add_rewards
from rows import one_sentence_prompts, prompts

out, data = Path(sys.argv[1]), Path(sys.argv[2])
judges = sorted(file.parent for file in (out / "models").glob("reward-*/whole"))
questions = {"dpo_answers": prompts(data, "eval")} | dict.fromkeys(
    ("before", "after"), one_sentence_prompts(data, "eval")
)
for file in [*sorted(out.glob("side-*.json")), *out.glob("ppo.json")]:
    found = json.loads(file.read_text(encoding="utf-8"))
    for part, rows in questions.items():
        if part in found:
            add_rewards(found[part], rows, judges)
    file.write_text(json.dumps(found), encoding="utf-8")
