"""Each check finds the fault in a series that has it, and nothing in the recorded runs, which are well."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest

from rlhf import DPOConfig, PPOConfig
from rlhf.runs import read_run
from rlhf.runs.figures import Series
from rlhf.runs.files import Run
from rlhf.runs.health import CHECKS, examine

ROOT = Path(__file__).parents[2]
RECORDED = sorted(ROOT.glob("docs/runs/*/*_state.json"))
# Whatever is found in a recorded run is true of it; its page tells of it too.
TRUE_OF_RECORDED = {
    "distillation/gkd": {
        "Held-out rows were not followed through training, so overfitting cannot be seen.",
        "Many completions are cut at the length limit.",  # all are: 64 tokens
    },
    "one-sentence/grpo": {"Most groups have equal rewards, and so teach nothing."},  # the reward is 0.96 of 1
    "reward-and-ppo/ppo": {
        "Many completions are cut at the length limit.",  # 88 %: 128 tokens
        "The critic explains no variance of the returns.",
    },
    "reward-and-ppo/reward": {
        "Held-out rows were not followed through training, so overfitting cannot be seen.",
    },
}
STEPS = range(1, 31)


def noise(step):
    """Between -1 and 1, without a trend."""
    return math.sin(7.3 * step) * math.cos(2.1 * step)


def run_of(samples=(), record=None, **series):
    """A run of 30 steps; each series is a function of the step. ``eval_`` series have a value at each tenth step."""
    names = {name.replace("__", "/"): value for name, value in series.items()}
    lines = []
    for step in STEPS:
        training = {name: value(step) for name, value in names.items() if not name.startswith("eval_")}
        lines.append({"step": step, "epoch": step / 30, **{n: v for n, v in training.items() if v is not ...}})
        if step % 10 == 0 or step == 1:
            held_out = {name: value(step) for name, value in names.items() if name.startswith("eval_")}
            lines += [{"step": step, **held_out}] if held_out else []
    return Run(Path("some-run"), {}, record or {}, lines, list(samples), [])


def falling(step):
    return 2 - 0.04 * step + 0.02 * noise(step)


FINE = {
    "loss": falling,
    "eval_loss": falling,
    "grad_norm": lambda s: 1 + 0.2 * noise(s),
    "learning_rate": lambda s: 1e-5,
}
ONLINE = {
    "loss": lambda s: 0.01 * noise(s),
    "grad_norm": FINE["grad_norm"],
    "policy_loss": lambda s: 0.01 * noise(s),
    "reward": lambda s: 0.2 + 0.02 * s + 0.03 * noise(s),
    "reward_std": lambda s: 0.3,
    "kl": lambda s: 0.2 * s,
    "entropy": lambda s: 2 - 0.02 * s,
    "completions__mean_length": lambda s: 40 + noise(s),
    "completions__clipped_ratio": lambda s: 0.1,
    "eval_reward": lambda s: 0.2 + 0.02 * s,
}
PREFERENCES = FINE | {
    "rewards__accuracies": lambda s: min(0.5 + 0.01 * s, 0.8),
    "rewards__margins": lambda s: 0.02 * s,
    "eval_rewards__margins": lambda s: 0.02 * s,
    "eval_perplexity__chosen": lambda s: 5 + 0.01 * s,
}
COMPLETIONS = [{"step": 30, "prompt": f"question {n}", "completion": f"answer {n}"} for n in range(4)]

FAULTS = {
    "Steps were left out, as their loss or gradient was not finite.": FINE | {"nonfinite_steps": lambda s: s // 10},
    "`loss` was not a finite number.": FINE | {"loss": lambda s: None if s == 20 else falling(s)},
    "`grad_norm` was not a finite number.": FINE | {"grad_norm": lambda s: math.nan if s == 20 else 1.0},
    "The loss is 0.": FINE | {"loss": lambda s: max(0.0, 1 - 0.1 * s)},
    "The loss never changed: nothing is trained.": FINE | {"loss": lambda s: 1.5},
    "The loss rose during training.": FINE | {"loss": lambda s: 1.5 + 0.03 * s + 0.05 * noise(s)},
    "The loss jumped above its value at the start.": FINE | {"loss": lambda s: 5.0 if s == 22 else falling(s)},
    "The gradient norm had spikes.": FINE | {"grad_norm": lambda s: 40.0 if s == 22 else 1 + 0.2 * noise(s)},
    "The learning rate is 0 in all lines of the log.": FINE | {"learning_rate": lambda s: 0.0},
    "The loss hardly moved.": {"loss": lambda s: 2 + 0.05 * noise(s), "learning_rate": lambda s: 1e-9},
    "Overfitting: the evaluation loss rose again.": FINE | {"eval_loss": lambda s: 1.5 + 0.002 * (s - 10) ** 2},
    "Held-out rows were not followed through training, so overfitting cannot be seen.": {"loss": falling},
    "The rows were read many times.": FINE | {"epoch": lambda s: s / 3},
    "Chosen and rejected answers were told apart almost at once.": PREFERENCES
    | {"rewards__accuracies": lambda s: 0.5 if s == 1 else 1.0},
    "Rejected answers are preferred to chosen ones.": PREFERENCES | {"rewards__accuracies": lambda s: 0.5 - 0.01 * s},
    "The margin grows, but chosen answers become less likely.": PREFERENCES
    | {"eval_perplexity__chosen": lambda s: 5 + 0.5 * s},
    "Nearly all completions are cut.": ONLINE | {"completions__clipped_ratio": lambda s: 0.98},
    "Many completions are cut at the length limit.": ONLINE | {"completions__clipped_ratio": lambda s: 0.7},
    "The reward is flat: completions do not differ in it.": ONLINE
    | {"reward": lambda s: 0.5, "reward_std": lambda s: 0},
    "The entropy collapsed.": ONLINE | {"entropy": lambda s: 2 * math.exp(-s / 5)},
    "The trained policy is not the one that sampled.": ONLINE | {"ratio__first_deviation": lambda s: 0.5},
    "The KL to the reference is below 0.": ONLINE | {"kl": lambda s: -0.5 * s},
    "Sampler and trainer disagree.": ONLINE | {"sampler_kl": lambda s: 0.2},
    "The reward fell.": ONLINE | {"reward": lambda s: 0.9 - 0.02 * s + 0.03 * noise(s)},
    "The reward did not rise by more than its noise.": ONLINE
    | {"reward": lambda s: 0.5 + 0.1 * noise(s), "eval_reward": lambda s: 0.5},
    "Most groups have equal rewards, and so teach nothing.": ONLINE | {"frac_reward_zero_std": lambda s: 0.8},
    "The length of the completions explodes.": ONLINE | {"completions__mean_length": lambda s: 10 * math.exp(s / 10)},
    "The length of the completions collapses.": ONLINE | {"completions__mean_length": lambda s: 90 * math.exp(-s / 10)},
    "The entropy rises: completions become random.": ONLINE | {"entropy": lambda s: 0.5 + 0.1 * s},
    "The policy is far from its reference.": ONLINE | {"kl": lambda s: 4.0 * s},
    "Updates change the policy too much at once.": ONLINE | {"approx_kl": lambda s: 0.3},
    "The critic explains no variance of the returns.": ONLINE | {"critic__explained_variance": lambda s: -0.8},
    "Reward functions failed.": ONLINE | {"rewards__judge__failed": lambda s: 0.1},
    "Samples repeat themselves.": FINE | {"samples": [COMPLETIONS[0] | {"completion": "and then " * 60}]},
    "All prompts get the same answer.": FINE | {"samples": [line | {"completion": "Yes."} for line in COMPLETIONS]},
    "Samples are empty: the model ends at once.": FINE
    | {"samples": [line | {"completion": ""} for line in COMPLETIONS]},
}  # fmt: skip


@pytest.mark.parametrize("text", FAULTS)
def test_a_fault_is_found_alone(text):
    health = examine(run_of(**FAULTS[text]))
    assert text in [finding.text for finding in health.findings]
    finding = next(finding for finding in health.findings if finding.text == text)
    assert finding.evidence and finding.advice.endswith((".", "?"))
    # What follows from the same figures may be found with it.
    follows = {"The loss is 0.": {"The loss never changed: nothing is trained."}}
    others = {finding.text for finding in health.findings} - {text} - follows.get(text, set())
    allowed = {"Held-out rows were not followed through training, so overfitting cannot be seen."}
    assert others <= allowed if "eval_loss" not in FAULTS[text] else others == set()


@pytest.mark.parametrize("series", [FINE, ONLINE, PREFERENCES, FINE | {"samples": COMPLETIONS}])
def test_nothing_is_found_in_a_healthy_run(series):
    health = examine(run_of(**series))
    assert health.findings == []
    assert len(health.passed) >= 9


@pytest.mark.parametrize("file", RECORDED, ids=lambda file: file.stem)
def test_recorded_runs_give_no_false_alarm(file):
    name = f"{file.parent.name}/{file.stem.removesuffix('_state')}"
    findings = examine(read_run(file)).findings
    assert {finding.text for finding in findings} == TRUE_OF_RECORDED.get(name, set())
    assert "problem" not in {finding.level for finding in findings}


def test_every_check_has_a_fault_that_it_finds():
    found = set()
    for series in FAULTS.values():
        passed = set(examine(run_of(**series)).passed)
        found |= {check.title for check in CHECKS if check.title not in passed}
    assert found == {check.title for check in CHECKS}


def test_advice_names_options_that_exist():
    findings = [finding for series in FAULTS.values() for finding in examine(run_of(**series)).findings]
    words = {word for finding in findings for word in re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", finding.advice)}
    options = {field.name for config in (PPOConfig, DPOConfig) for field in dataclasses.fields(config)}
    assert words - options - {"eval_loss", "apo_zero", "eval_dataset_name"} == set() and len(words) > 10


def test_a_run_without_figures_is_examined():
    assert examine(Run(Path("x"), {}, {}, [], [], [])).findings == []


def test_a_change_is_clear_only_above_the_noise():
    steps = tuple(STEPS)
    rising = Series("reward", steps, tuple(0.02 * step + 0.01 * noise(step) for step in steps)).change()
    assert rising.is_clear() and rising.difference == pytest.approx(0.02 * 24, rel=0.05)
    assert not Series("reward", steps, tuple(noise(step) for step in steps)).change().is_clear()


def test_the_state_of_a_trainer_is_read(tmp_path):
    file = tmp_path / "dpo_state.json"
    file.write_text(json.dumps({"log_history": [{"step": 1, "loss": 0.5}]}))
    run = read_run(file)
    assert run.name == "dpo" and run.metrics == [{"step": 1, "loss": 0.5}]
    file.write_text("{}")
    with pytest.raises(ValueError, match="no state of a trainer"):
        read_run(file)
