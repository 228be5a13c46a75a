"""Predicted against measured memory and time of five runs, as a table.

Each run is predicted by ``--dry_run`` in one process, and done in another. The measured memory is the largest resident
set of that process, as the kernel reports it.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SMALL = ["--max_length", "256", "--drop_long_prompts", "--save_strategy", "no", "--disable_tqdm"]
ACCUMULATED = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
PAIRS = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
ROLLOUTS = [
    "--per_device_train_batch_size", "8", "--num_generations", "4", "--max_completion_length", "32",
    "--reward_funcs", "length_reward(target=20)",
]  # fmt: skip
# By name: the command, its kind of rows, how many of them, and its options.
RUNS = {
    "SFT, all weights": ("sft", "completions", 16, ACCUMULATED),
    "SFT, LoRA": ("sft", "completions", 16, [*ACCUMULATED, "--use_peft"]),
    "DPO, reference in memory": ("dpo", "pairs", 8, [*PAIRS, "--precompute_ref_log_probs", "false"]),
    "DPO, stored reference": ("dpo", "pairs", 8, [*PAIRS, "--precompute_ref_log_probs", "true"]),
    "GRPO": ("grpo", "prompts", 4, ROLLOUTS),
}


def write_rows(pairs: list[dict], kind: str, count: int, file: Path) -> None:
    """Write the first rows in the form that a command reads."""
    forms = {
        "pairs": lambda row: row,
        "completions": lambda row: {"prompt": row["prompt"], "completion": row["chosen"]},
        "prompts": lambda row: {"prompt": row["prompt"]},
    }
    lines = [json.dumps(forms[kind](row)) + "\n" for row in pairs[:count]]
    file.write_text("".join(lines), encoding="utf-8")


def run(words: list[str]) -> tuple[str, float]:
    """Run a command; return what it printed, and the GiB of its largest resident set."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([sys.executable, "-m", "rlhf", *words], stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        output.seek(0)
        text = output.read()
    if status:
        raise SystemExit(f"{' '.join(words)}\n{text}")
    return text, usage.ru_maxrss / 2**20


def seconds_of(text: str) -> float:
    """The total of the last section that a dry run prints."""
    number, unit = re.findall(r"^  in all +([\d.]+) (s|min|h)$", text, re.MULTILINE)[-1]
    return float(number) * {"s": 1, "min": 60, "h": 3600}[unit]


def compare(name: str, model: str, pairs: list[dict]) -> dict[str, float]:
    """Predict a run and do it."""
    command, kind, count, options = RUNS[name]
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        write_rows(pairs, kind, count, rows)
        output = Path(folder) / "run"
        words = [command, "--model", model, "--dataset_name", str(rows), "--output_dir", str(output)]
        words += [*SMALL, *options]
        dry_run, _ = run([*words, "--dry_run"])
        _, measured_gib = run(words)
        results = json.loads((output / "all_results.json").read_text(encoding="utf-8"))
    total = re.search(r"in all +([\d.]+) GiB of", dry_run)
    libraries = re.search(r"Python, libraries +([\d.]+) GiB", dry_run)
    assert total and libraries
    return {
        "predicted_gib": float(total[1]),
        "measured_gib": measured_gib,
        "libraries_gib": float(libraries[1]),
        "predicted_seconds": seconds_of(dry_run),
        "measured_seconds": results["train_runtime"],
    }


def main() -> None:
    """Print the table."""
    model, file = sys.argv[1:3]
    pairs = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
    print("| run | memory predicted | measured | error | time predicted | measured |")
    print("|---|---|---|---|---|---|")
    for name in sys.argv[3:] or RUNS:
        figures = compare(name, model, pairs)
        error = figures["predicted_gib"] / figures["measured_gib"] - 1
        memory = f"{figures['predicted_gib']:.2f} GiB | {figures['measured_gib']:.2f} GiB | {error:+.1%}"
        times = f"{figures['predicted_seconds']:.0f} s | {figures['measured_seconds']:.0f} s"
        print(f"| {name} | {memory} | {times} |", flush=True)


if __name__ == "__main__":
    main()
