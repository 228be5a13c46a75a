"""Print how readable each room of the package is: size, density, comments, names.

    python scripts/readability.py            # every room of rlhf/
    python scripts/readability.py rlhf/data  # one room, file by file

Lines of code leave out docstrings, comments and blank lines. Density is the number of expression nodes (all but names
and constants) for each line that is not blank. Comments are counted per 100 lines of the file. The length of names is
the mean over all uses of a variable.
"""

import ast
import io
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path

GOALS = "goals: nodes per line <= 1.5, comments per 100 lines >= 5, letters per name >= 7.5"
DIRECTIVES = ("# fmt:", "# noqa", "# type:")
LAYOUT_TOKENS = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.COMMENT}


@dataclass
class Measurement:
    """Sums over files; the properties are the figures that are printed."""

    code: int = 0
    lines: int = 0
    filled: int = 0
    nodes: int = 0
    comments: int = 0
    letters: int = 0
    names: int = 0

    def __add__(self, other: "Measurement") -> "Measurement":
        sums = (a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        return Measurement(*sums)

    @property
    def density(self) -> float:
        return self.nodes / max(self.filled, 1)

    @property
    def comments_per_100(self) -> float:
        return 100 * self.comments / max(self.lines, 1)

    @property
    def name_length(self) -> float:
        return self.letters / max(self.names, 1)


def code_lines(source: str, tree: ast.AST) -> set[int]:
    """The numbers of the lines that hold code: no docstrings, comments or blank lines."""
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT_TOKENS:
            code |= set(range(token.start[0], token.end[0] + 1))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            code -= set(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    return code


def measure(file: Path) -> Measurement:
    """The sums of one file."""
    source = file.read_text()
    tree = ast.parse(source)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    names = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
    expressions = [node for node in ast.walk(tree) if isinstance(node, ast.expr)]
    return Measurement(
        code=len(code_lines(source, tree)),
        lines=len(source.splitlines()),
        filled=sum(bool(line.strip()) for line in source.splitlines()),
        nodes=sum(not isinstance(node, ast.Name | ast.Constant) for node in expressions),
        comments=sum(not comment.startswith(DIRECTIVES) for comment in comments),
        letters=sum(len(name) for name in names),
        names=len(names),
    )


def total(files: list[Path]) -> Measurement:
    """The sums over several files."""
    return sum((measure(file) for file in files), Measurement())


def print_row(name: str, measured: Measurement) -> None:
    figures = f"{measured.density:12.2f}{measured.comments_per_100:12.1f}{measured.name_length:12.1f}"
    print(f"{name:28}{measured.code:8}{figures}")


def main() -> None:
    root = Path(__file__).parents[1] / "rlhf"
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else root
    print(f"{'':28}{'code':>8}{'nodes/line':>12}{'comments':>12}{'names':>12}")
    if folder.resolve() == root:
        for room in sorted(path for path in root.iterdir() if path.is_dir() and any(path.glob("*.py"))):
            print_row(f"rlhf/{room.name}", total(sorted(room.rglob("*.py"))))
    else:
        for file in sorted(folder.rglob("*.py")):
            print_row(file.name, measure(file))
    print_row("together", total(sorted(folder.rglob("*.py"))))
    print(GOALS)


if __name__ == "__main__":
    main()
