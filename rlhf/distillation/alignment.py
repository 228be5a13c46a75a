"""Alignment of two tokenizations of one text: the smallest spans that begin and end with a token on both sides.

    student    the | cat | s | at | <|im_end|>
    teacher    the |  ca | ts  | at | </s>
    span        0  |   1 . . . | 2 |  3

The tokens of two tokenizers cannot be compared one by one, but the probabilities that two models give to the same
stretch of text can. Text is compared as bytes, because one character may be several tokens.
"""

import json
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Piece = bytes | None  # the bytes of a token; None for a special token, which stands for no text


class Spans(NamedTuple):
    """The span of each token, on both sides.

    Attributes:
        student: int64 [Ns], never falling within a sequence; -1 for a token without a counterpart.
        teacher: int64 [Nt], the same for the teacher's tokens.
        total: number of spans; each span in [0, total) has a token on both sides.
    """

    student: Tensor
    teacher: Tensor
    total: int


def token_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[Piece]:
    """Look up the bytes of each token. ``decode`` cannot do this for a token that is part of a character.

    Args:
        tokenizer: byte-level BPE, or SentencePiece with byte fallback.
        ids: token ids.
    Returns:
        The bytes of each token, which joined are the text; None for a special token (EOS, BOS, padding, a mark of the
        chat template).
    Raises:
        ValueError: a tokenizer of another kind, or an id outside its vocabulary.
    """
    added_tokens = tokenizer.added_tokens_decoder
    # The marks of a chat template are added tokens that are special, but often none of the named special tokens.
    special_ids = set(tokenizer.all_special_ids)
    special_ids |= {index for index, token in added_tokens.items() if token.special}
    to_bytes = _from_byte_level if _is_byte_level(tokenizer) else _from_sentence_piece
    tokens = tokenizer.convert_ids_to_tokens(list(ids))
    pieces: list[Piece] = []
    for index, token in zip(ids, tokens, strict=True):
        if token is None:
            raise ValueError(f"token {index} is not in the vocabulary of the tokenizer, which has {len(tokenizer)}")
        if index in special_ids:
            pieces.append(None)
        elif index in added_tokens:
            # An added token is stored as plain text, without the encoding of the other tokens.
            pieces.append(added_tokens[index].content.encode())
        else:
            pieces.append(to_bytes(token))
    return pieces


def align(student: Sequence[Piece], teacher: Sequence[Piece]) -> Spans:
    """Find the smallest spans whose ends are ends of tokens on both sides.

    Special tokens at the same place of the text form a span of their own: an EOS is aligned with the other tokenizer's
    EOS, whatever the two are called. A special token that only one side has is in no span. A space before the whole
    text that only one side has, as SentencePiece adds it, is ignored.

    Args:
        student: pieces from :func:`token_pieces`.
        teacher: pieces of the same text in the other tokenizer.
    Returns:
        The span of each token.
    Raises:
        ValueError: the texts differ; the message shows where.
    Example:
        >>> align([b"the", b" c", b"ats", None], [b"the ", b"cat", b"s", None])
        Spans(student=tensor([0, 0, 0, 1]), teacher=tensor([0, 0, 0, 1]), total=2)
        >>> align([b"the", b" ca", b"t"], [None, b"the", b" ", b"cat"])
        Spans(student=tensor([0, 1, 1]), teacher=tensor([-1,  0,  1,  1]), total=2)
    """
    student, teacher = _same_text(student, teacher)
    # A span ends wherever both sides have a boundary between tokens, and nowhere else.
    common_ends = sorted(_token_ends(student) & _token_ends(teacher))
    student_keys = _span_keys(student, common_ends)
    teacher_keys = _span_keys(teacher, common_ends)
    # Keys are ordered as the text is, so numbering the sorted ones numbers the spans from left to right.
    shared_keys = sorted(set(student_keys) & set(teacher_keys))
    number_of = {key: number for number, key in enumerate(shared_keys)}
    student_spans, teacher_spans = (
        torch.tensor([number_of.get(key, -1) for key in keys], dtype=torch.int64)
        for keys in (student_keys, teacher_keys)
    )
    return Spans(student_spans, teacher_spans, len(shared_keys))


