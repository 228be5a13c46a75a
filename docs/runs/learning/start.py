"""The model before training: its held-out perplexity and its answers.

python start.py MODEL DATA OUT writes start.json.
"""

import json
import sys
from pathlib import Path

from answers import answer, evaluate
from rows import prompts

model, data, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
found = {
    "held_out": evaluate(model, None, str(out / "held_out.jsonl"), out, "start"),
    "answers": answer(model, prompts(data, "eval")),
}
(out / "start.json").write_text(json.dumps(found), encoding="utf-8")
