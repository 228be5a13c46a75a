"""Several turns: the policy answers, an environment replies, until one of them ends it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from transformers import PreTrainedTokenizerBase

from rlhf.data import Dialogue, encode_reply
from rlhf.data.formats import Message, Turns
from rlhf.rollouts.engine import RolloutEngine, Sampling


class Reply(NamedTuple):
    """What an environment says to an answer.

    ``observation`` is what the policy reads next (plain text is the user's turn in a conversation); ``reward`` counts
    for this turn and adds up over the episode; ``done`` ends it.
    """

    observation: str | Message = ""
    reward: float = 0.0
    done: bool = False


class Environment(Protocol):
    """One episode. A trainer makes one for each sample with a factory, and plays it to its end."""

    def reset(self, row: Mapping[str, Any]) -> Turns | None:
        """Begin with a row of the data; returns the prompt, or None for the row's own."""
        ...

    def step(self, answer: str) -> Reply:
        """Take the policy's answer, as text."""
        ...


@dataclass
class Episode:
    """The tokens of one episode after its prompt: ``sampled`` says which of ``ids`` the policy wrote."""

    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)  # of the sampled ones
    reward: float = 0.0
    turns: list[Message] = field(default_factory=list)
    truncated: bool = False


def play(
    environments: Sequence[Environment],
    prompt_ids: Sequence[list[int]],
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    seeds: Callable[[int], int],
    index: Sequence[int],
    *,
    dialogues: Sequence[Dialogue],
    max_turns: int,
    max_length: int,
) -> list[Episode]:
    """Play all episodes side by side, a turn of each at a time.

    Sampled ids are never decoded and encoded again: an observation is rendered by the chat template behind a turn like
    the policy's, and what comes after that turn is appended.

    Args:
        environments, prompt_ids: of each episode; environments have been reset.
        seeds: from the number of a turn to its seed. index: the number of each episode, which its randomness follows.
        dialogues: of each episode, what was asked; observations of a conversation go through the chat template.
        max_turns: answers in an episode. max_length: tokens of an episode with its prompt; what would be longer is
            truncated.
    Returns:
        Episodes in order.
    Raises:
        ValueError: a prompt that leaves no room for an answer, or an environment that fails.
    """
    episodes = [Episode(list(ids)) for ids in prompt_ids]
    for number, ids in enumerate(prompt_ids):
        if len(ids) + sampling.max_tokens > max_length:
            name = type(environments[number]).__name__
            raise ValueError(
                f"environment {name}, episode {number}: a prompt of {len(ids)} tokens and answers of "
                f"{sampling.max_tokens} are more than max_length {max_length}: raise --max_length, or begin with less"
            )
    active = list(range(len(episodes)))
    for turn in range(max_turns):
        answers = engine.generate(
            [episodes[i].prompt_ids + episodes[i].ids for i in active],
            1,
            sampling,
            seeds(turn),
            [index[i] for i in active],
        )
        remaining = []
        for i, (answer,) in zip(active, answers, strict=True):
            episode = episodes[i]
            episode.ids += answer.ids
            episode.sampled += [True] * len(answer.ids)
            episode.logps += answer.logps
            text = str(tokenizer.decode(answer.ids, skip_special_tokens=True))
            episode.turns.append({"role": "assistant", "content": text})
            reply = _reply(environments[i], text, i, turn)
            episode.reward += reply.reward
            episode.truncated = answer.finish_reason == "length"
            if reply.done or episode.truncated:
                continue
            message = (
                {"role": "user", "content": reply.observation}
                if isinstance(reply.observation, str)
                else reply.observation
            )
            seen = encode_reply(tokenizer, dialogues[i], message, answer.ids[-1])
            if (
                turn + 1 == max_turns
                or len(episode.prompt_ids) + len(episode.ids) + len(seen) + sampling.max_tokens > max_length
            ):
                episode.truncated = True
                continue
            episode.turns.append(message)
            episode.ids += seen
            episode.sampled += [False] * len(seen)
            remaining.append(i)
        active = remaining
        if not active:
            break
    return episodes


def _reply(environment: Environment, answer: str, episode: int, turn: int) -> Reply:
    """What the environment says; its failures name the answer that they are about."""
    where = f"environment {type(environment).__name__}, episode {episode}, turn {turn + 1}, answer {answer[:200]!r}"
    try:
        reply = environment.step(answer)
    except Exception as error:  # of the user's own code, whatever it raises
        raise ValueError(f"{where}: step raised {type(error).__name__}: {error}") from error
    if not isinstance(reply, tuple) or len(reply) != 3 or math.isnan(reply[1]):
        raise ValueError(f"{where}: step must return Reply(observation, reward, done) with a number, got {reply!r}")
    return Reply(*reply)
