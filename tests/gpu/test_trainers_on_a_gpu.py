"""Every trainer on a GPU in bfloat16: losses of the CPU, no wait of the host, resuming, adapters, checkpointing."""

import os
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import sentences, tiny_model
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

import rlhf

pytestmark = pytest.mark.gpu
STEPS = 3
BFLOAT16 = 2e-2  # relative; of single losses
OFFLINE = {
    "sft": ("SFT", "sft_rows"),
    "dpo": ("DPO", "preference_rows"),
    "kto": ("KTO", "unpaired_rows"),
    "reward": ("Reward", "preference_rows"),
    "distill": ("Distill", "sft_rows"),
}
ONLINE = {"ppo": "PPO", "grpo": "GRPO"}
EVERY = [*OFFLINE, *ONLINE]


def vowels(completions, **_):
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


@pytest.fixture
def make(request, tmp_path, tokenizer):
    """Make a trainer of a tiny model on a device; ``kind`` is a key of the tables above."""

    def one(kind, device, model=None, peft_config=None, callbacks=(), name="run", **changes):
        online = kind in ONLINE
        prefix, rows = (ONLINE[kind], None) if online else OFFLINE[kind]
        options = dict(
            per_device_train_batch_size=8, max_steps=STEPS, logging_steps=1, learning_rate=1e-3, report_to="none",
            save_strategy="no", disable_tqdm=True, use_cpu=device.type == "cpu", optim="sgd", layout="segments",
        ) | changes  # fmt: skip
        more = {"teacher_model": tiny_model(seed=1)} if kind == "distill" else {}
        if online:
            options = dict(max_length=64, max_completion_length=8, num_iterations=2) | options
            more = {"reward_funcs": vowels}
            data = Dataset.from_list([{"prompt": text} for text in sentences(1, 12)])
        else:
            data = request.getfixturevalue(rows)
        return getattr(rlhf, f"{prefix}Trainer")(
            model=tiny_model() if model is None else model,
            args=getattr(rlhf, f"{prefix}Config")(str(tmp_path / name), **options),
            train_dataset=data, processing_class=tokenizer, peft_config=peft_config, callbacks=list(callbacks), **more,
        )  # fmt: skip

    return one


def figures(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def trained(trainer):
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", OFFLINE)
def test_losses_in_bfloat16_are_those_of_the_cpu(kind, make, gpu):
    on_gpu = trained(make(kind, gpu, bf16=True))
    on_cpu = trained(make(kind, torch.device("cpu"), bf16=False))
    assert on_gpu.data_collator.layout == "segments"
    assert all(parameter.dtype == torch.float32 for parameter in on_gpu.model.parameters())
    assert all(parameter.device.type == gpu.type for parameter in on_gpu.model.parameters())
    assert figures(on_gpu) == pytest.approx(figures(on_cpu), rel=BFLOAT16)
    assert figures(on_gpu, "grad_norm") == pytest.approx(figures(on_cpu, "grad_norm"), rel=5 * BFLOAT16)


@pytest.mark.parametrize("kind", OFFLINE)
def test_losses_in_float32_are_those_of_the_cpu(kind, make, gpu):
    on_gpu = trained(make(kind, gpu, bf16=False))
    on_cpu = trained(make(kind, torch.device("cpu"), bf16=False))
    assert figures(on_gpu) == pytest.approx(figures(on_cpu), rel=1e-4)
    assert figures(on_gpu, "grad_norm") == pytest.approx(figures(on_cpu, "grad_norm"), rel=1e-3)


@pytest.mark.parametrize("kind", ONLINE)
def test_on_policy_training_begins_at_a_ratio_of_one(kind, make, gpu):
    """The old log-probs come from a pass without gradient, the new ones from the training pass."""
    trainer = trained(make(kind, gpu, bf16=True, max_steps=4))
    first = figures(trainer, "ratio/first_deviation")[0]
    assert first < 1e-3
    weights = [parameter.detach() for parameter in trainer.model.parameters()]
    assert all(weight.device.type == gpu.type and torch.isfinite(weight).all() for weight in weights)


class HostWaits:
    """Counts the places where the host waits for the device in the last training step of a run, by file and line."""

    def __init__(self, trainer, device):
        self.places = Counter()
        self.device = device
        self.trainer = trainer
        self.training_step = trainer.training_step
        trainer.training_step = self.watched

    def watched(self, *args, **options):
        # Kernels are chosen and memory is allocated in the first steps.
        if self.device.type == "cpu" or self.trainer.state.global_step < STEPS - 1:
            return self.training_step(*args, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return self.training_step(*args, **options)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                for warning in caught:
                    if "synchroniz" in str(warning.message):
                        self.places[f"{Path(warning.filename).name}:{warning.lineno}"] += 1


@pytest.mark.parametrize("kind", EVERY)
def test_the_host_never_waits_within_a_micro_batch(kind, make, gpu):
    trainer = make(kind, gpu, bf16=True)
    waits = HostWaits(trainer, gpu)
    trainer.train()
    assert dict(waits.places) == {}


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == self.step


@pytest.fixture
def deterministic(gpu):
    """Kernels that add in a fixed order; as ``--full_determinism`` does, but undone afterwards."""
    before = {name: os.environ.get(name) for name in ("CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC")}
    os.environ |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_a_resumed_run_is_the_uninterrupted_one(kind, make, gpu, deterministic):
    options = dict(bf16=True, optim="adamw_torch_fused", max_steps=4, save_strategy="steps", save_steps=2)
    whole = trained(make(kind, gpu, name="whole", **options))
    trained(make(kind, gpu, name="parts", callbacks=[StopAfter(2)], **options))
    resumed = make(kind, gpu, name="parts", **options)
    resumed.train(resume_from_checkpoint=True)
    assert figures(resumed) == figures(whole) and figures(resumed, "grad_norm") == figures(whole, "grad_norm")
    for got, want in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_an_adapter_over_bfloat16_weights(kind, make, gpu):
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    trainer = make(kind, gpu, model=tiny_model().bfloat16(), peft_config=adapter, bf16=True)
    start = {name: p.detach().cpu().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    whole = trained(make(kind, torch.device("cpu"), name="whole", max_steps=1))
    assert figures(trainer)[0] == pytest.approx(figures(whole)[0], rel=BFLOAT16)  # an adapter starts at zero
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(start[name], p.detach().cpu())}
    assert moved and all("lora_" in name for name in moved)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_checkpointing_changes_no_number(kind, make, gpu):
    plain = trained(make(kind, gpu, bf16=True))
    checkpointed = trained(make(kind, gpu, bf16=True, gradient_checkpointing=True, name="checkpointed"))
    assert figures(checkpointed) == pytest.approx(figures(plain), rel=1e-3)
    assert figures(checkpointed, "grad_norm") == pytest.approx(figures(plain, "grad_norm"), rel=BFLOAT16)


def test_bfloat16_weights_without_autocast(make, gpu):
    trainer = trained(make("sft", gpu, model=tiny_model().bfloat16(), bf16=False))
    on_cpu = trained(make("sft", torch.device("cpu"), bf16=False, name="cpu"))
    assert figures(trainer)[0] == pytest.approx(figures(on_cpu)[0], rel=BFLOAT16)
