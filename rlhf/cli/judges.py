"""The judge of ``rlhf compare``, chosen by its options: rewards, an endpoint, a person, or choices from a page."""

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from rlhf.evaluation.answers import Answer, Question, key_of
from rlhf.evaluation.endpoint_judge import EndpointJudge, verdict_of_orders
from rlhf.evaluation.judging import Choice, Verdict, ask_person, verdict_of_choice, verdicts_by_rewards
from rlhf.evaluation.stored_lines import StoredLines
from rlhf.models.places import resolve
from rlhf.rewards import RewardSet

logger = logging.getLogger(__name__)


class Judge(ABC):
    """Decides which answers are better.

    Attributes:
        name: for the table.
        is_pending: whether the judgement comes later, from a page.
    """

    name: str
    is_pending = False

    def check(self, questions: Sequence[Question]) -> None:
        """Find out before the models answer what would fail after it.

        Args:
            questions: the prompts.

        Raises:
            ValueError: there are no prompts.
        """
        if not questions:
            raise ValueError("no prompts to judge answers to: the rows have none, or --num_prompts is 0")

    @abstractmethod
    def verdicts(
        self, key: str, questions: Sequence[Question], a: Sequence[Answer], b: Sequence[Answer]
    ) -> list[Verdict]:
        """Judge all prompts.

        Args:
            key: of the answers.
            questions: the prompts.
            a: answers of A.
            b: answers of B.

        Returns:
            A verdict for each prompt.
        """


class RewardJudge(Judge):
    """Judges by rewards.

    Args:
        specs: rewards by name, as training has them.
        loads_late: whether they are a model, which is loaded after the two models have answered.
    """

    def __init__(self, specs: list[str], loads_late: bool) -> None:
        self._specs = specs
        self._rewards = None if loads_late else RewardSet(specs)
        self.name = f"reward {', '.join(specs)}"

    def check(self, questions: Sequence[Question]) -> None:
        """As :meth:`Judge.check`; the columns that reward functions need are checked too.

        Args:
            questions: the prompts.
        """
        super().check(questions)
        if self._rewards is not None:
            self._rewards.check({"prompt": questions[0].dialogue.prompt, **questions[0].row})

    def verdicts(
        self, key: str, questions: Sequence[Question], a: Sequence[Answer], b: Sequence[Answer]
    ) -> list[Verdict]:
        """The higher reward wins."""
        rewards = self._rewards or RewardSet(self._specs)
        return verdicts_by_rewards(rewards, questions, a, b)


class ServerJudge(Judge):
    """Asks an endpoint in both orders; what it answered is stored.

    Args:
        endpoint: the judge.
        folder: where judgements are stored.
    """

    def __init__(self, endpoint: EndpointJudge, folder: Path) -> None:
        self._endpoint, self._folder = endpoint, folder
        self.name = f"{endpoint.model} at {endpoint.url}, both orders"

    def verdicts(
        self, key: str, questions: Sequence[Question], a: Sequence[Answer], b: Sequence[Answer]
    ) -> list[Verdict]:
        """An answer wins that is chosen in both orders."""
        stored = StoredLines(self._folder / f"judgements-{key_of(key, self._endpoint.url, self._endpoint.model)}.jsonl")
        judged = {int(entry["index"]) for entry in stored.entries}
        open_indices = [index for index in _differing(a, b) if index not in judged]
        self._endpoint.judge(
            questions, a, b, open_indices, lambda index, orders: stored.add({"index": index, "orders": list(orders)})
        )
        verdicts = _ties_of_identical(a, b)
        for entry in stored.entries:
            verdicts[entry["index"]] = verdict_of_orders(*entry["orders"])
        return verdicts


