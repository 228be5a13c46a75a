"""Formulas in the docs are formulas where they are shown: Markdown cuts some before TeX sees them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = {
    "Big", "Delta", "Vert", "alpha", "bar", "beta", "cdot", "cos", "cosh", "delta", "ell", "epsilon", "exp",
    "frac", "gamma", "ge", "hat", "in", "int", "lVert", "lambda", "le", "left", "log", "mathbb", "mathrm", "max",
    "mid", "min", "mu", "ne", "operatorname", "phi", "pi", "prod", "qquad", "quad", "rVert", "rho", "right",
    "sigma", "sim", "sqrt", "sum", "tau", "text", "tfrac", "theta", "times", "to", "vert", "zeta",
}  # fmt: skip
SPACES = r"\\[,;!: {}]"


def formulas(text):
    """Of a page: (formula, whether it stands in a table)."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for line in text.splitlines():
        bare = re.sub(r"`[^`]*`", "", line)
        for found in re.findall(r"(?<![\\$])\$([^$]+)\$", bare):
            yield found, line.startswith("|")


def fault(formula, in_table):
    """Why a formula is not shown as it is meant; None when it is."""
    if in_table and "|" in formula:
        return "a cell ends at |"
    if formula != formula.strip():
        return "no space inside the dollars"
    if formula.count("{") - formula.count(r"\{") != formula.count("}") - formula.count(r"\}"):
        return "braces"
    if formula.count(r"\left") != formula.count(r"\right"):
        return r"\left without \right"
    rest = re.sub(SPACES, " ", formula)
    if r"\\" in rest:
        return "a line break"
    unknown = set(re.findall(r"\\([a-zA-Z]+|.)", rest)) - COMMANDS
    return f"unknown commands {unknown}" if unknown else None


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_formulas_are_whole(page):
    assert [(formula, why) for formula, table in formulas(page.read_text()) if (why := fault(formula, table))] == []


def test_a_broken_one_is_seen():
    page = "| $\\mathrm{KL}(p\\,\\\\vert \\,q)$ |\n| $a|b$ | $\\frac{1}{2$ |\n\n$x^2$ and `$HOME$`\n"
    assert [fault(*found) for found in formulas(page)] == ["a line break", "a cell ends at |", "braces", None]
    assert sum(1 for _ in formulas((ROOT / "docs/losses.md").read_text())) > 80
