"""Write the reports of the recorded runs anew: ``python docs/runs/make_reports.py``.

The folder of a run has the log of its trainer, the options as YAML, and for some runs samples of rollouts.
"""

from dataclasses import replace
from pathlib import Path

import yaml

from rlhf.runs import Run, read_run, write_report
from rlhf.runs.files import read_lines

HERE = Path(__file__).parent
# Pages by folder: which runs they hold. Runs that answer one question are drawn over each other.
PAGES = {
    "smollm2-135m": {"report-sft.html": ["sft"], "report-dpo.html": ["dpo"]},
    "one-sentence": {
        "report.html": ["grpo", "ppo"],
        "report-grpo.html": ["grpo"],
        "report-ppo.html": ["ppo"],
    },
    "reward-and-ppo": {"report-reward.html": ["reward"], "report-ppo.html": ["ppo"]},
    "distillation": {"report.html": ["hard", "live", "cached", "gkd"]},
}


def recorded_run(folder: Path, name: str) -> Run:
    """A run as far as it was recorded."""
    run = read_run(folder / f"{name}_state.json")
    options = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
    # The place of a run that was not kept tells nobody anything.
    del options["output_dir"]
    return replace(run, options=options, completions=read_lines(folder / f"{name}_samples.jsonl"))


def main() -> None:
    """Write all pages, and print their sizes."""
    for folder, pages in PAGES.items():
        for page, names in pages.items():
            file = HERE / folder / page
            write_report([recorded_run(HERE / folder, name) for name in names], file)
            print(f"{file.relative_to(HERE.parent.parent)}: {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
