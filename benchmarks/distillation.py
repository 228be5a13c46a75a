"""Distillation: the divergence alone, and whole offline steps, beside TRL's.

    python benchmarks/distillation.py [--model SmolLM2-135M-Instruct [--data folder-of-rows]]

The divergence is from hidden states and two heads to the student's gradients: ours, TRL's chunked one, and all logits.
With a model, steps of a student of half its layers: ours with the teacher in memory, ours with what was kept of it, our
supervised fine-tuning, and TRL's GKDTrainer at lmbda 0; each in a process of its own, on the same rows. Where two sides
mean the same, losses (and gradients) must agree. Writes distillation.json to --output, and prints tables.
"""

import argparse
import itertools
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import Tensor
from training import CASES, rows_of

HIDDEN, VOCABULARY = 576, 49_152  # of SmolLM2-135M, student and teacher
TOKENS = (64, 256, 1024)
BETAS = {"KL": 0.0, "reverse KL": 1.0, "JSD": 0.5}
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


def ours(hidden: Tensor, weight: Tensor, taught: Tensor, their_weight: Tensor, beta: float) -> Tensor:
    from rlhf.logprobs import Divergence, Head, Predictions, compare

    token = torch.zeros(len(hidden), dtype=torch.int64)
    of = Divergence("generalized_jsd", options={"beta": beta})
    loss = compare(Predictions(hidden, Head(weight)), Predictions(taught, Head(their_weight)), token, of).loss
    assert loss is not None
    return loss / len(hidden)


def trl(hidden: Tensor, weight: Tensor, taught: Tensor, their_weight: Tensor, beta: float) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return ChunkedDivergenceFunction.apply(hidden, weight, None, taught, their_weight, None, beta)[0].mean()


def naive(hidden: Tensor, weight: Tensor, taught: Tensor, their_weight: Tensor, beta: float) -> Tensor:
    q, p = (hidden @ weight.T).log_softmax(-1), (taught @ their_weight.T).log_softmax(-1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a.exp() * (a - b)).sum(-1).mean()

    if beta in (0, 1):
        return kl(q, p) if beta else kl(p, q)
    m = torch.logaddexp(p + torch.tensor(beta).log(), q + torch.tensor(1 - beta).log())
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


SIDES: dict[str, Loss] = {"ours": ours, "TRL": trl, "naive": naive}


def divergences(rounds: int) -> list[dict[str, Any]]:
    """Seconds of value and gradients; medians of rounds in turns."""
    found = []
    for (name, beta), tokens in itertools.product(BETAS.items(), TOKENS):
        g = torch.Generator().manual_seed(0)
        hidden, taught = (torch.randn(tokens, HIDDEN, generator=g) for _ in range(2))
        weight, theirs = (torch.randn(VOCABULARY, HIDDEN, generator=g) / HIDDEN**0.5 for _ in range(2))
        hidden.requires_grad_(), weight.requires_grad_()

        def step(loss: Loss, inputs: tuple[Any, ...] = (hidden, weight, taught, theirs, beta)) -> float:
            inputs[0].grad = inputs[1].grad = None
            start = time.perf_counter()
            loss(*inputs).backward()
            return time.perf_counter() - start

        gradients = {}
        for side, loss in SIDES.items():
            step(loss)
            gradients[side] = [x.grad.clone() for x in (hidden, weight) if x.grad is not None]
        for side in SIDES:
            for got, want in zip(gradients[side], gradients["naive"], strict=True):
                torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)
        times = [{side: step(loss) for side, loss in SIDES.items()} for _ in range(rounds)]
        medians = {side: statistics.median(t[side] for t in times) for side in SIDES}
        found.append({"divergence": name, "tokens": tokens, "seconds": medians})
        print(name, tokens, {side: f"{value * 1e3:.0f} ms" for side, value in medians.items()}, flush=True)
    return found


STEPS = ("ours, live", "TRL, live", "ours, cached", "ours, SFT")


