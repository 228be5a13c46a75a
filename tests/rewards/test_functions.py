"""The built-in rewards, against cases worked out by hand and TRL's own functions."""

import math
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment, think_format_reward

from rlhf.rewards import (
    completion_text,
    exact_match,
    length_reward,
    matches,
    math_answer,
    numeric_answer,
    repetition_penalty,
    soft_overlong_punishment,
    think_format,
)


def as_messages(text):
    return [{"role": "assistant", "content": text}]


def test_the_text_of_a_completion():
    assert completion_text("yes") == completion_text(as_messages("yes")) == "yes"
    assert completion_text([{"content": "yes"}]) == "yes"  # as in TRL's examples, without a role
    turns = [*as_messages("a call"), {"role": "tool", "content": "7"}, *as_messages("42")]
    assert completion_text(turns) == completion_text([*turns, {"role": "tool", "content": "8"}]) == "42"
    assert completion_text(as_messages([{"type": "text", "text": "4"}, {"type": "text", "text": "2"}])) == "42"
    assert completion_text(as_messages(None)) == completion_text([]) == ""


@pytest.mark.parametrize("form", [str, as_messages], ids=["plain", "conversational"])
def test_exact_match(form):
    completions = [form(text) for text in (" Paris\n", "paris", "It is Paris", "Paris")]
    assert exact_match()(completions=completions, answer=["Paris"] * 3 + [None]) == [1.0, 0.0, 0.0, None]
    assert exact_match(ignore_case=True)(completions=completions[:2], answer=["Paris"] * 2) == [1.0, 1.0]
    assert exact_match("city")(completions=completions[:1], city=["Paris"], answer=["Rome"]) == [1.0]
    tagged = exact_match(pattern="<a>(.*?)</a>")
    texts = ["<a>1</a> no, <a>\n2 </a>", "<a>2</a> or <a>1</a>", "2"]
    assert tagged(completions=[form(text) for text in texts], answer=[2, "2", "2"]) == [1.0, 0.0, 0.0]