class PersonJudge(Judge):
    """Asks a person in the terminal; what was chosen is stored after each prompt.

    Args:
        folder: where choices are stored.
    """

    name = "a person, blind"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def verdicts(
        self, key: str, questions: Sequence[Question], a: Sequence[Answer], b: Sequence[Answer]
    ) -> list[Verdict]:
        """What the person chooses."""
        stored = StoredLines(self._folder / f"choices-{key}.jsonl")
        judged = {int(entry["index"]) for entry in stored.entries}
        open_indices = [index for index in _differing(a, b) if index not in judged]
        if judged and open_indices:
            logger.info("%d prompts are judged already, %d are left", len(judged), len(open_indices))
        ask_person(
            key, questions, a, b, open_indices, input,
            lambda index, choice: stored.add({"index": index, "choice": choice}),
        )  # fmt: skip
        verdicts = _ties_of_identical(a, b)
        for entry in stored.entries:
            verdicts[entry["index"]] = verdict_of_choice(key, entry["index"], entry["choice"])
        return verdicts


class PageJudge(Judge):
    """A person who chooses in the page; the choices come later."""

    name = "a person, blind, in the page"
    is_pending = True

    def verdicts(
        self, key: str, questions: Sequence[Question], a: Sequence[Answer], b: Sequence[Answer]
    ) -> list[Verdict]:
        """None so far."""
        return [Verdict(None)] * len(questions)


class ChoicesJudge(Judge):
    """Choices that were saved in the page.

    Args:
        file: the saved file.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self.name = f"a person, blind ({file})"
        self._comparison, self._choices = _read_choices(file)

    def verdicts(
        self, key: str, questions: Sequence[Question], a: Sequence[Answer], b: Sequence[Answer]
    ) -> list[Verdict]:
        """What was chosen."""
        if self._comparison != key:
            raise ValueError(
                f"{self._file}: these choices are about other answers; use the models, the data and the options that "
                "the page was written with"
            )
        verdicts = _ties_of_identical(a, b)
        for index, choice in self._choices.items():
            verdicts[index] = verdict_of_choice(key, index, choice)
        return verdicts


def _read_choices(file: Path) -> tuple[str, dict[int, Choice]]:
    """The key of the answers and the choices by prompt.

    Raises:
        ValueError: the file is not what the page saves.
    """
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        choices = {int(entry["index"]): entry["choice"] for entry in saved["choices"]}
        is_known = all(choice in get_args(Choice) for choice in choices.values())
        comparison = str(saved["comparison"])
    except (ValueError, KeyError, TypeError, RecursionError):
        is_known = False
    if not is_known:
        raise ValueError(f"{file}: not the choices that the page saves")
    return comparison, choices


def _differing(a: Sequence[Answer], b: Sequence[Answer]) -> list[int]:
    """Prompts whose two answers differ: the others need no judge."""
    return [index for index, (one, other) in enumerate(zip(a, b, strict=True)) if one.text != other.text]


def _ties_of_identical(a: Sequence[Answer], b: Sequence[Answer]) -> list[Verdict]:
    return [Verdict(0.5 if one.text == other.text else None) for one, other in zip(a, b, strict=True)]


def make_judge(args: Any, api_key: str | None) -> Judge | None:
    """The judge that the options name.

    Args:
        args: options of ``rlhf compare``.
        api_key: for an endpoint.

    Returns:
        The judge; None if none is named.

    Raises:
        ValueError: several are named, or one only in part.
        OSError: a file or folder is missing.
    """
    options = ("reward_model", "reward_funcs", "judge_url", "judge", "choices")
    given = [name for name in options if getattr(args, name) is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(f'--{name}' for name in given)} exclude each other: pass one judge")
    if (args.judge_url is None) != (args.judge_model is None):
        raise ValueError("--judge_url and --judge_model belong together: pass both")
    if args.judge == "page" and args.html is None:
        raise ValueError("--judge page needs --html FILE, the page to write")
    folder = Path(args.output_dir)
    if args.reward_model is not None:
        resolve(args.reward_model)  # a folder that is missing is found before the models answer
        return RewardJudge([args.reward_model], loads_late=True)
    if args.reward_funcs is not None:
        return RewardJudge(args.reward_funcs, loads_late=False)
    if args.judge_url is not None:
        return ServerJudge(EndpointJudge(args.judge_url, args.judge_model, api_key), folder)
    if args.choices is not None:
        return ChoicesJudge(Path(args.choices))
    if args.judge is None:
        return None
    return PersonJudge(folder) if args.judge == "person" else PageJudge()
