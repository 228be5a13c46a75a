"""Several turns: the policy answers, an environment replies, until one of them ends the episode."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from transformers import PreTrainedTokenizerBase

from rlhf.data import Dialogue, encode_reply
from rlhf.data.messages import Message, Turns
from rlhf.rollouts.engine import Completion, RolloutEngine, Sampling


class Reply(NamedTuple):
    """An environment's reply to an answer.

    Args:
        observation: what the policy reads next; plain text is the user's turn in a conversation.
        reward: of this turn; an episode's reward is the sum.
        done: ends the episode.
    """

    observation: str | Message = ""
    reward: float = 0.0
    done: bool = False


class Environment(Protocol):
    """The other side of one episode. A trainer makes one for each sample, and plays it to its end."""

    def reset(self, row: Mapping[str, Any]) -> Turns | None:
        """Begin an episode.

        Args:
            row: of the data.
        Returns:
            The prompt, or None for the row's own.
        """
        ...

    def step(self, answer: str) -> Reply:
        """Reply to the policy's answer.

        Args:
            answer: as text, without special tokens.
        Returns:
            What the policy reads next, the reward, and whether the episode ends.
        """
        ...


@dataclass
class Episode:
    """One episode.

    Args:
        prompt_ids: before the first answer.
        ids: tokens after the prompt, of answers and observations.
        sampled: for each of ``ids``, whether the policy sampled it.
        logps: nats, of the sampled ones.
        reward: sum over the turns.
        turns: messages after the prompt.
        truncated: cut by the number of turns or tokens, not ended by the environment.
    """

    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    reward: float = 0.0
    turns: list[Message] = field(default_factory=list)
    truncated: bool = False

    def _add_answer(self, answer: Completion, text: str) -> None:
        """Append a turn of the policy."""
        self.ids += answer.ids
        self.sampled += [True] * len(answer.ids)
        self.logps += answer.logps
        self.turns.append({"role": "assistant", "content": text})
        self.truncated = answer.finish_reason == "length"

    def _add_observation(self, message: Message, ids: list[int]) -> None:
        """Append a turn of the environment."""
        self.turns.append(message)
        self.ids += ids
        self.sampled += [False] * len(ids)


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
    """Play all episodes side by side, one turn of each at a time.

    Sampled ids are never decoded and encoded again. An observation is rendered by the chat template behind a turn like
    the policy's, and the tokens after that turn are appended.

    Args:
        environments: one for each episode, reset already.
        prompt_ids: of each episode.
        engine: samples the answers.
        tokenizer: decodes answers and renders observations.
        sampling: how answers are drawn.
        seeds: from the number of a turn to its seed.
        index: the number of each episode, which decides its random numbers.
        dialogues: the prompt of each episode with its tools, for the chat template.
        max_turns: most answers in an episode.
        max_length: most tokens of an episode with its prompt; an episode that needs more is truncated.
    Returns:
        Episodes in order.
    Raises:
        ValueError: a prompt that leaves no room for an answer, or an environment that fails.
    """
    # Before the first turn: the engine's own error would not name the environment.
    _check_room(environments, prompt_ids, sampling, max_length)
    episodes = [Episode(list(ids)) for ids in prompt_ids]
    # Episodes that go on; the others ended in an earlier turn.
    active_episodes = list(range(len(episodes)))
    for turn in range(max_turns):
        contexts = [episodes[number].prompt_ids + episodes[number].ids for number in active_episodes]
        # One request for each turn: an engine batches it, and a server shares what rows have in common.
        # By the numbers of the episodes: random numbers do not depend on which others still go on.
        answers = engine.generate(contexts, 1, sampling, seeds(turn), [index[number] for number in active_episodes])
        still_active = []
        for number, (answer,) in zip(active_episodes, answers, strict=True):
            episode = episodes[number]
            text = str(tokenizer.decode(answer.ids, skip_special_tokens=True))
            episode._add_answer(answer, text)
            reply = _reply(environments[number], text, number, turn)
            episode.reward += reply.reward
            # An answer that was cut has no end to reply to.
            if reply.done or episode.truncated:
                continue
            message = reply.observation
            if isinstance(message, str):
                message = {"role": "user", "content": message}
            observation_ids = encode_reply(tokenizer, dialogues[number], message, answer.ids[-1])
            total_length = len(episode.prompt_ids) + len(episode.ids) + len(observation_ids)
            # There must be room for a whole answer, or the engine would refuse the request.
            if turn + 1 == max_turns or total_length + sampling.max_tokens > max_length:
                episode.truncated = True
                continue
            episode._add_observation(message, observation_ids)
            still_active.append(number)
        active_episodes = still_active
        if not active_episodes:
            break
    return episodes


def _check_room(
    environments: Sequence[Environment], prompt_ids: Sequence[list[int]], sampling: Sampling, max_length: int
) -> None:
    for number, ids in enumerate(prompt_ids):
        if len(ids) + sampling.max_tokens > max_length:
            name = type(environments[number]).__name__
            raise ValueError(
                f"environment {name}, episode {number}: a prompt of {len(ids)} tokens and answers of "
                f"{sampling.max_tokens} are more than max_length {max_length}: raise --max_length, or begin with less"
            )


def _reply(environment: Environment, answer: str, episode: int, turn: int) -> Reply:
    """The environment's reply; an error names the answer that it is about."""
    error_context = (
        f"environment {type(environment).__name__}, episode {episode}, turn {turn + 1}, answer {answer[:200]!r}"
    )
    try:
        reply = environment.step(answer)
    except Exception as error:  # of the user's own code, whatever it raises
        raise ValueError(f"{error_context}: step raised {type(error).__name__}: {error}") from error
    # A NaN would spread to the other samples of its group.
    if not isinstance(reply, tuple) or len(reply) != 3 or math.isnan(reply[1]):
        raise ValueError(
            f"{error_context}: step must return Reply(observation, reward, done) with a number, got {reply!r}"
        )
    return Reply(*reply)
