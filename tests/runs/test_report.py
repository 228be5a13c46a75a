"""The report: which charts there are, what the tables say, and that text of a run stays text."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import write_rows

from rlhf.cli.main import main
from rlhf.runs import read_run
from rlhf.runs.charts import charts_of, constant_figures, thinned
from rlhf.runs.figures import Figures, Series
from rlhf.runs.files import Run
from rlhf.runs.metric_names import METRICS, split_name
from rlhf.runs.report import report_page, write_report
from rlhf.runs.report_tables import (
    before_and_after,
    differing_options,
    final_figures,
    record_table,
    rollout_tables,
    samples_table,
)

ROOT = Path(__file__).parents[2]
EVIL = "</script><img src=x onerror=alert(1)>\x1b[2J"
LINES = [
    {"step": 0, "eval_loss": 0.7, "eval_rewards/accuracies": 0.5},
    {"step": 1, "loss": 0.7, "beta": 0.1, "learning_rate": 1e-5, "num_tokens": 100, "seconds": 1.0, "odd_figure": 1.0},
    {"step": 2, "loss": 4e-3, "beta": 0.1, "learning_rate": 2e-5, "num_tokens": 300, "seconds": 2.0, "odd_figure": 2.0},
    {"step": 2, "eval_loss": 0.4, "eval_rewards/accuracies": 0.8, "seconds": 2.5},
    {"step": 3, "loss": 0.006, "beta": 0.1, "learning_rate": 0.0, "num_tokens": 700, "seconds": 3.0, "odd_figure": 3.0},
    {"step": 3, "eval_loss": 0.5, "eval_rewards/accuracies": 0.7, "train_runtime": 3.0},
]  # fmt: skip


def run_of(name="run-a", **changes):
    run = dict(folder=Path(name), options={"beta": 0.1}, record={}, metrics=LINES, samples=[], completions=[])
    return Run(**run | changes)


class Page(HTMLParser):
    """What a page would load, its cells, and the data of its charts."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.cells, self.tags, self.path, self.data = [], [], [], [], ""
        self.feed(text)
        self.charts = json.loads(self.data)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.path.append((tag, attributes))
        self.loads += [value for name, value in attributes.items() if name in ("src", "srcset") or
                       (name == "href" and not value.startswith("#"))]  # fmt: skip

    def handle_endtag(self, tag):
        while self.path and self.path.pop()[0] != tag:
            pass

    def handle_data(self, data):
        tag, attributes = self.path[-1] if self.path else ("", {})
        if tag == "script" and attributes.get("id") == "charts":
            self.data += data
        elif tag in ("td", "th"):
            self.cells.append(data)


def test_charts_are_grouped_and_none_is_empty():
    groups = charts_of([Figures(run_of())])
    titles = {heading: [chart.title for chart in charts] for heading, charts in groups.items()}
    assert titles == {
        "Loss": ["Loss"],
        "Preferences": ["Preference accuracy"],
        "Optimizer": ["Learning rate"],
        "Speed": ["Tokens read per second"],
        "Other figures": ["odd_figure"],
    }
    loss = groups["Loss"][0]
    assert loss.is_log  # 0.7 to 0.004
    assert [line.label for line in loss.lines] == ["train", "eval"] and loss.names == ("loss", "eval_loss")
    assert loss.as_json()["steps"] == [0, 1, 2, 3]
    assert [line["values"] for line in loss.as_json()["lines"]] == [[None, 0.7, 0.004, 0.006], [0.7, None, 0.4, 0.5]]
    # The evaluation took half of the second before the last line, which is not the time of training.
    assert groups["Speed"][0].lines[0].series.values == (200.0, 800.0)
    assert loss.summary == "train: 0.7 → 0.006; eval: 0.7 → 0.5"
    assert constant_figures(Figures(run_of())) == {"beta": 0.1}


def test_rewards_of_several_functions_are_one_chart_and_one_function_is_the_reward():
    lines = [{"step": s, "reward": 3.0 * s, "rewards/a/mean": 1.0 * s, "rewards/b[1]/mean": 2.0 * s} for s in (1, 2)]
    charts = {chart.title: chart for chart in charts_of([Figures(run_of(metrics=lines))])["Rewards"]}
    assert [line.label for line in charts["Reward by function"].lines] == ["mean of a", "mean of b[1]"]
    alone = [{"step": line["step"], "reward": line["reward"], "rewards/f/mean": line["reward"]} for line in lines]
    assert [chart.title for chart in charts_of([Figures(run_of(metrics=alone))])["Rewards"]] == ["Reward"]


