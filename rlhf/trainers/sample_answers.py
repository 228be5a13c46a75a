"""Greedy answers to the same few prompts at each evaluation: what the figures of a run look like as text."""

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from rlhf.data import Dialogue, Mixture, encode_prompt
from rlhf.evaluation import prompts_of
from rlhf.rollouts import LocalEngine, Sampling
from rlhf.runs.files import SAMPLES_FILE, append_line, read_lines
from rlhf.trainers.config import BaseConfig
from rlhf.trainers.sharding import zero_stage

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 48  # of an answer: enough to see what it is like, and little beside an evaluation
_ROWS = 64  # that are looked through for prompts
_SHOWN = 100  # characters of a prompt and of an answer in the log; the file has all
# A plain text has no prompt, so that its first words are one.
_FIRST_WORDS = re.compile(r"(?:\S+\s+){7}\S+(?=\s+\S)")


@dataclass(frozen=True)
class SamplePrompt:
    """A prompt that is answered at each evaluation.

    Attributes:
        prompt: text or messages.
        ids: its tokens.
    """

    prompt: Any
    ids: list[int]


def choose_prompts(rows: Any, count: int, tokenizer: PreTrainedTokenizerBase, args: BaseConfig) -> list[SamplePrompt]:
    """Choose the first different prompts of evaluation rows that leave room for an answer.

    Args:
        rows: as they are in a file; several sets by name, of which the first is taken; or None.
        count: how many.
        tokenizer: of the model.
        args: the configuration, which says how rows are read.

    Returns:
        At most ``count`` prompts; none for rows that are tokenised already, whose text is unknown.
    """
    if count == 0 or not rows:
        return []
    if isinstance(rows, dict):
        rows = next(iter(rows.values()))
    if isinstance(rows, Mixture):
        rows = rows.parts[0]
    first_rows = list(islice(iter(rows), _ROWS))
    form = args.reading().for_tokenizer(tokenizer).form
    dialogues = prompts_of(first_rows, _ROWS, form) or _first_words(first_rows, getattr(args, "dataset_text_field", ""))
    chosen: list[SamplePrompt] = []
    for dialogue in dialogues:
        if len(chosen) == count:
            break
        try:
            ids = encode_prompt(tokenizer, dialogue)
        except ValueError:
            continue  # a row that training leaves out
        if ids and (args.max_length is None or len(ids) + MAX_NEW_TOKENS <= args.max_length):
            chosen.append(SamplePrompt(dialogue.prompt, ids))
    return chosen


def _first_words(rows: Iterable[Any], text_field: str) -> list[Dialogue]:
    texts = [row[text_field] for row in rows if isinstance(row.get(text_field), str)]
    beginnings = [match.group() for text in texts if (match := _FIRST_WORDS.match(text.lstrip())) is not None]
    return [Dialogue(beginning) for beginning in dict.fromkeys(beginnings)]


class SampleAnswers(TrainerCallback):
    """Answers prompts at each evaluation of a run, shows the answers, and appends them to ``samples.jsonl``.

    The first process answers, with the model that is trained. Nothing of the run changes: the engine restores the modes
    of all modules, and random numbers are those of before. An error is told once, and the run goes on without answers.

    Args:
        prompts: the same at each evaluation.
        accelerator: of the run.
        tell: shows a text.
    """

    def __init__(self, prompts: Sequence[SamplePrompt], accelerator: Accelerator, tell: Callable[[str], None]) -> None:
        self.prompts, self.accelerator, self.tell = prompts, accelerator, tell
        self._is_training = False
        self._last_step: int | None = None  # whose answers are in the file
        self._stopped = False  # after an error

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin: an evaluation before this belongs to no run."""
        self._is_training = True
        lines = read_lines(_file_of(args)) if state.global_step and state.is_world_process_zero else []
        self._last_step = lines[-1]["step"] if lines else None

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Answer, once for each step."""
        is_due = self._is_training and not self._stopped and state.global_step != self._last_step
        if not is_due or not state.is_world_process_zero:
            return
        self._last_step = state.global_step
        if is_sharded(self.accelerator):
            self._stop("the weights are sharded")
            return
        model = self.accelerator.unwrap_model(kwargs["model"]).model
        try:
            answers = self._answer(model, kwargs["processing_class"])
        # Whatever a model raises that cannot sample: the run is worth more.
        except Exception as error:
            self._stop(f"{type(error).__name__}: {' '.join(str(error).split())}")
            return
        for index, (prompt, answer) in enumerate(zip(self.prompts, answers, strict=True)):
            entry = {"step": state.global_step, "index": index, "prompt": prompt.prompt, "completion": answer}
            append_line(_file_of(args), entry)
        self.tell("\n".join(shown(prompt.prompt, answer) for prompt, answer in zip(self.prompts, answers, strict=True)))

    def _answer(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        device = self.accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            engine = LocalEngine(model, tokenizer, autocast=autocast)
            sampling = Sampling(temperature=0.0, max_tokens=MAX_NEW_TOKENS)
            completions = engine.generate([prompt.ids for prompt in self.prompts], 1, sampling, seed=0)
        return [str(tokenizer.decode(one.ids, skip_special_tokens=True)) for (one,) in completions]

    def _stop(self, reason: str) -> None:
        self._stopped = True
        logger.warning("no sample answers (%s); --num_sample_answers 0 turns them off", reason)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether no process has the weights as a whole.

    Args:
        accelerator: of the run.

    Returns:
        True under FSDP and ZeRO-3.
    """
    return getattr(accelerator.state, "fsdp_plugin", None) is not None or zero_stage(accelerator) == 3


def shown(prompt: Any, answer: str) -> str:
    """A prompt and its answer as two lines.

    Args:
        prompt: text or messages, of which the last one is shown.
        answer: text.

    Returns:
        Both, cut where they are long.
    """
    question = prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))
    return f"    prompt  {_one_line(question)}\n    answer  {_one_line(answer)}"


def _one_line(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= _SHOWN else f"{words[: _SHOWN - 1]}…"


def _file_of(args: Any) -> Path:
    return Path(str(args.output_dir)) / SAMPLES_FILE
