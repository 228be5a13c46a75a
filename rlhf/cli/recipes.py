"""``rlhf recipes`` and ``rlhf init``: the YAML files that come with the package. Nothing heavy is imported here."""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

import rlhf
from rlhf.cli.options import RaisingParser

_KEY = re.compile(r"^# (for|memory): (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Recipe:
    """A YAML file of options for one command.

    Attributes:
        name: of the file, without its ending.
        command: that reads it, such as ``dpo``.
        task: what it is for.
        memory: that it takes.
        file: where it is.
    """

    name: str
    command: str
    task: str
    memory: str
    file: Path


def recipe_folder() -> Path:
    """The folder of the files: in an installed package inside it, in a checkout beside it."""
    package = Path(rlhf.__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def recipes() -> dict[str, Recipe]:
    """Read the headings of all recipes.

    Returns:
        Recipes by name.
    """
    found = {}
    for file in sorted(recipe_folder().glob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        facts = dict(_KEY.findall(text))
        # The first line is the command that reads the file.
        command = text.split()[2]
        found[file.stem] = Recipe(file.stem, command, facts.get("for", ""), facts.get("memory", ""), file)
    return found


def run(argv: list[str]) -> None:
    """List the recipes.

    Args:
        argv: words of the command line, after the command.

    Raises:
        ValueError: an unknown option.
    """
    parser = RaisingParser("rlhf recipes", description="The recipes that come with the package, by command.")
    parser.parse_args(argv)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("recipe", no_wrap=True)
    table.add_column("for", overflow="fold")
    table.add_column("memory", no_wrap=True)
    for recipe in recipes().values():
        table.add_row(Text(recipe.name), Text(recipe.task), Text(recipe.memory))
    console = Console(highlight=False)
    console.print(table)
    console.print(
        "\nMemory of the weights alone, for large models."
        "\nrlhf init RECIPE writes one; rlhf COMMAND --config FILE --dry_run tells what your rows take."
    )


def run_init(argv: list[str]) -> None:
    """Write a recipe into a file.

    Args:
        argv: words of the command line, after the command.

    Raises:
        ValueError: there is no such recipe.
        OSError: the file exists, or cannot be written.
    """
    parser = RaisingParser("rlhf init", description="Write a recipe into a file of your own (see rlhf recipes).")
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("-o", "--output", metavar="FILE", help="by default RECIPE.yaml in this folder")
    options = parser.parse_args(argv)
    name = options.recipe.replace("-", "_")
    known = recipes()
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]}?" if close else f"one of {', '.join(known)}"
        raise ValueError(f"{options.recipe}: no such recipe; {hint}")
    recipe = known[name]
    file = Path(options.output or f"{name}.yaml")
    text = recipe.file.read_text(encoding="utf-8").replace(f"configs/{name}.yaml", str(file))
    try:
        with file.open("x", encoding="utf-8") as opened:
            opened.write(text)
    except FileExistsError:
        raise FileExistsError(f"{file}: exists already; choose another file with -o") from None
    except OSError as error:
        raise OSError(f"{file}: cannot be written ({error.strerror or error})") from error
    print(f"wrote {file}: change it, then rlhf {recipe.command} --config {file} --dry_run")
