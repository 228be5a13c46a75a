"""``make demo``: supervised fine-tuning, DPO, PPO and distillation, and what each changed, by the ordinary commands.

python demo/run.py            a new small model, trained from nothing on the bundled corpus
python demo/run.py MODEL      a model of yours (folder or hub name) on the same corpus
"""

import json
import shlex
import shutil
import sys
import time
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

from rlhf.cli.main import main
from rlhf.evaluation import show_completions, show_metrics
from rlhf.runs.files import REPORT_FILE

OUT = Path("runs/demo")
PAIRS = "demo/data/pairs_eval.jsonl"
GENTLE = "--max_steps 30 --per_device_train_batch_size 8 --logging_steps 5"  # for weights that know something already


def rlhf(command: str) -> None:
    words = shlex.split(command)
    print(f"\n$ rlhf {shlex.join(words)}", flush=True)
    if status := main(words):
        sys.exit(status)


def new_model(folder: Path) -> str:
    set_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("demo/model")).save_pretrained(folder)
    AutoTokenizer.from_pretrained("demo/model").save_pretrained(folder)
    return str(folder)


def evaluate(stage: str, model: str, reference: str | None, options: str = "") -> dict:
    report = OUT / f"eval_{stage}.json"
    against = f"--ref_model_name_or_path {reference}" if reference else ""
    rlhf(
        f"eval --model_name_or_path {model} {against} --dataset_name {PAIRS} --max_length 128 "
        f"--num_completions 4 --max_new_tokens 24 --output_file {report} {options}"
    )
    return json.loads(report.read_text(encoding="utf-8"))


def demo(model: str | None) -> None:
    start = time.monotonic()
    shutil.rmtree(OUT, ignore_errors=True)
    gentle = "" if model is None else f"--dtype float32 {GENTLE}"
    if model is None:
        model = new_model(OUT / "base")
    template = "" if AutoTokenizer.from_pretrained(model).chat_template else "--chat_template_path demo/model"
    sft, dpo = OUT / "sft", OUT / "dpo"
    rates = ("--learning_rate 2e-5", "--learning_rate 5e-6") if gentle else ("", "")
    rlhf(f"sft --config demo/sft.yaml --model_name_or_path {model} {template} {gentle} {rates[0]}")
    rlhf(f"dpo --config demo/dpo.yaml {gentle} {rates[1]}")
    reports = {
        "before": evaluate("before", model, None, template),
        "after SFT": evaluate("sft", str(sft), str(sft)),
        "after DPO": evaluate("dpo", str(dpo), str(sft)),
    }
    print(f"\nHeld-out rows ({PAIRS}): chosen answers' perplexity, and preferences against the model after SFT")
    show_metrics({name: _figures(report["metrics"]) for name, report in reports.items()})
    prompts = [entry["prompt"] for entry in reports["before"]["completions"]]
    answers = {name: [entry["completion"] for entry in report["completions"]] for name, report in reports.items()}
    show_completions(prompts, answers)
    if not gentle:
        learn_to_answer_in_sentences()
        distill_into_half()
    runs = [folder for name in ("sft", "dpo", "ppo", "distilled") if (folder := OUT / name).is_dir()]
    print(f"\n{time.monotonic() - start:.0f} s in all. Each run left a page of curves, samples and checks:")
    for folder in runs:
        print(f"  {folder / REPORT_FILE}")
    print("Talk to the model, or to the models before and after DPO side by side:")
    print(f"  rlhf chat {dpo}")
    print(f"  rlhf chat {sft} {dpo}")


def learn_to_answer_in_sentences() -> None:
    """PPO from the model after SFT, which knows short answers and whole sentences; the reward wants sentences."""
    rlhf("ppo --config demo/ppo.yaml")
    log = json.loads((OUT / "ppo/trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    before = next(entry["eval_reward"] for entry in log if "eval_reward" in entry)
    after = json.loads((OUT / "ppo/all_results.json").read_text(encoding="utf-8"))["eval_reward"]
    kl = [entry["kl"] for entry in log if "kl" in entry][-1]
    print(f"\nHeld-out prompts answered in a whole sentence: {before:.0%} before PPO, {after:.0%} after (KL {kl:.1f})")


def distill_into_half() -> None:
    """A student of two of the four layers learns what the model after SFT says."""
    rlhf(f"student --from {OUT / 'sft'} --layers 2 --output_dir {OUT / 'student'}")
    rlhf("distill --config demo/distill.yaml")
    log = json.loads((OUT / "distilled/trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    before = next(entry for entry in log if "eval_kl" in entry)
    after = json.loads((OUT / "distilled/all_results.json").read_text(encoding="utf-8"))
    told = {"KL to the teacher": "eval_kl", "same likeliest token": "eval_agreement", "perplexity": "eval_perplexity"}
    print("\nHeld-out rows, two layers of four, before and after distillation; the teacher")
    rows = {
        name: {label: entry[key] for label, key in told.items()}
        for name, entry in (("before", before), ("after", after))
    }
    show_metrics(rows | {"teacher": {"perplexity": after["eval_teacher_perplexity"]}})


def _figures(metrics: dict) -> dict:
    perplexity = metrics.get("perplexity", metrics.get("perplexity/chosen"))
    preferences = {key: metrics[key] for key in ("rewards/accuracies", "rewards/margins") if key in metrics}
    return {"perplexity": perplexity, **preferences}


if __name__ == "__main__":
    demo(sys.argv[1] if len(sys.argv) > 1 else None)
