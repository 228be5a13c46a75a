"""``run.yaml``: it repeats the run, and says what the run read and how it ended."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_model, write_rows
from safetensors.torch import load_file
from transformers import TrainerCallback

from rlhf import DistillConfig, DPOConfig, GRPOConfig, KTOConfig, PPOConfig, RewardConfig, SFTConfig, SFTTrainer
from rlhf.cli.main import main
from rlhf.data.tables import hash_of_file
from rlhf.runs import read_run
from rlhf.runs.facts import git_state


def test_a_command_leaves_a_record_that_repeats_it(tmp_path, model_folder, sft_rows):
    renamed_rows = [{"question": row["prompt"], "completion": row["completion"]} for row in sft_rows]
    rows = write_rows(tmp_path / "rows.jsonl", renamed_rows)
    config = tmp_path / "sft.yaml"
    config.write_text(f"model_name_or_path: {model_folder}\nlearning_rate: 1e-3\n")
    words = [
        "sft", "--config", str(config), f"--data={rows}", "--max_steps", "2", "--use_cpu", "--report_to", "none",
        "--per_device_train_batch_size=2", "--columns", "question=prompt", "--hub_token", "hf_secretsecretsecret",
    ]  # fmt: skip
    first, second = tmp_path / "first", tmp_path / "second"
    assert main([*words, "--output_dir", str(first)]) == 0
    run = read_run(first)
    assert run.options == {
        "dataset_name": [str(rows)], "model_name_or_path": str(model_folder), "output_dir": str(first), "max_steps": 2,
        "learning_rate": 1e-3, "use_cpu": True, "report_to": ["none"], "per_device_train_batch_size": 2,
        "columns": "question=prompt",
    }  # fmt: skip
    record = run.record
    assert (record["command"], record["trainer"], record["status"]) == ("sft", "SFTTrainer", "finished")
    assert record["command_line"].startswith("rlhf sft --config") and "secret" not in (first / "run.yaml").read_text()
    (data,) = record["data"]
    size = Path(rows).stat().st_size
    assert data["files"] == [{"path": str(rows), "xxh3": hash_of_file(Path(rows)), "bytes": size}]
    assert (data["rows"], data["use"]) == (len(sft_rows), "train")
    assert record["versions"]["torch"] == torch.__version__
    assert record["model"]["parameters"] == record["model"]["trainable"] > 0
    assert record["machine"]["processes"] == 1 and record["seconds"] > 0

    assert main(["sft", "--config", str(first / "run.yaml"), "--output_dir", str(second)]) == 0
    assert read_run(second).options == run.options | {"output_dir": str(second)}
    weights = [load_file(folder / "model.safetensors") for folder in (first, second)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


class StopAt(TrainerCallback):
    def __init__(self, step, error=None):
        self.step, self.error = step, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            if self.error is not None:
                raise self.error
            control.should_training_stop = True


def test_a_program_leaves_a_record_too(tmp_path, tokenizer, sft_rows):
    """Its options are those that are not the defaults; how the run ended is told, and when each part began."""
    options = dict(max_steps=3, save_steps=1, learning_rate=1e-3, use_cpu=True, report_to="none", disable_tqdm=True)
    args = SFTConfig(str(tmp_path / "run"), **options)

    def trainer(*callbacks):
        return SFTTrainer(
            tiny_model(), args, train_dataset=sft_rows, processing_class=tokenizer, callbacks=list(callbacks)
        )

    trainer(StopAt(1)).train()
    first = read_run(tmp_path / "run").record
    assert first["status"] == "stopped at step 1 of 3" and first["command"] is None
    with pytest.raises(RuntimeError):
        trainer(StopAt(2, RuntimeError("out of memory\nmore"))).train(resume_from_checkpoint=True)
    second = read_run(tmp_path / "run")
    assert second.record["status"] == "failed at step 2: RuntimeError: out of memory"
    assert second.record["started"] == first["started"] and len(second.record["resumed"]) == 1
    assert second.options.keys() == options.keys() | {"output_dir"}


def test_a_default_configuration_has_changed_nothing(tmp_path):
    """Whatever it fills in by the machine and by other options."""
    for config in (SFTConfig, DPOConfig, KTOConfig, RewardConfig, PPOConfig, GRPOConfig, DistillConfig):
        assert config(str(tmp_path), use_cpu=True).given_options == {"output_dir": str(tmp_path), "use_cpu": True}
    assert GRPOConfig(str(tmp_path), beta=0.1).given_options == {"output_dir": str(tmp_path), "beta": 0.1}


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_state_of_a_repository(tmp_path):
    import subprocess

    def git(*words):
        subprocess.run(
            ["git", "-c", "user.name=n", "-c", "user.email=e", *words], cwd=tmp_path, check=True, capture_output=True
        )

    git("init", "-b", "work")
    assert git_state(tmp_path) is None  # without a commit
    (tmp_path / "a.py").write_text("1\n")
    git("add", ".")
    git("commit", "-m", "first")
    state = git_state(tmp_path)
    assert len(state.pop("commit")) == 40 and state == {"branch": "work", "dirty": False}
    (tmp_path / "untracked").write_text("")
    assert not git_state(tmp_path)["dirty"]
    (tmp_path / "a.py").write_text("2\n")
    assert git_state(tmp_path)["dirty"]


def test_a_key_called_record_is_passed_over(tmp_path):
    from rlhf.cli.options import read_config

    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"beta": 0.2, "record": {"command": "dpo"}}))
    assert read_config(str(file), {"beta"}) == {"beta": 0.2}
