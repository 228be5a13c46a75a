"""A chat: prompts and commands, one model or two."""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rlhf.data.messages import Message
from rlhf.rollouts import Sampling
from rlhf.runs.files import append_line
from rlhf.serving.chat_model import ChatModel
from rlhf.serving.conversation import Conversation
from rlhf.serving.display import Display

HELP = '''\
/help                  this list
/system TEXT           set the system message; alone, remove it
/clear                 forget the conversation
/undo                  forget the last question and its answer
/retry                 answer the last question again
/tool TEXT             give the result of a tool call
/set                   show the sampling options
/set temperature 0.7   change one: temperature, top_p, top_k,
                       max_new_tokens, seed
/save FILE             add the conversation to a JSONL file, as a row
                       that training reads
/exit                  end; Ctrl-D too
A line that ends with \\ goes on. """ begins and ends several lines.
Ctrl-C stops an answer.'''

_SETTINGS = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "max_new_tokens": "max_tokens",
}  # fmt: skip  # the option, and its name in Sampling


class Chat:
    """A conversation with each of some models, about the same questions.

    Args:
        models: one or two.
        sampling: how tokens are drawn.
        seed: of the random numbers.
        display: where answers are shown.
        system: the system message; None for none.
        tools: schemas of tools for the chat template; None for none.
    """

    def __init__(
        self,
        models: Sequence[ChatModel],
        sampling: Sampling,
        seed: int,
        display: Display,
        system: str | None = None,
        tools: list[Any] | None = None,
    ) -> None:
        self.models, self.sampling, self.seed, self.display = models, sampling, seed, display
        self.conversations = [Conversation(system, tools) for _ in models]
        self._num_answers = 0
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: self.display.note(HELP),
            "system": self._set_system,
            "clear": self._clear,
            "undo": self._undo,
            "retry": self._retry,
            "tool": self._answer_tool,
            "set": self._set,
            "save": self._save,
        }

    def handle(self, prompt: str) -> bool:
        """Answer a prompt, or carry out a command.

        Args:
            prompt: of the user. One that begins with ``/`` is a command.

        Returns:
            Whether the chat goes on.

        Raises:
            ValueError: an unknown command or a wrong value, or the model cannot answer.
            OSError: a file cannot be written.
        """
        if not prompt.strip():
            return True
        if not prompt.startswith("/"):
            self._ask([model.question(prompt) for model in self.models])
            return True
        name, _, text = prompt[1:].partition(" ")
        if name in ("exit", "quit"):
            return False
        if name not in self._commands:
            raise ValueError(f"/{name}: no such command; /help lists them")
        self._commands[name](text.strip())
        return True

    def _ask(self, questions: Sequence[Message]) -> None:
        number = self._num_answers
        self._num_answers += 1
        with self.display.answers([model.name for model in self.models]) as writers:
            for model, conversation, question, writer in zip(
                self.models, self.conversations, questions, writers, strict=True
            ):
                answer = model.answer(conversation, question, self.sampling, self.seed, number, writer.part)
                note = f"cut after {self.sampling.max_tokens} tokens; /set max_new_tokens N" if answer.is_cut else ""
                writer.close("stopped" if answer.is_stopped else note)

    # Commands

    def _set_system(self, text: str) -> None:
        for model, conversation in zip(self.models, self.conversations, strict=True):
            if text and not model.has_template:
                raise ValueError(f"{model.name} has no chat template, so no system message")
            conversation.system = text or None
        self.display.note("system message set" if text else "no system message")

    def _clear(self, _text: str) -> None:
        for conversation in self.conversations:
            conversation.exchanges.clear()
        self.display.note("the conversation is empty")

    def _undo(self, _text: str) -> None:
        self._take_last()
        self.display.note("forgot the last question and its answer")

    def _retry(self, _text: str) -> None:
        self._ask(self._take_last())

    def _take_last(self) -> list[Message]:
        """Remove the last exchange of each model, and return its question."""
        last = [conversation.exchanges[-1] if conversation.exchanges else [] for conversation in self.conversations]
        # A model that was stopped before its first token has no question.
        questions = [exchange[0] for exchange in last if exchange]
        if not questions:
            raise ValueError("there is no question yet")
        for conversation in self.conversations:
            conversation.exchanges.pop()
        return [exchange[0] if exchange else questions[0] for exchange in last]

    def _answer_tool(self, text: str) -> None:
        if not text:
            raise ValueError("/tool: write the result behind it")
        if not all(model.has_template for model in self.models):
            raise ValueError("/tool: a model without a chat template has no tools")
        self._ask([{"role": "tool", "content": text} for _ in self.models])

    def _set(self, text: str) -> None:
        if not text:
            values = {name: getattr(self.sampling, field) for name, field in _SETTINGS.items()}
            self.display.note("  ".join(f"{name} {value}" for name, value in {**values, "seed": self.seed}.items()))
            return
        name, _, value = text.replace("=", " ").partition(" ")
        name, value = name.removeprefix("--"), value.strip()
        if name == "seed":
            self.seed = _number(name, value, int)
            if self.seed < 0:
                raise ValueError(f"/set seed: expected a whole number of at least 0, got {value}")
        elif name in _SETTINGS:
            field = _SETTINGS[name]
            types = {field.name: field.type for field in fields(Sampling)}
            self.sampling = replace(self.sampling, **{field: _number(name, value, types[field])})
        else:
            raise ValueError(f"/set {name}: expected one of {', '.join([*_SETTINGS, 'seed'])}")
        self.display.note(f"{name} is {value}")

    def _save(self, text: str) -> None:
        if not text:
            raise ValueError("/save: name a file, such as chats.jsonl")
        rows = [row for conversation in self.conversations for row in conversation.rows()]
        if not rows:
            raise ValueError("/save: the conversation is empty")
        file = Path(text).expanduser()
        for row in rows:
            append_line(file, row)
        self.display.note(f"{file}: {len(rows)} row{'s' if len(rows) > 1 else ''} added")


def _number(name: str, value: str, number_type: Any) -> Any:
    try:
        return number_type(value)
    except ValueError:
        kind = "a whole number" if number_type is int else "a number"
        raise ValueError(f"/set {name}: expected {kind}, got {value!r}") from None
