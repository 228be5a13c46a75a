"""``rlhf teacher``: run a teacher over a data set once, so that training needs none in memory."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.cli.arguments import LoadArguments
from rlhf.cli.options import require
from rlhf.cli.overwriting import config_of, delete_set_aside, is_set_aside, refuse_inputs_inside, set_aside
from rlhf.cli.parsing import parse
from rlhf.cli.row_arguments import RowArguments
from rlhf.data import tokenize_prompts, tokenize_sft
from rlhf.data.packing import hash_of_tokens
from rlhf.distillation.collect import COMPLETIONS, keep_top_k, sample_completions
from rlhf.distillation.teacher_file import (
    ARRAYS,
    HEADER,
    NEW_HEADER,
    UNFINISHED,
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
from rlhf.rollouts.arguments import option
from rlhf.trainers.reference_logps import reference_fingerprint
from rlhf.trainers.run_lock import LOCK_FILE, run_lock


@dataclass
class TeacherArguments(RowArguments):
    dataset_text_field: str = option("text", "Column of plain text.")
    output_dir: str | None = option(None, "Output folder; an unfinished one is continued.")
    overwrite: bool = option(False, "Replace the contents of the folder.")
    k: int = option(32, "Most likely tokens to store at each position; 0: sample whole answers instead.")
    temperature: float = option(1.0, "Temperature of the teacher's logits; training uses the same.")
    top_p: float = option(1.0, "Nucleus sampling of whole answers (k 0).")
    max_new_tokens: int = option(256, "Longest answer (k 0).")
    seed: int = option(0, "Seed of whole answers (k 0).")
    max_length: int = option(1024, "Longest sequence in tokens, as in training.")
    drop_long_prompts: bool = option(False, "Drop rows whose prompt is longer than max_length.")
    tokens_per_batch: int = option(4096, "Tokens in a forward pass.")


@dataclass(frozen=True)
class _Job:
    """A loaded teacher, the rows to run it over, and the folder for the result."""

    args: TeacherArguments
    model_name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rows: Dataset
    folder: Path

    def key(self) -> Key:
        """What determines the result, besides the rows and what each kind of result adds."""
        return {
            # Without autocast: the teacher computes in the dtype of its weights.
            "teacher": reference_fingerprint(self.model, "no"),
            # Stored ids mean nothing under another tokenizer.
            **tokenizer_key(self.tokenizer),
            "k": self.args.k,
            "temperature": self.args.temperature,
        }

    def about(self) -> Key:
        """What a reader of the folder wants to know; it is not compared."""
        return {"about": {"model": self.model_name, "dataset": self.args.dataset_name}}


def run(argv: list[str]) -> None:
    args, model_args = parse("teacher", (TeacherArguments, LoadArguments), argv)
    name = model_args.model_name_or_path
    require(model_name_or_path=name, output_dir=args.output_dir)
    # Several processes would write to the same files.
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("the teacher runs in one process: start it without accelerate launch")
    folder = Path(args.output_dir)
    _check_folder(folder)
    if args.overwrite:
        refuse_inputs_inside(folder, vars(args) | vars(model_args) | {"config": config_of(argv)})
    with run_lock(folder):
        _teach(args, model_args, name, folder)


def _teach(args: TeacherArguments, model_args: LoadArguments, name: str, folder: Path) -> None:
    """Load the rows and the teacher, and write what it says."""
    rows = args.load_rows()
    trusts_code = model_args.trust_remote_code
    tokenizer = load_tokenizer(name, args.chat_template_path, model_args.model_revision, trusts_code)
    model: Any = load_model(name, **model_args.load_kwargs(trusts_code))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    job = _Job(args, name, model, tokenizer, rows, folder)
    if args.k == 0:
        _write_answers(job)
    else:
        _keep_predictions(job)
    delete_set_aside(folder)


def _keep_predictions(job: _Job) -> None:
    """Keep the k most likely tokens at each scored position."""
    args, folder = job.args, job.folder
    vocabulary = vocabulary_size(job.model)
    rows = tokenize_sft(
        job.rows,
        job.tokenizer,
        max_length=args.max_length,
        vocab_size=vocabulary,
        text_field=args.dataset_text_field,
        drop_long_prompts=args.drop_long_prompts,
        reading=args.reading(),
    )
    if args.k > vocabulary:
        raise ValueError(f"--k {args.k} is more than the teacher's vocabulary of {vocabulary}")
    # The size of the vocabulary decides the type in which ids are stored.
    key = {**job.key(), "vocabulary": vocabulary}
    if _continues(folder, {**key, **data_key(rows)}, args.overwrite):
        file = TeacherFile(folder, writable=True)
    else:
        file = create_teacher_file(folder, rows, {**job.about(), **key})
    keep_top_k(job.model, rows, file, tokens_per_batch=args.tokens_per_batch)
    num_bytes = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    num_tokens = file.key["tokens"]
    print(f"saved {folder}: {num_tokens} tokens, {num_bytes / max(num_tokens, 1):.0f} bytes each")


def _write_answers(job: _Job) -> None:
    """Write the teacher's own answers to the prompts, as rows to train on."""
    args, folder = job.args, job.folder
    rows = tokenize_prompts(
        job.rows,
        job.tokenizer,
        # A prompt and its answer together must fit into max_length in training.
        max_prompt_length=args.max_length - args.max_new_tokens,
        vocab_size=vocabulary_size(job.model),
        drop_long_prompts=args.drop_long_prompts,
        reading=args.reading(),
    )
    sampled = {"top_p": args.top_p, "max_new_tokens": args.max_new_tokens, "seed": args.seed}
    # Answers depend on prompts alone: other columns may change.
    data = {"data": hash_of_tokens(rows, ("prompt_ids",)), "rows": len(rows)}
    key = {**job.key(), **sampled, **data}
    if not _continues(folder, key, args.overwrite):
        folder.mkdir(parents=True, exist_ok=True)
        # Written before the first answer, so that an interrupted run is recognised and continued.
        write_key(folder, {**job.about(), **key, "complete": False})
    if not read_key(folder)["complete"]:
        sampling = Sampling(temperature=args.temperature, top_p=args.top_p, max_tokens=args.max_new_tokens)
        sample_completions(job.model, job.tokenizer, rows, folder, sampling, args.seed)
    print(f"saved {folder}: train on it with rlhf sft --dataset_name {folder / COMPLETIONS}")


def _check_folder(folder: Path) -> None:
    """Refuse a folder of something else before anything is loaded, even with ``--overwrite``."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: output_dir is a file; choose a folder")
    # A run that was killed at once left no more than these.
    entries = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    names = {name for name in entries if not is_set_aside(name)} - {LOCK_FILE, NEW_HEADER}
    if names and HEADER not in names:
        raise ValueError(f"{folder}: not empty and holds no {HEADER}; choose another --output_dir")


def _continues(folder: Path, key: Key, overwrite: bool) -> bool:
    """Whether the folder holds a result for ``key``, finished or not; it is set aside where ``overwrite`` says so.

    A folder whose arrays are not all there yet holds none.

    Raises:
        ValueError: it holds another result.
    """
    if not (folder / HEADER).exists():
        return False
    # Before the comparison: a result that is replaced need not fit.
    if overwrite:
        set_aside(folder, (*(f"{array}.npy" for array in ARRAYS), COMPLETIONS, HEADER))
        return False
    found = read_key(folder)
    check_key(folder, found, key, "choose another --output_dir, or pass --overwrite to replace it")
    return not found.get(UNFINISHED)
