"""``--profile``: which part of a step its time belongs to, and that no number changes."""

import importlib
import json
import time
import traceback
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import close, tiny_model
from datasets import Dataset
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

import rlhf
from rlhf import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from rlhf.cli.main import main
from rlhf.data import Collator
from rlhf.models.flops import batch_flops
from rlhf.trainers import profiling

bridge = importlib.import_module("rlhf.logprobs.bridge")
KINDS = {"sft": (SFTTrainer, SFTConfig, "sft_rows"), "dpo": (DPOTrainer, DPOConfig, "preference_rows")}


@pytest.fixture
def make(request, tmp_path, tokenizer):
    def make(kind, model=None, rows=None, peft=False, callbacks=(), **changes):
        trainer_class, config_class, fixture = KINDS[kind]
        options = dict(max_steps=4, logging_steps=1, learning_rate=1e-3, report_to="none", save_strategy="no") | changes
        return trainer_class(
            model=tiny_model() if model is None else model,
            args=config_class(str(tmp_path / "run"), use_cpu=True, disable_tqdm=True, **options),
            train_dataset=request.getfixturevalue(fixture) if rows is None else rows,
            processing_class=tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=4) if peft else None,
            callbacks=list(callbacks),
        )

    return make


def read(trainer):
    return json.loads((Path(trainer.args.output_dir) / "profile.json").read_text())


class Event:
    """As torch's profiler gives them: a name, and microseconds."""

    def __init__(self, name, start, end):
        self.name, self.time_range = name, profiling_interval(start, end)


def profiling_interval(start, end):
    return SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)


def test_time_counts_for_the_innermost_label():
    events = [
        Event("aten::mm", 0, 90),
        Event("rlhf.forward", 30, 50),
        Event("rlhf.step", 0, 100),
        Event("rlhf.head", 20, 60),
        Event("rlhf.data", 0, 10),
        Event("rlhf.loss", 20, 70),  # begins with the head, and is around it
        Event("rlhf.reference", 120, 150),  # of an evaluation
        Event("rlhf.step", 200, 300),
    ]
    seconds = profiling.seconds_of_labels(events)
    want = {"step": 10 + 30 + 100, "data": 10, "loss": 10, "head": 20, "forward": 20}
    assert seconds == pytest.approx({name: want.get(name, 0) / 1e6 for name in profiling.LABELS})


def test_each_part_gets_its_own_time(make, monkeypatch):
    """Each part of a step sleeps for a time of its own; what is between steps counts for none."""
    cost = {name: 0.02 * (i + 1) for i, name in enumerate(("data", "reference", "forward", "head", "loss"))}
    cost |= {"backward": 0.12, "optimizer": 0.14, "step": 0.16}

    class Elsewhere(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            time.sleep(cost["step"])

        def on_log(self, args, state, control, **kwargs):
            time.sleep(0.5)

    trainer = make("dpo", profile=1, callbacks=[Elsewhere()], per_device_train_batch_size=2)
    collate, score, measure = trainer.data_collator, bridge.score_predictions, trainer.measure

    def slow(seconds, function):
        return lambda *args, **kwargs: (time.sleep(seconds), function(*args, **kwargs))[1]

    def slow_score(*args, **kwargs):
        time.sleep(cost["head"] if torch.is_grad_enabled() else cost["reference"])
        return score(*args, **kwargs)

    def slow_layer(module, args, output):
        if torch.is_grad_enabled():
            time.sleep(cost["forward"])
            output.register_hook(lambda _: time.sleep(cost["backward"]))

    monkeypatch.setattr(bridge, "score_predictions", slow_score)
    trainer.measure = slow(cost["loss"], measure)
    trainer.data_collator = slow(cost["data"], collate)
    trainer.model.model.model.layers[1].register_forward_hook(slow_layer)
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(lambda *_: time.sleep(cost["optimizer"]))
    trainer.train()
    found = read(trainer)
    for name, seconds in cost.items():
        assert seconds <= found["seconds"][name] < seconds + 0.1, name
    assert found["seconds"]["rollout"] == 0
    close(found["step_seconds"], sum(found["seconds"].values()))
    assert found["steps"] == 1


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_stay_and_nothing_is_left_behind(kind, peft, make):
    logs, weights = [], []
    for options in ({}, {"profile": 1}):
        torch.manual_seed(0)
        trainer = make(kind, peft=peft, gradient_accumulation_steps=2, **options)
        before = set(vars(trainer))
        trainer.train()
        logs.append([{k: e[k] for k in ("loss", "grad_norm")} for e in trainer.state.log_history if "loss" in e])
        weights.append(trainer.model.model.state_dict())
    assert logs[0] == logs[1]
    assert all(torch.equal(weights[1][name], weight) for name, weight in weights[0].items())
    assert not {"get_batch_samples", "compute_loss", "training_step", "ask_reference"} & set(vars(trainer)) - before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trainer.model.modules())


def test_off_adds_nothing(make):
    assert not any(isinstance(c, profiling.Profiler) for c in make("sft").callback_handler.callbacks)


def test_a_run_that_ends_early_says_so(make, capsys):
    make("sft", profile=3, max_steps=2).train()
    assert "profile: training ended at step 2" in capsys.readouterr().out
    trainer = make("sft", profile=3, max_steps=4)
    trainer.train()
    assert read(trainer)["steps"] == 2
    with pytest.raises(ValueError, match="profile must be"):
        SFTConfig("run", profile=-1, use_cpu=True)


