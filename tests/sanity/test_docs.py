"""The pages are whole: formulas reach TeX as they are meant, and links lead to files that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"]
DOCS = [*(ROOT / page for page in PAGES), *sorted((ROOT / "docs").rglob("*.md"))]
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


def links(text):
    """Of a page: (text, target) of each link, code blocks left out."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\[([^\[\]]*)\]\(([^)\s]+)\)", text)


def heading_anchors(page):
    """The anchors that a Markdown viewer makes of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(page, target):
    """Why a link of a page leads nowhere; None when it leads somewhere."""
    if re.match(r"https?://|mailto:", target):
        return None
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    if not file.exists():
        return f"{target}: no such file"
    if anchor and file.suffix == ".md" and anchor not in heading_anchors(file):
        return f"{target}: no such heading"
    return None


def defined_names(file):
    """Functions, classes and methods (`Class.method`) of a source file."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
    return names


def undefined(page, text, target):
    """Why a link such as [`Class.method`](file.py) names something that its file does not define; else None."""
    if not (target.endswith(".py") and text.startswith("`")):
        return None
    name = text.strip("`")
    is_file = "/" in name or name.endswith(".py")
    return None if is_file or name in defined_names(page.parent / target) else f"{target} does not define {name}"


@pytest.mark.parametrize("page", DOCS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    faults = []
    for text, target in links(page.read_text()):
        faults.append(broken(page, target) or undefined(page, text, target))
    assert [fault for fault in faults if fault] == []


def test_a_link_to_nowhere_is_seen():
    page = ROOT / "README.md"
    assert broken(page, "docs/nothing.md") and broken(page, "docs/data.md#nothing")
    assert undefined(page, "`BaseTrainer.nothing`", "rlhf/trainers/base.py")
    assert undefined(page, "`BaseTrainer.measure`", "rlhf/trainers/base.py") is None
    assert broken(page, "docs/data.md") is None and len(links(page.read_text())) > 15


def test_tests_that_the_pages_name_exist():
    source = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"def (test_\w+)\(", source))
    named = {name for page in DOCS for name in re.findall(r"`(test_\w+)`", page.read_text())}
    assert named - defined == set()
