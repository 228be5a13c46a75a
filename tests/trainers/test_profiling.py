"""``--profile`` and ``--verbose``: whose time is whose, what is counted, and that no number changes."""

import importlib
import json
import traceback
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import close, tiny_model
from peft import LoraConfig
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

import rlhf
from rlhf import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from rlhf.cli.main import main
from rlhf.data import Collator
from rlhf.trainers import profiling, throughput
from rlhf.trainers.activations import Activations

bridge = importlib.import_module("rlhf.logprobs.bridge")
scoring = importlib.import_module("rlhf.logprobs.score")
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


@pytest.fixture
def fixed_peak(monkeypatch):
    monkeypatch.setattr(throughput, "product_peak", lambda *_: 1e9)


def read(trainer):
    return json.loads((Path(trainer.args.output_dir) / "profile.json").read_text())


def test_each_phase_gets_its_own_time(make, monkeypatch, fixed_peak):
    """A clock that stands still but for what each part of a step adds to it."""
    now = [0.0]
    cost = {phase: 2.0**i for i, phase in enumerate(profiling.PHASES)}
    monkeypatch.setattr(profiling, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def spend(phase):
        now[0] += cost[phase]

    class Elsewhere(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            spend("other")

        def on_step_end(self, args, state, control, **kwargs):
            now[0] += 0.0 if state.global_step < 3 else 0.5  # within the step too

        def on_log(self, args, state, control, **kwargs):
            now[0] += 1000  # between steps

    trainer = make(
        "dpo", profile=2, callbacks=[Elsewhere()], per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    collate, score, ask_reference = trainer.data_collator, bridge.score, DPOTrainer.ask_reference

    def slow_collate(rows):
        spend("data")
        return collate(rows)

    def slow_score(*args, **kwargs):
        scores = score(*args, **kwargs)
        if scores.logps.requires_grad:
            spend("head")
            scores.logps.register_hook(lambda _: spend("head backward"))
        return scores

    def slow_reference(*args):
        spend("reference")
        return ask_reference(*args)

    def slow_layer(module, args, output):
        if torch.is_grad_enabled():
            spend("forward")
            output.register_hook(lambda _: spend("backward"))

    monkeypatch.setattr(bridge, "score", slow_score)
    monkeypatch.setattr(DPOTrainer, "ask_reference", slow_reference)
    trainer.data_collator = slow_collate
    trainer.model.model.model.layers[1].register_forward_hook(slow_layer)
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(lambda *_: spend("optimizer"))
    trainer.train()
    found = read(trainer)
    once_a_step = {"optimizer", "other"}
    want = {phase: seconds * (1 if phase in once_a_step else 2) for phase, seconds in cost.items()}
    want["other"] += 0.5
    assert found["seconds"] == want
    assert found["step_seconds"] == sum(want.values()) and found["steps"] == 2


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_stay_and_nothing_is_left_behind(kind, peft, make, fixed_peak):
    logs, weights = [], []
    for options in ({}, {"profile": 1, "verbose": True}):
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


@pytest.mark.parametrize("layout", ["segments", "rows"])
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_counted_exactly(kind, layout, make, monkeypatch, fixed_peak, sft_rows, preference_rows):
    """Every step has the same 8 rows, so the counted step's figure is that of all; each product 2 m k n."""
    monkeypatch.setattr(importlib.import_module("rlhf.logprobs.chunks"), "_chunk_size", lambda *_: 7)
    rows = {"sft": sft_rows, "dpo": preference_rows}[kind].select(range(8))
    own = {"precompute_ref_log_probs": False} if kind == "dpo" else {}
    trainer = make(kind, rows=rows, profile=1, max_steps=3, layout=layout, **own)
    trainer.train()
    batch = Collator(layout=layout)(list(trainer.train_dataset))
    c = trainer.model.config
    head_dim, key_value = c.hidden_size // c.num_attention_heads, c.hidden_size // 2
    linear = c.num_hidden_layers * (
        2 * c.hidden_size**2 + 2 * c.hidden_size * key_value + 3 * c.hidden_size * c.intermediate_size
    )
    tokens, scored = batch.input_ids.numel(), len(batch.targets)
    if layout == "segments":
        squares = sum(span.length * (span.length + span.prefix) for span in batch.segments.spans)
    else:
        squares = batch.input_ids.size(0) * batch.input_ids.size(1) ** 2
    attention = c.num_hidden_layers * c.num_attention_heads * head_dim * squares  # of one product
    head = scored * c.vocab_size * c.hidden_size
    # Forward and backward: 1 + 2 products of a linear layer and the head, 2 + 5 of attention (scores are recomputed).
    want = 3 * tokens * linear + 7 * attention + 3 * head
    if kind == "dpo":  # the reference: forward only
        want += tokens * linear + 2 * attention + head
    found = read(trainer)
    assert found["tokens"] == tokens
    close(found["flops"], 2 * want)
    close(found["share_of_peak"], 2 * want / found["step_seconds"] / 1e9)
    close(found["tokens_per_second"], tokens / found["step_seconds"])


def test_the_peak_is_measured_without_touching_the_runs_random_numbers():
    state = torch.get_rng_state()
    peak = throughput.product_peak(torch.device("cpu"), torch.float32, seconds=0.01)
    assert torch.equal(torch.get_rng_state(), state)
    assert 1e8 < peak < 1e14


def test_a_run_that_ends_early_says_so(make, capsys, fixed_peak):
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
    assert main([*argv, "--profile", "2", "--verbose", "--disable_tqdm", "True"]) == 0
    shown = capsys.readouterr().out
    assert "first batch: 8 sequences" in shown and "--activation_checkpointing would keep" in shown
    for phase in ("data", "forward", "head", "backward", "optimizer", "other", "step"):
        assert f"\n  {phase:<14}" in shown
    assert f"\n  {'reference':<14}" not in shown
    found = json.loads((tmp_path / "run" / "profile.json").read_text())
    assert found.keys() == {
        "steps", "step_seconds", "seconds", "tokens", "tokens_per_second", "flops", "flops_per_second",
        "peak_flops_per_second", "share_of_peak", "dtype", "device",
    }  # fmt: skip
    assert tuple(found["seconds"]) == profiling.PHASES
    close(sum(found["seconds"].values()), found["step_seconds"])
    assert 0 < found["share_of_peak"] < 1


class Network(nn.Sequential):
    def head_plan(self, *args):
        return None


def test_saved_bytes_of_a_known_network():
    network = Network(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3), nn.Sigmoid())
    with Activations(network) as activations:
        output = network(torch.randn(5, 4))
    output.sum().backward()
    # What each node needs: the input, the result of ReLU (which is the next input), the result of the sigmoid.
    assert activations.total == 4 * 5 * (4 + 8 + 3)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_what_checkpointing_would_keep_is_what_it_keeps(make):
    batch = None
    found = []
    for checkpointing in (False, True):
        trainer = make("dpo", model=tiny_model(num_hidden_layers=6), activation_checkpointing=checkpointing)
        if checkpointing:
            trainer.model.model.activation_checkpointing_enable()
        trainer.model.train()
        batch = batch or Collator(layout="segments")(list(trainer.train_dataset.select(range(8))))
        with Activations(trainer.model) as activations:
            trainer.compute_loss(trainer.model, batch)
        found.append(activations)
    plain, checkpointed = found
    assert len(plain.layers) == 6
    largest = max(plain.layers.values())
    # A layer's first input is saved outside too, and what all layers share (angles) is saved by the first.
    assert plain.checkpointed == pytest.approx(checkpointed.total + largest, rel=0.1)
    assert plain.total > 2 * plain.checkpointed


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("peft", [False, True])
def test_the_plan_that_is_shown_is_the_one_that_is_followed(make, monkeypatch, peft, local, entropy):
    followed = []
    plan = scoring.plan
    monkeypatch.setattr(scoring, "plan", lambda *args, **kwargs: followed.append(plan(*args, **kwargs)) or followed[-1])
    trainer = make("sft", peft=peft)
    batch = Collator(layout="segments")(list(trainer.train_dataset.select(range(4))))
    loss = (lambda scores: -scores.logps) if local else None
    for learning in (True, False):
        with torch.set_grad_enabled(learning):
            trainer.model(batch, loss, entropy)
            assert trainer.model.head_plan(batch, loss, entropy) == followed[-1]
    ways = {"local"} if local else {"unit"} if peft and not entropy else {"save"}
    assert {p.mode for p in followed} == ways | {"tile"}


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
def test_nothing_of_ours_waits_between_two_lines_of_the_log(kind, make):
    trainer = make(kind, gradient_accumulation_steps=2, logging_steps=100)
    with Waits() as waits:
        trainer.train()
    # On a CPU alone targets are checked, before anything is computed; and what transformers itself waits for.
    not_ours = ("low, high = int(", "super().train(")
    assert {line for line in waits.lines if not any(known in line for known in not_ours)} == set()


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