def student_and_rows(args: argparse.Namespace) -> tuple[Any, Any, list[dict[str, Any]]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlhf.distillation.student import copy_layers, spread_layers

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    teacher = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
    depth = teacher.config.num_hidden_layers
    student = copy_layers(teacher, spread_layers(depth, depth // 2))
    rows = rows_of(CASES["sft"], tokenizer, args.data, args.steps * CASES["sft"].rows)
    return tokenizer, student, rows


def trainer_of(side: str, args: argparse.Namespace, folder: str) -> Any:
    from datasets import Dataset

    tokenizer, student, rows = student_and_rows(args)
    settings: dict[str, Any] = dict(
        output_dir=folder, max_steps=args.steps, per_device_train_batch_size=CASES["sft"].rows, logging_steps=1,
        report_to="none", save_strategy="no", learning_rate=1e-5, lr_scheduler_type="constant", disable_tqdm=True,
        max_length=1024, train_sampling_strategy="sequential", bf16=False,
    )  # fmt: skip
    if side == "TRL, live":
        from transformers import AutoModelForCausalLM
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        def collate(batch: list[dict[str, str]]) -> dict[str, Tensor]:
            """As its own collator pads, for rows of text."""
            parts = [[tokenizer(row[name])["input_ids"] for name in ("prompt", "completion")] for row in batch]
            width = max(len(prompt) + len(answer) for prompt, answer in parts)
            ids, labels, mask = torch.zeros(3, len(parts), width, dtype=torch.int64)
            labels -= 100
            for row, (prompt, answer) in enumerate(parts):
                end = len(prompt) + len(answer)
                ids[row, :end], mask[row, :end] = torch.tensor(prompt + answer), 1
                labels[row, len(prompt) : end] = torch.tensor(answer)
            return {"input_ids": ids, "attention_mask": mask, "labels": labels}

        teacher = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
        config = GKDConfig(**settings, lmbda=0.0, beta=0.5, gradient_checkpointing=False)
        data = Dataset.from_list(rows)
        return GKDTrainer(
            student, teacher, config, data_collator=collate, train_dataset=data, processing_class=tokenizer
        )
    from rlhf import DistillConfig, DistillTrainer, SFTConfig, SFTTrainer

    data = Dataset.from_list(rows)
    if side == "ours, SFT":
        return SFTTrainer(student, SFTConfig(**settings), train_dataset=data, processing_class=tokenizer)
    teacher = args.model if side == "ours, live" else None
    if side == "ours, cached":
        settings["teacher_file"] = args.kept
    else:
        settings["teacher_model_init_kwargs"] = {"dtype": "float32"}
    return DistillTrainer(
        student, teacher, DistillConfig(**settings, beta=0.5), train_dataset=data, processing_class=tokenizer
    )


def run(side: str, args: argparse.Namespace) -> dict[str, Any]:
    """One side, in this process."""
    if side != "TRL, live":
        os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # as our commands do: large pages, before torch's first tensor
    from transformers import TrainerCallback
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    logging.getLogger("rlhf").setLevel(logging.ERROR)
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(side, args, folder)
        trainer.add_callback(Clock())
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seconds = [b - a for a, b in itertools.pairwise(times)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"losses": losses, "seconds": seconds, "peak": peak}


def keep(args: argparse.Namespace, folder: Path) -> None:
    """What `rlhf teacher` stores for the rows."""
    rows = student_and_rows(args)[2]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["teacher", "--model_name_or_path", args.model, "--dtype", "float32", "--dataset_name", str(file)]
    from rlhf.cli.main import main as rlhf

    assert rlhf([*argv, "--output_dir", str(folder / "kept"), "--k", "32", "--max_length", "1024"]) == 0


def steps(args: argparse.Namespace) -> dict[str, Any]:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        keep(args, Path(folder))
        for side in STEPS:
            argv = [sys.executable, __file__, "--model", args.model, "--steps", str(args.steps), "--one", side]
            argv += ["--kept", str(Path(folder) / "kept"), *(["--data", args.data] if args.data else [])]
            # What we ask of torch's memory stays with our sides.
            own = {"THP_MEM_ALLOC_ENABLE": "0"} if side == "TRL, live" else {}
            done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | own)
            if done.returncode:
                raise SystemExit(f"{side}:\n{done.stderr[-3000:]}")
            found[side] = json.loads(done.stdout.strip().splitlines()[-1])
            print(side, found[side], flush=True)
    for ours, theirs in zip(found["ours, live"]["losses"], found["TRL, live"]["losses"], strict=True):
        assert abs(ours - theirs) < 2e-4 * abs(theirs), f"losses differ: {found}"
    return {side: {**result, "seconds": statistics.median(result["seconds"][1:])} for side, result in found.items()}


def report(results: dict[str, Any]) -> None:
    print("\n| divergence | tokens | ours, ms | TRL, ms | all logits, ms | TRL / ours |\n|---|---|---|---|---|---|")
    for entry in results["divergences"]:
        t = {side: value * 1e3 for side, value in entry["seconds"].items()}
        row = f"{t['ours']:.0f} | {t['TRL']:.0f} | {t['naive']:.0f} | **{t['TRL'] / t['ours']:.2f}×**"
        print(f"| {entry['divergence']} | {entry['tokens']} | {row} |")
    if "steps" not in results:
        return
    print("\n| step | seconds | GiB | time / TRL's | memory / TRL's |\n|---|---|---|---|---|")
    theirs = results["steps"]["TRL, live"]
    for side, own in results["steps"].items():
        ratios = f"{own['seconds'] / theirs['seconds']:.2f} | {own['peak'] / theirs['peak']:.2f}"
        print(f"| {side} | {own['seconds']:.2f} | {own['peak']:.2f} | {ratios} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of the teacher")
    parser.add_argument("--data", help="folder of rows")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="the first is a warm-up")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--one", choices=STEPS, help="one side, as JSON")
    parser.add_argument("--kept", help="what was kept of the teacher")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run(args.one, args)))
        return
    results: dict[str, Any] = {"divergences": divergences(args.rounds)}
    if args.model:
        results["steps"] = steps(args)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "distillation.json").write_text(json.dumps(results, indent=1) + "\n")
    report(results)


if __name__ == "__main__":
    main()
