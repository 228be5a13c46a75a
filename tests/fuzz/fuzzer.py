"""Run commands on malformed inputs: ``python tests/fuzz/fuzzer.py --cases 1000 --seed 7``.

Each case is made from the seed and its number. It runs in a forked child with a time limit. Its outcome is one of:

* one line: status 2, one line on stderr that names what is wrong;
* accepted: status 0, and what was written is right: finite metrics and weights, as many rows as there are;
* fault: a traceback, a hang, another status, no one line, or accepted although it must be refused.
"""

import argparse
import contextlib
import gc
import json
import math
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1]))  # conftest, where pytest does not put it there

from fuzz_files import adapter_case, folder_case, model_case, rows_case, weights_case
from fuzz_options import option_case, place_case, reward_case, template_case, yaml_case
from fuzz_world import Case, World, make_world
from safetensors.torch import load_file

import rlhf.cli.data
import rlhf.cli.eval
import rlhf.cli.teacher
import rlhf.cli.training
import rlhf.online  # once, before the children
from rlhf.cli.main import main as run_command

# How often each kind is drawn.
KINDS = {
    rows_case: 25, model_case: 16, weights_case: 5, adapter_case: 4, folder_case: 6, option_case: 22, yaml_case: 12,
    template_case: 2, reward_case: 4, place_case: 4,
}  # fmt: skip
MEMORY = 8 * 2**30  # that a child may add
LONGEST_LINE = 1500


@dataclass(frozen=True)
class Outcome:
    """What became of a case; ``fault`` is empty where nothing is wrong."""

    number: int
    case: Case
    result: str
    fault: str
    output: str


def make_case(seed: int, number: int, folder: Path, world: World) -> Case:
    """The case of a number, always the same for a seed."""
    random = Random(f"{seed}:{number}")
    (kind,) = random.choices(list(KINDS), list(KINDS.values()))
    return kind(random, folder, world)


def run_case(seed: int, number: int, world: World, limit: float) -> Outcome:
    """Make a case, run it, and judge its end."""
    folder = Path(tempfile.mkdtemp(dir=world.root))
    try:
        case = make_case(seed, number, folder, world)
        status = _in_child(case, folder, limit)
        errors = (folder / "stderr").read_text(errors="replace")
        result, fault = judge(case, status, folder, errors)
        return Outcome(number, case, result, fault, errors[-3000:])
    finally:
        shutil.rmtree(folder)


def _in_child(case: Case, folder: Path, limit: float) -> int | None:
    """The exit status; negative for a signal; None for a child that did not end in time."""
    child = os.fork()
    if child == 0:
        _run_and_exit(case, folder)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _run_and_exit(case: Case, folder: Path) -> None:
    status = 1
    try:
        os.setsid()
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT, 0o644), descriptor)
        os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY,) * 2)
        os.environ.update(case.environment)
        if case.before is not None:
            case.before()
        if case.only_options:
            rlhf.cli.training.train = lambda *_, **__: 0  # type: ignore[assignment]
        status = run_command(case.argv)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        # Nothing may go on in the child: it would run the other cases too.
        os._exit(status if isinstance(status, int) else 1)


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * os.sysconf("SC_PAGE_SIZE")


def judge(case: Case, status: int | None, folder: Path, errors: str) -> tuple[str, str]:
    """The result, and what is wrong with it."""
    if status is None:
        return "hang", "it did not end"
    if status == 0:
        if case.must == "refuse":
            return "accepted", _without_word_of_it(case, folder)
        return "accepted", "" if case.only_options else _wrong_output(case, folder)
    lines = [line for line in errors.splitlines() if line.startswith(f"rlhf {case.argv[0]}: ")]
    if "Traceback" in errors or status not in (2, 3):
        return "traceback", f"status {status}: {errors.strip().splitlines()[-1:]}"
    if len(lines) != 1:
        return "no line", f"{len(lines)} lines"
    if "'loss'" in (folder / "stdout").read_text(errors="replace") and status == 2:
        return "one line", f"after the work: {lines[0]}"
    if case.must == "accept":
        return "one line", f"must be accepted: {lines[0]}"
    if len(lines[0]) > LONGEST_LINE:
        return "one line", f"of {len(lines[0])} characters"
    if case.names and not any(name in lines[0] for name in case.names):
        return "one line", f"names none of {case.names}: {lines[0]}"
    return "one line", ""


def _without_word_of_it(case: Case, folder: Path) -> str:
    """`rlhf data` lists the rows that cannot be read; any other command must refuse them."""
    reports = case.argv[0] == "data" and "cannot be read" in (folder / "stdout").read_text()
    return "" if reports else "must be refused"


def _wrong_output(case: Case, folder: Path) -> str:
    """What is wrong with the files of a run that was accepted."""
    if case.rows is not None:
        shown = (folder / "stdout").read_text()
        row_lines = [line for line in shown.splitlines() if "trained on" in line]
        return "" if any(f" {case.rows} " in line for line in row_lines) else f"not {case.rows} rows: {row_lines}"
    for state in folder.glob("**/out/trainer_state.json"):
        for entry in json.loads(state.read_text())["log_history"]:
            for name, value in entry.items():
                if isinstance(value, float) and not math.isfinite(value):
                    return f"{name} is {value}"
    for file in folder.glob("**/out/*.safetensors"):
        for name, weight in load_file(file).items():
            if not weight.isfinite().all():
                return f"{file.name}: {name} is not finite"
    return ""


def run_all(seed: int, numbers: range, limit: float) -> Iterator[Outcome]:
    """Run the cases one after the other."""
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        world = make_world(root)
        # Else each child would copy all pages of objects that its garbage collector visits.
        gc.collect()
        gc.freeze()
        for number in numbers:
            yield run_case(seed, number, world, limit)
    finally:
        shutil.rmtree(root)


def main() -> int:
    """Print the faults and a summary; 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to repeat one")
    parser.add_argument("--limit", type=float, default=60, help="seconds for a case")
    options = parser.parse_args()
    results: Counter[str] = Counter()
    faults = 0
    for outcome in run_all(options.seed, range(options.first, options.first + options.cases), options.limit):
        results[f"{outcome.case.kind}: {outcome.result}"] += 1
        results[outcome.result] += 1
        if outcome.fault:
            faults += 1
            case = outcome.case
            print(f"case {outcome.number} ({case.kind}, {case.title}): {outcome.result}: {outcome.fault}", flush=True)
            if options.cases == 1:
                print(outcome.output, *case.argv)
    print(dict(sorted(results.items())), f"{faults} faults")
    return min(faults, 1)


if __name__ == "__main__":
    sys.exit(main())
