"""`rlhf sweep`: its grid, its runs, what it skips, and its table."""

import json

import pytest
import yaml

from rlhf.cli import sweep
from rlhf.cli.main import main
from rlhf.cli.sweep_grid import command_of, grid_of, runs_of, values_of
from rlhf.cli.sweep_table import sweep_table


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("beta=0.05,0.1", ("beta", ["0.05", "0.1"])),
        ("--lr=1e-6, 5e-6", ("learning_rate", ["1e-6", "5e-6"])),
        ('loss-kwargs={"a": 1, "b": 2},{"a": 3}', ("loss_kwargs", ['{"a": 1, "b": 2}', '{"a": 3}'])),
        ("loss_type=a.py:f,sigmoid", ("loss_type", ["a.py:f", "sigmoid"])),
    ],
)
def test_values(setting, values):
    assert values_of(setting) == values


def test_a_grid_and_the_names_of_its_runs():
    grid = grid_of("dpo", ["beta=0.1,0.2", "loss_type=my/loss.py:f"], 2, 42)
    assert [run.name for run in runs_of(grid)] == [
        f"beta={beta},loss_type=my_loss.py_f,seed={seed}" for beta in ("0.1", "0.2") for seed in (42, 43)
    ]


@pytest.mark.parametrize(
    ("settings", "seeds", "message"),
    [
        (["beta"], None, "--set beta: expected OPTION=VALUE,VALUE"),
        (["beta=0.1,"], None, None),
        (["beta=0.1,0.1"], None, "a value is given twice"),
        (["beta=1", "beta=2"], None, "--set beta is given twice"),
        (["betta=1"], None, "unknown option --betta; did you mean --beta?"),
        (["output_dir=a,b"], None, "--set output_dir: the sweep sets it itself"),
        (["seed=1,2"], 2, "--seeds and --set seed exclude each other"),
        ([], 0, "--seeds must be at least 1, got 0"),
        ([], None, "nothing is swept"),
        (["loss_type=a/b,a:b"], None, "two runs would have the folder loss_type=a_b"),
    ],
)
def test_what_no_grid_can_be(settings, seeds, message):
    if message is None:
        assert len(runs_of(grid_of("dpo", settings, seeds, 1))) == 1
        return
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        runs_of(grid_of("dpo", settings, seeds, 1))


def test_the_command_of_a_file(tmp_path):
    def command(text, name="c.yaml"):
        (tmp_path / name).write_text(text)
        return command_of(str(tmp_path / name))

    assert command("beta: 0.1\nrecord:\n  command: kto\n") == "kto"
    assert command("# rlhf online-dpo --config c.yaml\nbeta: 0.1\n") == "online-dpo"
    assert command("beta: 0.1\n", "dpo.yaml") == "dpo" == command_of("dpo.yaml")
    with pytest.raises(ValueError, match="does not tell its command; name it, as in `rlhf sweep dpo --config"):
        command("beta: 0.1\nrecord: {command: eval}\n")


def fake_run(words, figures, status=0, run_status="finished"):
    """What a training command would leave in its folder."""
    options = dict(word.removeprefix("--").split("=", 1) for word in words if "=" in word)
    folder = sweep.Path(options["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump({"beta": 1, "record": {"status": run_status, "seconds": 1.5}}))
    (folder / "all_results.json").write_text("{}")
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, **figures(options)}) + "\n")
    return status


def accuracy(options):
    beta = float(options["beta"])
    return {"eval_rewards/accuracies": 0.9 - beta, "eval_rewards/margins": 9 * beta, "eval_log_ratios/margins": 9.0}


def test_a_sweep_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    config, out = tmp_path / "dpo.yaml", tmp_path / "sweep"
    config.write_text(f"output_dir: {out}\nmax_steps: 2\n")
    argv = ["sweep", "--config", str(config), "--set", "beta=0.1,0.2,0.4", "--use_cpu", "true"]
    started = []

    def launch(words):
        started.append(words)
        if "--beta=0.2" in words and len(started) < 3:
            return 2
        if "--beta=0.4" in words and len(started) < 4:
            return fake_run(words, accuracy, 130, "stopped at step 1 of 2")
        return fake_run(words, accuracy)

    monkeypatch.setattr(sweep, "run_command", launch)
    assert main([*argv, "--dry-run"]) == 0
    assert f"not run   rlhf dpo --config {config} --use_cpu true --beta=0.2" in capsys.readouterr().out
    assert not started and not out.exists()

    assert main(argv) == 130  # interrupted in the third
    assert started[0] == ["dpo", "--config", str(config), "--use_cpu", "true", "--beta=0.1",
                          f"--output_dir={out}/beta=0.1", "--resume=auto"]  # fmt: skip
    states = {run["name"]: run["status"] for run in json.loads((out / "sweep.json").read_text())["runs"]}
    assert states == {"beta=0.1": "finished", "beta=0.2": "failed (status 2)", "beta=0.4": "stopped"}
    capsys.readouterr()

    assert main(argv) == 0 and len(started) == 5
    lines = capsys.readouterr().out.splitlines()
    assert "run 1 of 3: beta=0.1: finished already" in lines
    table = lines[lines.index("") + 1 :]
    assert table[:5] == [
        "beta  eval_rewards/accuracies  eval_log_ratios/margins",
        " 0.1                      0.8                        9",
        " 0.2                      0.7                        9",
        " 0.4                      0.5                        9",
        "sorted by eval_rewards/accuracies, the highest first",
    ]
    assert (out / "report.html").read_text().count("beta=0.4") > 0
    recorded = json.loads((out / "sweep.json").read_text())["runs"][2]
    assert recorded["options"] == {"beta": 0.4} and recorded["metrics"]["eval_rewards/accuracies"] == 0.5

    # A larger grid goes on; other options are another sweep.
    assert main([*argv[:4], "beta=0.1,0.8", *argv[5:]]) == 0 and len(started) == 6
    assert main([*argv, "--learning_rate", "1e-4"]) == 2
    assert "choose another --output_dir" in capsys.readouterr().err
    config.write_text(f"output_dir: {out}\nmax_steps: 3\n")
    assert main(argv) == 2
    assert "its runs have max_steps 2, this sweep has 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--set", "beta=1"], "neither a command nor --config"),
        (["eval", "--set", "beta=1"], "eval is no command that trains: one of sft, dpo"),
        (["dpo", "--set", "beta=1"], "--output_dir is missing"),
        (["dpo", "--output_dir", "x", "--set", "beta=1", "--overwrite"], "--overwrite: a sweep goes on by itself"),
        (["--config", "nowhere.yaml", "--set", "beta=1"], "nowhere.yaml: no such config file"),
    ],
)
def test_bad_calls_are_one_line(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_table_over_seeds_and_metrics_that_do_not_compare():
    runs = [
        ({"beta": beta, "seed": seed}, {"eval_loss": float(seed) * float(beta), "eval_rewards/margins": 3.0})
        for beta in ("0.1", "1")
        for seed in ("1", "2")
    ]
    assert sweep_table(runs, ["beta", "seed"], None)[0].startswith("no metric compares across these runs")
    assert sweep_table(runs, ["beta", "seed"], "eval_loss") == [
        "beta  seeds     eval_loss",
        " 0.1      2  0.15 ± 0.071",
        "   1      2    1.5 ± 0.71",
        "sorted by eval_loss, the lowest first; mean ± standard deviation over seeds",
    ]
    with pytest.raises(ValueError, match="--metric nothing: not every run has it; the first run has eval_loss"):
        sweep_table(runs, ["beta"], "nothing")
    assert sweep_table([], ["beta"], None) == ["no run is finished"]
