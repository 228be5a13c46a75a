"""Spans of the same text in two tokenizers: they partition both sides, and say the same."""

import itertools
import json

import pytest
import torch
from conftest import close, sentences
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlhf.distillation.alignment import align, concatenate, first_tokens, token_pieces
from rlhf.losses import span_logps

TEXTS = ["the naïve café — déjà vu, “quoted” 日本語のテキスト 🙂🙃 ok", "x = [1, 2];\n\treturn  x  +  1\n"]


def byte_level(texts, size, specials, **kwargs):
    bpe = Tokenizer(models.BPE(unk_token=None))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = bpe.pre_tokenizer.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=specials[0], **kwargs)


def sentence_piece(texts, size):
    """As Llama 2's: a space before the text, spaces as ▁, bytes for what is not in the vocabulary."""
    special = ["<unk>", "<s>", "</s>"]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    )
    state = json.loads(trained.to_str())["model"]
    vocab = state["vocab"] | {f"<0x{b:02X}>": len(state["vocab"]) + b for b in range(256)}
    merges = [tuple(pair) for pair in state["merges"]]
    bpe = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = trained.normalizer
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def tokenizers(tokenizer):
    return {
        "words": tokenizer,
        "other": byte_level([*TEXTS, "the catalogue of the houses", "redder"] * 3, 380, ["</s>"]),
        "pieces": sentence_piece([*sentences(7, 60), "the naïve café"], 400),
    }


PAIRS = [("words", "other"), ("other", "words"), ("words", "pieces"), ("pieces", "other")]


def ids_of(tokenizer, text):
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def texts_of(pieces, span, count):
    texts = [b""] * count
    for piece, s in zip(pieces, span.tolist(), strict=True):
        if s >= 0:
            texts[s] += piece or b""
    return texts


def check(student, teacher):
    """All that is promised, for two lists of pieces; gives the spans' texts."""
    spans = align(student, teacher)
    sides = [texts_of(p, s, spans.total) for p, s in ((student, spans.student), (teacher, spans.teacher))]
    for span in (spans.student, spans.teacher):
        inside = span[span >= 0]
        assert set(inside.tolist()) == set(range(spans.total)) and (inside.diff() >= 0).all()
    # A first space that only one side has is in the first span of text.
    assert [a.lstrip() for a in sides[0][:1]] == [b.lstrip() for b in sides[1][:1]] and sides[0][1:] == sides[1][1:]
    for pieces, span in ((student, spans.student), (teacher, spans.teacher)):
        assert all(piece is None for piece, s in zip(pieces, span.tolist(), strict=True) if s < 0)
    return spans, sides[0]


@pytest.mark.parametrize("name", ["words", "other", "pieces"])
@pytest.mark.parametrize("text", [*TEXTS, *sentences(9, 5), "", " ", "🙂"])
def test_pieces_are_the_text(name, text, tokenizers):
    pieces = token_pieces(tokenizers[name], ids_of(tokenizers[name], text))
    assert pieces[-1] is None and None not in pieces[:-1]
    joined = b"".join(pieces[:-1]).decode()
    assert joined == (" " + text if name == "pieces" and text else text)


@pytest.mark.parametrize("pair", PAIRS)
@settings(max_examples=60, deadline=None)
@given(
    text=st.one_of(st.text(max_size=30), st.lists(st.sampled_from(sentences(11, 9) + TEXTS), max_size=3).map(" ".join))
)
def test_spans_partition_both_sides_and_say_the_same(tokenizers, pair, text):
    text = text.replace("▁", "")  # to SentencePiece the same as a space
    pieces = [token_pieces(tokenizers[name], ids_of(tokenizers[name], text)) for name in pair]
    spans, texts = check(*pieces)
    assert b"".join(texts).decode() in (text, " " + text)
    assert spans.student[-1] == spans.teacher[-1] == spans.total - 1  # EOS with EOS
    assert (spans.student >= 0).all() and (spans.teacher >= 0).all()


