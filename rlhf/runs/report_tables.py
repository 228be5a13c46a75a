"""The tables of a report, as text: figures before and after, samples, options, and the record."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from rlhf.runs.charts import NOT_DRAWN, repeats_another, short
from rlhf.runs.comparable import scaled_by
from rlhf.runs.figures import EVALUATION, Figures, Series, is_finite_number
from rlhf.runs.files import Run
from rlhf.runs.metric_names import METRICS, Better, describe, split_name
from rlhf.runs.sample_checks import text_of

MAX_PROMPTS, MAX_STEPS = 8, 6
MAX_CHARACTERS = 1500  # of a prompt or a completion
# Of the optimizer and its inside: curves tell of them.
_NOT_IN_TABLES = (
    "learning_rate", "grad_norm", "tokens_per_second*", "ratio/*", "clip_ratio/*", "approx_kl", "sampler_kl", "beta",
    "entropy_coef", "policy_loss", "value_loss", "critic/values", "critic/returns",
)  # fmt: skip
_NAMES = ("output_dir", "run_name")  # of a run; they always differ
_ROLLOUT_STEPS, _ROLLOUT_ROWS = 3, 6


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        caption: what it shows.
        heads: of the columns.
        rows: cells; the first is the head of its row.
        marked: positions (row, column) of cells that stand out.
        is_text: whether cells are prose; else they are figures.
    """

    caption: str
    heads: list[str]
    rows: list[list[str]]
    marked: frozenset[tuple[int, int]] = frozenset()
    is_text: bool = False


def before_and_after(figures: Figures) -> Table | None:
    """Figures at the beginning and at the end: of the evaluations, else of training.

    Args:
        figures: of a run.

    Returns:
        None where nothing was logged twice.
    """
    evaluated = [series for series in _all_series(figures) if series.name.startswith(EVALUATION) and len(series) > 1]
    if evaluated:
        same_steps = len({(series.steps[0], series.steps[-1]) for series in evaluated}) == 1
        steps = evaluated[0].steps
        ends = [f"step {steps[0]}", f"step {steps[-1]}"] if same_steps else ["first", "last"]
        rows = [_row_of_evaluation(series) for series in evaluated]
        return Table("On held-out rows", ["figure", *ends, "best"], rows)
    trained = [series for series in _all_series(figures) if len(series) > 1 and not series.is_constant]
    rows = []
    for series in trained:
        change = series.change()
        rows.append([_title(series.name), short(change.before), short(change.after)])
    heads = ["figure", "mean of the first fifth of the log", "mean of the last fifth"]
    return Table("In training (there was no evaluation before and after)", heads, rows) if rows else None


def final_figures(all_figures: Sequence[Figures]) -> Table | None:
    """The last evaluation of each run, else the end of its training, with the best of each row marked.

    Args:
        all_figures: of at least two runs.

    Returns:
        None where nothing was logged.
    """
    names = list(dict.fromkeys(series.name for figures in all_figures for series in _all_series(figures)))
    # A figure of training says little where the same was measured on held-out rows.
    names = [name for name in names if name.startswith(EVALUATION) or EVALUATION + name not in names]
    options = {name for figures in all_figures for name in figures.run.options}
    differing = [
        name for name in options if len({_option(figures.run.options.get(name)) for figures in all_figures}) > 1
    ]
    rows, marked = [], set()
    for name in names:
        values = [_final_value(figures.series(name)) for figures in all_figures]
        rows.append([_title(name), *("" if value is None else short(value) for value in values)])
        known = [value for value in values if value is not None]
        best = _best(known, _better(name, all_figures))
        # A scale that an option sets differs between these runs, so no value is the best.
        if scaled_by(name, differing):
            best = None
        if len(set(known)) > 1 and best is not None:
            marked |= {(len(rows) - 1, column + 1) for column, value in enumerate(values) if value == best}
    heads = ["figure", *names_of([figures.run for figures in all_figures])]
    caption = "Last evaluation, else the last fifth of training; the best is bold"
    return Table(caption, heads, rows, frozenset(marked)) if rows else None


