"""Kill runs of all trainers at random moments and at every write, and compare them with runs that were not killed.

make soak N=20                      20 random kills of each job, and a kill at every write
PYTHONPATH=tests python tests/soak/soak.py --jobs sft ppo --random 5 --every 3
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from conftest import tokenizer
from forked import points, random_kill, run
from jobs import JOBS, Job, import_commands, prepare, result, start, survive


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--random", type=int, default=20, help="random kills of each job")
    parser.add_argument("--every", type=int, default=1, help="aimed kills: at each K-th write; 0 for none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list_writes", action="store_true")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="soak-"))
    inputs = work / "inputs"
    inputs.mkdir()
    import_commands()
    prepared = run(lambda: prepare(inputs, tokenizer.__wrapped__()), inputs)
    assert prepared.status == 0, prepared.output
    num_wrong = sum(soak(name, JOBS[name], inputs, work, args) for name in args.jobs)
    if num_wrong:
        print(f"{num_wrong} runs are wrong; their folders are in {work}")
        return 1
    shutil.rmtree(work)
    print("nothing is wrong")
    return 0


def soak(name: str, job: Job, inputs: Path, work: Path, args: argparse.Namespace) -> int:
    case = work / name
    whole = start(job, inputs, case)
    assert whole.status == 0, f"{name}: {whole.output}"
    expected = result(case)
    if args.list_writes:
        print("\n".join(f"{number:4} {write.kind:12} {write.file}" for number, write in enumerate(whole.writes, 1)))
    generator = random.Random(f"{args.seed} {name}")
    plans = [[random_kill(generator, whole.seconds)] for _ in range(args.random)]
    if args.every:
        plans += [[kill] for kill in points(whole.writes)[:: args.every]]
    kinds: Counter[str] = Counter()
    begin = time.monotonic()
    num_wrong = 0
    for number, kills in enumerate(plans):
        wrong = survive(job, inputs, work / f"{name}-{number}", kills, expected)
        num_wrong += bool(wrong)
        for line in wrong:
            kinds[line.split(":")[0]] += 1
            place = whole.writes[kills[0].before - 1] if kills[0].before else f"after {kills[0].after:.2f} s"
            print(f"  {name}-{number} {kills[0]} {place}: {line}", flush=True)
    seconds = time.monotonic() - begin
    print(f"{name}: {len(plans)} kills, {num_wrong} wrong {dict(kinds) or ''} {seconds:.0f} s", flush=True)
    return num_wrong


if __name__ == "__main__":
    sys.exit(main())