@settings(max_examples=200, deadline=None)
@given(data=st.data(), size=st.integers(1, 24))
def test_spans_are_the_smallest(data, size):
    text = bytes(range(65, 65 + size))
    cuts = [sorted({*data.draw(st.sets(st.integers(1, size))), size}) for _ in range(2)]
    sides = [[text[a:b] for a, b in zip([0, *c], c, strict=False)] for c in cuts]
    texts = check(*sides)[1]
    ends = [i for i in range(1, size + 1) if i in cuts[0] and i in cuts[1]]
    assert texts == [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_special_tokens_anywhere(data):
    piece = st.sampled_from([None, b"a", b"ab", b"b", b"ba", b"aab"])
    student = data.draw(st.lists(piece, max_size=10))
    text = b"".join(p or b"" for p in student)
    cuts = sorted({*data.draw(st.sets(st.integers(0, len(text)))), 0, len(text)})
    teacher = [text[a:b] for a, b in itertools.pairwise(cuts)]
    for place in data.draw(st.lists(st.integers(0, len(teacher)), max_size=3)):
        teacher.insert(place, None)
    check(student, teacher)


def test_a_character_in_several_tokens_is_in_one_span():
    smile = "🙂".encode()
    spans = align([b"a", smile[:1], smile[1:], b"b"], [b"a", smile[:2], smile[2:], b"b"])
    assert spans.student.tolist() == [0, 1, 1, 2] and spans.teacher.tolist() == [0, 1, 1, 2]
    # Both break within the character: so do the spans, which are of bytes.
    assert align([smile[:2], smile[2:]], [smile[:2], smile[2:]]).total == 2


def test_specials_meet_their_like_or_nothing():
    spans = align([None, b"a", None, b"b", None, None], [b"a", None, b"b", None])
    assert spans.student.tolist() == [-1, 0, 1, 2, 3, 3] and spans.teacher.tolist() == [0, 1, 2, 3]
    assert align([b"ab", None], [b"a", None, b"b", None]).teacher.tolist() == [0, -1, 0, 1]
    assert align([], []).total == 0 and align([None], [None]).total == 1


def test_a_space_before_the_text():
    spans = align([b" the", b" cat"], [b"the", b" ", b"cat"])
    assert spans.student.tolist() == [0, 1] and spans.teacher.tolist() == [0, 1, 1]
    spans = align([None, b" ", b"the"], [b"th", b"e"])
    assert spans.student.tolist() == [-1, 0, 0] and spans.teacher.tolist() == [0, 0]
    assert align([b" the"], [b" the"]).total == 1


def test_different_texts_are_refused():
    with pytest.raises(ValueError, match=r"differ at byte 5 \('the cat' for the student, 'the cut' for the teacher\)"):
        align([b"the", b" cat"], [b"the", b" cut"])
    with pytest.raises(ValueError, match="differ at byte 3"):
        align([b"the"], [b"the", b" cat"])


def test_a_batch_is_numbered_through():
    first, second = align([b"a", None], [b"a"]), align([b"ab", b"c"], [None, b"a", b"b", b"c"])
    both = concatenate([first, second])
    assert both.student.tolist() == [0, -1, 1, 2] and both.teacher.tolist() == [0, -1, 1, 1, 2] and both.total == 3
    assert concatenate([]).total == 0 and concatenate([]).student.dtype == torch.int64


def test_log_probabilities_of_spans_and_where_they_begin():
    span = torch.tensor([-1, 0, 0, -1, 1, 2, 2, 2])
    logps = torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    want = [sum(p for p, s in zip(logps.tolist(), span.tolist(), strict=True) if s == i) for i in range(3)]
    close(span_logps(logps, span, 3).detach(), want, torch.float64)
    assert torch.autograd.gradcheck(lambda x: span_logps(x, span, 3), logps)
    assert first_tokens(span, 3).tolist() == [1, 4, 5]
    assert first_tokens(span[:0], 0).tolist() == []


def test_added_tokens_that_say_something_are_text(tokenizers):
    added = byte_level(TEXTS, 300, ["</s>"])
    added.add_tokens(["déjà vu", "  "])
    text = TEXTS[0] + "  "
    pieces = token_pieces(added, ids_of(added, text))
    assert "déjà vu".encode() in pieces and b"".join(pieces[:-1]).decode() == text
    check(pieces, token_pieces(tokenizers["other"], ids_of(tokenizers["other"], text)))


def test_other_kinds_of_tokenizers_are_refused():
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    with pytest.raises(ValueError, match=r"neither byte-level nor of SentencePiece's kind \(its decoder: WordPiece\)"):
        token_pieces(wrapped, [1])
