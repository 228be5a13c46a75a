"""The plan of a run: its memory carried on from a few layers is that of the whole model; a dry run touches nothing."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model
from peft import LoraConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "rollouts"))
import fake_llm

from rlhf.cli.main import main
from rlhf.online import GRPOConfig, GRPOTrainer
from rlhf.planning import plan_lines, plan_run
from rlhf.planning.batches import batch_sizes, make_micro
from rlhf.planning.memory import MemoryPlan, available_memory, gradient_bytes, weight_bytes
from rlhf.planning.schedule import row_figures
from rlhf.planning.sharding import divided, shards_of
from rlhf.planning.step import backward, measure_step, run_step, stacks_of
from rlhf.trainers import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from rlhf.trainers.reference_logps import without_reference_pass

LAYERS = 7
OPTIONS = dict(max_length=64, per_device_train_batch_size=4, report_to="none", use_cpu=True, disable_tqdm=True)


def sft_trainer(tmp_path, tokenizer, rows, lora=None, **options):
    args = SFTConfig(output_dir=str(tmp_path / "run"), **OPTIONS | options)
    model = tiny_model(num_hidden_layers=LAYERS)
    return SFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=lora)


def largest_micro(trainer):
    sizes = batch_sizes(trainer, trainer.get_train_dataloader(), 1000)
    return make_micro(trainer, [trainer.train_dataset[index] for index in sizes.largest])


@pytest.mark.parametrize(
    "options",
    [{"gradient_accumulation_steps": 2}, {"activation_checkpointing": True, "lora": LoraConfig(r=4)}],
    ids=["accumulation", "checkpointing, lora"],
)
def test_the_memory_of_few_layers_carried_on_is_that_of_all_layers(options, tmp_path, tokenizer, sft_rows):
    trainer = sft_trainer(tmp_path, tokenizer, sft_rows, **options)
    if trainer.args.activation_checkpointing:
        trainer.model.activation_checkpointing_enable()
    micro, stacks = largest_micro(trainer), stacks_of(trainer)
    predicted = measure_step(trainer, micro, stacks)
    phases, state_bytes = run_step(trainer, micro, list(stacks[0].layers))
    assert len(stacks[0]) == LAYERS
    assert predicted.peaks == {name: phase.peak for name, phase in phases.items()}
    assert predicted.optimizer == state_bytes > 0
    assert predicted.kept == phases["forward"].end > 0


def test_the_bytes_of_weights_and_gradients_are_those_of_the_tensors(tmp_path, tokenizer, sft_rows):
    trainer = sft_trainer(tmp_path, tokenizer, sft_rows)
    backward(trainer, largest_micro(trainer))
    weights = list(trainer.model.parameters())
    buffers = sum(buffer.nbytes for buffer in trainer.model.buffers())
    assert weight_bytes([trainer.model]) == sum(weight.nbytes for weight in weights) + buffers
    assert gradient_bytes(trainer.model) == sum(weight.grad.nbytes for weight in weights)


def test_a_run_that_does_not_fit_is_told_what_would(tmp_path, tokenizer, sft_rows, monkeypatch):
    monkeypatch.setattr("rlhf.planning.plan.available_memory", lambda _: 10)
    plan = plan_run(sft_trainer(tmp_path, tokenizer, sft_rows))
    assert not plan.memory.fits and plan.duration is None
    changes = plan.memory.changes
    assert "--per_device_train_batch_size 1" in changes
    assert all(0 < peak < plan.memory.peak for peak in changes.values())
    lines = plan_lines(plan, "cpu")
    assert any("--per_device_train_batch_size 1" in line for line in lines)
    assert "  not measured: the run does not fit" in lines


def test_figures_of_rows(tmp_path, tokenizer, sft_rows):
    rows = sft_trainer(tmp_path, tokenizer, sft_rows).train_dataset
    figures = row_figures(rows)
    lengths = sorted(len(row["input_ids"]) for row in rows)
    assert (figures.rows, figures.shortest, figures.longest) == (len(rows), lengths[0], lengths[-1])
    assert figures.tokens == sum(lengths)
    labels = [label for row in rows for label in row.get("labels", row["input_ids"])]
    assert figures.scored == sum(label != -100 for label in labels)


def test_a_reference_that_is_asked_once_needs_no_pass_for_a_plan(tmp_path, tokenizer, preference_rows):
    args = DPOConfig(output_dir=str(tmp_path / "run"), num_train_epochs=2, **OPTIONS)
    with without_reference_pass():
        trainer = DPOTrainer(
            tiny_model(), args=args, train_dataset=preference_rows, processing_class=tokenizer,
            eval_dataset=preference_rows,
        )  # fmt: skip
    assert set(trainer.train_dataset["ref_chosen_logps"]) == {0.0}
    plan = plan_run(trainer)
    assert plan.schedule.steps == 24 and plan.memory.others == 0
    assert {"evaluation", "reference pass", "head and loss"} <= set(plan.memory.phases)
    assert plan.memory.expected >= plan.memory.measured > 0
    assert plan.duration.evaluation > 0 and plan.duration.training > 0


def test_a_rollout_is_planned_without_a_call_of_the_rewards(tmp_path, tokenizer, sft_rows):
    def reward(prompts, **_):
        raise AssertionError("called")

    args = GRPOConfig(
        output_dir=str(tmp_path / "run"), max_length=96, max_completion_length=16, num_generations=4, use_cpu=True,
        per_device_train_batch_size=8, gradient_accumulation_steps=2, beta=0.1, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    prompts = sft_rows.select_columns(["prompt"])
    plan = plan_run(GRPOTrainer(tiny_model(), reward, args, prompts, processing_class=tokenizer))
    assert plan.memory.phases["rollout"] > 0 and plan.duration.rollouts > 0
    assert plan.memory.others == plan.memory.weights
    assert plan.schedule.steps == 12 * 3


@pytest.mark.parametrize("sleeps", [False, True])
def test_vllm_in_the_process_takes_its_share(sleeps, tmp_path, tokenizer, sft_rows, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", fake_llm.module())
    monkeypatch.setattr("rlhf.planning.plan.device_memory", lambda device: 2**40)
    args = GRPOConfig(
        output_dir=str(tmp_path / "run"), max_length=96, max_completion_length=16, num_generations=4, use_cpu=True,
        per_device_train_batch_size=8, report_to="none", disable_tqdm=True, use_vllm=True,
        vllm_gpu_memory_utilization=0.25, vllm_enable_sleep_mode=sleeps,
    )  # fmt: skip
    prompts = sft_rows.select_columns(["prompt"])
    trainer = GRPOTrainer(tiny_model(), lambda **_: [], args, prompts, processing_class=tokenizer)
    plan = plan_run(trainer, with_times=False)
    if sleeps:  # training has the memory then
        assert plan.memory.vllm == 0 and plan.memory.phase == "rollout" and plan.memory.phases["rollout"] == 2**38
    else:
        assert plan.memory.vllm == 2**38 and "  vLLM                    256.00 GiB" in "\n".join(
            plan_lines(plan, "cuda")
        )
    assert 2**38 < plan.memory.peak < 2**38 + 2**35
    assert "sampling comes on top" in plan.notes[0]
    # A run that samples and does not fit is told what would help too.
    assert not plan.memory.fits and set(plan.memory.changes) == {"--use_peft (computed)"}


def test_processes_of_a_machine_share_its_memory(monkeypatch):
    whole = available_memory(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert available_memory(torch.device("cpu")) == whole // 2


def test_each_process_holds_a_part_of_one_copy():
    plan = MemoryPlan(weights=64, others=0, optimizer=128, gradients=64, phases={"step": 100}, fixed=0, available=1000)
    args = SimpleNamespace(world_size=8, parallelism_config={"dp_replicate_size": 4, "dp_shard_size": 2, "cp_size": 1})
    assert shards_of(args) == 2
    parts = dict.fromkeys(("weights", "gradients", "optimizer"), True)
    part = divided(plan, parts, args.world_size, shards_of(args), 4)
    assert (part.weights, part.gradients, part.optimizer) == (32, 32, 64)


def files_of(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def dry_run(data_files, model_folder, output, *words):
    file = data_files / "sft.jsonl"
    argv = ["sft", "--model", str(model_folder), "--dataset_name", str(file), "--output_dir", str(output)]
    return main([*argv, "--use_cpu", "--dry_run", "--max_length", "8", "--drop_long_prompts", *words])


def test_a_dry_run_prints_the_plan_and_touches_nothing(tmp_path, data_files, model_folder, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "training_args.bin").write_bytes(b"of a run")
    before = files_of(tmp_path)
    assert dry_run(data_files, model_folder, run, "--overwrite") == 0
    assert files_of(tmp_path) == before
    printed = capsys.readouterr().out
    for word in ("largest micro-batch", "optimizer state", "at most", "training", "rows cut to max_length 8"):
        assert word in printed


def test_a_dry_run_refuses_what_the_run_would(tmp_path, data_files, model_folder, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "training_args.bin").write_bytes(b"of a run")
    assert dry_run(data_files, model_folder, run) == 2
    assert "holds a run already" in capsys.readouterr().err
    words = ("--dataloader_drop_last", "--per_device_train_batch_size", "64")
    assert dry_run(data_files, model_folder, tmp_path / "new", *words) == 2
    assert "leaves nothing to train on" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
