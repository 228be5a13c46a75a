"""``rlhf eval``: metrics of a model on held-out rows, computed by the trainers' own evaluation."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.cli.arguments import LoadArguments
from rlhf.cli.launch import LaunchArguments
from rlhf.cli.options import require
from rlhf.cli.output_files import check_output_file, write_output_file
from rlhf.cli.parsing import parse
from rlhf.cli.row_arguments import RowArguments
from rlhf.data import tokenizer_difference
from rlhf.data.batch import IGNORE
from rlhf.distillation import DistillConfig, DistillTrainer
from rlhf.evaluation import complete, model_size, model_speed, prompts_of, show_completions, show_metrics
from rlhf.models import load_model, load_tokenizer
from rlhf.rollouts.arguments import option
from rlhf.trainers import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer


@dataclass
class EvalArguments(RowArguments):
    """Rows to evaluate on, and a reference or a teacher to compare with."""

    ref_model_name_or_path: str | None = option(
        None, "Reference of the preference metrics; without it, perplexity only."
    )
    teacher_model_name_or_path: str | None = option(
        None, "Teacher to judge the model by: how far from it, how much smaller and faster."
    )
    max_length: int = option(1024, "Longest sequence in tokens.")
    drop_long_prompts: bool = option(False, "Leave out rows with too long a prompt.")
    batch_size: int = option(8, "Rows a forward pass, on each device; moves speeds alone.")
    beta: float = option(0.1, "Scale of the rewards in the preference metrics.")
    num_completions: int = option(0, "Also answer this many prompts, greedily.")
    max_new_tokens: int = option(128, "Longest answer.")
    output_file: str | None = option(None, "Write metrics and answers there as JSON.")
    overwrite: bool = option(False, "Replace output_file if it exists.")


def run(argv: list[str]) -> None:
    """Evaluate a model, alone or beside a reference or a teacher; print the metrics, and write them if asked to.

    Args:
        argv: words of the command line, after the command.

    Raises:
        ValueError, OSError: bad options or bad data.
    """
    _, args, model_args = parse("eval", (LaunchArguments, EvalArguments, LoadArguments), argv)
    require(model_name_or_path=model_args.model_name_or_path)
    check_output_file("output_file", args.output_file, args.overwrite)
    if args.teacher_model_name_or_path is not None and args.ref_model_name_or_path is not None:
        raise ValueError("--teacher_model_name_or_path and --ref_model_name_or_path exclude each other: pass one")
    name, trust_remote_code = str(model_args.model_name_or_path), model_args.trust_remote_code
    rows = args.load_rows()
    tokenizer = load_tokenizer(name, args.chat_template_path, model_args.model_revision, trust_remote_code)
    model = load_model(name, **model_args.load_kwargs(trust_remote_code))
    # A trainer wants a folder, and evaluation leaves nothing in it.
    with tempfile.TemporaryDirectory() as folder:
        trainer = _make_trainer(folder, model, rows, tokenizer, args, model_args)
        metrics = _without_times(trainer.evaluate())
    columns = {name: metrics}
    if args.teacher_model_name_or_path is not None:
        columns = _beside_teacher(trainer, metrics, args)
    row_format = trainer.args.reading().for_tokenizer(tokenizer).form
    prompts = prompts_of(rows, args.num_completions, row_format)
    # Greedy and one at a time, so that answers do not depend on the batch.
    answers = complete(model, tokenizer, prompts, args.max_new_tokens)
    # All processes compute; the first one shows.
    if not trainer.is_world_process_zero():
        return
    show_metrics(columns)
    texts = [prompt.prompt for prompt in prompts]
    show_completions(texts, {name: answers})
    if args.output_file is not None:
        completions = [{"prompt": text, "completion": answer} for text, answer in zip(texts, answers, strict=True)]
        _write_report(Path(args.output_file), name, args, columns, completions)


def _make_trainer(
    folder: str,
    model: PreTrainedModel,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    args: EvalArguments,
    model_args: LoadArguments,
) -> Any:
    """The trainer whose evaluation has the metrics that were asked for."""
    settings: dict[str, Any] = dict(
        max_length=args.max_length,
        drop_long_prompts=args.drop_long_prompts,
        columns=args.columns,
        roles=args.roles,
        chat_template_kwargs=args.template_kwargs(),
        per_device_eval_batch_size=args.batch_size,
        report_to="none",
    )
    inputs: dict[str, Any] = dict(eval_dataset=rows, processing_class=tokenizer)
    other_kwargs = model_args.other_kwargs(model_args.trust_remote_code)
    if args.teacher_model_name_or_path is not None:
        teacher_tokenizer = load_tokenizer(args.teacher_model_name_or_path)
        # Perplexities are means over tokens, and these differ between tokenizers.
        difference = tokenizer_difference(tokenizer, teacher_tokenizer)
        if difference is not None:
            raise ValueError(
                f"the teacher has another tokenizer ({difference}), and perplexities of two tokenizers do not "
                "compare: leave --teacher_model_name_or_path out"
            )
        teacher = load_model(args.teacher_model_name_or_path, **other_kwargs)
        inputs["teacher_processing_class"] = teacher_tokenizer
        return DistillTrainer(model, teacher, DistillConfig(folder, **settings), **inputs)
    # Without pairs there is nothing to prefer, and perplexity is all that can be said.
    if args.ref_model_name_or_path is not None and "chosen" in rows.column_names:
        reference = load_model(args.ref_model_name_or_path, **other_kwargs)
        return DPOTrainer(model, reference, DPOConfig(folder, beta=args.beta, **settings), **inputs)
    return SFTTrainer(model, SFTConfig(folder, disable_dropout=True, **settings), **inputs)


def _without_times(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics of an evaluation without the prefix, and without what depends on the machine."""
    return {
        name.removeprefix("eval_"): value
        for name, value in metrics.items()
        if name != "epoch" and "_second" not in name and "runtime" not in name
    }


