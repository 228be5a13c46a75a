"""The same text in two tokenizers: stretches that begin and end with a token on both sides.

    student    the | cat | s | at | <|im_end|>
    teacher    the |  ca | ts  | at | </s>
    span        0  |   1 . . . | 2 |  3

Token by token two tokenizers cannot be compared; the probability of a stretch of text that both can cut out can. Text
is compared as bytes, so that a character whose bytes are several tokens has its place inside a span like any other.
"""

import json
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Piece = bytes | None  # what a token says; None for one that says nothing, like an EOS


class Spans(NamedTuple):
    """Which span each token is in.

    ``student`` and ``teacher`` are int64 [Ns] and [Nt], never falling within a sequence, with -1 for a token without a
    counterpart; every span in [0, total) has a token on both sides.
    """

    student: Tensor
    teacher: Tensor
    total: int


def token_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[Piece]:
    """The bytes that each token stands for; None for a special token (EOS, BOS, padding, a mark of the chat template).

    Joined, they are the text, also where a token is part of a character, which ``decode`` cannot show.

    Raises:
        ValueError: neither byte-level BPE nor SentencePiece's pieces with byte fallback; or an unknown id.
    """
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)}
    to_bytes = _from_byte_level if _is_byte_level(tokenizer) else _from_sentence_piece
    pieces: list[Piece] = []
    for index, token in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True):
        if token is None:
            raise ValueError(f"token {index} is not in the vocabulary of the tokenizer, which has {len(tokenizer)}")
        if index in special:
            pieces.append(None)
        else:  # an added token is written as it is
            pieces.append(added[index].content.encode() if index in added else to_bytes(token))
    return pieces


def align(student: Sequence[Piece], teacher: Sequence[Piece]) -> Spans:
    """The smallest spans whose ends are ends of tokens on both sides.

    Special tokens at the same place of the text are a span of their own (an EOS and the other's EOS, whatever they are
    called); one that only one side has is in no span. A space before the whole text that only one side has (which
    SentencePiece puts there) belongs to no text.

    Args:
        student, teacher: from :func:`token_pieces`, of the same text.
    Raises:
        ValueError: the texts differ; says where.
    Example:
        >>> align([b"the", b" c", b"ats", None], [b"the ", b"cat", b"s", None])
        Spans(student=tensor([0, 0, 0, 1]), teacher=tensor([0, 0, 0, 1]), total=2)
        >>> align([b"the", b" ca", b"t"], [None, b"the", b" ", b"cat"])
        Spans(student=tensor([0, 1, 1]), teacher=tensor([-1,  0,  1,  1]), total=2)
    """
    sides = _same_text(list(student), list(teacher))
    common = sorted(_ends(sides[0]) & _ends(sides[1]))
    keys = [_keys(side, common) for side in sides]
    number = {key: i for i, key in enumerate(sorted(set(keys[0]) & set(keys[1])))}
    first, second = (torch.tensor([number.get(key, -1) for key in side], dtype=torch.int64) for side in keys)
    return Spans(first, second, len(number))


def join(spans: Sequence[Spans]) -> Spans:
    """Those of several sequences one after the other, with spans numbered through: a batch, flat."""
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    total = 0
    for one in spans:
        for side, span in zip(sides, (one.student, one.teacher), strict=True):
            side.append(torch.where(span < 0, span, span + total))
        total += one.total
    empty = torch.empty(0, dtype=torch.int64)
    return Spans(torch.cat([empty, *sides[0]]), torch.cat([empty, *sides[1]]), total)


def first_tokens(span: Tensor, total: int) -> Tensor:
    """Where each span begins, [total]: there both models have read the same text, and their distributions compare."""
    places = torch.arange(len(span), device=span.device)
    found = torch.full((total + 1,), len(span), device=span.device)
    return found.scatter_reduce(0, torch.where(span < 0, total, span), places, "amin")[:total]


def _same_text(student: list[Piece], teacher: list[Piece]) -> tuple[list[Piece], list[Piece]]:
    """Both sides, less a first space that only one of them has."""
    ours, theirs = (b"".join(piece or b"" for piece in side) for side in (student, teacher))
    if ours == b" " + theirs:
        student, ours = _without_space(student), theirs
    elif theirs == b" " + ours:
        teacher, theirs = _without_space(teacher), ours
    if ours != theirs:
        place = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(map(len, (ours, theirs)))
        )
        here, there = (text[max(place - 10, 0) : place + 20].decode(errors="replace") for text in (ours, theirs))
        raise ValueError(
            f"the two tokenizers do not have the same text: they differ at byte {place} ({here!r} for the student, "
            f"{there!r} for the teacher)"
        )
    return student, teacher


def _without_space(pieces: list[Piece]) -> list[Piece]:
    first = next(i for i, piece in enumerate(pieces) if piece)
    return [*pieces[:first], (pieces[first] or b"")[1:], *pieces[first + 1 :]]


def _ends(pieces: list[Piece]) -> set[int]:
    ends, end = set(), 0
    for piece in pieces:
        end += len(piece or b"")
        ends.add(end)
    return ends - {0}


def _keys(pieces: list[Piece], common: list[int]) -> list[tuple[int, bool]]:
    """For each token where its span ends, and whether it is one of special tokens, which comes after the text there."""
    keys, end = [], 0
    for piece in pieces:
        end += len(piece or b"")
        if piece is None:
            keys.append((end, True))
            continue
        place = bisect_left(common, end)  # a piece that lost its only byte, the first space, goes with what follows
        keys.append((common[place] if place < len(common) else end, False))
    return keys


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Raises for what is neither byte-level nor SentencePiece."""
    # The decoder alone: to write out the whole tokenizer takes a tenth of a second.
    decoder = tokenizer.backend_tokenizer.decoder if tokenizer.is_fast else None
    kinds = set() if decoder is None else _kinds(json.loads(decoder.__getstate__()))
    if "ByteLevel" in kinds:
        return True
    if kinds & {"ByteFallback", "Metaspace"}:
        return False
    raise ValueError(
        f"the tokenizer of {tokenizer.name_or_path or 'this model'} is neither byte-level nor of SentencePiece's kind "
        f"(its decoder: {', '.join(sorted(kinds)) or 'none'}): the bytes of its tokens are not known"
    )


def _kinds(decoder: dict[str, Any]) -> set[str]:
    return {decoder["type"]}.union(*(_kinds(one) for one in decoder.get("decoders", [])))


@lru_cache(1)
def _byte_of() -> dict[str, int]:
    """GPT-2's alphabet: a printable character for each byte, itself where it is one already."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _from_byte_level(token: str) -> bytes:
    return bytes(_byte_of()[character] for character in token)


def _from_sentence_piece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()
