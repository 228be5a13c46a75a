"""`rlhf.SFTTrainer?` in a notebook: what it does, its arguments, and an example that runs."""

import re
import textwrap

import pytest

import rlhf

TRAINERS = [name for name in dir(rlhf) if name.endswith("Trainer") and name != "DistillationTrainer"]
STUDENT, TEACHER = "HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-1.7B-Instruct"


def test_all_trainers_are_listed_with_their_options():
    families = {"SFT", "DPO", "KTO", "Reward", "PPO", "GRPO", "RLOO", "OnlineDPO", "BestOfN", "Distill"}
    assert {name.removesuffix("Trainer") for name in TRAINERS} == families
    assert {f"{family}Config" for family in families} < set(dir(rlhf))


FAST = ("SFTTrainer", "DPOTrainer", "GRPOTrainer", "DistillTrainer")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in TRAINERS]
)
def test_the_example_runs(name, tmp_path, monkeypatch, model_folder):
    text = getattr(rlhf, name).__doc__
    assert "Args:" in text or "``model``, ``reward_funcs``" in text
    example = textwrap.dedent(re.search(r"Example:\n +```python\n(.*?)```", text, re.DOTALL)[1])
    for old, new in ((STUDENT, str(model_folder)), (TEACHER, f"{model_folder}/"), ("max_steps=100", "max_steps=1")):
        example = example.replace(old, new)
    # Prompts of the example are long for a tiny model, and rollouts for a test.
    example = example.replace(
        "max_steps=1", "max_steps=1, max_length=64" + ", max_completion_length=4" * ("is_short" in example)
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    names = {"rlhf": rlhf}
    exec(compile(example, name, "exec"), names)
    assert names["trainer"].state.global_step == 1