def _beside_teacher(trainer: Any, metrics: dict[str, float], args: EvalArguments) -> dict[str, dict[str, float]]:
    """Student and teacher: metrics, what each costs, and how fast both are on the first rows."""
    rows = trainer.eval_dataset
    first_rows = [rows[index] for index in range(min(args.batch_size, len(rows)))]
    prompts = []
    for row in first_rows:
        # An answer begins at the first scored token; a plain text is scored from its beginning.
        answer_start = next(position for position, label in enumerate(row["labels"]) if label != IGNORE)
        prompts.append(row["input_ids"][: max(1, answer_start)])
    # Both as the trainer holds them: on the same device, with the same faster modules.
    models = {"student": trainer.model, "teacher": trainer.teacher.policy}
    batch = trainer.data_collator(first_rows).to(trainer.args.device)
    speed = model_speed(models, trainer.processing_class, batch, prompts, args.max_new_tokens)
    quality = {
        "student": {name: metrics[name] for name in ("kl", "agreement", "perplexity")},
        "teacher": {"perplexity": metrics["teacher_perplexity"]},
    }
    return {name: quality[name] | model_size(model) | speed[name] for name, model in models.items()}


def _write_report(
    path: Path, model: str, args: EvalArguments, columns: dict[str, dict[str, float]], completions: list[dict[str, Any]]
) -> None:
    report: dict[str, Any] = {
        "model": model,
        "reference": args.ref_model_name_or_path,
        "teacher": args.teacher_model_name_or_path,
        "data": args.dataset_name,
        # The first column is the model's, alone or beside its teacher.
        "metrics": next(iter(columns.values())),
    }
    if args.teacher_model_name_or_path is not None:
        report["teacher_metrics"] = columns["teacher"]
    report["completions"] = completions
    # Answers in any script stay readable in the file.
    write_output_file(path, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
