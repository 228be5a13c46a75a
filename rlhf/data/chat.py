"""From text and conversations to token ids: which tokens the assistant wrote, and where each answer ends."""

import os

from transformers import PreTrainedTokenizerBase

from rlhf.data.formats import Message, Turns

Tokens = tuple[list[int], list[bool]]  # ids, and which of them are scored


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Plain text with the tokenizer's own special tokens and an EOS."""
    return _with_eos(tokenizer, tokenizer(text)["input_ids"])


def encode_conversation(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> Tokens:
    """A conversation, scored on the assistant's turns up to and including the token that ends each.

    The turns are found by rendering the conversation turn by turn, so the template needs no ``{% generation %}``.
    A template that rewrites earlier turns (dropping their reasoning, say) admits no such split: then only the last
    answer is scored.
    """
    _check_template(tokenizer)
    pieces: list[tuple[str, bool]] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = _around(tokenizer, messages, index)
        if not before.startswith(done) or not after.startswith(before):
            last = max(i for i, turn in enumerate(messages) if turn["role"] == "assistant")
            prompt, completions = encode_completions(tokenizer, messages[:last], [messages[last : last + 1]])
            return prompt + completions[0], [False] * len(prompt) + [True] * len(completions[0])
        pieces += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    ids: list[int] = []
    scored: list[bool] = []
    for number, (text, answer) in enumerate(pieces):
        piece = _ids(tokenizer, text)
        end = _end_of_answer(tokenizer, piece) if answer else None
        if number == len(pieces) - 1:  # what follows the last answer is never generated
            piece = piece[:end] if end else _with_eos(tokenizer, piece)
            end = len(piece)
        ids += piece
        scored += [answer and (end is None or position < end) for position in range(len(piece))]
    return ids, scored


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Turns) -> list[int]:
    """What a policy is given to answer: text, or turns in the chat template up to where the assistant begins."""
    return encode_completions(tokenizer, prompt, [])[0]


def encode_completions(
    tokenizer: PreTrainedTokenizerBase, prompt: Turns, completions: list[Turns]
) -> tuple[list[int], list[list[int]]]:
    """A prompt and its completions, tokenised apart: the prompt's ids are the same whatever follows."""
    if isinstance(prompt, str):
        return _prompt_ids(tokenizer, prompt), [_with_eos(tokenizer, _ids(tokenizer, str(c))) for c in completions]
    _check_template(tokenizer)
    turns = [list(completion) for completion in completions if not isinstance(completion, str)]
    before = _render(tokenizer, prompt, generate=True)
    full = [_render(tokenizer, prompt + turn) for turn in turns]
    # All of `before`, unless the template rewrites it.
    common = os.path.commonprefix([before, *full])  # noqa: RUF071  # characters are meant
    encoded = []
    for text in full:
        ids = _ids(tokenizer, text[len(common) :])
        end = _end_of_answer(tokenizer, ids)
        encoded.append(ids[:end] if end else _with_eos(tokenizer, ids))
    return _ids(tokenizer, common), encoded


def _around(tokenizer: PreTrainedTokenizerBase, messages: list[Message], index: int) -> tuple[str, str]:
    """The rendering up to where the assistant's turn ``index`` begins, and up to where it ends."""
    after = _render(tokenizer, messages[: index + 1])
    before = _render(tokenizer, messages[:index], generate=True) if index else ""
    if index == 0 or before == _render(tokenizer, messages[:index]):  # the template has no generation prompt
        before = after[: max(after.find(str(messages[index].get("content")), len(before)), 0)]
    return before, after


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], generate: bool = False) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)  # type: ignore[return-value]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    ids = tokenizer(prompt)["input_ids"]
    ended = ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(str(tokenizer.eos_token))
    return ids[:-1] if ended else ids


def _with_eos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token: set tokenizer.eos_token, so that answers learn to end")
    return ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]


def _end_of_answer(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> int | None:
    """Number of ids up to and including the token that ends the answer; None when the template sets none."""
    for position in range(len(ids), 0, -1):
        if ids[position - 1] in tokenizer.added_tokens_decoder:
            return position
        if str(tokenizer.decode(ids[position - 1])).strip():
            return None
    return None


def _check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise ValueError(
            "the data is conversational but the tokenizer has no chat template: pass --chat_template_path "
            "(a .jinja file or a model folder), or use plain 'prompt' and 'completion' text"
        )