def test_evaluation_sets_are_lines_of_their_own():
    assert split_name("eval_long answers_loss") == ("loss", "eval long answers")
    assert split_name("eval_teacher_perplexity") == ("teacher_perplexity", "eval")
    assert split_name("eval_odd") == ("odd", "eval") and split_name("loss") == ("loss", "train")


def test_every_metric_of_the_docs_has_words():
    names = re.findall(
        r"`([^`]+)`", "".join(re.findall(r"^\| (`.*?) \|", (ROOT / "docs/metrics.md").read_text(), re.M))
    )
    known = {name.removeprefix("eval_") for name in names if "NAME" not in name and "million" not in name}
    not_drawn = {"num_tokens", "epoch", "MiB", "forward tokens/s", "generation tokens/s"}
    assert known - set(METRICS) - not_drawn == set()


def test_a_long_series_keeps_its_ends_and_spikes():
    values = [1.0] * 100_000
    values[54_321], values[77_777] = 50.0, -9.0
    short = thinned(Series("loss", tuple(range(100_000)), tuple(values)))
    assert len(short) <= 602 and short.steps[0] == 0 and short.steps[-1] == 99_999
    assert dict(zip(short.steps, short.values, strict=True))[54_321] == 50.0 and min(short.values) == -9.0


def test_before_and_after():
    table = before_and_after(Figures(run_of()))
    assert table.heads == ["figure", "step 0", "step 3", "best"]
    assert table.rows == [
        ["loss", "0.7", "0.5", "0.4 (step 2)"],
        ["preference accuracy (share)", "0.5", "0.7", "0.8 (step 2)"],
    ]
    in_training = before_and_after(Figures(run_of(metrics=[line for line in LINES if "loss" in line])))
    assert in_training.rows[0] == ["loss", "0.7", "0.006"] and "In training" in in_training.caption


def test_several_runs_are_compared():
    better = [line | ({"eval_loss": 0.3} if "eval_loss" in line else {}) for line in LINES]
    runs = [run_of(), run_of("run-b", options={"beta": 0.1, "seed": 1}, metrics=better)]
    figures = final_figures(list(map(Figures, runs)))
    assert figures.heads == ["figure", "run-a", "run-b"] and figures.rows[0] == ["loss", "0.5", "0.3"]
    assert (0, 2) in figures.marked and (0, 1) not in figures.marked
    differing, equal = differing_options(runs)
    assert differing.rows == [["seed", "default", "1"]] and equal.rows == [["beta", "0.1"]]
    labels = [line.label for line in charts_of(list(map(Figures, runs)))["Loss"][0].lines]
    assert labels == ["run-a, train", "run-a, eval", "run-b, train", "run-b, eval"]
    # Folders of one name are told apart by the folder around them.
    assert final_figures([Figures(run_of("a/x")), Figures(run_of("b/x"))]).heads == ["figure", "a/x", "b/x"]


def test_samples_stand_side_by_side():
    samples = [
        {"step": step, "index": n, "prompt": [{"role": "user", "content": f"q{n}"}], "completion": f"a{n} at {step}"}
        for step in range(0, 80, 10)
        for n in range(2)
    ]
    table = samples_table([run_of(samples=samples)])
    assert table.heads == ["prompt", "step 0", "step 10", "step 30", "step 40", "step 60", "step 70"]
    assert table.rows[1][:2] == ["q1", "a1 at 0"] and table.rows[1][-1] == "a1 at 70"
    both = samples_table([run_of(samples=samples), run_of("b", samples=samples[:4])])
    assert both.heads == ["prompt", "run-a, step 70", "b, step 10"] and both.rows[0] == ["q0", "a0 at 70", "a0 at 10"]
    rollout = {"step": 1, "prompt": "p", "completion": "c", "reward": 0.5, "rewards": {"f": 1.0, "g": None},
               "tokens": 3, "truncated": True}  # fmt: skip
    (first,) = rollout_tables(run_of(completions=[rollout]))
    assert first.heads == ["prompt", "completion", "reward", "f", "g", "tokens"]
    assert first.rows == [["p", "c", "0.5", "1", "none", "3, cut"]]


