"""The tokens of a text, and which token a character belongs to."""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from rlhf.data.prompts import common_length


@dataclass(frozen=True)
class TokenizedText:
    """A text as ids.

    Args:
        tokenizer: Made the ids.
        text: The text.
        add_special_tokens: Whether the tokenizer added its own special tokens.
        ids: The ids.
        offsets: First and last character (exclusive) of each id. None if the tokenizer does not know them: then a
            border is found by tokenising the text before it.
    """

    tokenizer: PreTrainedTokenizerBase
    text: str
    add_special_tokens: bool
    ids: list[int]
    offsets: list[tuple[int, int]] | None

    # A border is a character. A token may reach over it: for the start of an answer that token belongs to the answer
    # (`first_token_after`), and so it does for its end (`first_token_from`).

    def first_token_after(self, border: int) -> int:
        """Index of the first token that holds a character at or after ``border``; it may begin before."""
        if self.offsets is None:
            return self._tokens_before(border)[1]
        token_index = bisect_right(self.offsets, border, key=lambda offset: offset[1])
        if token_index and self._crosses_with_space(token_index - 1, border):
            return token_index - 1
        return token_index

    def first_token_from(self, border: int) -> int:
        """Index of the first token that begins at or after ``border``."""
        if self.offsets is None:
            num_before, num_shared = self._tokens_before(border)
            # The first token that differs reaches over the border.
            return num_shared if num_shared == num_before else num_shared + 1
        return bisect_left(self.offsets, border, key=lambda offset: offset[0])

    def without_first(self) -> "TokenizedText":
        return self._replaced(self.ids[1:], self.offsets and self.offsets[1:])

    def without_last(self) -> "TokenizedText":
        return self._replaced(self.ids[:-1], self.offsets and self.offsets[:-1])

    def with_last(self, token: int) -> "TokenizedText":
        """With one more token, which stands behind the text."""
        # A place of its own behind the text keeps the offsets in order, as binary search needs.
        offset_behind = (len(self.text), len(self.text) + 1)
        return self._replaced([*self.ids, token], self.offsets and [*self.offsets, offset_behind])

    def _replaced(self, ids: list[int], offsets: list[tuple[int, int]] | None) -> "TokenizedText":
        return replace(self, ids=ids, offsets=offsets)

    def _tokens_before(self, border: int) -> tuple[int, int]:
        """How many tokens the text before ``border`` has, and how many of them begin the ids of the whole text."""
        # Cut there, the text may be split otherwise near the border, so only the common ids count.
        ids_before = tokenize(self.tokenizer, self.text[:border], self.add_special_tokens).ids
        return len(ids_before), common_length(ids_before, self.ids)

    def _crosses_with_space(self, index: int, border: int) -> bool:
        """Whether a token reaches over ``border`` with white space.

        Tokenizers with ``trim_offsets`` leave white space out of the offsets, so the text of the token has to be asked.
        """
        assert self.offsets is not None
        token_start, token_end = self.offsets[index]
        next_offsets = self.offsets[index + 1 : index + 2]
        is_covered = bool(next_offsets) and next_offsets[0][0] <= border
        is_space_next = self.text[border : border + 1].isspace()
        is_word = bool(self.text[token_start:token_end].strip())
        if token_end != border or is_covered or not is_space_next or not is_word:
            return False
        return str(self.tokenizer.decode(self.ids[index]))[-1:].isspace()


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool) -> TokenizedText:
    """Tokenise a text as a whole.

    Args:
        tokenizer: Any tokenizer; the slow ones have no offsets.
        text: The text.
        add_special_tokens: Whether the tokenizer adds its own special tokens, such as BOS.

    Returns:
        Ids and offsets.
    """
    if not tokenizer.is_fast:
        token_ids = list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
        return TokenizedText(tokenizer, text, add_special_tokens, token_ids, None)
    encoding = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    offsets = encoding["offset_mapping"]
    # Special tokens that are added behind the text have offsets (0, 0): move them behind the text, to keep the order.
    for token_index in range(len(offsets) - 1, 0, -1):
        if offsets[token_index] != (0, 0):
            break
        offsets[token_index] = (len(text), len(text) + 1)
    return TokenizedText(tokenizer, text, add_special_tokens, encoding["input_ids"], offsets)


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Look up the id of EOS.

    Args:
        tokenizer: Any tokenizer.

    Returns:
        The id.

    Raises:
        ValueError: The tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token: set tokenizer.eos_token, so that answers learn to end")
    return tokenizer.eos_token_id


def tokenize_plain(tokenizer: PreTrainedTokenizerBase, text: str, ends: bool) -> TokenizedText:
    """Tokenise plain text with the tokenizer's special tokens, none of them twice.

    Args:
        tokenizer: Any tokenizer.
        text: The text.
        ends: Whether the text ends with an EOS; otherwise one that the tokenizer adds is removed.

    Returns:
        Ids and offsets.

    Raises:
        ValueError: The text is to end and the tokenizer has no EOS.
    """
    tokenised = tokenize(tokenizer, text, add_special_tokens=True)
    bos_token_id, eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    has_two_bos = bos_token_id is not None and tokenised.ids[:2] == [bos_token_id, bos_token_id]
    # Two that are both in the text are the user's.
    if has_two_bos and not text.startswith(str(tokenizer.bos_token) * 2):
        tokenised = tokenised.without_first()  # one is in the text, one was added
    if eos_token_id is None:
        return tokenised.with_last(eos_id(tokenizer)) if ends else tokenised
    # EOS may be in the text, be added by the tokenizer, both or neither: in the end there is one, or none.
    is_written = text.rstrip().endswith(str(tokenizer.eos_token))
    is_last = tokenised.ids[-1:] == [eos_token_id]
    is_added = is_last and (not is_written or tokenised.ids[-2:] == [eos_token_id, eos_token_id])
    if is_added:
        tokenised = tokenised.without_last()
    return tokenised.with_last(eos_token_id) if ends and not is_written else tokenised
