"""The head alone: cross-entropy from hidden states, value and gradients of both, four ways side by side.

    python benchmarks/head.py     # or: make bench

Others at their best chunk size of several, found at each shape. Losses and gradients must agree. Memory is the growth
of a fresh process while it does one step. Writes a table and a plot to --output.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf.logprobs import Targets, TokenLoss, score
from rlhf.logprobs.head import Head

SHAPES = {"SmolLM2-135M": (576, 49_152), "Qwen2.5-0.5B": (896, 151_936)}
TOKENS = (64, 128, 256, 512, 1024, 2048)
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    count = len(labels)
    targets = Targets(torch.arange(count), labels, torch.zeros(count, dtype=torch.int64), 1)
    loss = score(hidden, Head(weight), targets, objective=TokenLoss(lambda scores: -scores.logps)).loss
    assert loss is not None
    return loss / count


def coupled(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Ours for a loss that needs all log-probs at once, such as DPO's."""
    count = len(labels)
    targets = Targets(torch.arange(count), labels, torch.zeros(count, dtype=torch.int64), 1)
    return -score(hidden, Head(weight), targets).logps.mean()


def naive(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, labels)


def trl(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return -ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, chunk, None, 1.0, ())[0].mean()


def torchs(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None) -> Tensor:
    method = "auto" if chunk is None else None
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk, chunking_method=method)
    return F.linear_cross_entropy(hidden, weight, labels, options=options)


SIDES: dict[str, list[Loss]] = {
    "ours": [ours],
    "ours, coupled": [coupled],
    "TRL": [partial(trl, chunk=chunk) for chunk in (4096, 8192, 32_768, 2**20)],
    "torch": [partial(torchs, chunk=chunk) for chunk in (None, 128, 256, 512, 1024)],
    "naive": [naive],
}


def problem(hidden_size: int, vocabulary: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, generator=g).requires_grad_()
    weight = (torch.randn(vocabulary, hidden_size, generator=g) / hidden_size**0.5).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (tokens,), generator=g)


def step(loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor) -> float:
    hidden.grad = weight.grad = None
    start = time.perf_counter()
    loss(hidden, weight, labels).backward()
    return time.perf_counter() - start


def sweep(name: str, rounds: int) -> list[dict[str, Any]]:
    found = []
    for tokens in TOKENS:
        inputs = problem(*SHAPES[name], tokens)
        best: dict[str, Loss] = {}
        gradients = {}
        for side, losses in SIDES.items():
            losses = [loss for loss in losses if getattr(loss, "keywords", {}).get("chunk") not in _pointless(tokens)]
            timed = {loss: min(step(loss, *inputs) for _ in range(2)) for loss in losses}
            best[side] = min(timed, key=lambda loss: timed[loss])
            step(best[side], *inputs)
            gradients[side] = [x.grad.clone() for x in inputs[:2] if x.grad is not None]
        for side in SIDES:
            for got, want in zip(gradients[side], gradients["naive"], strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
        times = [{side: step(loss, *inputs) for side, loss in best.items()} for _ in range(rounds)]
        medians = {side: statistics.median(t[side] for t in times) for side in SIDES}
        chunks = {side: getattr(loss, "keywords", {}).get("chunk") for side, loss in best.items()}
        found.append({"tokens": tokens, "seconds": medians, "chunks": chunks})
        print(name, tokens, {k: f"{v:.3f}" for k, v in medians.items()}, chunks, flush=True)
    return found


def _pointless(tokens: int) -> set[int]:
    return {chunk for chunk in (128, 256, 512, 1024) if chunk >= tokens > 64 and chunk > 128}


def memory(name: str, side: str, tokens: int, chunk: int | None) -> float:
    """GiB that the process grows by in a step, beside inputs and gradients."""
    argv = [sys.executable, __file__, "--one", name, side, str(tokens), str(chunk)]
    return float(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)


def one(name: str, side: str, tokens: int, chunk: str) -> float:
    hidden, weight, labels = problem(*SHAPES[name], tokens)
    hidden.grad, weight.grad = torch.ones_like(hidden), torch.ones_like(weight)
    loss = next(x for x in SIDES[side] if str(getattr(x, "keywords", {}).get("chunk")) == chunk)
    small = problem(8, 64, 4)
    loss(*small).backward()  # imports, thread pools
    before = _peak()
    hidden.grad = weight.grad = None
    loss(hidden, weight, labels).backward()
    return (_peak() - before) / 2**20


def _peak() -> int:
    """KiB, of this program alone: what getrusage says begins with the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def report(results: dict[str, Any], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "head.json").write_text(json.dumps(results, indent=1) + "\n")
    lines = ["| head | tokens | " + " | ".join(f"{side}, ms" for side in SIDES) + " |", "|---" * (len(SIDES) + 2) + "|"]
    figure, axes = plt.subplots(1, len(results), figsize=(5.5 * len(results), 4), layout="constrained", squeeze=False)
    for axis, (name, entries) in zip(axes[0], results.items(), strict=True):
        for entry in entries:
            cells = []
            for side in SIDES:
                chunk = entry["chunks"][side]
                cells.append(f"{entry['seconds'][side] * 1e3:.0f}" + (f" ({chunk})" if chunk else ""))
            lines.append(f"| {name} | {entry['tokens']} | " + " | ".join(cells) + " |")
        last = entries[-1]
        if "memory" in last:
            cells = [f"{last['memory'][side]:.2f} GiB" for side in SIDES]
            lines.append(f"| {name} | {last['tokens']}, memory | " + " | ".join(cells) + " |")
        for side in SIDES:
            axis.plot([e["tokens"] for e in entries], [e["seconds"][side] * 1e3 for e in entries], "o-", label=side)
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms, value and gradients", title=name)
        axis.set_xticks(TOKENS, [str(n) for n in TOKENS])
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False)
    figure.savefig(folder / "head.png", dpi=130)
    (folder / "head.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", nargs=4, metavar=("HEAD", "SIDE", "TOKENS", "CHUNK"), help="memory of one side")
    args = parser.parse_args()
    torch.set_num_threads(2)
    if args.one:
        print(one(args.one[0], args.one[1], int(args.one[2]), args.one[3]))
        return
    results = {}
    for name in args.shapes:
        results[name] = sweep(name, args.rounds)
        last = results[name][-1]
        last["memory"] = {side: memory(name, side, last["tokens"], last["chunks"][side]) for side in SIDES}
    report(results, args.output)


if __name__ == "__main__":
    main()
