"""A row as pieces of text, each with whether it is learned: what an audit shows of the first rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.data.batch import IGNORE
from rlhf.data.messages import Turns, is_trained

_CONTEXT_TOKENS = 8  # tokens before one that are decoded with it
_LONGEST_CHARACTER = 4  # bytes of a character in UTF-8, and so the most tokens that it can have


@dataclass(frozen=True)
class Piece:
    """A stretch of text, mostly one token.

    Args:
        text: The text.
        learned: Whether it is scored in training.
        special: Whether it is a special token, or the header of a turn.
    """

    text: str
    learned: bool
    special: bool = False


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], labels: Sequence[int]) -> list[Piece]:
    """The text of each token; tokens that share a character are one piece.

    Args:
        tokenizer: Made the ids.
        ids: Token ids.
        labels: For each id, itself or −100 if it is not learned.

    Returns:
        Pieces that together are the text.
    """
    # The header tokens of a template are often added tokens that no special token's attribute names.
    special_ids = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    token_pieces: list[Piece] = []
    piece_start = 0
    for piece_stop in range(1, len(ids) + 1):
        # The text of a token is what it adds behind the tokens before it: at the beginning of a text, some tokenizers
        # drop a space.
        context_start = max(0, piece_start - _CONTEXT_TOKENS)
        text_before = _decode(tokenizer, ids[context_start:piece_start])
        piece_text = _decode(tokenizer, ids[context_start:piece_stop])[len(text_before) :]
        is_incomplete = piece_text.endswith("\N{REPLACEMENT CHARACTER}")
        # Bytes that are no character at all must not swallow the rest of the row.
        if is_incomplete and piece_stop - piece_start < _LONGEST_CHARACTER and piece_stop < len(ids):
            continue  # the rest of the character is in the next token
        is_learned = any(label != IGNORE for label in labels[piece_start:piece_stop])
        is_special = piece_stop == piece_start + 1 and ids[piece_start] in special_ids
        token_pieces.append(Piece(piece_text, is_learned, is_special))
        piece_start = piece_stop
    return token_pieces


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    if not ids:
        return ""
    # Cleaning up removes spaces before punctuation: the pieces would no longer make the text.
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def text_pieces(prompt: Turns, completion: Turns) -> list[Piece]:
    """The text of a prompt and a completion, without a tokenizer.

    Args:
        prompt: Text or messages; nothing of it is learned.
        completion: Text or messages; the assistant's turns are learned unless their weight is 0.

    Returns:
        Pieces, two for each message.
    """
    return _turn_pieces(prompt, is_completion=False) + _turn_pieces(completion, is_completion=True)


def _turn_pieces(turns: Turns, is_completion: bool) -> list[Piece]:
    if isinstance(turns, str):
        return [Piece(turns, is_completion)] if turns else []
    message_pieces = []
    for message in turns:
        is_learned = is_completion and is_trained(message)
        texts: list[Any] = [message[key] for key in ("reasoning_content", "content", "tool_calls") if message.get(key)]
        # The template writes its own header here; without a tokenizer, the role stands for it.
        message_pieces.append(Piece(f"{message['role']}: ", False, special=True))
        message_pieces.append(Piece("\n".join(map(str, texts)) + "\n", is_learned))
    return message_pieces


def middle_left_out(shown: list[Piece], limit: int) -> list[Piece]:
    """Shorten a row to its beginning and its end.

    Args:
        shown: The pieces of a row.
        limit: How many pieces are left; one more says how many are not.

    Returns:
        The pieces.
    """
    if len(shown) <= limit:
        return shown
    end_length = limit // 2
    gap_piece = Piece(f"\n… {len(shown) - 2 * end_length} more …\n", False)
    return [*shown[:end_length], gap_piece, *shown[-end_length:]]
