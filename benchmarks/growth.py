"""How the time and memory of an SFT step grow: with the number of sequences, and with the length of one.

    python benchmarks/growth.py --model SmolLM2-135M-Instruct

Each point is a process of its own: the median of three steps (forward and backward, no optimizer), and how much its
memory grew beyond weights and gradients. Writes a table and a plot to --output.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SHAPES = [(count, 128) for count in (1, 2, 4, 8, 16)] + [(1, length) for length in (256, 512, 1024, 2048)]


def one(model: str, count: int, length: int) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM

    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # as our commands do: large pages, before torch's first tensor
    from rlhf.data import Collator
    from rlhf.kernels import optimize
    from rlhf.models import Policy, choose_layout

    torch.set_num_threads(2)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    layout = choose_layout(loaded, "auto")
    optimize(loaded)
    policy = Policy(loaded)
    g = torch.Generator().manual_seed(0)

    def step(count: int, length: int) -> float:
        ids = torch.randint(100, 10_000, (count, length), generator=g).tolist()
        batch = Collator(layout=layout)([{"input_ids": row, "labels": row} for row in ids])
        start = time.perf_counter()
        scores = policy(batch, lambda scores: -scores.logps)
        (scores.loss / len(batch.targets)).backward()
        return time.perf_counter() - start

    step(1, 8)  # the gradients are there from now on
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = [step(count, length) for _ in range(3)]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": statistics.median(seconds), "memory": grown / 2**20}


def report(found: list[dict[str, Any]], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "growth.json").write_text(json.dumps(found, indent=1) + "\n")
    lines = ["| sequences | tokens each | tokens | s | GiB beyond weights and gradients |", "|---|---|---|---|---|"]
    for x in found:
        lines.append(
            f"| {x['count']} | {x['length']} | {x['count'] * x['length']} | {x['seconds']:.2f} | {x['memory']:.2f} |"
        )
    (folder / "growth.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for label, own in (
        ("sequences of 128 tokens", [x for x in found if x["length"] == 128]),
        ("one sequence", [x for x in found if x["count"] == 1]),
    ):
        tokens = [x["count"] * x["length"] for x in own]
        for axis, key in zip(axes, ("seconds", "memory"), strict=True):
            axis.plot(tokens, [x[key] for x in own], "o-", label=label)
    for axis, label in zip(axes, ("seconds a step", "GiB beyond weights and gradients"), strict=True):
        axis.set(xlabel="tokens in the step", ylabel=label, xlim=(0, None), ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(folder / "growth.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the checkpoint")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--one", nargs=2, type=int, metavar=("SEQUENCES", "TOKENS"), help="one point, as JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.model, *args.one)))
        return
    found = []
    for count, length in SHAPES:
        argv = [sys.executable, __file__, "--model", args.model, "--one", str(count), str(length)]
        done = subprocess.run(argv, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        found.append({"count": count, "length": length, **json.loads(done.stdout.strip().splitlines()[-1])})
        print(found[-1], flush=True)
    report(found, args.output)


if __name__ == "__main__":
    main()
