"""``rlhf report``: one page about one or several runs."""

from collections import Counter
from pathlib import Path

from rlhf.cli.options import RaisingParser
from rlhf.runs.files import REPORT_FILE, Run, read_run
from rlhf.runs.health import examine
from rlhf.runs.report import GENERATOR, write_report
from rlhf.runs.report_tables import names_of
from rlhf.visible import visible

_DESCRIPTION = """\
Write one page of HTML about one or several runs: curves, figures before and after, samples, health checks in words,
options, and what the runs ran on. Several runs are drawn over each other, with the options that differ.
The page needs no network. Each training run writes its own at its end."""
_GENERATOR_IS_WITHIN = 4096  # characters of a page


def run(argv: list[str]) -> None:
    """Write a report, and say what it found.

    Args:
        argv: words of the command line, after the command.

    Raises:
        ValueError, OSError: a folder holds no run, or the page would replace another file.
    """
    parser = RaisingParser("rlhf report", description=_DESCRIPTION)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output_dir of a run, or its trainer_state.json")
    parser.add_argument(
        "-o", "--output_file", metavar="FILE",
        help=f"the page (default: {REPORT_FILE} in the folder of the run; of several runs, in the working directory)",
    )  # fmt: skip
    options = parser.parse_args(argv)
    places = list(dict.fromkeys(options.runs))
    runs = [read_run(place) for place in places]
    file = _output_file(options.output_file, places)
    _refuse_other_pages(file)
    write_report(runs, file)
    for name, entry in zip(names_of(runs), runs, strict=True):
        _print_health(entry, f"{name}: " if len(runs) > 1 else "")
    print(visible(f"saved {file}"))


def _output_file(given: str | None, places: list[str]) -> Path:
    if given is not None:
        return Path(given)
    is_one_folder = len(places) == 1 and Path(places[0]).is_dir()
    return Path(places[0]) / REPORT_FILE if is_one_folder else Path(REPORT_FILE)


def _refuse_other_pages(file: Path) -> None:
    """A report replaces an older one, and no other file."""
    if file.is_dir():
        raise ValueError(f"--output_file {file}: is a folder; name a file")
    if file.exists() and GENERATOR not in _beginning(file):
        raise ValueError(f"{file}: exists, and is no report; name another file with -o")


def _beginning(file: Path) -> str:
    with file.open(encoding="utf-8", errors="replace") as page:
        return page.read(_GENERATOR_IS_WITHIN)


def _print_health(run: Run, prefix: str) -> None:
    health = examine(run)
    levels = Counter(finding.level for finding in health.findings)
    counts = [f"{number} {level}{'s' if number > 1 else ''}" for level, number in levels.items()]
    print(visible(f"{prefix}{', '.join(counts) or 'nothing was found'} ({len(health.passed)} checks found nothing)"))
    for finding in health.findings:
        print(visible(f"  {finding.level}: {finding.text} {finding.evidence}"))
