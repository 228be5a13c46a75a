"""``rlhf eval``: metrics of models on held-out rows, computed by the trainers' own evaluation."""

import gc
import json
import logging
import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.cli.arguments import LoadArguments, split_names
from rlhf.cli.launch import LaunchArguments
from rlhf.cli.options import require
from rlhf.cli.output_files import check_output_file, write_output_file
from rlhf.cli.parsing import parse
from rlhf.cli.row_arguments import RowArguments
from rlhf.data import tokenizer_difference
from rlhf.data.batch import IGNORE
from rlhf.data.columns import CHOSEN, present, renamed
from rlhf.data.messages import Turns
from rlhf.distillation import DistillConfig, DistillTrainer
from rlhf.evaluation import complete, model_size, model_speed, prompts_of, show_completions, show_metrics
from rlhf.evaluation.harness import check_tasks, task_metrics
from rlhf.models import load_model, load_tokenizer
from rlhf.rollouts.arguments import option
from rlhf.trainers import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

logger = logging.getLogger(__name__)

STDOUT = "-"


@dataclass
class EvalArguments(RowArguments):
    """Rows or tasks to evaluate on, and a reference or a teacher to compare with."""

    ref_model_name_or_path: str | None = option(
        None, "Reference of the preference metrics; on rows without pairs, a model beside the others."
    )
    teacher_model_name_or_path: str | None = option(
        None, "Teacher to judge the model by: how far from it, how much smaller and faster."
    )
    tasks: list[str] | None = option(
        None, "Benchmarks of lm-eval, such as ifeval,gsm8k, or YAML files of tasks; needs the extra eval."
    )
    max_length: int = option(1024, "Longest sequence in tokens.")
    drop_long_prompts: bool = option(False, "Drop rows whose prompt is longer than max_length.")
    batch_size: int = option(8, "Rows a forward pass, on each device; moves speeds alone.")
    beta: float = option(0.1, "Scale of the rewards in the preference metrics.")
    num_completions: int = option(0, "Also answer this many prompts, greedily.")
    max_new_tokens: int = option(128, "Longest answer.")
    output_file: str | None = option(None, "Write metrics and answers there as JSON; -: to the terminal, alone.")
    overwrite: bool = option(False, "Replace output_file if it exists.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tasks = split_names(self.tasks)


@dataclass
class EvaluatedArguments(LoadArguments):
    """One model or several."""

    model_name_or_path: list[str] | None = option(  # type: ignore[assignment]
        None, "A folder, or a name on the hub; several become columns."
    )


@dataclass
class Results:
    """What was measured, a column for each model.

    Attributes:
        columns: metrics by model.
        prompts: that the models answered.
        answers: by model.
        is_first_process: whether this process shows and writes.
    """

    columns: dict[str, dict[str, float]]
    prompts: list[Turns]
    answers: dict[str, list[str]]
    is_first_process: bool = True


def run(argv: list[str]) -> None:
    """Evaluate models, alone or beside a reference or a teacher; print the metrics, and write them if asked to.

    Args:
        argv: words of the command line, after the command.

    Raises:
        ValueError, OSError: bad options or bad data.
    """
    _, args, model_args = parse("eval", (LaunchArguments, EvalArguments, EvaluatedArguments), argv)
    require(model_name_or_path=model_args.model_name_or_path)
    names = _checked_names(args, model_args)
    check_output_file("output_file", None if args.output_file == STDOUT else args.output_file, args.overwrite)
    if args.tasks is not None:
        # Each process would run all tasks.
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("--tasks runs in one process: leave --num_processes out")
        check_tasks(args.tasks)
    # Tasks bring rows of their own.
    rows = None if args.tasks is not None and args.dataset_name is None else args.load_rows()
    if args.ref_model_name_or_path is not None and not _has_pairs(rows, args):
        names = list(dict.fromkeys([*names, args.ref_model_name_or_path]))
    results = Results({}, [], {})
    for name in names:
        _evaluate(name, rows, args, model_args, results)
        # The next model needs the memory.
        gc.collect()
    # All processes compute; the first one shows.
    if not results.is_first_process:
        return
    if len(names) > 1:
        _warn_of_other_tokens(names, model_args.trust_remote_code)
    report = _report(names, args, results)
    if args.output_file == STDOUT:
        sys.stdout.write(report)
        return
    show_metrics(results.columns)
    show_completions(results.prompts, results.answers)
    if args.output_file is not None:
        write_output_file(Path(args.output_file), report)


def _checked_names(args: EvalArguments, model_args: EvaluatedArguments) -> list[str]:
    """The models; options that do not fit together are refused."""
    names = model_args.model_name_or_path or []
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--model_name_or_path: {name} is named twice; leave one out")
    if args.teacher_model_name_or_path is not None and args.ref_model_name_or_path is not None:
        raise ValueError("--teacher_model_name_or_path and --ref_model_name_or_path exclude each other: pass one")
    if args.teacher_model_name_or_path is not None and len(names) > 1:
        raise ValueError(f"--teacher_model_name_or_path judges one model, got {len(names)}: name one")
    # A branch or tag means nothing in another repository.
    if model_args.model_revision != "main" and len(names) > 1:
        raise ValueError(f"--model_revision is of one model, got {len(names)}: name one")
    return names


def _has_pairs(rows: Dataset | None, args: EvalArguments) -> bool:
    return rows is not None and bool(present(renamed(rows.column_names, args.reading().form), CHOSEN))


def _evaluate(
    name: str, rows: Dataset | None, args: EvalArguments, model_args: EvaluatedArguments, results: Results
) -> None:
    """Add the columns of one model, and its answers, to the results."""
    trust_remote_code = model_args.trust_remote_code
    tokenizer = load_tokenizer(name, args.chat_template_path, model_args.model_revision, trust_remote_code)
    model = load_model(name, **model_args.load_kwargs(trust_remote_code))
    metrics: dict[str, float] = {}
    if rows is not None:
        # A trainer wants a folder, and evaluation leaves nothing in it.
        with tempfile.TemporaryDirectory() as folder:
            trainer = _make_trainer(folder, model, rows, tokenizer, args, model_args)
            metrics = _without_times(trainer.evaluate())
        results.is_first_process = trainer.is_world_process_zero()
        row_format = trainer.args.reading().for_tokenizer(tokenizer).form
        prompts = prompts_of(rows, args.num_completions, row_format)
        # Greedy and one at a time, so that answers do not depend on the batch.
        results.answers[name] = complete(model, tokenizer, prompts, args.max_new_tokens)
        results.prompts = [prompt.prompt for prompt in prompts]
    if args.teacher_model_name_or_path is not None:
        results.columns.update(_beside_teacher(trainer, metrics, args))
    else:
        results.columns[name] = metrics
    reference = args.ref_model_name_or_path
    if reference is not None and "rewards/chosen" in metrics and reference not in results.columns:
        results.columns[reference] = reference_metrics(metrics, args.beta)
    if args.tasks is not None:
        # Without a trainer, the model is still where it was loaded.
        own_column = results.columns.get(name, results.columns.get("student", {}))
        own_column.update(task_metrics(model, tokenizer, args.tasks, args.batch_size))


def reference_metrics(metrics: Mapping[str, float], beta: float) -> dict[str, float]:
    """The reference's own figures, from those of a model beside it: no further forward pass is needed.

    A reward is ``beta`` times the log-ratio of model and reference. A log-perplexity is the sum of log-probs by tokens.

    Args:
        metrics: of a model, with ``logps/…``, ``rewards/…`` and ``perplexity/chosen``.
        beta: scale of the rewards, not 0.

    Returns:
        ``logps/chosen``, ``logps/rejected`` and ``perplexity/chosen`` of the reference; empty if ``beta`` is 0.
    """
    if beta == 0:
        return {}
    logps = {
        f"logps/{side}": metrics[f"logps/{side}"] - metrics[f"rewards/{side}"] / beta for side in ("chosen", "rejected")
    }
    ratio = logps["logps/chosen"] / metrics["logps/chosen"]
    return {**logps, "perplexity/chosen": math.exp(math.log(metrics["perplexity/chosen"]) * ratio)}


def _warn_of_other_tokens(names: Sequence[str], trust_remote_code: bool) -> None:
    first, *others = (load_tokenizer(name, trust_remote_code=trust_remote_code) for name in names)
    for name, tokenizer in zip(names[1:], others, strict=True):
        difference = tokenizer_difference(first, tokenizer)
        if difference is not None:
            logger.warning(
                "%s has another tokenizer (%s), so that its perplexity does not compare with the others: "
                "rlhf compare gives bits per byte",
                name,
                difference,
            )


def _make_trainer(
    folder: str,
    model: PreTrainedModel,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    args: EvalArguments,
    model_args: EvaluatedArguments,
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
    if args.ref_model_name_or_path is not None and _has_pairs(rows, args):
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


def _report(names: Sequence[str], args: EvalArguments, results: Results) -> str:
    """The results as JSON: of one model under the same keys as ever, of several by the model's name."""
    report: dict[str, Any] = {
        "model": names[0],
        "reference": args.ref_model_name_or_path,
        "teacher": args.teacher_model_name_or_path,
        "data": args.dataset_name,
    }
    texts = list(zip(*results.answers.values(), strict=True))
    if len(names) == 1:
        # The first column is the model's, alone or beside its teacher.
        report["metrics"] = next(iter(results.columns.values()))
        if args.teacher_model_name_or_path is not None:
            report["teacher_metrics"] = results.columns["teacher"]
        report["completions"] = [
            {"prompt": prompt, "completion": text} for prompt, (text,) in zip(results.prompts, texts, strict=True)
        ]
    else:
        report["model"], report["metrics"] = list(names), results.columns
        report["completions"] = [
            {"prompt": prompt, "completions": dict(zip(results.answers, answers, strict=True))}
            for prompt, answers in zip(results.prompts, texts, strict=True)
        ]
    # Answers in any script stay readable in the file.
    return json.dumps(report, indent=2, ensure_ascii=False) + "\n"
