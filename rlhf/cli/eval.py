"""``rlhf eval``: what a model makes of held-out rows, computed by the trainers' own evaluation."""

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.cli.arguments import LoadArguments, parse
from rlhf.cli.row_arguments import RowArguments
from rlhf.cli.training import _require, quiet_logging
from rlhf.data import load_data, tokenizer_difference
from rlhf.distillation import DistillConfig, DistillTrainer
from rlhf.evaluation import complete, model_size, model_speed, prompts_of, show_completions, show_metrics
from rlhf.models import Policy, load_model, load_tokenizer
from rlhf.trainers import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer


@dataclass
class EvalArguments(RowArguments):
    dataset_name: str | None = field(default=None, metadata={"help": "File, saved folder or hub name."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    dataset_split: str = field(default="train", metadata={"help": "Split; a slice such as train[:200] too."})
    ref_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Reference of the preference metrics; without it, perplexity only."}
    )
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Teacher to judge the model by: how far from it, how much smaller and faster."}
    )
    max_length: int = field(default=1024, metadata={"help": "Longest sequence in tokens."})
    drop_long_prompts: bool = field(default=False, metadata={"help": "Leave out rows with too long a prompt."})
    batch_size: int = field(default=8, metadata={"help": "Rows a forward pass, on each device; moves speeds alone."})
    beta: float = field(default=0.1, metadata={"help": "Scale of the rewards in the preference metrics."})
    num_completions: int = field(default=0, metadata={"help": "Also answer this many prompts, greedily."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer."})
    output_file: str | None = field(default=None, metadata={"help": "Write metrics and answers there as JSON."})


def run(argv: list[str]) -> None:
    args, model_args = parse("eval", (EvalArguments, LoadArguments), argv)
    quiet_logging()
    _require(model_name_or_path=model_args.model_name_or_path, dataset_name=args.dataset_name)
    if args.teacher_model_name_or_path is not None and args.ref_model_name_or_path is not None:
        raise ValueError("--teacher_model_name_or_path and --ref_model_name_or_path exclude each other: pass one")
    rows = load_data(args.dataset_name, args.dataset_split, args.dataset_config)
    tokenizer = load_tokenizer(
        model_args.model_name_or_path, args.chat_template_path, model_args.model_revision, model_args.trust_remote_code
    )
    model = load_model(model_args.model_name_or_path, **model_args.load_kwargs(model_args.trust_remote_code))
    shared: dict[str, Any] = dict(
        max_length=args.max_length,
        drop_long_prompts=args.drop_long_prompts,
        columns=args.columns,
        roles=args.roles,
        chat_template_kwargs=args.template_kwargs(),
        per_device_eval_batch_size=args.batch_size,
        report_to="none",
    )
    teacher = None
    others = model_args.other_kwargs(model_args.trust_remote_code)
    with tempfile.TemporaryDirectory() as scratch:
        if args.teacher_model_name_or_path is not None:
            theirs = load_tokenizer(args.teacher_model_name_or_path)
            if (difference := tokenizer_difference(tokenizer, theirs)) is not None:
                raise ValueError(
                    f"the teacher has another tokenizer ({difference}), and perplexities of two tokenizers do not "
                    "compare: leave --teacher_model_name_or_path out"
                )
            teacher = load_model(args.teacher_model_name_or_path, **others)
            trainer: Any = DistillTrainer(
                model, teacher, DistillConfig(scratch, **shared), eval_dataset=rows, processing_class=tokenizer,
                teacher_processing_class=theirs,
            )  # fmt: skip
        elif args.ref_model_name_or_path is not None and "chosen" in rows.column_names:
            reference = load_model(args.ref_model_name_or_path, **others)
            trainer = DPOTrainer(
                model, reference, DPOConfig(scratch, beta=args.beta, **shared),
                eval_dataset=rows, processing_class=tokenizer,
            )  # fmt: skip
        else:
            trainer = SFTTrainer(
                model, SFTConfig(scratch, disable_dropout=True, **shared), eval_dataset=rows, processing_class=tokenizer
            )
        metrics = trainer.evaluate()
    kept = {
        k.removeprefix("eval_"): v
        for k, v in metrics.items()
        if k != "epoch" and "_second" not in k and "runtime" not in k
    }
    name = str(model_args.model_name_or_path)
    columns = {name: kept} if teacher is None else _beside(trainer, teacher, kept, args)
    form = trainer.args.reading().for_tokenizer(tokenizer).form
    prompts = prompts_of(rows, args.num_completions, form)
    answers = complete(model, tokenizer, prompts, args.max_new_tokens)
    if not trainer.is_world_process_zero():
        return
    show_metrics(columns)
    asked = [prompt.prompt for prompt in prompts]
    show_completions(asked, {name: answers})
    if args.output_file is not None:
        report = {"model": name, "reference": args.ref_model_name_or_path, "teacher": args.teacher_model_name_or_path}
        report |= {"data": args.dataset_name, "metrics": next(iter(columns.values()))}
        if teacher is not None:
            report["teacher_metrics"] = columns["teacher"]
        report["completions"] = [{"prompt": p, "completion": a} for p, a in zip(asked, answers, strict=True)]
        path = Path(args.output_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _beside(trainer: Any, teacher: Any, metrics: dict[str, float], args: Any) -> dict[str, dict[str, float]]:
    """Student and teacher: what the evaluation found, what each costs, and how fast both are on its first rows."""
    first = [trainer.eval_dataset[i] for i in range(min(args.batch_size, len(trainer.eval_dataset)))]
    # An answer begins at the first scored token; a plain text is scored from its beginning.
    starts = [next(i for i, label in enumerate(row["labels"]) if label != -100) for row in first]
    prompts = [row["input_ids"][: max(1, start)] for row, start in zip(first, starts, strict=True)]
    models = {"student": trainer.model, "teacher": Policy(teacher)}
    batch = trainer.data_collator(first).to(trainer.args.device)
    speed = model_speed(models, trainer.processing_class, batch, prompts, args.max_new_tokens)
    said = {
        "student": {name: metrics[name] for name in ("kl", "agreement", "perplexity")},
        "teacher": {"perplexity": metrics["teacher_perplexity"]},
    }
    return {name: said[name] | model_size(model) | speed[name] for name, model in models.items()}