def test_the_command_prints_a_table_and_writes_the_figures(tmp_path, model_folder, data_files, capsys):
    argv = ["sft", "--model_name_or_path", str(model_folder), "--dataset_name", str(data_files / "sft.jsonl")]
    argv += ["--output_dir", str(tmp_path / "run"), "--max_steps", "4", "--report_to", "none", "--use_cpu"]
    assert main([*argv, "--profile", "2", "--disable_tqdm", "True"]) == 0
    shown = capsys.readouterr().out
    for label in ("data", "forward", "head", "loss", "backward", "optimizer", "other", "step"):
        assert f"\n  {label:<14}" in shown
    assert f"\n  {'reference':<14}" not in shown
    found = json.loads((tmp_path / "run" / "profile.json").read_text())
    flops = {"model_flops", "hardware_flops", "model_flops_utilization", "hardware_flops_utilization"}
    peak = {"peak_flops_per_second", "peak_dtype"}
    assert found.keys() == {"steps", "step_seconds", "seconds", "tokens", "tokens_per_second"} | flops | peak
    assert found["peak_dtype"] == "float32" and 0 < found["model_flops"] < found["hardware_flops"]
    utilization = found["model_flops"] / found["step_seconds"] / found["peak_flops_per_second"]
    close(found["model_flops_utilization"], utilization)
    assert f"\n  {'MFU':<14}" in shown
    assert tuple(found["seconds"]) == profiling.LABELS
    close(found["tokens_per_second"], found["tokens"] / found["step_seconds"])
    trace = json.loads((tmp_path / "run" / "trace.json").read_text())
    assert {"rlhf.forward", "rlhf.head"} <= {event["name"] for event in trace["traceEvents"]}


def test_tokens_are_those_that_the_model_reads(make, sft_rows):
    trainer = make("sft", rows=sft_rows.select(range(8)), profile=1, max_steps=3)
    trainer.train()
    batch = Collator(layout="segments")(list(trainer.train_dataset))
    assert read(trainer)["tokens"] == batch.input_ids.numel()


def test_flops_are_those_of_the_policy_and_its_reference(make, preference_rows):
    trainer = make(
        "dpo", rows=preference_rows.select(range(8)), profile=1, max_steps=3, per_device_train_batch_size=8,
        precompute_ref_log_probs=False,
    )  # fmt: skip
    trainer.train()
    batch = Collator(layout="segments")(list(trainer.train_dataset))
    model = trainer.model.without_adapter
    passes = [batch_flops(model, batch, with_head=True, with_gradient=gradient).model for gradient in (True, False)]
    assert read(trainer)["model_flops"] == sum(passes)


def test_on_policy_steps_have_their_rollout(tmp_path, tokenizer):
    trainer = GRPOTrainer(
        tiny_model(),
        lambda completion_ids, **_: [float(len(ids)) for ids in completion_ids],
        GRPOConfig(
            str(tmp_path), profile=1, max_steps=3, num_generations=2, max_completion_length=4, max_length=32,
            per_device_train_batch_size=2, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["the cat is", "the dog is"]}),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    seconds = read(trainer)["seconds"]
    assert seconds["rollout"] > seconds["data"] > 0


class Waits(TorchDispatchMode):
    """Where our own code makes the host wait for a tensor's value."""

    def __init__(self):
        super().__init__()
        self.lines = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten._local_scalar_dense:
            ours = [f for f in traceback.extract_stack() if Path(f.filename).is_relative_to(Path(rlhf.__file__).parent)]
            self.lines |= {f"{Path(f.filename).name}: {f.line}" for f in ours[-1:]}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_ours_waits_but_the_look_at_the_gradient(kind, make):
    trainer = make(kind, gradient_accumulation_steps=2, logging_steps=100)
    with Waits() as waits:
        trainer.train()
    # On a CPU alone targets are checked, before anything is computed; and what transformers itself waits for.
    not_ours = ("lowest, highest = int(", "super().train(", "super().get_batch_samples(", "super()._finalize_training(")
    # Once in a step, before the weights change.
    looks = ("if is_bad or (norm is not None", "has_bad_loss, *num_receivers = ")
    assert {line for line in waits.lines if not any(known in line for known in (*not_ours, *looks))} == set()


@pytest.mark.parametrize("kind", KINDS)
def test_a_micro_batch_runs_where_no_value_can_be_read(kind, make, monkeypatch):
    """On the meta device whatever needs a tensor's value raises: what would make the host wait for a GPU.

    (Padded rows are not here: transformers' own mask reads whether there is any padding.)
    """
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # which knows no meta device
    trainer = make(kind)
    batch = Collator(layout="segments")(list(trainer.train_dataset.select(range(4))))
    trainer.model.to("meta").train()
    if kind == "dpo":
        trainer.ref_policy.to("meta")
    count = trainer._get_num_items_in_batch([batch], torch.device("meta"))
    batch = batch.to("meta")
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)
    loss.backward()
    assert loss.is_meta and batch.num_tokens().is_meta and all(p.grad.is_meta for p in trainer.model.parameters())
