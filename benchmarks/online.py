"""A step of GRPO: this package and TRL, on the same prompts, group size, number of tokens and beta.

    python benchmarks/online.py --model SmolLM2-135M-Instruct --data folder-of-rows [--steps 4]

Each side runs in a process of its own. Every completion has exactly --tokens tokens on both sides (no end before),
drawn at temperature 1; the reward is a hash of the sampled ids, so that every group has some variance. Seconds are
medians after a first step: of the whole step, of generation, and of all the rest. Writes a table to --output.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch


class Case(NamedTuple):
    """``prompts`` of ``length`` tokens and ``group`` completions of each make a step, in micro-batches of ``micro``."""

    prompts: int
    group: int
    length: tuple[int, int]
    micro: int
    beta: float
    lora: bool = False


CASES = {
    "grpo": Case(4, 8, (60, 220), 16, 0.04),
    "grpo, no reference": Case(4, 8, (60, 220), 16, 0.0),
    "grpo, long prompts": Case(2, 8, (300, 600), 8, 0.04),
    "grpo lora": Case(4, 8, (60, 220), 16, 0.04, lora=True),
}
SIDES = ("ours", "trl")


def prompts_of(case: Case, tokenizer: Any, data: str, count: int) -> list[dict[str, str]]:
    from rlhf.data import load_data

    found: dict[str, None] = {}
    for row in load_data(str(Path(data) / "preferences_train.jsonl.gz")):
        text = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        if case.length[0] <= len(tokenizer(text)["input_ids"]) <= case.length[1]:
            found.setdefault(text)
        if len(found) == count:
            return [{"prompt": text} for text in found]
    raise SystemExit(f"only {len(found)} of {count} prompts have fitting lengths")


def hashed(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(sum(ids) % 97) / 97 for ids in completion_ids]


def run(side: str, case: Case, model: str, data: str, steps: int, tokens: int) -> dict[str, Any]:
    """One side of one case, in this process."""
    if side == "ours":
        os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # as our commands do: large pages, before torch's first tensor
    import logging
    import tempfile

    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, TrainerCallback
    from transformers.utils import logging as transformers_logging

    from rlhf.rollouts import LocalEngine

    transformers_logging.set_verbosity_error()
    logging.getLogger("rlhf").setLevel(logging.ERROR)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = prompts_of(case, tokenizer, data, steps * case.prompts)
    settings: dict[str, Any] = dict(
        max_steps=steps, per_device_train_batch_size=case.micro, num_generations=case.group, beta=case.beta,
        gradient_accumulation_steps=case.prompts * case.group // case.micro, max_completion_length=tokens,
        loss_type="grpo", learning_rate=1e-6, lr_scheduler_type="constant", logging_steps=1, report_to="none",
        save_strategy="no", disable_tqdm=True, bf16=torch.cuda.is_available(), shuffle_dataset=False,
    )  # fmt: skip
    if side == "trl":
        from trl import GRPOConfig, GRPOTrainer

        settings |= dict(gradient_checkpointing=False, generation_kwargs={"min_new_tokens": tokens})
        settings |= dict(temperature=1.0, top_p=1.0, top_k=0)
    else:
        from rlhf import GRPOConfig, GRPOTrainer  # type: ignore[assignment]

        settings |= dict(min_completion_length=tokens, max_length=1024, log_completions=False)
    times: list[float] = []
    sampling: list[float] = []

    def timed(function: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            _wait()
            start = time.perf_counter()
            result = function(*args, **kwargs)
            _wait()
            sampling.append(time.perf_counter() - start)
            return result

        return wrapper

    owner: Any = LocalEngine if side == "ours" else GenerationMixin
    owner.generate = timed(owner.generate)

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            _wait()
            times.append(time.perf_counter())

    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
    with tempfile.TemporaryDirectory() as out:
        trainer: Any = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
            reward_funcs=hashed,
            args=GRPOConfig(output_dir=out, **settings),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=lora if case.lora else None,
            callbacks=[Clock()],
        )
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    gpu = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "steps": [b - a for a, b in itertools.pairwise(times)],
        "sampling": sampling,
        "lengths": [entry["completions/mean_length"] for entry in log],
        "peak": peak / 2**30,
    }


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compare(name: str, args: argparse.Namespace) -> dict[str, Any]:
    found = {}
    for side in args.sides:
        argv = [sys.executable, __file__, "--model", args.model, "--data", args.data, "--steps", str(args.steps)]
        argv += ["--tokens", str(args.tokens), "--one", side, name]
        done = subprocess.run(argv, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name}, {side}:\n{done.stderr[-3000:]}")
        one = json.loads(done.stdout.strip().splitlines()[-1])
        assert set(one["lengths"]) == {float(args.tokens)}, one["lengths"]
        assert len(one["sampling"]) == len(one["steps"]) == args.steps
        rest = [step - sampled for step, sampled in zip(one["steps"], one["sampling"], strict=True)]
        found[side] = {
            "step": statistics.median(one["steps"][1:]),
            "generation": statistics.median(one["sampling"][1:]),
            "rest": statistics.median(rest[1:]),
            "peak": one["peak"],
        }
        print(name, side, found[side], flush=True)
    return found


def report(results: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "online.json").write_text(json.dumps(results, indent=1) + "\n")
    lines = ["| case | part | ours | TRL | TRL / ours |", "|---|---|---|---|---|"]
    for name, sides in results.items():
        for part, unit in (("step", "s"), ("generation", "s"), ("rest", "s"), ("peak", "GiB")):
            a, b = sides["ours"][part], sides["trl"][part]
            ratio = f"**{b / a:.2f}×**" if unit == "s" else f"**{a / b:.2f}×** (ours / TRL)"
            lines.append(f"| {name} | {part} | {a:.2f} {unit} | {b:.2f} {unit} | {ratio} |")
    (folder / "online.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the checkpoint")
    parser.add_argument("--data", required=True, help="folder of rows")
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--steps", type=int, default=4, help="the first is a warm-up")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "CASE"), help="one side of one case, as JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run(args.one[0], CASES[args.one[1]], args.model, args.data, args.steps, args.tokens)))
        return
    file = args.output / "online.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for name in args.case:
        results[name] = compare(name, args)
        report({name: results[name] for name in CASES if name in results}, args.output)


if __name__ == "__main__":
    main()
