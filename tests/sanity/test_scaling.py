"""The arithmetic of docs/scaling agrees with its page and with the configuration files of clusters."""

import importlib.util
import math

import pytest
import yaml
from test_house import ROOT

FOLDER = ROOT / "docs/scaling"
spec = importlib.util.spec_from_file_location("scaling_arithmetic", FOLDER / "arithmetic.py")
arithmetic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(arithmetic)
MACHINE = arithmetic.Machine()


def test_the_page_has_these_tables():
    written = (FOLDER / "README.md").read_text().split(arithmetic.MARKS[0])[1].split(arithmetic.MARKS[1])[0]
    assert written.strip() == arithmetic.tables(MACHINE).strip()


@pytest.mark.parametrize("gpus, model", [(8, "8B"), (64, "70B"), (512, "70B")])
def test_the_files_are_the_runs_of_the_page(gpus, model):
    run = next(run for run in arithmetic.RUNS if run.gpus == gpus and run.model.name == model)
    found = arithmetic.best_split(run, MACHINE)
    launched = yaml.safe_load((ROOT / f"configs/accelerate/cluster_{gpus}.yaml").read_text())
    options = yaml.safe_load((ROOT / f"configs/clusters/grpo_{gpus}.yaml").read_text())
    parallel = launched["parallelism_config"]
    shards, copies = (parallel[f"parallelism_config_dp_{name}_size"] for name in ("shard", "replicate"))
    assert (launched["num_processes"], shards, copies) == (found.trainers, run.shards, found.trainers // run.shards)
    assert launched["num_machines"] == math.ceil(found.trainers / 8)
    rows = options["per_device_train_batch_size"] * options["gradient_accumulation_steps"] * found.trainers
    assert (options["per_device_train_batch_size"], rows) == (run.micro_rows, run.rows)
    assert (options["max_length"], options["max_completion_length"]) == (run.length, run.completion)
    # Checkpoints are about as frequent as loses least time.
    step = found.overlapped
    assert 0.3 < options["save_steps"] * step / arithmetic.checkpoint(run, MACHINE).interval < 3


def test_counts_by_hand():
    # Two layers of 10 parameters beside 2 x 3 x 5 of embedding and head.
    model = arithmetic.Model("tiny", 50, 2, 5, 1, vocabulary=3)
    assert model.layer_parameters == 10
    parts = arithmetic.memory(model, 2, 7)
    assert parts["weights, gradients, Adam"] == 400 and parts["gathered weights"] == 2 * (20 + 30)
    # Four tokens of sequences of 8: 6 a parameter, and 2 products x 2 operations x 3 passes x half of the tokens.
    assert arithmetic.training_flops(model, 4, 8) == 4 * 6 * 50 + 3 * (2 * 2 * 4 * 4 * 5) * 2
    run = arithmetic.Run(16, model, 16, 1, 1, 16, 0, 8, 1)
    machine = arithmetic.Machine(
        within_node=100, between_nodes=10, host=5, file_system=60, hours_between_failures=4 / 9
    )
    # All eight adapters of a node: 80 bytes a second, less than within the node.
    assert arithmetic.communication_seconds(run, machine) == pytest.approx(8 * 50 * 15 / 16 / 80)
    # 200 bytes are gathered and copied to the host; then to the GPU and on by one adapter, for each of three servers.
    update = 200 * 15 / 16 / 80 + 200 / 5 + 3 * (200 / 5 + 200 / 10)
    assert arithmetic.update_seconds(run, machine, 3) == pytest.approx(update)
    # In bf16, once.
    assert arithmetic.one_group_seconds(run, machine) == pytest.approx(100 / 80 + 100 / 10)
    # 600 bytes take 10 s; a failure every 100 s: sqrt(2 x 10 x 100).
    assert arithmetic.checkpoint(run, machine).interval == pytest.approx(math.sqrt(2000))
