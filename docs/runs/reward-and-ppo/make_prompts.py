"""The different questions of a file of preference rows, one a line: ``python make_prompts.py SOURCE TARGET``."""

import json
import sys
from pathlib import Path

from rlhf.data import load_data

source, target = sys.argv[1], Path(sys.argv[2])
questions = {row["prompt"][0]["content"] for row in load_data(source) if len(row["prompt"]) == 1}
rows = [{"prompt": [{"role": "user", "content": text}]} for text in sorted(questions)]
target.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
print(f"{target}: {len(rows)} prompts")
