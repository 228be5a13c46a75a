"""Which of two answers is better: by rewards, or by a person who does not know whose answers they are."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import xxhash
from rich.console import Console, Group
from rich.panel import Panel
from rich.text import Text

from rlhf.evaluation.answers import Answer, Question
from rlhf.evaluation.tables import prompt_text
from rlhf.rewards import RewardSet
from rlhf.visible import visible

Choice = Literal["first", "second", "tie"]
KEYS: dict[str, Choice] = {"1": "first", "2": "second", "t": "tie"}
QUIT = "q"


@dataclass(frozen=True)
class Verdict:
    """The judgement of one prompt.

    Args:
        score: 1 if B's answer is better, 0 if A's is, 1/2 for a tie; None if there is no judgement.
        rewards: Of A's and of B's answer, from a judge that scores each by itself.
        positions: From a judge that reads both, what it chose with A's answer first, and with B's answer first.
    """

    score: float | None
    rewards: tuple[float, float] | None = None
    positions: tuple[Choice, Choice] | None = None


def verdicts_by_rewards(
    rewards: RewardSet, questions: Sequence[Question], a: Sequence[Answer], b: Sequence[Answer]
) -> list[Verdict]:
    """Judge by the weighted sum of rewards; the higher one wins, equal ones are a tie.

    Args:
        rewards: Reward functions or models.
        questions: The prompts with their rows.
        a: Answers of A.
        b: Answers of B.

    Returns:
        A verdict for each question; without a score where a reward does not apply.

    Raises:
        ValueError: A function needs a column that is not there, or fails.
        OSError: A server that does not answer.
    """
    rewards.check({"prompt": questions[0].dialogue.prompt, **questions[0].row})
    scores_a, scores_b = (_rewards_of(rewards, questions, answers) for answers in (a, b))
    return [_by_reward(*pair) for pair in zip(scores_a, scores_b, strict=True)]


def _rewards_of(rewards: RewardSet, questions: Sequence[Question], answers: Sequence[Answer]) -> list[float]:
    prompts = [question.dialogue.prompt for question in questions]
    completions = [answer.as_turns(prompt) for answer, prompt in zip(answers, prompts, strict=True)]
    # In a file of several forms a row may lack a column that others have.
    names = dict.fromkeys(name for question in questions for name in question.row)
    columns = {name: [question.row.get(name) for question in questions] for name in names}
    scored = rewards(prompts, completions, [answer.ids for answer in answers], **columns)
    return [float(reward) for reward in scored.rewards]


def _by_reward(reward_a: float, reward_b: float) -> Verdict:
    if math.isnan(reward_a) or math.isnan(reward_b):
        return Verdict(None)
    score = 0.5 if reward_a == reward_b else float(reward_b > reward_a)
    return Verdict(score, rewards=(reward_a, reward_b))


def b_is_first(key: str, index: int) -> bool:
    """Decide at random, but always in the same way, whose answer a person sees first.

    Args:
        key: Of the comparison.
        index: Of the prompt.

    Returns:
        Whether it is B's.
    """
    return xxhash.xxh3_64_intdigest(f"{key} {index}".encode()) % 2 == 1


def verdict_of_choice(key: str, index: int, choice: Choice) -> Verdict:
    """Translate the choice of a person, who knows first and second alone.

    Args:
        key: Of the comparison.
        index: Of the prompt.
        choice: What was chosen.

    Returns:
        The verdict.
    """
    if choice == "tie":
        return Verdict(0.5)
    return Verdict(float((choice == "first") == b_is_first(key, index)))


def ask_person(
    key: str,
    questions: Sequence[Question],
    a: Sequence[Answer],
    b: Sequence[Answer],
    open_indices: Sequence[int],
    read_line: Callable[[str], str],
    on_choice: Callable[[int, Choice], None],
    console: Console | None = None,
) -> None:
    """Show pairs of answers in random order and read which one is better, until all are judged or "q" is read.

    Args:
        key: Of the comparison; decides the order of each pair.
        questions: The prompts.
        a: Answers of A.
        b: Answers of B.
        open_indices: The prompts to judge.
        read_line: Shows a text and returns a line.
        on_choice: Called after each choice, with the index of the prompt.
        console: Where to print; a new one by default.
    """
    console = console or Console()
    for position, index in enumerate(open_indices, start=1):
        first, second = (b, a) if b_is_first(key, index) else (a, b)
        title = f"prompt {position} of {len(open_indices)}"
        parts = ((title, prompt_text(questions[index].dialogue.prompt)), ("1", first[index].text))
        panels = [_panel(name, text) for name, text in (*parts, ("2", second[index].text))]
        console.print(Group(*panels))
        choice = _read_choice(read_line)
        if choice is None:
            return
        on_choice(index, choice)


def _panel(title: str, text: str) -> Panel:
    # Texts of data and models: square brackets are no styles, and control characters stay visible.
    return Panel(Text(visible(text.strip())), title=title, title_align="left")


def _read_choice(read_line: Callable[[str], str]) -> Choice | None:
    """What a person chose; None to stop."""
    while True:
        try:
            typed = read_line("better answer: 1, 2, t for a tie, q to stop: ").strip().lower()
        except EOFError:
            return None
        if typed == QUIT:
            return None
        if typed in KEYS:
            return KEYS[typed]
