"""The win rates of docs/runs/learning."""

import importlib
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModel

FOLDER = Path(__file__).parents[2] / "docs/runs/learning"


@pytest.fixture
def win_rates(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("win_rates")


def answers(*texts: str, kind: str = "greedy") -> list[dict]:
    """An answer to each prompt, with the share of "a" as its reward."""
    entries = [
        {"prompt": number, "kind": kind, "text": text, "tokens": 1, "ended": 1} for number, text in enumerate(texts)
    ]
    return [entry | {"judge": entry["text"].count("a") / len(entry["text"])} for entry in entries]


def test_a_win_rate_is_tested_against_a_half(win_rates):
    even = win_rates.win_rate([0.0, 1.0, 0.5, 0.0, 1.0])
    assert even.value == 0.5 and even.p_value == pytest.approx(1)
    assert even.low < 0.5 < even.high
    better = win_rates.win_rate([0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert better.value == 0.9375 and better.low > 0.5 and better.p_value < 0.001


def test_a_judge_with_length_adds_the_log_odds_of_the_length(win_rates):
    before, after = answers("aaaa"), answers("ab" * 500)
    assert win_rates.duel(before * 2, after * 2, "judge", "greedy")["rewards"] == [1.0, 0.5]
    with_length = win_rates.duel(before * 2, after * 2, "judge and length", "greedy")["rewards"]
    assert with_length == pytest.approx([1 + 0.004 * win_rates.LENGTH_WEIGHT, 0.5 + win_rates.LENGTH_WEIGHT])


def test_all_seeds_of_a_prompt_are_one_unit(win_rates):
    start = answers("ab", "ab") + answers("ab", "ab", kind="sampled")
    worse, better = answers("bb", "bb"), answers("aa", "aa")
    seeds = [{"sft_answers": better + start[2:]}, {"sft_answers": worse + start[2:]}]
    found = win_rates.side_duels(start, {"ours": seeds, "trl": [{}, {}]}, ["judge"])
    assert list(found) == ["start → ours sft, sampled, by judge", "start → ours sft, greedy, by judge"]
    greedy = found["start → ours sft, greedy, by judge"]
    assert greedy["win_rate_by_seed"] == [1.0, 0.0]
    # Two prompts with 1/2 each: there is no difference between them, although there are four answers.
    assert (greedy["win_rate"].value, greedy["win_rate"].low, greedy["win_rate"].high) == (0.5, 0.5, 0.5)


def test_lengths_of_a_pair_are_relative_to_all_answers_of_its_prompt(win_rates):
    choices = importlib.import_module("reward_choices")
    prompt = [{"role": "user", "content": "?"}]
    rows = [
        {"prompt": prompt, "chosen": [{"content": "a" * 9}], "rejected": [{"content": "a" * 4}]},
        {"prompt": prompt, "chosen": [{"content": "a" * 3}], "rejected": [{"content": "a" * 4}]},
    ]
    linear, logarithm, relative = choices.lengths(rows).T.tolist()
    assert linear == [0.005, -0.001]
    assert logarithm == pytest.approx([math.log(2), math.log(4 / 5)])
    assert relative == pytest.approx([1, -0.2])  # the mean of the four answers is 5
    assert len(set(choices.folds_of(rows).tolist())) == 1


def test_a_reward_model_is_made_of_the_first_layers_and_a_head(win_rates, model_folder):
    frozen_reward = importlib.import_module("frozen_reward")
    whole = AutoModel.from_pretrained(model_folder)
    weights = torch.linspace(-1, 1, whole.config.hidden_size)
    reward = frozen_reward.with_head(str(model_folder), 1, weights)
    reward.config.pad_token_id = 0
    ids = torch.tensor([[5, 9, 7]])
    with torch.no_grad():
        state = whole.norm(whole(ids, output_hidden_states=True).hidden_states[1])[0, -1]
        torch.testing.assert_close(reward(ids).logits[0, 0], state @ weights)
