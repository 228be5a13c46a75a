"""Where a prompt ends and its answer begins: the one definition that every trainer uses."""

import os
from collections.abc import Sequence
from typing import Any

from rlhf.data.messages import ASSISTANT, Message, Turns

_SYSTEM_ROLES = ("system", "developer")
_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # turns in Anthropic's plain text
_MIN_REPEATED_WORDS = 3  # an answer may begin like a shorter prompt by chance


def last_answer(turns: list[Message]) -> tuple[list[Message], list[Message]]:
    """Split a conversation before its last answer: the assistant's last turns, with the tool turns between them.

    Args:
        turns: The conversation.

    Returns:
        The prompt, and the answer.

    Raises:
        ValueError: There is no assistant's turn; lists the roles.
    """
    answer_end = len(turns)
    # A conversation may end with a question that nobody has answered: it is left out.
    while answer_end and turns[answer_end - 1]["role"] != ASSISTANT:
        answer_end -= 1
    if answer_end == 0:
        raise ValueError(f"no assistant's turn: the roles are {roles_of(turns)}; --roles theirs=assistant names it")
    answer_start = answer_end - 1
    for turn_index in range(answer_end - 1, -1, -1):
        turn_role = turns[turn_index]["role"]
        if turn_role == ASSISTANT:
            answer_start = turn_index
        elif turn_role != "tool":
            break
    return turns[:answer_start], turns[answer_start:answer_end]


def roles_of(turns: list[Message]) -> str:
    """List the different roles of a conversation, for error messages."""
    roles = {str(turn["role"]) for turn in turns}
    return ", ".join(sorted(roles))


def split_prompt(prompt: Turns, completion: Turns) -> tuple[Turns, Turns]:
    """Bring prompt and completion to one form, and remove a prompt that the completion repeats.

    White space and system turns are ignored in the comparison.

    Args:
        prompt: Text or messages.
        completion: Text or messages.

    Returns:
        Prompt and completion, both text or both messages.

    Raises:
        ValueError: The completion begins with another prompt.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        return _split_text(prompt, completion)
    if isinstance(completion, str):
        return prompt, [{"role": ASSISTANT, "content": completion}]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}] if prompt.strip() else []
    if not prompt:
        return last_answer(completion)
    return _without_repeated_prompt(prompt, completion)


def _split_text(prompt: str, completion: str) -> tuple[str, str]:
    # White space around a repeated prompt differs often.
    stripped_prompt = prompt.strip()
    stripped_completion = completion.lstrip()
    is_repeated = len(prompt.split()) >= _MIN_REPEATED_WORDS and stripped_completion.startswith(stripped_prompt)
    answer_text = stripped_completion[len(stripped_prompt) :] if is_repeated else ""
    return (prompt.rstrip(), answer_text) if answer_text.strip() else (prompt, completion)


def _without_repeated_prompt(prompt: list[Message], completion: list[Message]) -> tuple[list[Message], list[Message]]:
    system, questions = _split_system(prompt)
    repeated_system, turns = _split_system(completion)
    # The prompt may be repeated at the beginning. A prompt of one question may also be the last question of a whole
    # conversation: then the turns before it join the prompt.
    possible_ends = [len(questions)]
    if len(questions) == 1:
        possible_ends += range(len(turns), 0, -1)
    for prompt_end in possible_ends:
        prompt_start = prompt_end - len(questions)
        is_repeated = (
            bool(questions) and prompt_end < len(turns) and _are_same_turns(questions, turns[prompt_start:prompt_end])
        )
        if not is_repeated:
            continue
        if system and repeated_system and not _are_same_turns(system, repeated_system, shortest=True):
            raise ValueError("the prompt's system turn and the one that the answer repeats differ")
        return (system or repeated_system) + turns[:prompt_start] + questions, turns[prompt_end:]

    first_role = completion[0]["role"]
    if prompt[-1]["role"] != ASSISTANT and first_role in ("user", *_SYSTEM_ROLES):
        raise ValueError(
            f"the answer begins with a {first_role} turn that does not repeat the prompt: "
            "give the answer alone, or the whole conversation"
        )
    return prompt, completion


def _split_system(turns: list[Message]) -> tuple[list[Message], list[Message]]:
    """Split off the system turns at the beginning."""
    num_system = 0
    while num_system < len(turns) and turns[num_system]["role"] in _SYSTEM_ROLES:
        num_system += 1
    return turns[:num_system], turns[num_system:]


def _are_same_turns(first: Sequence[Message], second: Sequence[Message], shortest: bool = False) -> bool:
    """Whether two conversations agree up to white space; ``shortest``: as far as the shorter of them goes."""
    if len(first) != len(second) and not shortest:
        return False
    return all(
        _comparable(first_turn) == _comparable(second_turn)
        for first_turn, second_turn in zip(first, second, strict=False)
    )


def _comparable(turn: Message) -> tuple[object, ...]:
    # A turn of calls alone has no content.
    return turn["role"], str(turn["content"] or "").strip(), turn.get("tool_calls")


def common_prompt(chosen: Turns, rejected: Turns) -> Turns:
    """Find the prompt with which both answers of a pair begin.

    Args:
        chosen: The preferred answer, with its prompt.
        rejected: The other answer, in the same form (text or messages).

    Returns:
        The prompt. Each answer keeps at least one message of its own.

    Raises:
        ValueError: They begin with different messages.
    """
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _common_text(chosen, rejected)
    num_shared = 0
    # The last message of each stays its answer, even if both are the same.
    while num_shared < min(len(chosen), len(rejected)) - 1 and chosen[num_shared] == rejected[num_shared]:
        num_shared += 1
    if num_shared == 0:
        raise ValueError("'chosen' and 'rejected' begin with different messages: add a 'prompt' column")
    return chosen[:num_shared]


def _common_text(chosen: str, rejected: str) -> str:
    common_text = chosen[: common_length(chosen, rejected)]
    # The prompt of a dialogue in plain text (HH-RLHF) ends with the header of the last answer.
    last_turn = chosen.rfind(_ASSISTANT) + len(_ASSISTANT)
    is_dialogue = _HUMAN in common_text and _ASSISTANT in common_text
    if is_dialogue and last_turn <= len(common_text) and rejected.rfind(_ASSISTANT) < last_turn:
        return chosen[:last_turn]
    # Cut at white space: a word that both answers begin alike belongs to the answers.
    last_space = max(common_text.rfind(" "), common_text.rfind("\n"))
    return common_text[: last_space + 1].rstrip(" ")


def common_length(*sequences: Sequence[Any]) -> int:
    """The length of the beginning that sequences share: characters of texts, or ids of lists."""
    return len(os.path.commonprefix(sequences))  # type: ignore[arg-type]  # noqa: RUF071
