"""What is learnt in equal seconds, by this package and by TRL, on one GPU: SFT, DPO, GRPO, a reward model and PPO.

python docs/runs/learning/run.py --model SmolLM2-135M-Instruct --data FOLDER_OF_PREFERENCES --out runs/learning

Each side trains its seeds at the same time, alone on the machine; the sides take turns. Reward models train first. PPO
trains last, while the results of the others are evaluated; neither is timed against anything.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from settings import REWARD, SIDES, STAGES  # noqa: E402


class Processes:
    """The processes of the run, and the files by which they wait for each other.

    Args:
        out: folder of all results.
        deadline: when everything is stopped, in seconds of ``time.monotonic``.
    """

    def __init__(self, out: Path, deadline: float) -> None:
        self.out, self.deadline, self.started = out, deadline, time.monotonic()
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        for folder in ("gates", "models", "runs", "logs"):
            (out / folder).mkdir(parents=True, exist_ok=True)

    def say(self, text: str) -> None:
        """One line with the seconds since the start."""
        print(f"{time.monotonic() - self.started:6.1f} s  {text}", flush=True)

    def start(self, name: str, script: str, *arguments: object) -> None:
        """Start a script of this folder; what it prints goes to a file."""
        with (self.out / "logs" / f"{name}.log").open("wb") as log:
            command = [sys.executable, str(HERE / script), *map(str, arguments)]
            self.running[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def wait(self, gate: str, names: list[str]) -> None:
        """Until each of these processes has passed a gate, has ended, or the time is over."""
        for name in names:
            file = self.out / "gates" / (f"{gate}-{name}" if name != gate else gate)
            while not file.exists() and self.running[name].poll() is None and time.monotonic() < self.deadline:
                time.sleep(0.05)

    def open(self, gate: str) -> None:
        """Let the processes go on that wait at a gate."""
        (self.out / "gates" / gate).touch()
        self.say(gate)

    def finish(self) -> int:
        """Wait for all, stop those that are late, and say which failed.

        Returns:
            The number of processes that failed.
        """
        failed = 0
        for name, process in self.running.items():
            try:
                status = process.wait(max(0.1, self.deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait()
            if status:
                failed += 1
                log = (self.out / "logs" / f"{name}.log").read_text(encoding="utf-8", errors="replace")
                self.say(f"{name} ended with status {status}:\n{log[-1500:]}")
        self.say("done")
        return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--data", required=True, type=Path, help="folder of preferences_{train,eval}.jsonl.gz")
    parser.add_argument("--out", required=True, type=Path, help="folder of the results")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all budgets of seconds")
    parser.add_argument("--tiny", action="store_true", help="small batches, for a rehearsal on a CPU")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds after which everything is stopped")
    parser.add_argument("--only", nargs="+", default=["reward", "sides", "ppo"], choices=["reward", "sides", "ppo"])
    args = parser.parse_args()
    if args.tiny:
        os.environ["LEARNING_TINY"] = "1"
    processes = Processes(args.out, time.monotonic() + args.limit)
    threads = str(max(1, (os.cpu_count() or 2) // 8))
    os.environ |= {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    data = args.data.resolve()
    judges = [f"reward-{name}" for name in REWARD] if "reward" in args.only else []
    seeds = range(args.seeds) if "sides" in args.only else []
    workers = {side: [f"{side}-{seed}" for seed in seeds] for side in SIDES}
    for name in judges:
        processes.start(name, "reward_model.py", name.removeprefix("reward-"), args.model, data, args.out, args.scale)
    for side, names in workers.items():
        for seed, name in enumerate(names):
            processes.start(name, "side.py", side, seed, args.model, data, args.out, args.scale)
    if "ppo" in args.only:
        start = args.out / "models" / "ours-0-sft" if "sides" in args.only else args.model
        processes.start("ppo", "ppo.py", start, args.out, data, args.scale)
    processes.wait("ready", judges)
    processes.open("go-reward")
    for stage in STAGES:
        for names in workers.values():
            processes.wait(f"ready-{stage}", names)
        if stage == STAGES[0]:
            # The reward models are not timed, the sides are.
            for name in judges:
                processes.running[name].wait(max(0.1, processes.deadline - time.monotonic()))
        for side, names in workers.items():
            if names:
                processes.open(f"go-{stage}-{side}")
                processes.wait(f"done-{stage}", names)
    for name in judges:
        processes.running[name].wait(max(0.1, processes.deadline - time.monotonic()))
    processes.open("go-ppo")
    processes.open("go-answers")
    return 1 if processes.finish() else 0


if __name__ == "__main__":
    sys.exit(main())
