"""One page of HTML about one or several runs. It holds all that it needs, and loads nothing."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rlhf.runs.charts import charts_of, constant_figures, short
from rlhf.runs.figures import Figures
from rlhf.runs.files import REPORT_FILE, Run, read_run, write_whole
from rlhf.runs.health import Health, examine_figures
from rlhf.runs.metric_names import describe, split_name
from rlhf.runs.report_tables import (
    before_and_after,
    differing_options,
    final_figures,
    names_of,
    record_table,
    rollout_tables,
    samples_table,
)
from rlhf.visible import visible

logger = logging.getLogger(__name__)

GENERATOR = '<meta name="generator" content="rlhf report">'  # tells a report from other pages
_PAGE_FOLDER = Path(__file__).parent / "page"


@dataclass(frozen=True)
class NamedHealth:
    """The health of one of several runs.

    Attributes:
        name: of the run.
        health: what was found.
        constants: figures that never changed, in words.
    """

    name: str
    health: Health
    constants: list[str]


def write_report(runs: Sequence[Run], file: Path) -> None:
    """Write the report of one or several runs, whole or not at all.

    Args:
        runs: at least one.
        file: its folder is made.

    Raises:
        OSError: the file cannot be written.
    """
    write_whole(file, report_page(runs))


def write_run_report(folder: Path) -> Path:
    """Write the report of a run into its folder.

    Args:
        folder: of the run.

    Returns:
        The file.

    Raises:
        ValueError: the folder holds no run.
        OSError: the file cannot be written.
    """
    file = folder / REPORT_FILE
    write_report([read_run(folder)], file)
    return file


def write_report_at_end(folder: Path) -> None:
    """Write the report of a run that ends. The model is what matters: a report that fails is one warning.

    Args:
        folder: of the run.
    """
    try:
        write_run_report(folder)
    except Exception as error:  # whatever it is, the run itself is well
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        logger.warning("%s: no report was written (%s); `rlhf report %s` makes it", folder, reason, folder)


def report_page(runs: Sequence[Run]) -> str:
    """Write the report of one or several runs as HTML.

    Args:
        runs: at least one.

    Returns:
        The page.
    """
    all_figures = [Figures(run) for run in runs]
    charts = charts_of(all_figures)
    names = names_of(runs)
    differing, equal = differing_options(runs)
    context: dict[str, Any] = {
        "names": names,
        "introduction": _introduction(runs[0]) if len(runs) == 1 else f"{len(runs)} runs over each other",
        "healths": [
            NamedHealth(name, examine_figures(figures), _constants(figures))
            for name, figures in zip(names, all_figures, strict=True)
        ],
        "figures": before_and_after(all_figures[0]) if len(runs) == 1 else final_figures(all_figures),
        "chart_groups": charts,
        "chart_data": [chart.as_json() for group in charts.values() for chart in group],
        "samples": samples_table(runs),
        "rollouts": rollout_tables(runs[0]) if len(runs) == 1 else [],
        "differing_options": differing,
        "options": equal,
        "record": record_table(runs),
        # Parts of this package; the template marks them as no text to be escaped.
        "generator": GENERATOR,
        "styles": _read("uPlot.min.css") + _read("report.css"),
        "scripts": [_read("uPlot.iife.min.js"), _read("report.js")],
    }
    return _environment().get_template("report.html.jinja").render(context)


@cache  # so that the template is compiled once
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(_PAGE_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_show_controls,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _show_controls(value: Any) -> Any:
    """Text of runs without control characters; it is escaped after that."""
    is_html = hasattr(value, "__html__")
    return visible(value) if isinstance(value, str) and not is_html else value


def _read(name: str) -> str:
    return (_PAGE_FOLDER / name).read_text(encoding="utf-8")


def _introduction(run: Run) -> str:
    record = run.record
    steps = max((line.get("step", 0) for line in run.metrics), default=0)
    model = (record.get("model") or {}).get("name")
    parts = [
        f"rlhf {record['command']}" if record.get("command") else record.get("trainer"),
        f"from {model}" if model else None,
        f"{steps} steps",
        f"{record['seconds']:,.0f} s" if record.get("seconds") else None,
        record.get("status"),
    ]
    return " · ".join(str(part) for part in parts if part)


def _constants(figures: Figures) -> list[str]:
    texts = []
    for name, value in constant_figures(figures).items():
        metric, split = split_name(name)
        texts.append(f"{describe(metric).title}{'' if split == 'train' else f' ({split})'}: {short(value)}")
    return texts
