"""Text of an answer while its tokens arrive."""

import re

from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_REPLACEMENT = "\ufffd"  # decoders write it for bytes that are no whole character


class TextStream:
    """Decode tokens one by one: the pieces of text, joined, are the text of all tokens decoded together.

    All tokens so far are decoded each time, because a decoder may drop a space at the start of its input. Characters
    that further tokens could change are held back: those of incomplete bytes.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self._shown_text = ""

    def feed(self, token: int) -> str:
        """Add a token.

        Args:
            token: its id.

        Returns:
            The text that is certain now, often empty.
        """
        self.ids.append(token)
        num_stable = len(self.ids)
        # Byte tokens are decoded as a run: one wrong byte turns all of them into replacement characters.
        while num_stable and self._is_byte(self.ids[num_stable - 1]):
            num_stable -= 1
        text = self._decode(self.ids[:num_stable])
        return self._new_part(text.rstrip(_REPLACEMENT))

    def finish(self) -> str:
        """End the text.

        Returns:
            What was held back.
        """
        return self._new_part(self.text)

    @property
    def text(self) -> str:
        """The text of all tokens so far."""
        return self._decode(self.ids)

    def _new_part(self, text: str) -> str:
        if not text.startswith(self._shown_text):
            return ""
        new_part = text[len(self._shown_text) :]
        self._shown_text = text
        return new_part

    def _is_byte(self, token: int) -> bool:
        name = self.tokenizer.convert_ids_to_tokens(token)
        return isinstance(name, str) and _BYTE_TOKEN.fullmatch(name) is not None

    def _decode(self, ids: list[int]) -> str:
        # With special tokens, because marks of reasoning and of calls may be such tokens.
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
