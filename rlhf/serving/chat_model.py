"""A model that answers: its tokens are sampled by the engine in this process, and shown as they arrive."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rlhf.data import Dialogue, answer_end_ids, encode_prompt
from rlhf.data.messages import Message
from rlhf.models import load_model, load_tokenizer
from rlhf.models.kinds import refuse_reward_model
from rlhf.rollouts import LocalEngine, Sampling
from rlhf.serving.answers import Part, PartStream, answer_message
from rlhf.serving.conversation import Conversation
from rlhf.serving.streaming import TextStream

_PROMPT_END = 16  # tokens: long enough for a mark that begins the reasoning


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        message: for the conversation; empty content if the answer was stopped at once.
        is_stopped: whether the user stopped it.
        is_cut: whether ``max_tokens`` cut it.
    """

    message: Message
    is_stopped: bool
    is_cut: bool


class ChatModel:
    """A causal LM with its tokenizer.

    Args:
        model: on its device.
        tokenizer: with a chat template, or without one: then the model continues text.
        name: shown above its answers.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.has_template = bool(tokenizer.chat_template)
        self.engine = LocalEngine(model, tokenizer)
        # Those that training taught: the chat template's end of a turn may be missing in both configurations.
        self.engine.end_ids = list(dict.fromkeys([*self.engine.end_ids, *answer_end_ids(tokenizer)]))

    @classmethod
    def load(cls, name: str, **kwargs: Any) -> "ChatModel":
        """Load a model or an adapter with its base.

        Args:
            name: a folder, or a name on the hub.
            kwargs: of ``from_pretrained``.

        Returns:
            The model, on the accelerator if there is one.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: it holds no causal LM.
        """
        refuse_reward_model(name)
        tokenizer = load_tokenizer(
            name, revision=kwargs.get("revision"), trust_remote_code=kwargs.get("trust_remote_code")
        )
        model: Any = load_model(name, **kwargs)
        if torch.cuda.is_available():
            model = model.to("cuda")
        return cls(model.eval(), tokenizer, Path(name).name or name)

    @property
    def size(self) -> str:
        """Its parameters, type and device in a few words."""
        count = sum(parameter.numel() for parameter in self.model.parameters())
        unit, divisor = ("B", 1e9) if count >= 1e9 else ("M", 1e6)
        return f"{count / divisor:.3g}{unit} parameters, {str(self.model.dtype).removeprefix('torch.')} on " + str(
            self.model.device.type
        )

    def answer(
        self,
        conversation: Conversation,
        question: Message,
        sampling: Sampling,
        seed: int,
        number: int,
        on_part: Callable[[Part], None],
    ) -> Answer:
        """Answer a question, and add both to the conversation.

        Ctrl-C stops the answer; what was written stays. A question without any answer is left out.

        Args:
            conversation: so far; changed.
            question: the user's message, or the result of a tool.
            sampling: how tokens are drawn. ``max_tokens`` is lowered to what is left of the context.
            seed: of the random numbers.
            number: of the answer in this chat. Another one has other random numbers.
            on_part: called with each piece of the answer.

        Returns:
            The answer.

        Raises:
            ValueError: the chat template refuses the conversation, or the context is full.
            FloatingPointError: the model's logits are not finite.
        """
        prompt_ids = self._prompt_ids(conversation, question)
        sampling = replace(sampling, max_tokens=min(sampling.max_tokens, self._room_after(len(prompt_ids))))
        texts = TextStream(self.tokenizer)
        parts = PartStream(self._prompt_end(prompt_ids))
        written: list[Part] = []

        def write(new_parts: list[Part]) -> None:
            written.extend(new_parts)
            for part in new_parts:
                on_part(part)

        def on_token(_row: int, token: int) -> None:
            if token not in self.engine.end_ids:
                write(parts.feed(texts.feed(token)))

        is_stopped = is_cut = False
        try:
            completions = self.engine.generate([prompt_ids], 1, sampling, seed, [number], on_token=on_token)
            is_cut = completions[0][0].finish_reason == "length"
        except KeyboardInterrupt:
            is_stopped = True
        write([*parts.feed(texts.finish()), *parts.finish()])
        message = self._message(texts.text, written)
        conversation.exchanges.append([question, message] if texts.ids or not is_stopped else [])
        return Answer(message, is_stopped, is_cut)

    def question(self, text: str) -> Message:
        """Write a user's text as a message.

        Args:
            text: of the user.

        Returns:
            A user's message, or a text to continue for a model without a chat template.
        """
        return {"role": "user" if self.has_template else "text", "content": text}

    def _prompt_ids(self, conversation: Conversation, question: Message) -> list[int]:
        if not self.has_template:
            # No turns: each text is continued by itself.
            return encode_prompt(self.tokenizer, question["content"])
        messages = [*conversation.messages(), question]
        return encode_prompt(self.tokenizer, Dialogue(messages, tools=conversation.tools))

    def _room_after(self, num_tokens: int) -> int:
        """Tokens of the context that are left for the answer."""
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if context is None:
            return int(1e9)
        if num_tokens >= context:
            raise ValueError(
                f"{self.name}: the conversation has {num_tokens} tokens, and the model's context {context}: "
                "/undo shortens it, /clear begins again"
            )
        return int(context) - num_tokens

    def _prompt_end(self, prompt_ids: list[int]) -> str:
        return str(self.tokenizer.decode(prompt_ids[-_PROMPT_END:])) if self.has_template else ""

    def _message(self, text: str, parts: list[Part]) -> Message:
        if not self.has_template:
            return {"role": "text", "content": text}
        return answer_message(text, parts, str(self.tokenizer.get_chat_template()))