# Text, and the answers that it is right and wrong for.
NUMBERS = {
    "the last number counts": ("3 and 4 make 7", ["7", "7.0", 7, "#### 7"], ["3", "4", "-7", "77"]),
    "GSM8K": ("6*7=42\n#### 42", ["so 2 times 21\n#### 42"], ["#### 41"]),
    "after the mark the first": ("#### 42\n(checked: 6*7, 2 ways)", ["42"], ["2"]),
    "boxed": (r"\boxed{42}, in 3 steps", ["42"], ["3"]),
    "an empty mark": ("I say 42 ####", [], ["42"]),
    "thousands": ("It costs $1,234,567.50.", ["1234567.5", r"1{,}234{,}567.50"], ["50", "567.5", "1"]),
    "a list": ("2,3,4", ["4"], ["234", "2"]),
    "a sentence's end": ("It is 42.", ["42"], ["0.42"]),
    "dots before": ("so...42", ["42"], ["0.42"]),
    "no whole part": ("p = .5", ["0.5", "1/2"], ["5"]),
    "negative": ("x = -3", ["-3", "−3", "-3.0"], ["3"]),
    "negative money": ("a loss of -$5", ["-5"], ["5"]),
    "negative dollars": ("a loss of $-5", ["-5"], ["5"]),
    "a minus between": ("8-3", ["3"], ["-3"]),
    "a unit behind": ("5kg", ["5"], ["0"]),
    "no number inside a word": ("42 grams of H2O", ["42"], ["2"]),
    "a version": ("42 in v1.2.3", ["42"], ["2.3", "3"]),
    "percent": ("a share of 50%", ["50", "0.5", "50%", "1/2"], ["0.5%", "5", "5000", "5000%"]),
    "the answer in percent": ("it is 0.5", ["50%", "0.5"], ["5%", "5000%"]),
    "LaTeX percent": (r"50\%", ["50%"], ["5%"]),
    "a fraction": ("so 3/4", ["0.75", "6/8", r"\frac{3}{4}", "75%"], ["4", "3", "34"]),
    "a negative fraction": (r"-\frac{3}{4}", ["-0.75", r"\frac{-3}{4}"], ["0.75"]),
    "a mixed number": ("2 1/2 cups", ["2.5", r"2\frac{1}{2}"], ["0.5", "1 1/2", "2"]),
    "a long mixed number": (r"12 \dfrac{1}{2}", ["12.5"], ["2.5", "0.5"]),
    "by zero": ("1/0", [], ["1", "0"]),
    "a power": ("1.5e3 or so", ["1500"], ["1.5", "3"]),
    "no number": ("I do not know", [], ["0", "1"]),
    "absurdly long": ("9" * 5000, [], ["9"]),
    "an absurd power": ("1e999999999", [], ["1"]),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_numeric_answer(case):
    text, right, wrong = NUMBERS[case]
    reward = numeric_answer()
    for answers, want in ((right, 1.0), (wrong, 0.0)):
        assert reward(completions=[text] * len(answers), answer=answers) == [want] * len(answers)
        assert reward(completions=[as_messages(text)] * len(answers), answer=answers) == [want] * len(answers)


def test_numeric_answer_where_there_is_none():
    assert numeric_answer()(completions=["42", "42"], answer=[None, "a dog"]) == [None, None]


def test_numeric_tolerance():
    assert numeric_answer()(completions=["0.333"], answer=["1/3"]) == [0.0]
    assert numeric_answer(tolerance=2e-3)(completions=["0.333", "0.33"], answer=["1/3"] * 2) == [1.0, 0.0]
    assert numeric_answer()(completions=["1000000"], answer=["1000001"]) == [0.0]


@settings(deadline=None, max_examples=50)
@given(value=st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_numbers_however_they_are_written(value):
    reward = numeric_answer()
    texts = [f"{value}", f"{value:,}", f"2 steps: ${value:,}.", f"#### {value}\nafter 2 steps", rf"\boxed{{{value:,}}}"]
    texts += [f"{int(value * 1000)}/1000", f"{value * 100}%"]
    assert reward(completions=texts, answer=[str(value)] * len(texts)) == [1.0] * len(texts)
    assert reward(completions=texts, answer=[str(3 * value + 7777)] * len(texts)) == [0.0] * len(texts)


@settings(deadline=None, max_examples=50)
@given(st.text(alphabet="0123456789.,/-−$%\\{}eE# x\n", max_size=40))
def test_any_text_can_be_scored(text):
    assert numeric_answer()(completions=[text], answer=["7"])[0] in (0.0, 1.0)
    assert numeric_answer()(completions=["7"], answer=[text])[0] in (0.0, 1.0, None)


def test_math_answer_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ValueError, match=r"math_answer needs math-verify: pip install 'rlhf-exact\[math\]'"):
        math_answer()


def test_math_answer_asks_math_verify(monkeypatch):
    def parse(text, parsing_timeout):
        assert parsing_timeout is None  # its alarm would end ours
        return [word for word in text.split() if word.isdigit()]

    def verify(gold, target, timeout_seconds):
        assert timeout_seconds is None
        return gold == target

    monkeypatch.setitem(sys.modules, "math_verify", SimpleNamespace(parse=parse, verify=verify))
    got = math_answer()(completions=["so 42", as_messages("so 41"), "so 42"], solution=["42", "42", "a dog"])
    assert got == [1.0, 0.0, None]


def test_math_answer_really():
    pytest.importorskip("math_verify")
    completions = [r"My answer is \boxed{\frac{2}{6}}", r"My answer is \boxed{\frac{1}{2}}"]
    assert math_answer()(completions=completions, solution=[r"\frac{1}{3}"] * 2) == [1.0, 0.0]


def test_matches():
    assert matches(r"\Ayes.*no\Z")(completions=["yes\nno", as_messages("yes, no"), "yes"]) == [1.0, 1.0, 0.0]
    assert matches("b")(completions=["abc", "ac"]) == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"'\(' is no regular expression"):
        matches("(")
    with pytest.raises(ValueError, match="is no regular expression"):
        exact_match(pattern="[")


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from(["<think>", "</think>", "\n", "a", " "]), max_size=7).map("".join))
def test_think_format_is_that_of_trl(text):
    assert think_format()(completions=[text]) == think_format_reward([as_messages(text)])


IDS = st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=1, max_size=3)


@settings(deadline=None, max_examples=50)
@given(IDS, st.integers(1, 4), st.sampled_from([-1.0, -0.3, 0.0]))
def test_repetition_penalty_is_that_of_trl(ids, size, penalty):
    want = get_repetition_penalty_reward(size, penalty)(ids)
    assert repetition_penalty(size, penalty)(completion_ids=ids) == pytest.approx(want, rel=1e-12)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 60), min_size=1), st.integers(0, 40), st.integers(0, 10))
def test_soft_overlong_punishment_is_that_of_trl(lengths, longest, cache):
    longest += cache
    ids = [[1] * length for length in lengths]
    want = get_soft_overlong_punishment(longest, cache)(ids)
    assert soft_overlong_punishment(longest, cache)(completion_ids=ids) == want


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 30), st.integers(0, 90))
def test_length_reward(target, length):
    (got,) = length_reward(target)(completion_ids=[[1] * length])
    assert got == (-abs(length - target) / target if length < 2 * target else -1.0)
    assert math.copysign(1.0, got) == (1.0 if length == target else -1.0)  # 0.0, not -0.0, at the target


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: length_reward(0), "target must be at least 1"),
        (lambda: repetition_penalty(0), "ngram_size must be at least 1"),
        (lambda: repetition_penalty(2, 0.5), "max_penalty must not be positive"),
        (lambda: soft_overlong_punishment(10, 11), r"soft_punish_cache must be in \[0, max_completion_len = 10\]"),
        (lambda: numeric_answer(tolerance=-1), r"tolerance must be in \[0, 1\)"),
    ],
)
def test_options_are_checked(make, said):
    with pytest.raises(ValueError, match=said):
        make()
