"""Rewards for all answers of the run: python judge.py OUT DATA adds them to the files that hold the answers."""

import json
import sys
from pathlib import Path

from answers import add_rewards
from rows import one_sentence_prompts, prompts

out, data = Path(sys.argv[1]), Path(sys.argv[2])
judges = sorted(file.parent for file in (out / "models").glob("reward-*/whole"))
questions, short_questions = prompts(data, "eval"), one_sentence_prompts(data, "eval")
asked = {
    "answers": questions,
    "sft_answers": questions,
    "dpo_answers": questions,
    "before": short_questions,
    "after": short_questions,
}
for file in [*out.glob("start.json"), *sorted(out.glob("side-*.json")), *out.glob("ppo.json")]:
    found = json.loads(file.read_text(encoding="utf-8"))
    for part in asked.keys() & found.keys():
        add_rewards(found[part], asked[part], judges)
    file.write_text(json.dumps(found), encoding="utf-8")
