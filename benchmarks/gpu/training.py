"""What the sections that train share: a tokenizer, rows of words, a trainer of this package or of TRL."""

import contextlib
import io
import random
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu.measuring import Setup

ROOT = Path(__file__).parents[2]
WORDS = "river stone window garden music paper summer letter bridge market forest winter engine story".split()  # noqa: SIM905


def tokenizer() -> Any:
    """The small one of the demo; models are random, so that any serves."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "demo/model")


def rows_of_words(kind: str, count: int, words: tuple[int, int]) -> list[dict[str, str]]:
    """Rows of random words.

    Args:
        kind: "sft", "dpo" or "grpo".
        count: rows.
        words: the fewest and the most of each text.
    Returns:
        Rows of the columns that a trainer of that kind reads.
    """
    pick = random.Random(0)
    columns = {"sft": ("prompt", "completion"), "dpo": ("prompt", "chosen", "rejected"), "grpo": ("prompt",)}[kind]

    def text() -> str:
        return " ".join(pick.choices(WORDS, k=pick.randint(*words)))

    return [{name: text() if name == "prompt" else " " + text() for name in columns} for _ in range(count)]


def make_trainer(setup: Setup, package: Any, kind: str, model: Any, rows: Any, **options: Any) -> Any:
    """A trainer as a user makes it, with nothing saved.

    Args:
        setup: the device.
        package: rlhf or trl.
        kind: "sft", "dpo" or "grpo".
        model: is trained.
        rows: of the trainer.
        options: of its configuration; ``callbacks``, ``ref_model``, ``peft_config`` and ``reward_funcs`` go to the
            trainer.
    Returns:
        The trainer.
    """
    from datasets import Dataset

    arguments = {
        name: options.pop(name)
        for name in ("callbacks", "ref_model", "peft_config", "reward_funcs")
        if options.get(name) is not None
    }
    settings = dict(
        output_dir=tempfile.mkdtemp(), logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True,
        lr_scheduler_type="constant", use_cpu=not setup.on_gpu,
    ) | {name: value for name, value in options.items() if name not in arguments}  # fmt: skip
    name = kind.upper()
    text_tokenizer = tokenizer()
    model.config.eos_token_id = model.generation_config.eos_token_id = text_tokenizer.eos_token_id
    return getattr(package, f"{name}Trainer")(
        model=model,
        args=getattr(package, f"{name}Config")(**settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=text_tokenizer,
        **arguments,
    )


def train(trainer: Any, **options: Any) -> None:
    """Train without the lines of each step, which would stand between the tables.

    Args:
        trainer: of either package.
        options: of its ``train``.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train(**options)
