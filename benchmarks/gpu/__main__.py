"""Measure what the paths for a GPU do, in sections; a section that fails says so, and the others run.

    python -m benchmarks.gpu                        # one GPU, about four minutes
    python -m benchmarks.gpu --only flow,head
    python -m benchmarks.gpu --tiny --device cpu    # shows that the sections work; the figures mean nothing

Models are random and nothing is downloaded. Prints a table for each section, and writes all rows to --output as JSON.
"""

import argparse
import importlib
import json
import logging
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch

from benchmarks.gpu.measuring import Results, Setup, free_memory, show

# Name: module, function, title of its table.
SECTIONS = {
    "environment": ("environment", "measure", "TITLE"),
    "flow": ("flow", "measure", "TITLE"),
    "head-accuracy": ("head", "measure_accuracy", "TITLE_OF_ACCURACY"),
    "attention-accuracy": ("attention", "measure_accuracy", "TITLE_OF_ACCURACY"),
    "head": ("head", "measure", "TITLE"),
    "attention": ("attention", "measure", "TITLE"),
    "steps": ("steps", "measure", "TITLE"),
    "kinds": ("kinds", "measure", "TITLE"),
}


def run(name: str, setup: Setup) -> tuple[Results, str]:
    """A section's results; its own failure is among them.

    Args:
        name: a key of :data:`SECTIONS`.
        setup: the device.
    Returns:
        The results and the title of the table.
    """
    module_name, function, title = SECTIONS[name]
    module = importlib.import_module(f"benchmarks.gpu.{module_name}")
    try:
        results = getattr(module, function)(setup)
    except Exception as error:
        traceback.print_exc()
        traceback.clear_frames(error.__traceback__)
        results = Results(setup, failures=[f"{type(error).__name__}: {error}"])
    free_memory(setup)
    return results, getattr(module, title)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"sections, separated by commas: {', '.join(SECTIONS)}")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a CPU")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=300, help="no section begins later than this")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/gpu.json"))
    args = parser.parse_args(argv)
    args.sections = args.only.split(",") if args.only else list(SECTIONS)
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"--only: no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "benchmarks.gpu: torch finds no GPU here; --tiny --device cpu shows that the sections work\n")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the sections.

    Args:
        argv: words of the command line.
    Returns:
        The exit status: 1 if anything failed.
    """
    args = parse(argv)
    setup = Setup(torch.device(args.device), args.tiny)
    began = time.perf_counter()
    tables, failures = {}, []
    for name in args.sections:
        start = time.perf_counter()
        if start - began > args.seconds:
            failures.append(f"{name}: not started, {start - began:.0f} s are gone")
            continue
        results, title = run(name, setup)
        tables[name] = results.rows
        failures += [f"{name}: {failure}" for failure in results.failures]
        if results.rows:
            show(title, results.rows)
        print(f"[{name}: {time.perf_counter() - start:.1f} s]\n", flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"tables": tables, "failures": failures}, indent=1, default=str) + "\n")
    for failure in failures:
        print(f"failed: {failure}")
    return 1 if failures else 0


def be_quiet() -> None:
    """Nothing between the tables: no progress bars, no messages of other packages."""
    import datasets
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()


if __name__ == "__main__":
    be_quiet()
    sys.exit(main())