def align_answer(student: Sequence[Piece], teacher: Sequence[Piece]) -> Spans:
    r"""Align two renderings of one answer, where one template may write more around the answer than the other.

    White space and an empty thought are examples. A token of which any part is on one side alone is in no span.

    Args:
        student: pieces of the answer from :func:`token_pieces`.
        teacher: pieces of the answer in the other tokenizer and template.
    Returns:
        The span of each token.
    Raises:
        ValueError: neither text contains the other, apart from white space around it; the message shows where.
    Example:
        >>> align_answer([b"\n", b"the", b" cat", None], [b"the ", b"cat", b" ", None])
        Spans(student=tensor([-1,  0,  0, -1]), teacher=tensor([ 0,  0, -1, -1]), total=1)
    """
    try:
        return align(student, teacher)
    except ValueError:
        sides = [_without_leading_space(pieces) for pieces in (student, teacher)]
        texts = [_text_of(pieces) for pieces in sides]
        # The answer that both have is the shorter text, without white space around it.
        shared_text = min((text.strip() for text in texts), key=len)
        if any(shared_text not in text for text in texts):
            raise
    # The last occurrence: a thought that one template writes before the answer may quote it.
    token_bounds = [_token_bounds(pieces, text.rfind(shared_text)) for pieces, text in zip(sides, texts, strict=True)]
    # A token may reach over an end of the core. The compared stretch then shrinks to the next boundary of both sides.
    student_ends, teacher_ends = (
        {end for token in tokens for end in token if 0 <= end <= len(shared_text)} for tokens in token_bounds
    )
    common_ends = student_ends & teacher_ends or {0}
    first, last = min(common_ends), max(common_ends)
    indices_inside = [
        [index for index, (start, end) in enumerate(tokens) if first <= start and end <= last]
        for tokens in token_bounds
    ]
    compared = [[pieces[index] for index in indices] for pieces, indices in zip(sides, indices_inside, strict=True)]
    spans = align(*compared)
    # Tokens outside of the compared stretch are in no span.
    student_spans, teacher_spans = (torch.full((len(pieces),), -1) for pieces in sides)
    student_spans[indices_inside[0]] = spans.student
    teacher_spans[indices_inside[1]] = spans.teacher
    return Spans(student_spans, teacher_spans, spans.total)


def align_by_position(student_length: int, teacher_length: int) -> Spans:
    """Align token i of one answer with token i of the other, as far as the shorter one goes.

    Args:
        student_length: tokens of the student's answer.
        teacher_length: tokens of the teacher's answer.
    Returns:
        One span for each two such tokens.
    """
    total = min(student_length, teacher_length)
    positions = torch.arange(max(student_length, teacher_length))
    spans = torch.where(positions < total, positions, -1)
    return Spans(spans[:student_length], spans[:teacher_length], total)


def concatenate(sequences: Sequence[Spans]) -> Spans:
    """Join the spans of several sequences into those of a flat batch, numbered through.

    Args:
        sequences: spans of each sequence, in the order of the batch.
    Returns:
        Spans over all tokens of the batch.
    """
    # An empty start, so that no sequences at all give tensors of the right type.
    no_spans = torch.empty(0, dtype=torch.int64)
    student_parts, teacher_parts = [no_spans], [no_spans]
    total = 0
    for spans in sequences:
        student_parts.append(_shifted(spans.student, total))
        teacher_parts.append(_shifted(spans.teacher, total))
        total += spans.total
    return Spans(torch.cat(student_parts), torch.cat(teacher_parts), total)


def first_tokens(spans: Tensor, total: int) -> Tensor:
    """Find the token at which each span begins: there both models have read the same text.

    Args:
        spans: int64 [N], one side of :class:`Spans`.
        total: number of spans.
    Returns:
        int64 [total], indices into ``spans``.
    """
    positions = torch.arange(len(spans), device=spans.device)
    # Tokens without a span are written to one more entry, which is dropped.
    slots = torch.where(spans < 0, total, spans)
    first = torch.full((total + 1,), len(spans), device=spans.device)
    return first.scatter_reduce(0, slots, positions, "amin")[:total]


def _shifted(spans: Tensor, offset: int) -> Tensor:
    return torch.where(spans < 0, spans, spans + offset)


def _text_of(pieces: Sequence[Piece]) -> bytes:
    return b"".join(piece or b"" for piece in pieces)


