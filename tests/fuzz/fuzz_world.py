"""What the fuzzer damages: a tiny model, its adapter, a reward model, rows, a run, a teacher's folder."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from conftest import sentences, small_tokenizer, tiny_model, write_rows
from peft import LoraConfig, get_peft_model

from rlhf.cli.main import main

ROWS = 6
TINY = [
    "--use_cpu",
    "--max_steps",
    "1",
    "--save_strategy",
    "no",
    "--report_to",
    "none",
    "--disable_tqdm",
    "true",
    "--logging_steps",
    "1",
]
TINY += ["--per_device_train_batch_size", "2"]
ON_POLICY = ["--reward_funcs", "length_reward(target=5)", "--max_completion_length", "4", "--num_generations", "2"]
# By command: the file of rows, and words that it needs besides.
COMMANDS: dict[str, tuple[str, list[str]]] = {
    "sft": ("sft.jsonl", []),
    "dpo": ("pairs.jsonl", []),
    "kto": ("marked.jsonl", []),
    "reward": ("pairs.jsonl", []),
    "grpo": ("sft.jsonl", ON_POLICY),
    "ppo": ("sft.jsonl", ON_POLICY),
    "online-dpo": ("sft.jsonl", ON_POLICY),
    "distill": ("sft.jsonl", []),
}


@dataclass
class Case:
    """One input.

    Attributes:
        kind: of the input.
        title: what is wrong with it.
        argv: the command line.
        must: "refuse", "accept", or "either".
        names: the line of a refusal has one of these; empty for any.
        only_options: whether the command ends where training would begin.
        rows: that `rlhf data` must report; None for any number.
        environment: variables to set.
        before: called in the child before the command.
    """

    kind: str
    title: str
    argv: list[str]
    must: str = "either"
    names: tuple[str, ...] = ()
    only_options: bool = False
    rows: int | None = None
    environment: dict[str, str] = field(default_factory=dict)
    before: Callable[[], None] | None = None


@dataclass(frozen=True)
class World:
    """Folders that all cases start from."""

    root: Path

    def path(self, name: str) -> Path:
        return self.root / name

    def copy(self, name: str, folder: Path) -> Path:
        """A copy of a folder whose files can be replaced."""
        return Path(shutil.copytree(self.root / name, folder / name))

    def words(self, command: str, folder: Path, model: Path | None = None, data: Path | None = None) -> list[str]:
        """The command line of a tiny run that works."""
        file, more = COMMANDS[command]
        if command == "distill":
            more = ["--teacher_model_name_or_path", str(self.path("model"))]
        places = {"model_name_or_path": model or self.path("model"), "dataset_name": data or self.path(file)}
        places["output_dir"] = folder / "out"
        return [command, *(word for name, place in places.items() for word in (f"--{name}", str(place))), *TINY, *more]


def good_rows(command: str) -> list[dict[str, object]]:
    """Rows that a command trains on."""
    prompts, first, second = (sentences(seed, ROWS) for seed in (1, 2, 3))
    if command in ("dpo", "reward"):
        return [
            {"prompt": p, "chosen": " " + c, "rejected": " " + r}
            for p, c, r in zip(prompts, first, second, strict=True)
        ]
    rows: list[dict[str, object]] = [{"prompt": p, "completion": " " + c} for p, c in zip(prompts, first, strict=True)]
    return [{**row, "label": number % 2 == 0} for number, row in enumerate(rows)] if command == "kto" else rows


def make_world(root: Path) -> World:
    """Write all that the cases start from."""
    world = World(root)
    model, tokenizer = tiny_model(), small_tokenizer()
    for name, size in (("model", "5GB"), ("shards", "20KB")):
        model.save_pretrained(root / name, max_shard_size=size)
        tokenizer.save_pretrained(root / name)
    for name, command in (("sft", "sft"), ("pairs", "dpo"), ("marked", "kto")):
        write_rows(root / f"{name}.jsonl", good_rows(command))
    adapted = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    adapted.peft_config["default"].base_model_name_or_path = str(root / "model")
    adapted.save_pretrained(root / "adapter")
    tokenizer.save_pretrained(root / "adapter")
    _run(world.words("reward", root / "judge"))
    (root / "judge/out").rename(root / "reward")
    run = [*world.words("sft", root / "stopped"), "--save_strategy", "steps", "--save_steps", "1"]
    _run(run)
    (root / "stopped/out").rename(root / "run")
    places = {"model_name_or_path": "model", "dataset_name": "sft.jsonl", "output_dir": "teacher"}
    _run(
        ["teacher", "--k", "4", *(word for name, place in places.items() for word in (f"--{name}", str(root / place)))]
    )
    return world


def write_json(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


def _run(argv: list[str]) -> None:
    """Run a command in a child, so that this process has no threads when it forks for the cases."""
    child = os.fork()
    if child == 0:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        status = 1
        try:
            status = main(argv)
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"rlhf {' '.join(argv)} ended with {os.waitstatus_to_exitcode(status)}")