def test_text_of_a_run_stays_text():
    samples = [{"step": 1, "index": 0, "prompt": EVIL, "completion": EVIL}]
    lines = [{"step": step, EVIL: float(step), f"eval_{EVIL}_loss": float(step)} for step in (1, 2)]
    record = {"command": "sft", "command_line": EVIL, "model": {"name": EVIL},
              "data": [{"name": EVIL, "use": "train", "rows": 1, "files": []}]}  # fmt: skip
    text = report_page(
        [run_of(EVIL.replace("/", "_"), options={EVIL: EVIL}, record=record, metrics=lines, samples=samples)]
    )
    page = Page(text)
    assert "img" not in page.tags and "\x1b" not in text
    assert any("<img src=x onerror=alert(1)>\\x1b[2J" in cell for cell in page.cells)
    assert any(EVIL in chart["title"] or EVIL in chart["lines"][0]["label"] for chart in page.charts)


@pytest.mark.parametrize(
    "names", [["smollm2-135m/dpo"], ["one-sentence/grpo"], ["distillation/live", "distillation/hard"]]
)
def test_a_page_holds_all_that_it_needs(names, tmp_path):
    runs = [read_run(ROOT / f"docs/runs/{name}_state.json") for name in names]
    write_report(runs, tmp_path / "new/page.html")
    text = (tmp_path / "new/page.html").read_text()
    page = Page(text)
    assert page.loads == [] and "@import" not in text and "url(" not in text
    assert len(text.encode()) < 200_000
    assert len(page.charts) >= 4 and text.count('class="plot"') == len(page.charts)
    assert all(len(line["values"]) == len(chart["steps"]) for chart in page.charts for line in chart["lines"])
    assert list(tmp_path.glob("new/*")) == [tmp_path / "new/page.html"]


def luminance(colour):
    """WCAG 2.2, relative luminance."""
    digits = colour * 2 if len(colour) == 3 else colour
    channels = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_colours_can_be_read():
    """Text has a contrast of 4.5 against both backgrounds, lines have 3 (WCAG 2.2, AA)."""
    style = (ROOT / "rlhf/runs/page/report.css").read_text()
    themes = re.findall(r"--ink: #.*?(?=\})", style, re.DOTALL)
    assert len(themes) == 3  # light, dark, print
    for theme in themes:
        colours = dict(re.findall(r"--([\w-]+): #(\w+)", theme))
        for name, colour in colours.items():
            limit = 3 if re.fullmatch(r"c\d", name) else 4.5
            for background in (colours["paper"], colours["panel"]) if name not in ("paper", "panel", "line") else ():
                dark, bright = sorted((luminance(colour), luminance(background)))
                assert (bright + 0.05) / (dark + 0.05) >= limit, (name, colour, background)


def test_a_run_leaves_a_report(tmp_path, model_folder, preference_rows, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", list(preference_rows))
    folder = tmp_path / "my-run"
    words = ["dpo", f"--model_name_or_path={model_folder}", f"--dataset_name={rows}", f"--eval_dataset_name={rows}",
             f"--output_dir={folder}", "--eval_on_start", "--max_steps=2", "--logging_steps=1", "--use_cpu",
             "--beta=0.3"]  # fmt: skip
    assert main(words) == 0
    page = Page((folder / "report.html").read_text())
    # The last evaluation comes after training.
    loss = next(chart for chart in page.charts if chart["title"] == "Loss")
    assert [line["label"] for line in loss["lines"]] == ["train", "eval"] and loss["lines"][1]["values"][-1] is not None
    assert "beta" in page.cells and "0.3" in page.cells and "finished" in page.cells
    assert any("xxh3" in cell for cell in page.cells)
    facts = {row[0]: row[1] for row in record_table([read_run(folder)]).rows}
    assert facts["trainer"] == "DPOTrainer" and f"{len(preference_rows)} rows\n{rows}" in facts[f"data, train: {rows}"]
    capsys.readouterr()

    # By hand, over the one that the run wrote.
    assert main(["report", str(folder)]) == 0
    assert f"saved {folder / 'report.html'}" in capsys.readouterr().out
    other = tmp_path / "page.html"
    assert main(["report", str(folder), str(ROOT / "docs/runs/smollm2-135m/dpo_state.json"), "-o", str(other)]) == 0
    assert "my-run · dpo" in other.read_text()
    other.write_text("somebody's page")
    assert main(["report", str(folder), "-o", str(other)]) == 2
    assert "is no report" in capsys.readouterr().err and other.read_text() == "somebody's page"


def test_a_report_that_fails_is_one_warning(tmp_path, caplog, monkeypatch):
    from rlhf.runs import report

    monkeypatch.setattr(report, "write_run_report", lambda folder: (_ for _ in ()).throw(KeyError("a\nbug")))
    report.write_report_at_end(tmp_path)
    assert len(caplog.records) == 1 and "no report was written (KeyError" in caplog.text
