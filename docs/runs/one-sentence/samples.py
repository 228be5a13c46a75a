"""A few of the completions that a run kept, from its beginning, middle and end."""

import json
import sys
from pathlib import Path

entries = [json.loads(line) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
steps = sorted({entry["step"] for entry in entries})
wanted = (steps[0], steps[len(steps) // 2], steps[-1])
kept = [entry for step in wanted for entry in [e for e in entries if e["step"] == step][::11][:4]]
Path(sys.argv[2]).write_text("".join(json.dumps(e, ensure_ascii=False) + "\n" for e in kept), encoding="utf-8")
