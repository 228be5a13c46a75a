"""A Modelfile for Ollama: the chat template in Go's language where it can be derived, and the ends of answers."""

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from rlhf.data import Dialogue
from rlhf.data.messages import Message
from rlhf.data.templates import ChatTemplate
from rlhf.serving.model_folder import ServedModel

_QUOTES = '"""'
_SYSTEM, _QUESTION, _ANSWER, _QUESTION_2 = "\ue000S", "\ue000Q", "\ue000A", "\ue000Z"  # private characters


@dataclass(frozen=True)
class TemplatePieces:
    """The text that a chat template writes around messages.

    Attributes:
        start: at the beginning, without a system message.
        before_system: at the beginning, before a system message.
        after_system: behind it.
        before_question: before a user's message.
        before_answer: between a user's message and the answer.
        after_answer: behind an answer.
    """

    start: str
    before_system: str
    after_system: str
    before_question: str
    before_answer: str
    after_answer: str

    def render(self, messages: list[Message]) -> str:
        """Write a conversation that ends with a question.

        Args:
            messages: of system, user and assistant.

        Returns:
            The prompt of the model.
        """
        text = "" if messages[0]["role"] == "system" else self.start
        around = {
            "system": (self.before_system, self.after_system),
            "user": (self.before_question, self.before_answer),
            "assistant": ("", self.after_answer),
        }
        for message in messages:
            before, after = around[message["role"]]
            text += before + message["content"] + after
        return text

    def go(self) -> str:
        """The template in the language of Go, as Ollama reads it.

        Returns:
            The text behind ``TEMPLATE``.
        """
        system = f"{self.before_system}{{{{ .System }}}}{self.after_system}"
        question = f"{self.before_question}{{{{ .Content }}}}{self.before_answer}"
        answer = f"{{{{ .Content }}}}{self.after_answer}"
        return (
            f"{{{{ if .System }}}}{system}{{{{ else }}}}{self.start}{{{{ end }}}}"
            f'{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{question}'
            f'{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ end }}}}{{{{ end }}}}'
        )


def template_pieces(tokenizer: Any) -> TemplatePieces | None:
    """Derive the pieces of a chat template from conversations that it renders.

    Args:
        tokenizer: with a chat template.

    Returns:
        The pieces; None for a template that is not made of them, such as one that changes earlier answers.
    """
    template = ChatTemplate.of(tokenizer, Dialogue([]))
    chat = _messages([("user", _QUESTION), ("assistant", _ANSWER), ("user", _QUESTION_2)])
    try:
        with_system = _split(template.render_prompt([*_messages([("system", _SYSTEM)]), *chat]), [_SYSTEM, *_CHAT])
        without = _split(template.render_prompt(chat), _CHAT)
    except ValueError:  # it knows no system message, say
        return None
    if with_system is None or without is None:
        return None
    before_system, to_question, to_answer, to_next, at_end = with_system
    start, *rest = without
    start = _without_bos(start, tokenizer)
    # A question is followed by the same text whether an answer is there already or not.
    if rest != [to_answer, to_next, at_end] or to_answer != at_end:
        return None
    before_question = _common_suffix([to_question, to_next, start])
    pieces = TemplatePieces(
        start=start.removesuffix(before_question),
        before_system=_without_bos(before_system, tokenizer),
        after_system=to_question.removesuffix(before_question),
        before_question=before_question,
        before_answer=to_answer,
        after_answer=to_next.removesuffix(before_question),
    )
    is_writable = "{{" not in "".join(vars(pieces).values()) and _QUOTES not in pieces.go()
    return pieces if is_writable and _agrees(pieces, template, tokenizer) else None


def modelfile(model: ServedModel, system: str | None = None) -> str:
    """Write the Modelfile of a model, to lie in its folder.

    Args:
        model: in a folder.
        system: the system message; None for none.

    Returns:
        The text.

    Raises:
        ValueError: the system message holds three quotes.
    """
    lines = ["FROM ."]
    pieces = template_pieces(model.tokenizer) if model.tokenizer.chat_template else None
    if pieces is not None:
        lines.append(f"TEMPLATE {_QUOTES}{pieces.go()}{_QUOTES}")
    lines += [f"PARAMETER stop {_quoted(text)}" for text in model.end_texts]
    if system is not None:
        if _QUOTES in system:
            raise ValueError(f"--system: three quotes ({_QUOTES}) cannot be written into a Modelfile; leave them out")
        lines.append(f"SYSTEM {_QUOTES}{system}{_QUOTES}")
    return "\n".join(lines) + "\n"


_CHAT = [_QUESTION, _ANSWER, _QUESTION_2]


def _messages(turns: list[tuple[str, str]]) -> list[Message]:
    return [{"role": role, "content": content} for role, content in turns]


def _split(text: str, contents: list[str]) -> list[str] | None:
    """The text between contents, which must occur once each and in order."""
    pieces = []
    for content in contents:
        before, found, text = text.partition(content)
        if not found or content in text:
            return None
        pieces.append(before)
    return [*pieces, text]


def _common_suffix(texts: list[str]) -> str:
    reversed_texts = [text[::-1] for text in texts]
    is_shared = takewhile(lambda letters: len(set(letters)) == 1, zip(*reversed_texts, strict=False))
    return "".join(letters[0] for letters in is_shared)[::-1]


def _without_bos(text: str, tokenizer: Any) -> str:
    """Without a BOS token that the tokenizer, and so the server, adds by itself."""
    bos = tokenizer.bos_token
    adds_bos = bos is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return text.removeprefix(bos) if adds_bos else text


def _agrees(pieces: TemplatePieces, template: ChatTemplate, tokenizer: Any) -> bool:
    """Whether both write the same for longer conversations than the pieces come from."""
    turns = [("system", "be brief"), ("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    ends = [("user", "five\nsix")]
    for chat in ([*turns, *ends], [*turns[1:], *ends], ends, [turns[0], *ends]):
        expected = _without_bos(template.render_prompt(_messages(chat)), tokenizer)
        if pieces.render(_messages(chat)) != expected:
            return False
    return True


def _quoted(text: str) -> str:
    return f"{_QUOTES}{text}{_QUOTES}" if '"' in text else f'"{text}"'
