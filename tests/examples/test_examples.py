"""The examples run, and do what they say."""

import importlib.util
import subprocess
import sys
from pathlib import Path

from conftest import close

ROOT = Path(__file__).parents[2]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plain_torch():
    found = load("plain_torch").main()
    assert found["perplexity after"] < found["perplexity before"] / 3
    assert found["DPO loss"] < 0.5


def test_a_game_is_played_to_its_end():
    game = load("guess").Guess()
    assert game.reset({"number": 4}) is None
    assert [tuple(game.step(text)) for text in ("well", "I say 7!", "3", "4.")] == [
        ("A number, please.", 0.0, False), ("Lower.", 0.0, False), ("Higher.", 0.0, False), ("", 0.8, True),
    ]  # fmt: skip


def test_hf_trainer_accumulates_exactly():
    main = load("hf_trainer").main
    whole = main(8, 1)
    close(main(1, 8), whole)
    assert whole[-1] < whole[0] - 0.5


def test_accelerate_on_one_process_and_on_two():
    script = str(ROOT / "examples/accelerate_loop.py")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    launch += [str(ROOT / "configs/accelerate/two_cpu.yaml"), "--main_process_port", "0", script]
    printed = []
    for argv in ([sys.executable, script], launch):
        done = subprocess.run(argv, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        line = next(line for line in done.stdout.splitlines() if " -> " in line)
        printed.append([float(value) for value in line.split(" -> ")])
    (first, last), two = printed
    assert max(abs(a - b) for a, b in zip(two, (first, last), strict=True)) < 2e-4, printed  # four digits are printed
    assert last < first - 0.2
