"""What is learnt in equal seconds, by this package and by TRL: SFT, DPO, GRPO; then a reward model, and PPO against it.

python docs/runs/learning/run.py --model SmolLM2-135M-Instruct --data FOLDER_OF_PREFERENCES --out runs/learning

On a CPU both sides train at the same time, each on a core of its own. On a GPU each side trains its seeds at the same
time, and the sides take turns. Reward models train first, PPO last.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from rows import one_pair_a_prompt  # noqa: E402
from settings import ON_GPU, REWARD_LAYERS, SIDES, STAGES  # noqa: E402


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

    def join(self, names: list[str]) -> None:
        """Wait for the end of these processes, or of the time."""
        while any(self.running[name].poll() is None for name in names) and time.monotonic() < self.deadline:
            time.sleep(0.05)

    def stop(self) -> None:
        """End the processes that still run."""
        for process in self.running.values():
            if process.poll() is None:
                process.kill()

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
    parser.add_argument("--limit", type=float, default=6000.0, help="seconds after which everything is stopped")
    parser.add_argument("--only", nargs="+", default=["reward", "sides", "ppo"], choices=["reward", "sides", "ppo"])
    args = parser.parse_args()
    processes = Processes(args.out, time.monotonic() + args.limit)
    threads = str(max(1, (os.cpu_count() or 2) // 8))
    os.environ |= {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    data = args.data.resolve()
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in one_pair_a_prompt(data)]
    (args.out / "held_out.jsonl").write_text("".join(lines), encoding="utf-8")
    places = (args.model, data, args.out, args.scale)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` runs
    try:
        (on_gpu if ON_GPU else on_cpu)(processes, args, places)
        failed = processes.finish()
    finally:
        processes.stop()
    if not failed:
        subprocess.run([sys.executable, str(HERE / "judge.py"), str(args.out), str(data)], check=True)
    return 1 if failed else 0


def train_reward(processes: Processes, args: argparse.Namespace) -> None:
    """The head of the reward model, then all of its weights."""
    if "reward" in args.only:
        processes.open("go-reward")
        processes.start("reward-frozen", "frozen_reward.py", args.model, REWARD_LAYERS, args.data.resolve(), args.out)
        processes.join(["reward-frozen"])
        if processes.running["reward-frozen"].poll() != 0:
            return  # there is nothing to fine-tune; `finish` shows the error
        processes.start("reward", "reward_model.py", args.data.resolve(), args.out, args.scale)
        processes.join(["reward"])


def start_ppo(processes: Processes, args: argparse.Namespace) -> None:
    """Start PPO from the fine-tuned model of seed 0."""
    if "ppo" in args.only:
        start = args.out / "models" / "ours-0-sft"
        processes.start("ppo", "ppo.py", start, args.out, args.data.resolve(), args.scale)


def start_answers(processes: Processes, args: argparse.Namespace) -> None:
    """Start the answers of the model before training."""
    if "sides" in args.only:
        processes.start("start", "start.py", args.model, args.data.resolve(), args.out)


def on_gpu(processes: Processes, args: argparse.Namespace, places: tuple[object, ...]) -> None:
    """All processes start at once; then the sides take turns, each with all its seeds at the same time."""
    seeds = range(args.seeds) if "sides" in args.only else []
    workers = {side: [f"{side}-{seed}" for seed in seeds] for side in SIDES}
    for side, names in workers.items():
        for seed, name in enumerate(names):
            processes.start(name, "side.py", side, seed, *places)
    start_ppo(processes, args)
    train_reward(processes, args)  # while the others load: it is not timed
    for stage in STAGES:
        for names in workers.values():
            processes.wait(f"ready-{stage}", names)
        for side, names in workers.items():
            processes.open(f"go-{stage}-{side}")
            processes.wait(f"done-{stage}", names)
    processes.open("go-ppo")
    processes.open("go-answers")
    start_answers(processes, args)


def on_cpu(processes: Processes, args: argparse.Namespace, places: tuple[object, ...]) -> None:
    """Both sides at the same time, each on a core of its own, one seed after the other."""
    for gate in ("go-ppo", "go-answers", *(f"go-{stage}-{side}" for stage in STAGES for side in SIDES)):
        processes.open(gate)
    train_reward(processes, args)
    for seed in range(args.seeds) if "sides" in args.only else []:
        for side in SIDES:
            processes.start(f"{side}-{seed}", "side.py", side, seed, *places)
        processes.join([f"{side}-{seed}" for side in SIDES])
        processes.say(f"seed {seed} is trained")
    for seed in range(args.seeds) if "sides" in args.only else []:
        for side in SIDES:
            processes.start(f"learnt-{side}-{seed}", "learnt.py", side, seed, *places[1:-1])
        processes.join([f"learnt-{side}-{seed}" for side in SIDES])
    start_answers(processes, args)
    start_ppo(processes, args)


if __name__ == "__main__":
    sys.exit(main())