def samples_table(runs: Sequence[Run]) -> Table | None:
    """Answers to the same prompts: of one run by step, of several runs at their last step.

    Args:
        runs: whose samples are shown.

    Returns:
        None where there are none.
    """
    columns: dict[str, dict[str, str]] = {}
    if len(runs) == 1:
        steps = sorted({entry["step"] for entry in runs[0].samples if "step" in entry})
        columns = {f"step {step}": _completions_by_prompt(runs[0], step) for step in _spread(steps, MAX_STEPS)}
    else:
        for name, run in zip(names_of(runs), runs, strict=True):
            if run.samples:
                step = int(run.samples[-1].get("step", 0))
                columns[f"{name}, step {step}"] = _completions_by_prompt(run, step)
    prompts = list(dict.fromkeys(prompt for column in columns.values() for prompt in column))[:MAX_PROMPTS]
    if not prompts:
        return None
    rows = [[_cut(prompt), *(_cut(column.get(prompt, "")) for column in columns.values())] for prompt in prompts]
    return Table("Answers to the same prompts", ["prompt", *columns], rows, is_text=True)


def rollout_tables(run: Run) -> list[Table]:
    """Samples of rollouts with their rewards.

    Args:
        run: as its folder describes it.

    Returns:
        A table for a few steps, the last one first.
    """
    steps = sorted({entry["step"] for entry in run.completions if "step" in entry})
    tables = []
    for step in reversed(_spread(steps, _ROLLOUT_STEPS)):
        entries = [entry for entry in run.completions if entry.get("step") == step][:_ROLLOUT_ROWS]
        functions = list(dict.fromkeys(name for entry in entries for name in entry.get("rewards") or {}))
        # One function is the reward itself.
        functions = functions if len(functions) > 1 else []
        heads = ["prompt", "completion", "reward", *functions, "tokens"]
        tables.append(Table(f"Rollout of step {step}", heads, [_rollout_row(entry, functions) for entry in entries],
                            is_text=True))  # fmt: skip
    return tables


def differing_options(runs: Sequence[Run]) -> tuple[Table | None, Table | None]:
    """Options that differ between runs, and those that do not.

    Args:
        runs: one or several; of one run all options are in the second table.

    Returns:
        Both tables; None for one that is empty.
    """
    names = list(dict.fromkeys(name for run in runs for name in run.options))
    rows = {name: [_option(run.options.get(name)) for run in runs] for name in names}
    differing = [[name, *values] for name, values in rows.items() if len(set(values)) > 1 and name not in _NAMES]
    equal = [[name, values[0]] for name, values in rows.items() if len(set(values)) == 1]
    return (
        Table("Options that differ", ["option", *names_of(runs)], differing) if differing else None,
        Table("Options that are not the defaults", ["option", "value"], equal) if equal else None,
    )


def record_table(runs: Sequence[Run]) -> Table | None:
    """What the runs ran on: command, model, data with hashes, versions, git, machine.

    Args:
        runs: one or several, a column each.

    Returns:
        None where no run has a record.
    """
    facts = [_facts(run) for run in runs]
    names = list(dict.fromkeys(name for entry in facts for name in entry))
    rows = [[name, *(entry.get(name, "") for entry in facts)] for name in names]
    marked = {
        (row, column)
        for row, cells in enumerate(rows)
        for column in range(1, len(cells))
        if len(set(cells[1:])) > 1
    }  # fmt: skip
    caption = "What the run ran on" if len(runs) == 1 else "What the runs ran on; what differs is bold"
    return Table(caption, ["fact", *names_of(runs)], rows, frozenset(marked), is_text=True) if rows else None


def names_of(runs: Sequence[Run]) -> list[str]:
    """Names of runs that differ from each other.

    Args:
        runs: in any order.

    Returns:
        The names of their folders; with the folder around them where two are the same.
    """
    names = [run.name for run in runs]
    return [
        f"{run.folder.resolve().parent.name}/{name}" if names.count(name) > 1 else name
        for run, name in zip(runs, names, strict=True)
    ]


def _all_series(figures: Figures) -> list[Series]:
    """Those that measure the model, the most telling first."""
    names = [
        name for name in figures.names
        if not any(fnmatchcase(split_name(name).metric, pattern) for pattern in (*NOT_DRAWN, *_NOT_IN_TABLES))
    ]  # fmt: skip
    order = list(METRICS)
    names.sort(key=lambda name: order.index(metric) if (metric := split_name(name).metric) in METRICS else len(order))
    return [series for name in names if not repeats_another(series := figures.series(name), figures)]


def _row_of_evaluation(series: Series) -> list[str]:
    best = _best(series.values, describe(split_name(series.name).metric).better)
    where = "" if best is None else f"{short(best)} (step {series.steps[series.values.index(best)]})"
    return [_title(series.name), short(series.values[0]), short(series.values[-1]), where]


