"""A step of SFT and DPO: this package, TRL and a plain Hugging Face loop, on the same rows, precision and steps.

    python benchmarks/training.py --model SmolLM2-135M-Instruct --data folder-of-rows [--case dpo ...]

The folder holds preferences_train.jsonl.gz (conversations: prompt, chosen, rejected); without one, rows of random
words of the same lengths are used. Each side runs in a process of its own, one after the
other; losses must agree step by step. Writes a table and a plot to --output.

On a GPU all sides train in bf16 under autocast, unless --dtype float32. --mkl leaves oneDNN out of ours, for a
processor on which it gains nothing.
"""

import argparse
import itertools
import json
import logging
import os
import random
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
    """``prompt`` and ``answer`` are ranges of their lengths in tokens; ``rows`` make a step."""

    kind: str
    rows: int
    prompt: tuple[int, int]
    answer: tuple[int, int]
    lora: bool = False
    cached: bool = False  # the reference's log-probs, computed before
    packed: bool = False  # rows of 1,024 tokens, two a step, in each package's own order: so nothing is learned


CASES = {
    "sft": Case("sft", 4, (40, 160), (120, 320)),
    "sft short texts": Case("sft", 16, (20, 90), (20, 100)),
    "sft packed short texts": Case("sft", 16, (20, 90), (20, 100), packed=True),
    "dpo": Case("dpo", 4, (60, 220), (10, 100)),
    "dpo cached reference": Case("dpo", 4, (60, 220), (10, 100), cached=True),
    "dpo long prompts": Case("dpo", 4, (200, 600), (40, 160)),
    "sft lora": Case("sft", 4, (40, 160), (120, 320), lora=True),
    "dpo lora": Case("dpo", 4, (60, 220), (10, 100), lora=True),
}
SIDES = ("ours", "trl", "plain")


class Machine(NamedTuple):
    """Where all sides train, and how."""

    device: str  # "cuda" or "cpu"
    dtype: str  # "bfloat16", under autocast, or "float32"
    mkl: bool = False  # products of matrices by MKL alone

    @property
    def bf16(self) -> bool:
        return self.dtype == "bfloat16"


def rows_of(case: Case, tokenizer: Any, data: str | None, count: int) -> list[dict[str, Any]]:
    """The first rows whose prompt and answers have fitting lengths, rendered to text: the same tokens on every side."""
    found = []
    for row in _read(data) if data else _words(case):
        texts = [row["prompt"][0]["content"], *(row[k][-1]["content"] for k in ("chosen", "rejected") if k in row)]
        asked, *answered = (len(tokenizer(text)["input_ids"]) for text in texts)
        if case.kind == "sft":
            answered = answered[:1]
        if case.prompt[0] <= asked <= case.prompt[1] and all(case.answer[0] <= n <= case.answer[1] for n in answered):
            prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
            end = tokenizer.eos_token
            answers = {k: row[k][-1]["content"].strip() + end for k in ("chosen", "rejected")}
            found.append({"prompt": prompt, **answers})
        if len(found) == count:
            break
    if len(found) < count:
        raise SystemExit(f"only {len(found)} of {count} rows have fitting lengths")
    if case.kind == "dpo":
        return found
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in found]


def _read(data: str) -> Any:
    from rlhf.data import load_data

    return load_data(str(Path(data) / "preferences_train.jsonl.gz"))


def _words(case: Case) -> Any:
    pick = random.Random(0)
    words = "river stone window garden music paper summer letter bridge market forest winter engine story".split()  # noqa: SIM905

    def turn(role: str, span: tuple[int, int]) -> list[dict[str, str]]:
        return [{"role": role, "content": " ".join(pick.choices(words, k=pick.randint(*span)))}]

    while True:
        yield {
            "prompt": turn("user", case.prompt),
            "chosen": turn("assistant", case.answer),
            "rejected": turn("assistant", case.answer),
        }