def _same_text(student: Sequence[Piece], teacher: Sequence[Piece]) -> tuple[Sequence[Piece], Sequence[Piece]]:
    """Both sides without a leading space that only one of them has; raises where their texts differ."""
    student_text, teacher_text = _text_of(student), _text_of(teacher)
    if student_text == b" " + teacher_text:
        return _without_leading_space(student), teacher
    if teacher_text == b" " + student_text:
        return student, _without_leading_space(teacher)
    if student_text != teacher_text:
        raise ValueError(_difference(student_text, teacher_text))
    return student, teacher


def _difference(student_text: bytes, teacher_text: bytes) -> str:
    """The message that shows where two texts differ, with a little of what is around."""
    different = (
        position
        for position, (student_byte, teacher_byte) in enumerate(zip(student_text, teacher_text, strict=False))
        if student_byte != teacher_byte
    )
    position = next(different, min(len(student_text), len(teacher_text)))
    student_excerpt, teacher_excerpt = (
        text[max(position - 10, 0) : position + 20].decode(errors="replace") for text in (student_text, teacher_text)
    )
    return (
        f"the two tokenizers do not have the same text: they differ at byte {position} ("
        f"{student_excerpt!r} for the student, {teacher_excerpt!r} for the teacher)"
    )


def _without_leading_space(pieces: Sequence[Piece]) -> list[Piece]:
    pieces = list(pieces)
    first = next((index for index, piece in enumerate(pieces) if piece), None)
    if first is None:
        return pieces
    return [*pieces[:first], (pieces[first] or b"").removeprefix(b" "), *pieces[first + 1 :]]


def _token_bounds(pieces: Sequence[Piece], offset: int) -> list[tuple[int, int]]:
    """Start and end of each piece, in bytes from ``offset``."""
    ends = [-offset]
    for piece in pieces:
        ends.append(ends[-1] + len(piece or b""))
    return list(pairwise(ends))


def _token_ends(pieces: Sequence[Piece]) -> set[int]:
    return {end for _, end in _token_bounds(pieces, 0)} - {0}


def _span_keys(pieces: Sequence[Piece], common_ends: list[int]) -> list[tuple[int, bool]]:
    """For each token the end of its span in bytes, and whether it is special: special tokens come after their text."""
    keys = []
    for piece, (_, end) in zip(pieces, _token_bounds(pieces, 0), strict=True):
        if piece is None:
            keys.append((end, True))
            continue
        # The span ends at the next boundary of both sides. An empty piece, which lost the leading space, joins the
        # text that follows it.
        index = bisect_left(common_ends, end)
        keys.append((common_ends[index] if index < len(common_ends) else end, False))
    return keys


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether tokens are written in GPT-2's alphabet of bytes; False for SentencePiece, an error for other kinds."""
    # The decoder alone is read: to serialise the whole tokenizer takes a tenth of a second.
    decoder = tokenizer.backend_tokenizer.decoder if tokenizer.is_fast else None
    decoder_kinds = set() if decoder is None else _decoder_kinds(json.loads(decoder.__getstate__()))
    if "ByteLevel" in decoder_kinds:
        return True
    if decoder_kinds & {"ByteFallback", "Metaspace"}:
        return False
    raise ValueError(
        f"the tokenizer of {tokenizer.name_or_path or 'this model'} is neither byte-level nor of SentencePiece's kind "
        f"(its decoder: {', '.join(sorted(decoder_kinds)) or 'none'}): the bytes of its tokens are not known"
    )


def _decoder_kinds(decoder: dict[str, Any]) -> set[str]:
    """Types of a decoder and of all decoders within it."""
    inner = (_decoder_kinds(part) for part in decoder.get("decoders", []))
    return {decoder["type"]}.union(*inner)


@lru_cache(1)
def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: a printable character for each byte, which is the byte's own where that is printable."""
    # Bytes that are no printable character of Latin-1 are numbered on from 256, in order.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}


def _from_byte_level(token: str) -> bytes:
    byte_of = _byte_of_character()
    return bytes(byte_of[character] for character in token)


def _from_sentence_piece(token: str) -> bytes:
    # A byte without a character of its own is written as its number, <0x0A>; a space as ▁.
    is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    if is_byte:
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()
