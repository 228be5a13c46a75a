"""What a user gets from the wheel: run by `make wheel` with the Python of an environment that holds nothing else.

The package must come from the wheel, carry its types and its configs, answer `--help`, and each shipped config must be
read to its end: a data file that does not exist is what each command complains of.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import rlhf
from rlhf.cli.recipes import recipes

PACKAGE = Path(rlhf.__file__).parent
COMMAND = Path(sys.executable).parent / "rlhf"
MISSING = "no-such-file.jsonl"


def run(*arguments: str, folder: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command in an empty folder, where no checkout can lend it a file."""
    return subprocess.run([str(COMMAND), *arguments], cwd=folder, capture_output=True, text=True)


def main() -> None:
    """Raise `AssertionError` for the first thing that is missing."""
    assert "site-packages" in PACKAGE.parts, f"{PACKAGE} is a checkout, not an installed wheel"
    assert (PACKAGE / "py.typed").exists()
    assert {"report.html.jinja", "report.css", "report.js"} <= {file.name for file in (PACKAGE / "runs/page").iterdir()}
    found = recipes()
    assert found and list((PACKAGE / "configs/accelerate").glob("*.yaml"))
    with tempfile.TemporaryDirectory() as folder:
        version = run("--version", folder=folder)
        assert version.stdout.strip() == rlhf.__version__, version
        assert run("--help", folder=folder).returncode == 0
        for command in sorted({recipe.command for recipe in found.values()}):
            shown = run(command, "--help", folder=folder)
            assert shown.returncode == 0 and "--learning_rate" in shown.stdout, shown
        for recipe in found.values():
            # The relative name is what the documentation writes; the package finds its own copy of it.
            data = ("--dataset_name", MISSING, "--output_dir", "out")
            started = run(recipe.command, "--config", f"configs/{recipe.file.name}", *data, folder=folder)
            assert started.returncode == 2 and MISSING in started.stderr, started
            print(f"rlhf {recipe.command}: help and configs/{recipe.file.name}")


if __name__ == "__main__":
    main()
