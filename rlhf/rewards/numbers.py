"""Numbers in text: the one that a completion or an answer states."""

import re
from fractions import Fraction
from typing import NamedTuple

_LATEX_FRACTION = re.compile(r"(?P<whole>\d)?\s*\\[dt]?frac\s*\{\s*(?P<top>-?\d+)\s*\}\s*\{\s*(?P<bottom>\d+)\s*\}")
_NUMBER = re.compile(
    # A sign or a currency, where no word or number ends: neither the 2 of H2O nor the 3 of 1.2.3 is a number.
    r"(?P<sign>(?<![\w)\]}%])[-−+])?(?:\\?[$€£])?(?<![A-Za-z\d_])(?<!\d\.)"
    # A fraction, perhaps with a whole number before it: 3/4, 2 1/2.
    r"(?:(?:(?P<whole>\d+) )?(?P<top>\d+)\s?/\s?(?P<bottom>\d+)(?!\d*[.,]\d)"
    # A decimal, perhaps with commas between thousands: 1,234.50, .5.
    r"|(?P<decimal>(?:\d{1,3}(?:(?:,|\{,\})\d{3})++(?!\d)|\d++)(?:\.\d++)?+|(?<!\.)\.\d++)"
    # An exponent of up to three digits: 1e9999 is no number that anyone should compute.
    r"(?P<power>[eE][-+]?\d{1,3}(?!\d))?(?![eE][-+]?\d))"
    r"(?P<percent>\s?\\?%)?"
)
_MAX_DIGITS = 400  # Python refuses to read a number of thousands of digits
_ANSWER_MARK = re.compile(r"####|\\boxed\s*\{")


class Number(NamedTuple):
    """An exact number, and whether it was written as a percentage."""

    value: Fraction
    percent: bool


def stated_number(text: str) -> Number | None:
    r"""The first number after the last ``####`` or ``\boxed{``, or else the last number of the text.

    Args:
        text: a completion, or the text of an answer.
    Returns:
        None where the text holds no number.
    """
    after_mark = _ANSWER_MARK.split(text)[-1]
    is_marked = len(after_mark) < len(text)
    numbers = list(_NUMBER.finditer(_LATEX_FRACTION.sub(_plain_fraction, after_mark)))
    if not numbers:
        return None
    return _parse(numbers[0 if is_marked else -1])


def _plain_fraction(fraction: re.Match[str]) -> str:
    whole_part = f"{fraction['whole']} " if fraction["whole"] else ""
    return f"{whole_part}{fraction['top']}/{fraction['bottom']}"


def _parse(number: re.Match[str]) -> Number | None:
    if len(number.group()) > _MAX_DIGITS:
        return None
    if number["bottom"]:
        if int(number["bottom"]) == 0:
            return None
        value = Fraction(int(number["top"]), int(number["bottom"])) + int(number["whole"] or 0)
    else:
        plain_digits = re.sub(r"[,{}]", "", number["decimal"])
        value = Fraction(plain_digits + (number["power"] or ""))
    is_negative = number["sign"] in ("-", "−")
    return Number(-value if is_negative else value, number["percent"] is not None)