def _better(name: str, figures: Sequence[Figures]) -> Better | None:
    """The direction of progress; the loss of training on rewards has none."""
    metric = split_name(name).metric
    is_online = any(entry.is_online for entry in figures)
    return None if metric == "loss" and is_online else describe(metric).better


def _title(name: str) -> str:
    metric, split = split_name(name)
    title, unit, _ = describe(metric)
    of_set = f" on {split.removeprefix('eval ')}" if split.startswith("eval ") else ""
    return f"{title}{of_set}" + (f" ({unit})" if unit else "")


def _best(values: Sequence[float], better: Better | None) -> float | None:
    if better is None or not values:
        return None
    return min(values) if better == "lower" else max(values)


def _final_value(series: Series) -> float | None:
    if not series.values:
        return None
    return series.values[-1] if series.name.startswith(EVALUATION) else series.change().after


def _completions_by_prompt(run: Run, step: int) -> dict[str, str]:
    return {
        text_of(entry.get("prompt")): text_of(entry.get("completion"))
        for entry in run.samples
        if entry.get("step") == step
    }


def _rollout_row(entry: Mapping[str, Any], functions: Sequence[str]) -> list[str]:
    rewards = entry.get("rewards") or {}
    tokens = str(entry.get("tokens", "")) + (", cut" if entry.get("truncated") else "")
    numbers = [entry.get("reward"), *(rewards.get(name) for name in functions)]
    texts = [_cut(text_of(entry.get("prompt"))), _cut(text_of(entry.get("completion")))]
    return [*texts, *(_figure(value) for value in numbers), tokens]


def _figure(value: Any) -> str:
    return short(value) if is_finite_number(value) else "none"


def _spread(steps: Sequence[int], number: int) -> list[int]:
    """The first and the last step, and some between them."""
    if len(steps) <= number:
        return list(steps)
    return [steps[round(position * (len(steps) - 1) / (number - 1))] for position in range(number)]


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}… ({len(text):,} characters)"


def _option(value: Any) -> str:
    if value is None:
        return "default"
    if isinstance(value, list) and not any(isinstance(item, list | dict) for item in value):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _facts(run: Run) -> dict[str, str]:
    record = run.record
    facts: dict[str, Any] = {
        "command": record.get("command_line"),
        "status": record.get("status"),
        "started": record.get("started"),
        "resumed": ", ".join(record.get("resumed") or []),
        "time": _duration(record["seconds"]) if record.get("seconds") else None,
        "trainer": record.get("trainer"),
        **_model_facts(record.get("model") or {}),
        **{f"data, {entry.get('use')}: {entry.get('name')}": _data(entry) for entry in record.get("data") or []},
        "versions": ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items()),
        "git": _git(record.get("git")),
        "machine": _machine(record.get("machine") or {}),
    }
    return {name: str(value) for name, value in facts.items() if value}


def _model_facts(model: Mapping[str, Any]) -> dict[str, Any]:
    if not model:
        return {}
    facts = {"model": model.get("name")}
    if is_finite_number(model.get("parameters")) and is_finite_number(model.get("trainable")):
        facts["parameters"] = f"{model['parameters']:,}, of them {model['trainable']:,} trained in {model.get('dtype')}"
    return facts


def _data(entry: Mapping[str, Any]) -> str:
    rows = "a stream" if entry.get("rows") is None else f"{entry['rows']:,} rows"
    files = [f"{file['path']} ({file['bytes']:,} bytes, xxh3 {file['xxh3']})" for file in entry.get("files") or []]
    return "\n".join([rows, *files])


def _git(state: Mapping[str, Any] | None) -> str:
    if not state:
        return ""
    changes = ", with changes that are not committed" if state.get("dirty") else ""
    return f"{state.get('commit')} on {state.get('branch') or 'no branch'}{changes}"


def _machine(machine: Mapping[str, Any]) -> str:
    if not machine:
        return ""
    processor = f"{machine.get('processor')}, {machine.get('cores')} cores, {machine.get('memory_gib')} GiB"
    processes = machine.get("processes")
    parts = [
        machine.get("accelerator"),
        processor,
        machine.get("system"),
        f"{processes} processes" if processes != 1 else "",
    ]
    return "; ".join(str(part) for part in parts if part)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
