"""Tiny runs of the commands, and what must be the same however often a run was killed."""

import hashlib
import json
import logging
import re
import shutil
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import datasets
from conftest import sentences, tiny_model, write_rows
from forked import KILLED, NONE, Kill, Outcome, run

from rlhf.cli.commands import COMMANDS, TrainingCommand
from rlhf.cli.main import main

Result = dict[str, Any]
# Temporary files of `datasets.map` are removed when nobody has written to them for a day.
_IGNORED = re.compile(r".*\.lock$|tmp")
_TIMES = re.compile("runtime|per_second|seconds|time|flos")
_REWARD = "def vowels(completions, **_):\n    return [float(sum(c in 'aeiou' for c in text)) for text in completions]\n"
# More than a checkpoint, rotation, log lines between the saves.
_TRAINING = dict(
    max_steps=5, save_steps=2, save_total_limit=1, logging_steps=3, per_device_train_batch_size=4, learning_rate=1e-3,
    report_to="none", use_cpu=True, disable_tqdm=True,
)  # fmt: skip
_ROLLOUTS = dict(max_length=48, max_completion_length=8, log_completions=True)
_GROUPS = _ROLLOUTS | dict(num_generations=2)


@dataclass(frozen=True)
class Job:
    """A command that is killed.

    Attributes:
        command: its name.
        rows: the file of its rows.
        options: of the command, besides the model, the rows and the folder.
        resumes: whether the same command with ``--resume auto`` goes on; a command that trains nothing goes on anyway.
    """

    command: str
    rows: str
    options: dict[str, Any] = field(default_factory=dict)
    resumes: bool = True


JOBS = {
    "sft": Job("sft", "sft", _TRAINING | dict(packing=True, max_length=64)),
    "dpo": Job("dpo", "preferences", _TRAINING | dict(precompute_ref_log_probs=True)),
    "kto": Job("kto", "unpaired", _TRAINING),
    "reward": Job("reward", "preferences", _TRAINING),
    "distill": Job("distill", "sft", _TRAINING | dict(teacher_file="teacher")),
    "distill-on-policy": Job(
        "distill", "sft", _TRAINING | dict(teacher_model_name_or_path="model", lmbda=1.0, max_completion_length=8)
    ),
    "ppo": Job("ppo", "prompts", _TRAINING | _ROLLOUTS | dict(reward_funcs="reward.py:vowels")),
    "grpo": Job("grpo", "prompts", _TRAINING | _GROUPS | dict(reward_funcs="reward.py:vowels", num_iterations=2)),
    "rloo": Job("rloo", "prompts", _TRAINING | _GROUPS | dict(reward_funcs="reward.py:vowels")),
    "online-dpo": Job("online-dpo", "prompts", _TRAINING | _ROLLOUTS | dict(reward_funcs="reward.py:vowels")),
    "teacher": Job("teacher", "sft", dict(k=4, tokens_per_batch=100), resumes=False),
    "teacher-answers": Job("teacher", "sft", dict(k=0, max_new_tokens=6, max_length=64), resumes=False),
}


def import_commands() -> None:
    """Import all that the commands need, once, before the first fork."""
    for command in COMMANDS.values():
        if isinstance(command, TrainingCommand):
            resolve_name(command.trainer)
        else:
            import_module(command.module)
    import_module("rlhf.cli.training")


def prepare(folder: Path, tokenizer: Any) -> int:
    """Write what all jobs read: a model, rows of each kind, a reward, and a teacher's folder.

    Args:
        folder: to write to.
        tokenizer: of the model.
    Returns:
        The status of the teacher's command.
    """
    tiny_model().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "reward.py").write_text(_REWARD)
    first, second, third = (sentences(seed, 24) for seed in (1, 2, 3))
    pairs = list(zip(first, second, third, strict=True))
    sets = {
        "sft": [{"prompt": p, "completion": f" {c}"} for p, c, _ in pairs],
        "preferences": [{"prompt": p, "chosen": f" {c}", "rejected": f" {r}"} for p, c, r in pairs],
        "unpaired": [{"prompt": p, "completion": f" {c}", "label": len(r) % 2 == 0} for p, c, r in pairs],
        "prompts": [{"prompt": p} for p, _, _ in pairs],
    }
    for name, rows in sets.items():
        write_rows(folder / f"{name}.jsonl", rows)
    argv = f"teacher --model_name_or_path {folder}/model --dataset_name {folder}/sft.jsonl --k 4"
    return main([*argv.split(), "--output_dir", str(folder / "teacher")])


