"""Prompts from a file of preference rows: the first question of each, with what is asked of the answer.

python make_data.py preferences_train.jsonl.gz prompts_train.jsonl 2000
"""

import json
import sys
from pathlib import Path

from reward import ASKED

from rlhf.data import load_data

source, target, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
seen: dict[str, None] = {}
for row in load_data(source):
    turns = row["prompt"]
    question = " ".join(turns[0]["content"].split()) if len(turns) == 1 and turns[0]["role"] == "user" else ""
    if 4 <= len(question.split()) <= 40:
        seen.setdefault(question)
    if len(seen) == count:
        break
rows = [{"prompt": [{"role": "user", "content": f"{question} {ASKED}"}]} for question in seen]
target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
print(f"{target}: {len(rows)} prompts")