def trainer_of(
    side: str, case: Case, machine: Machine, model: Any, tokenizer: Any, rows: Any, steps: int, out: str
) -> Any:
    from datasets import Dataset
    from peft import LoraConfig

    settings: dict[str, Any] = dict(
        output_dir=out, max_steps=steps, per_device_train_batch_size=case.rows, logging_steps=1, report_to="none",
        save_strategy="no", learning_rate=1e-6 if case.kind == "dpo" else 1e-5, lr_scheduler_type="constant",
        disable_tqdm=True, max_length=1024, bf16=machine.bf16, use_cpu=machine.device == "cpu",
        train_sampling_strategy="sequential",
    )  # fmt: skip
    if side == "trl":
        import trl as package

        settings |= dict(gradient_checkpointing=False)
    else:
        import rlhf as package  # type: ignore[no-redef]
    if case.cached:
        settings["precompute_ref_log_probs"] = True
    if case.packed:
        settings |= dict(packing=True, per_device_train_batch_size=2, learning_rate=0.0, max_steps=-1)
        settings |= dict(num_train_epochs=1)
    name = case.kind.upper()
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
    return getattr(package, f"{name}Trainer")(
        model=model,
        args=getattr(package, f"{name}Config")(**settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora if case.lora else None,
    )


def plain(
    case: Case, machine: Machine, model: Any, tokenizer: Any, rows: list[dict[str, Any]], steps: int
) -> dict[str, Any]:
    """What one writes without a package: padded rows, all logits."""
    import copy

    import torch.nn.functional as F

    def encode(row: dict[str, Any], answer: str) -> tuple[list[int], int]:
        prompt, completion = (tokenizer(row[name])["input_ids"] for name in ("prompt", answer))
        return prompt + completion, len(prompt)

    def padded(sequences: list[tuple[list[int], int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        width = max(len(ids) for ids, _ in sequences)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in sequences])
        lengths, prompts = (torch.tensor(x)[:, None] for x in zip(*((len(i), p) for i, p in sequences), strict=True))
        column = torch.arange(width)[None]
        labels = torch.where((column >= prompts) & (column < lengths), ids, -100)
        return ids.to(device), (column < lengths).long().to(device), labels.to(device)

    def sums(model: Any, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        nll = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
        return -nll.view(len(ids), -1).sum(1)

    device = machine.device
    model.to(device).train()
    if case.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"))
    reference = copy.deepcopy(model).eval() if case.kind == "dpo" and not case.lora else None
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-6 if case.kind == "dpo" else 1e-5, weight_decay=0.0, fused=True)
    losses, times = [], [time.perf_counter()]
    for step in range(steps):
        batch = rows[step * case.rows : (step + 1) * case.rows]
        with torch.autocast(device, torch.bfloat16, enabled=machine.bf16):
            if case.kind == "sft":
                ids, mask, labels = padded([encode(row, "completion") for row in batch])
                loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
            else:
                inputs = padded([encode(row, name) for name in ("chosen", "rejected") for row in batch])
                with torch.no_grad():
                    if reference is None:
                        with model.disable_adapter():
                            ref = sums(model, *inputs)
                    else:
                        ref = sums(reference, *inputs)
                chosen, rejected = (sums(model, *inputs) - ref).chunk(2)
                loss = -F.logsigmoid(0.1 * (chosen - rejected)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        times.append(time.perf_counter())
    return {"losses": losses, "seconds": [b - a for a, b in itertools.pairwise(times)]}


def use_mkl_alone() -> None:
    """Keep oneDNN out of our products, as on a processor on which it gains nothing."""
    from rlhf.kernels import linear, matmul

    matmul.onednn_is_faster = linear.onednn_is_faster = lambda: False  # type: ignore[attr-defined,assignment]


def run(side: str, case: Case, machine: Machine, model: str, data: str | None, steps: int) -> dict[str, Any]:
    """One side of one case, in this process."""
    if side == "ours":
        os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # as our commands do: large pages, before torch's first tensor
        if machine.mkl:
            use_mkl_alone()
    import tempfile

    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    logging.getLogger("rlhf").setLevel(logging.ERROR)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = rows_of(case, tokenizer, data, steps * case.rows)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    if side == "plain":
        result = plain(case, machine, loaded, tokenizer, rows, steps)
    else:
        times: list[float] = []

        class Clock(TrainerCallback):
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                times.append(time.perf_counter())

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                if machine.device == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter())

        with tempfile.TemporaryDirectory() as out:
            trainer = trainer_of(side, case, machine, loaded, tokenizer, rows, steps, out)
            trainer.add_callback(Clock())
            counts: list[float] = []
            compute_loss = trainer.compute_loss

            def counted(*args: Any, **kwargs: Any) -> Any:
                counts.append(float(kwargs["num_items_in_batch"]))
                return compute_loss(*args, **kwargs)

            if case.packed:
                trainer.compute_loss = counted
            trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        if case.packed:  # over all rows: each step holds other ones
            losses = [sum(a * b for a, b in zip(losses, counts, strict=True)) / sum(counts)]
        result = {"losses": losses, "seconds": [b - a for a, b in itertools.pairwise(times)]}
    on_gpu = machine.device == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {**result, "peak": peak / 2**30}


def compare(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """All sides of a case, and whether they computed the same."""
    found = {}
    sides = [side for side in args.sides if side != "plain" or not CASES[name].packed]
    for side in sides:
        argv = [sys.executable, __file__, "--model", args.model, "--steps", str(args.steps), "--one", side, name]
        argv += ["--device", args.device, "--dtype", args.dtype, *(["--mkl"] if args.mkl else [])]
        done = subprocess.run([*argv, *(["--data", args.data] if args.data else [])], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name}, {side}:\n{done.stderr[-3000:]}")
        found[side] = json.loads(done.stdout.strip().splitlines()[-1])
        print(name, side, found[side], flush=True)
    for side in sides[1:]:
        pairs = zip(found["ours"]["losses"], found[side]["losses"], strict=True)
        worst = max(abs(a - b) / max(abs(b), 1e-3) for a, b in pairs)
        assert worst < (2e-2 if args.dtype == "bfloat16" else 2e-4), f"{name}: losses differ from {side}: {found}"
    return {
        side: {"seconds": statistics.median(run["seconds"][1:]), "peak": run["peak"], "losses": run["losses"]}
        for side, run in found.items()
    }


def report(results: dict[str, Any], folder: Path) -> None:
    """table.md, results.json and steps.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training.json").write_text(json.dumps(results, indent=1) + "\n")
    lines = ["| case | ours, s | TRL, s | plain, s | TRL / ours | ours, GiB | TRL, GiB | ours / TRL |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for name, sides in results.items():
        t = {side: sides[side]["seconds"] if side in sides else float("nan") for side in SIDES}
        m = {side: sides[side]["peak"] if side in sides else float("nan") for side in SIDES}
        lines.append(
            f"| {name} | {t['ours']:.2f} | {t['trl']:.2f} | {t['plain']:.2f} | **{t['trl'] / t['ours']:.2f}×** "
            f"| {m['ours']:.2f} | {m['trl']:.2f} | **{m['ours'] / m['trl']:.2f}×** |"
        )
    table = "\n".join(lines).replace("nan", "–")
    (folder / "training.md").write_text(table + "\n")
    print(table)
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.6 * len(results) + 1.5), sharey=True, layout="constrained")
    for axis, key, label in zip(axes, ("seconds", "peak"), ("seconds a step", "peak memory, GiB"), strict=True):
        for offset, side in zip((-0.25, 0, 0.25), SIDES, strict=True):
            bars = [(i + offset, sides[side][key]) for i, sides in enumerate(results.values()) if side in sides]
            if bars:
                axis.barh(*zip(*bars, strict=True), height=0.24, label={"trl": "TRL 1.16"}.get(side, side))
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(results)), list(results))
    axes[0].invert_yaxis()
    axes[1].legend(frameon=False)
    figure.savefig(folder / "training.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the checkpoint")
    parser.add_argument("--data", help="folder of rows")
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--steps", type=int, default=5, help="the first is a warm-up")
    parser.add_argument("--output", type=Path, help="folder; default: docs/benchmarks, on a GPU runs/benchmarks")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--mkl", action="store_true", help="products of ours by MKL alone")
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "CASE"), help="one side of one case, as JSON")
    args = parser.parse_args()
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    args.output = args.output or Path("docs/benchmarks" if args.device == "cpu" else "runs/benchmarks")
    if args.one:
        machine = Machine(args.device, args.dtype, args.mkl)
        print(json.dumps(run(args.one[0], CASES[args.one[1]], machine, args.model, args.data, args.steps)))
        return
    file = args.output / "training.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for name in args.case:
        results[name] = compare(name, args)
        report({name: results[name] for name in CASES if name in results}, args.output)


if __name__ == "__main__":
    main()