def start(job: Job, inputs: Path, case: Path, kill: Kill = NONE) -> Outcome:
    """Start a job, or go on with it.

    Args:
        job: what to run.
        inputs: folder of :func:`prepare`.
        case: folder for the output and the caches; what is written there is counted.
        kill: when the job ends before its time.
    Returns:
        How it ended.
    """
    case.mkdir(parents=True, exist_ok=True)
    options = {name: _place(value, inputs) for name, value in job.options.items()}
    options |= dict(
        model_name_or_path=inputs / "model", dataset_name=inputs / f"{job.rows}.jsonl", output_dir=case / "out"
    )
    if job.resumes:
        options["resume"] = "auto"
    argv = [job.command, *(f"--{name}={value}" for name, value in options.items())]
    return run(partial(_command, argv, case / "cache"), case, kill)


def _place(value: Any, inputs: Path) -> Any:
    """A path below the inputs, where an option is one of their names."""
    if not isinstance(value, str):
        return value
    return inputs / value if (inputs / value.split(":")[0]).exists() else value


def _command(argv: list[str], cache: Path) -> int:
    # Read from the environment long before the fork.
    datasets.config.HF_CACHE_HOME = cache
    datasets.config.HF_DATASETS_CACHE = cache / "datasets"
    logging.getLogger("rlhf").handlers.clear()
    logging.getLogger().handlers.clear()
    return main(argv)


def survive(job: Job, inputs: Path, case: Path, kills: list[Kill], expected: Result) -> list[str]:
    """Kill a job at each of some moments, run it to its end with the same command, and compare.

    Args:
        job: what to run.
        inputs: folder of :func:`prepare`.
        case: folder for the run; it is removed at the end if nothing is wrong.
        kills: one for each start but the last.
        expected: result of a run that was not killed.
    Returns:
        What is wrong, a line each.
    """
    shutil.rmtree(case, ignore_errors=True)
    for kill in [*kills, NONE]:
        outcome = start(job, inputs, case, kill)
        if outcome.status == 0:
            break
        if outcome.status != KILLED or kill == NONE:
            return [f"needs a hand: status {outcome.status}: {outcome.output.strip().splitlines()[-1:]}"]
    wrong = differences(result(case), expected)
    if not wrong:
        shutil.rmtree(case)
    return wrong


def result(case: Path) -> Result:
    """What a run leaves, without times.

    Args:
        case: folder of the run.
    Returns:
        Names of all files, hashes of weights and of a teacher's arrays, logs, metrics, and the lines of completions.
    """
    out = case / "out"
    files = sorted(path for path in case.rglob("*") if path.is_file() and not _IGNORED.match(path.name))
    found: Result = {"files": [str(path.relative_to(case)) for path in files]}
    for path in out.iterdir():
        if path.suffix in (".safetensors", ".npy"):
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.suffix == ".jsonl":
            found[path.name] = [_without_times(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.name in ("trainer_state.json", "all_results.json", "teacher.json"):
            found[path.name] = _without_times(json.loads(path.read_text()))
    return found


def _without_times(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_times(item) for item in value]
    if isinstance(value, dict):
        return {name: _without_times(item) for name, item in value.items() if not _TIMES.search(name)}
    return value


def differences(found: Result, expected: Result) -> list[str]:
    """Compare two results.

    Args:
        found: of a run that was killed.
        expected: of one that was not.
    Returns:
        A line for each part that differs.
    """
    wrong = []
    for name in sorted({*found, *expected}):
        ours, theirs = found.get(name), expected.get(name)
        if ours != theirs:
            wrong.append(f"{name}: {_first_difference(ours, theirs)}")
    return wrong


def _first_difference(ours: Any, theirs: Any) -> str:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        name = next(name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name))
        return f"{name}: {_first_difference(ours.get(name), theirs.get(name))}"
    if isinstance(ours, list) and isinstance(theirs, list):
        if len(ours) != len(theirs):
            only = [item for item in [*ours, *theirs] if (item in ours) != (item in theirs)]
            return f"{len(ours)} entries, not {len(theirs)}; {str(only)[:200]}"
        index = next(index for index, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
        return f"[{index}]: {_first_difference(ours[index], theirs[index])}"
    return f"{str(ours)[:100]}, not {str(theirs)[:100]}"
