"""``rlhf teacher``: run a teacher over a data set once, so that training needs none in memory."""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf.cli.arguments import LoadArguments, parse
from rlhf.cli.row_arguments import RowArguments
from rlhf.cli.training import _require, quiet_logging
from rlhf.data import load_data, tokenize_prompts, tokenize_sft
from rlhf.data.packing import hash_of_tokens
from rlhf.distillation.collect import keep_top_k, sample_completions
from rlhf.distillation.teacher_file import (
    HEADER,
    Key,
    TeacherFile,
    check_key,
    create_teacher_file,
    data_key,
    read_key,
    tokenizer_key,
    write_key,
)
from rlhf.models import load_model, load_tokenizer, vocabulary_size
from rlhf.rollouts import Sampling
from rlhf.trainers.reference_logps import reference_fingerprint


@dataclass
class TeacherArguments(RowArguments):
    dataset_name: str | None = field(default=None, metadata={"help": "File, saved folder or hub name."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    dataset_split: str = field(default="train", metadata={"help": "Split; a slice such as train[:1000] too."})
    dataset_text_field: str = field(default="text", metadata={"help": "Column of plain text."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder to write, or to go on with."})
    overwrite: bool = field(default=False, metadata={"help": "Start anew, whatever the folder holds."})
    k: int = field(
        default=32, metadata={"help": "Likeliest tokens kept of each scored token; 0 samples whole answers instead."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Divides the teacher's logits; training uses the same."})
    top_p: float = field(default=1.0, metadata={"help": "Of whole answers (k 0): the likeliest tokens of this mass."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest answer (k 0)."})
    seed: int = field(default=0, metadata={"help": "Of what is sampled."})
    max_length: int = field(default=1024, metadata={"help": "Longest sequence in tokens, as in training."})
    drop_long_prompts: bool = field(default=False, metadata={"help": "Leave out rows with too long a prompt."})
    tokens_per_batch: int = field(default=4096, metadata={"help": "Tokens of a forward pass."})

    def __post_init__(self) -> None:
        for name, least in (("k", 0), ("max_new_tokens", 1), ("tokens_per_batch", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"--temperature must be above 0, got {self.temperature}")


def run(argv: list[str]) -> None:
    args, model_args = parse("teacher", (TeacherArguments, LoadArguments), argv)
    quiet_logging()
    _require(
        model_name_or_path=model_args.model_name_or_path, dataset_name=args.dataset_name, output_dir=args.output_dir
    )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("the teacher runs in one process: start it without accelerate launch")
    folder = Path(args.output_dir)
    _check_folder(folder)
    rows = load_data(args.dataset_name, args.dataset_split, args.dataset_config)
    tokenizer = load_tokenizer(
        model_args.model_name_or_path, args.chat_template_path, model_args.model_revision, model_args.trust_remote_code
    )
    model = load_model(model_args.model_name_or_path, **model_args.load_kwargs(model_args.trust_remote_code))
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    vocabulary = vocabulary_size(model)
    key = {"teacher": reference_fingerprint(model, "no"), **tokenizer_key(tokenizer), "k": args.k}
    key["temperature"] = args.temperature
    about = {"about": {"model": model_args.model_name_or_path, "dataset": args.dataset_name}}
    if args.k == 0:
        _answers(folder, rows, tokenizer, model, vocabulary, key, about, args)
        return
    rows = tokenize_sft(
        rows, tokenizer, max_length=args.max_length, vocab_size=vocabulary, text_field=args.dataset_text_field,
        drop_long_prompts=args.drop_long_prompts, reading=args.reading(),
    )  # fmt: skip
    if args.k > vocabulary:
        raise ValueError(f"--k {args.k} is more than the teacher's vocabulary of {vocabulary}")
    key |= {"vocabulary": vocabulary}
    if _goes_on(folder, {**key, **data_key(rows)}, args.overwrite):
        file = TeacherFile(folder, writable=True)
    else:
        file = create_teacher_file(folder, rows, {**about, **key})
    keep_top_k(model, rows, file, tokens_per_batch=args.tokens_per_batch)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"saved {folder}: {file.key['tokens']} tokens, {size / max(file.key['tokens'], 1):.0f} bytes each")


def _answers(
    folder: Path,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    model: Any,
    vocabulary: int,
    key: Key,
    about: Key,
    args: TeacherArguments,
) -> None:
    """The teacher's own completions, as rows to train on."""
    sampling = Sampling(temperature=args.temperature, top_p=args.top_p, max_tokens=args.max_new_tokens)
    rows = tokenize_prompts(
        rows, tokenizer, max_prompt_length=args.max_length - args.max_new_tokens, vocab_size=vocabulary,
        drop_long_prompts=args.drop_long_prompts, reading=args.reading(),
    )  # fmt: skip
    key |= {"top_p": args.top_p, "max_new_tokens": args.max_new_tokens, "seed": args.seed}
    key |= {"data": hash_of_tokens(rows, ("prompt_ids",)), "rows": len(rows)}
    if not _goes_on(folder, key, args.overwrite):
        folder.mkdir(parents=True, exist_ok=True)
        write_key(folder, {**about, **key, "complete": False})
    if not read_key(folder)["complete"]:
        sample_completions(model, tokenizer, rows, folder, sampling, args.seed)
    print(f"saved {folder}: train on it with rlhf sft --dataset_name {folder / 'completions.jsonl'}")


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: output_dir is a file; choose a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / HEADER).exists():
        raise ValueError(f"{folder}: not empty and holds no {HEADER}; choose another --output_dir")


def _goes_on(folder: Path, key: Key, overwrite: bool) -> bool:
    """Whether the folder holds what ``key`` asks for, finished or not; replaced if it does not and may be.

    Raises:
        ValueError: it holds something else, and nobody said to replace it.
    """
    if not (folder / HEADER).exists():
        return False
    if overwrite:
        shutil.rmtree(folder)
        return False
    check_key(folder, read_key(folder), key, "choose another --output_dir, or pass --overwrite to replace it")
    return True
