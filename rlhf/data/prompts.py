"""Where a prompt ends and its answer begins: the one definition for every trainer."""

import os

from rlhf.data.messages import Message, Turns

_SYSTEM = ("system", "developer")
_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # Anthropic's plain text
_WORDS = 3  # a shorter text may stand before an answer that begins alike by chance


def last_answer(turns: list[Message]) -> tuple[list[Message], list[Message]]:
    """A conversation before its last answer, and the answer: the assistant's last turns with tool turns between them.

    Raises:
        ValueError: no assistant's turn; lists the roles.
    """
    last = max((index for index, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
    if last is None:
        raise ValueError(f"no assistant's turn: the roles are {roles_of(turns)}; --roles theirs=assistant names it")
    first = last
    for index in range(last, -1, -1):
        if turns[index]["role"] not in ("assistant", "tool"):
            break
        first = index if turns[index]["role"] == "assistant" else first
    return turns[:first], turns[first : last + 1]


def roles_of(turns: list[Message]) -> str:
    return ", ".join(sorted({str(turn["role"]) for turn in turns}))


def split_prompt(prompt: Turns, completion: Turns) -> tuple[Turns, Turns]:
    """Both in one form, and the completion without a prompt that it repeats, up to white space and system turns.

    Raises:
        ValueError: the completion begins with another prompt.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        repeated = len(prompt.split()) >= _WORDS and completion.lstrip().startswith(prompt.strip())
        rest = completion.lstrip()[len(prompt.strip()) :] if repeated else ""
        return (prompt.rstrip(), rest) if rest.strip() else (prompt, completion)
    if isinstance(completion, str):
        return prompt, [{"role": "assistant", "content": completion}]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}] if prompt.strip() else []
    if not prompt:
        return last_answer(completion)
    return _without_repeated(prompt, completion)


def _without_repeated(prompt: list[Message], completion: list[Message]) -> tuple[list[Message], list[Message]]:
    system, core = _system_first(prompt)
    own_system, own = _system_first(completion)
    # A prompt that is one question may be the last one of a conversation.
    ends = [len(core)] + [i + 1 for i in range(len(own) - 1, -1, -1) if len(core) == 1]
    for end in ends:
        begins = own[end - len(core) : end]
        if core and end < len(own) and len(begins) == len(core) and all(map(_same, core, begins)):
            if system and own_system and not all(map(_same, system, own_system)):
                raise ValueError("the prompt's system turn and the one that the answer repeats differ")
            return (system or own_system) + own[: end - len(core)] + core, own[end:]
    if prompt[-1]["role"] != "assistant" and completion[0]["role"] in ("user", *_SYSTEM):
        raise ValueError(
            f"the answer begins with a {completion[0]['role']} turn that does not repeat the prompt: "
            "give the answer alone, or the whole conversation"
        )
    return prompt, completion


def _system_first(turns: list[Message]) -> tuple[list[Message], list[Message]]:
    count = next((i for i, turn in enumerate(turns) if turn["role"] not in _SYSTEM), len(turns))
    return turns[:count], turns[count:]


def _same(one: Message, other: Message) -> bool:
    written = [(turn["role"], str(turn["content"] or "").strip(), turn.get("tool_calls")) for turn in (one, other)]
    return written[0] == written[1]


def common_prompt(chosen: Turns, rejected: Turns) -> Turns:
    """What both answers of a pair begin with.

    Raises:
        ValueError: they begin with different messages.
    """
    if isinstance(chosen, str) and isinstance(rejected, str):
        common = os.path.commonprefix([chosen, rejected])  # noqa: RUF071  # characters are meant
        end = chosen.rfind(_ASSISTANT) + len(_ASSISTANT)
        if _HUMAN in common and _ASSISTANT in common and end <= len(common) and rejected.rfind(_ASSISTANT) < end:
            return chosen[:end]
        # Cut at white space: a word that both answers begin alike belongs to the answers.
        return common[: max(common.rfind(" "), common.rfind("\n")) + 1].rstrip(" ")
    same = 0
    while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
        same += 1
    if same == 0:
        raise ValueError("'chosen' and 'rejected' begin with different messages: add a 'prompt' column")
    return chosen[:same]
