"""The answers of a model to the prompts of a data set, by the engine that samples in training."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from datasets import Dataset
from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedTokenizerBase

from rlhf.data import Dialogue, RowFormat, encode_prompt
from rlhf.data.formats import canonical, prompt_dialogue
from rlhf.data.messages import Turns
from rlhf.models.adapter_files import adapter_config, base_of
from rlhf.models.places import resolve
from rlhf.rollouts import LocalEngine, Sampling

# Files that decide what a model answers; a run writes other files beside them.
_MODEL_FILES = (
    "*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "config.json", "generation_config.json",
    "adapter_config.json", "tokenizer*", "vocab.*", "merges.txt", "*.jinja", "*.model",
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A prompt with the row that it comes from.

    Args:
        dialogue: The prompt, with tools and options of the chat template.
        row: The columns of the row under their usual names; reward functions get them.
    """

    dialogue: Dialogue
    row: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """An answer of a model.

    Args:
        text: Without special tokens.
        ids: Its tokens, with the one that ends it.
        is_whole: False where it was cut at the longest length.
    """

    text: str
    ids: list[int]
    is_whole: bool

    def as_turns(self, prompt: Turns) -> Turns:
        """The answer in the form of its prompt: text, or one message of the assistant.

        Args:
            prompt: Text or messages.

        Returns:
            Text or messages.
        """
        return self.text if isinstance(prompt, str) else [{"role": "assistant", "content": self.text}]


def questions_of(rows: Dataset, count: int, form: RowFormat) -> list[Question]:
    """Read the first different prompts of a data set, as they are trained. Rows without a prompt are skipped.

    Args:
        rows: Rows of text in any of the known columns.
        count: How many.
        form: How rows are read.

    Returns:
        At most ``count`` questions.
    """
    questions: dict[str, Question] = {}
    for row in rows:
        if len(questions) == count:
            break
        renamed_row = canonical(row, form)
        try:
            dialogue = prompt_dialogue(renamed_row, form)
        except ValueError:
            continue
        # Many data sets hold several answers to one prompt, and so the prompt several times.
        if dialogue.prompt:
            questions.setdefault(_as_key(asdict(dialogue)), Question(dialogue, renamed_row))
    return list(questions.values())


def answer_questions(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    sampling: Sampling,
    seed: int,
    batch_size: int,
    start: int = 0,
) -> Iterator[list[Answer]]:
    """Answer each question once.

    The answer to a question depends on the model, the question, its number, ``sampling`` and ``seed``. The other
    questions of its batch change it through rounding alone, which can decide between two tokens of equal probability.

    Args:
        model: A causal LM, on its device.
        tokenizer: The tokenizer of the model.
        questions: What to answer.
        sampling: How tokens are drawn; temperature 0 is greedy.
        seed: Of the random numbers.
        batch_size: Questions that are answered at once.
        start: The first question to answer, where the answers to those before are known.

    Yields:
        The answers of each batch, in the order of the questions.
    """
    engine = LocalEngine(model, tokenizer)
    prompt_ids = [encode_prompt(tokenizer, question.dialogue) for question in questions]
    for first in range(start, len(questions), batch_size):
        numbers = range(first, min(first + batch_size, len(questions)))
        completions = engine.generate([prompt_ids[number] for number in numbers], 1, sampling, seed, index=numbers)
        yield [
            Answer(
                str(tokenizer.decode(completion.ids, skip_special_tokens=True)),
                completion.ids,
                is_whole=completion.finish_reason == "stop",
            )
            for (completion,) in completions
        ]


def model_identity(name_or_path: str) -> str | None:
    """Describe the files that decide what a model answers, so that stored answers are used for this model alone.

    Args:
        name_or_path: A folder of a model or an adapter, or a name on the hub.

    Returns:
        Names, sizes and times of its files; None for a model of the hub that was not downloaded yet.

    Raises:
        FileNotFoundError: A path to nothing, or a folder without a model.
    """
    location = resolve(name_or_path)
    folder = Path(location)
    if not folder.is_dir():
        files = (try_to_load_from_cache(location, name) for name in ("config.json", "adapter_config.json"))
        # The path of a cached file contains the commit.
        return next((path for path in files if isinstance(path, str)), None)
    paths = sorted({path for pattern in _MODEL_FILES for path in folder.glob(pattern)})
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    adapter = adapter_config(location)
    base = None if adapter is None else model_identity(base_of(location, adapter))
    return _as_key([str(folder.resolve()), facts, base])


def key_of(*parts: Any) -> str:
    """Hash what a stored result depends on.

    Args:
        parts: Values that JSON can write.

    Returns:
        Sixteen hexadecimal digits.
    """
    return xxhash.xxh3_64(_as_key(parts).encode()).hexdigest()


def _as_key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def to_device(model: Any) -> Any:
    """Move a model to the accelerator, if there is one.

    Args:
        model: A model in memory.

    Returns:
        The model.
    """
    return model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
