"""``rlhf eval``: what a model makes of held-out rows, computed by the trainers' own evaluation."""

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.cli.arguments import ModelArguments, parse
from rlhf.cli.training import _require, quiet_logging
from rlhf.data import load_data
from rlhf.evaluation import complete, prompts_of, show_completions, show_metrics
from rlhf.models import load_model, load_tokenizer
from rlhf.trainers import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer


@dataclass
class EvalArguments:
    dataset_name: str | None = field(default=None, metadata={"help": "File, saved folder or hub name."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    dataset_split: str = field(default="train", metadata={"help": "Split; a slice such as train[:200] too."})
    ref_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Reference of the preference metrics; without it, perplexity only."}
    )
    max_length: int = field(default=1024, metadata={"help": "Longest sequence in tokens."})
    drop_long_prompts: bool = field(default=False, metadata={"help": "Leave out rows with too long a prompt."})
    chat_template_path: str | None = field(default=None, metadata={"help": "Template file, or a model folder."})
    batch_size: int = field(default=8, metadata={"help": "Rows a forward pass, on each device; moves no figure."})
    beta: float = field(default=0.1, metadata={"help": "Scale of the rewards in the preference metrics."})
    num_completions: int = field(default=0, metadata={"help": "Also answer this many prompts, greedily."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer."})
    output_file: str | None = field(default=None, metadata={"help": "Write metrics and answers there as JSON."})


def run(argv: list[str]) -> None:
    args, model_args = parse("eval", (EvalArguments, ModelArguments), argv)
    quiet_logging()
    _require(model_name_or_path=model_args.model_name_or_path, dataset_name=args.dataset_name)
    rows = load_data(args.dataset_name, args.dataset_split, args.dataset_config)
    tokenizer = load_tokenizer(model_args.model_name_or_path, args.chat_template_path)
    model = load_model(model_args.model_name_or_path, **model_args.load_kwargs())
    shared: dict[str, Any] = dict(
        max_length=args.max_length,
        drop_long_prompts=args.drop_long_prompts,
        per_device_eval_batch_size=args.batch_size,
        report_to="none",
    )
    with tempfile.TemporaryDirectory() as scratch:
        if args.ref_model_name_or_path is not None and "chosen" in rows.column_names:
            reference = load_model(args.ref_model_name_or_path, **model_args.load_kwargs())
            trainer: Any = DPOTrainer(
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
    prompts = prompts_of(rows, args.num_completions)
    answers = complete(model, tokenizer, prompts, args.max_new_tokens)
    if not trainer.is_world_process_zero():
        return
    name = str(model_args.model_name_or_path)
    show_metrics({name: kept})
    show_completions(prompts, {name: answers})
    if args.output_file is not None:
        report = {"model": name, "reference": args.ref_model_name_or_path, "data": args.dataset_name, "metrics": kept}
        report["completions"] = [{"prompt": p, "completion": a} for p, a in zip(prompts, answers, strict=True)]
        path = Path(args.output_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
