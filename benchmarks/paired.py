"""Did a change cost anything? The head and a step of SFT, DPO and GRPO, with two checkouts side by side.

    git worktree add ../before COMMIT
    python benchmarks/paired.py --before ../before --model SmolLM2-135M-Instruct [--rounds 5] [--case dpo ...]

Each measurement runs in a process of its own, and the checkouts take turns. Both train the same random words with the
same seed, through names that both have (`from rlhf import …`), so their losses and gradient norms must agree. Prints
the median time of a step and the peak memory of both, and their ratios. Writes a table to --output.
"""

import argparse
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CASES = ("head", "sft", "dpo", "grpo")
WORDS = ("river", "stone", "window", "garden", "music", "paper", "summer", "letter", "bridge", "market")
STEPS = 6
WARM_UP = 2  # steps that are not counted


def words(pick: random.Random, low: int, high: int) -> str:
    """Between ``low`` and ``high`` random words."""
    return " ".join(pick.choices(WORDS, k=pick.randint(low, high)))


def make_rows(case: str, count: int) -> list[dict[str, str]]:
    """Rows of random words in the columns that a case needs."""
    pick = random.Random(0)
    rows = []
    for _ in range(count):
        row = {"prompt": words(pick, 40, 120)}
        if case == "dpo":
            row |= {"chosen": " " + words(pick, 20, 80), "rejected": " " + words(pick, 20, 80)}
        elif case != "grpo":
            row["completion"] = " " + words(pick, 100, 250)
        rows.append(row)
    return rows


def load(case: str, folder: str) -> Any:
    """The model; for the head alone, its embeddings under a single layer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if case != "head":
        return AutoModelForCausalLM.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    return AutoModelForCausalLM.from_pretrained(folder, config=config)


def work(case: str, folder: str) -> dict[str, Any]:
    """Train a few steps in this process.

    Returns:
        The median seconds of a step, the peak memory in MiB, and the loss and gradient norm of each step.
    """
    import datasets
    import torch
    from transformers import AutoTokenizer, TrainerCallback

    import rlhf

    torch.set_num_threads(2)
    durations: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            durations.append(time.perf_counter() - self.began)

    batch = 2 if case == "grpo" else 4
    options: dict[str, Any] = {
        "per_device_train_batch_size": batch, "max_steps": STEPS, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "learning_rate": 1e-6, "seed": 0, "max_length": 512,
    }  # fmt: skip
    extra: dict[str, Any] = {}
    if case == "grpo":
        options |= {"num_generations": 4, "max_completion_length": 48, "per_device_train_batch_size": 8}
        extra["reward_funcs"] = lambda completions, **_: [float(len(set(text))) for text in completions]
    name = {"head": "SFT", "sft": "SFT", "dpo": "DPO", "grpo": "GRPO"}[case]
    if case == "head":
        options["optim"] = "sgd"
    with tempfile.TemporaryDirectory() as output:
        trainer = getattr(rlhf, f"{name}Trainer")(
            model=load(case, folder),
            args=getattr(rlhf, f"{name}Config")(output_dir=output, **options),
            train_dataset=datasets.Dataset.from_list(make_rows(case, batch * STEPS)),
            processing_class=AutoTokenizer.from_pretrained(folder),
            callbacks=[Clock()],
            **extra,
        )
        if case == "grpo":
            # A rollout happens while the batch is fetched, before the step begins: count from step to step.
            ends: list[float] = []
            Clock.on_step_end = lambda *_, **__: ends.append(time.perf_counter())  # type: ignore[method-assign]
        trainer.train()
    if case == "grpo":
        durations = [later - earlier for earlier, later in itertools.pairwise(ends)]
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    numbers = [entry[name] for entry in logged for name in ("loss", "grad_norm")]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": statistics.median(durations[WARM_UP:]), "memory": peak, "numbers": numbers}


def run(checkout: Path, case: str, model: str) -> dict[str, Any]:
    """One measurement of a checkout in a process of its own."""
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "THP_MEM_ALLOC_ENABLE": "1",  # large pages, as our commands set them
    }
    command = [sys.executable, str(Path(__file__).resolve()), "--model", model, "--work", case]
    done = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{checkout}: {case} failed\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(case: str, before: Path, after: Path, model: str, rounds: int) -> dict[str, Any]:
    """Measure both checkouts in turn; the ratio is the median of the ratios of each round."""
    pairs = []
    for index in range(rounds):
        order = (before, after) if index % 2 == 0 else (after, before)
        results = {checkout: run(checkout, case, model) for checkout in order}
        pairs.append((results[before], results[after]))
    old, new = pairs[0]
    row: dict[str, Any] = {"case": case}
    for figure in ("seconds", "memory"):
        ratios = [later[figure] / earlier[figure] for earlier, later in pairs]
        row[f"{figure} before"] = statistics.median(earlier[figure] for earlier, _ in pairs)
        row[f"{figure} after"] = statistics.median(later[figure] for _, later in pairs)
        row[f"{figure} ratio"] = statistics.median(ratios)
        row[f"{figure} ratios"] = [min(ratios), max(ratios)]
    numbers = zip(old["numbers"], new["numbers"], strict=True)
    row["largest difference"] = max(abs(a - b) / max(abs(a), 1e-3) for a, b in numbers)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout to compare this one with")
    parser.add_argument("--model", required=True, help="a folder or a name on the hub")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--work", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        print(json.dumps(work(args.work, args.model)))
        return
    if args.before is None:
        parser.error("--before is required: the folder of another checkout")
    after = Path(__file__).resolve().parents[1]
    lines = [
        "| case | s before | s after | ratio | MiB before | MiB after | ratio | losses and gradient norms differ by |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for case in args.case:
        row = compare(case, args.before.resolve(), after, args.model, args.rounds)
        low, high = row["seconds ratios"]
        lines.append(
            f"| {case} | {row['seconds before']:.3f} | {row['seconds after']:.3f} "
            f"| {row['seconds ratio']:.3f} ({low:.3f} to {high:.3f}) "
            f"| {row['memory before']:.0f} | {row['memory after']:.0f} | {row['memory ratio']:.3f} "
            f"| {row['largest difference']:.1e} |"
        )
        print(lines[-1], flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "paired.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
