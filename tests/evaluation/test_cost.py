"""What models cost: sizes by counting, speeds on a clock of our own, and that all do the same work."""

from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model

from rlhf.data import Collator
from rlhf.evaluation import model_size, model_speed, tokens_per_second
from rlhf.evaluation.cost import ROUNDS
from rlhf.models import Policy
from rlhf.rollouts import LocalEngine


def test_sizes():
    """Tied weights count once, half precision takes half."""
    model = tiny_model("qwen2")
    count = sum(p.numel() for p in set(model.parameters()))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model_size(model) == {"million parameters": count / 1e6, "MiB": 4 * count / 2**20}
    assert model_size(model.bfloat16())["MiB"] == 2 * count / 2**20


def test_speeds_are_medians_without_the_first_and_in_turns(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr("rlhf.evaluation.cost.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def work(name, tokens, seconds):
        left = iter(seconds)

        def do():
            order.append(name)
            now[0] += next(left)
            return tokens

        return do

    found = tokens_per_second({"a": work("a", 100, [50, 2, 9, 1]), "b": work("b", 10, [0.1, 4, 4, 4])})
    assert found == {"a": pytest.approx(50), "b": pytest.approx(2.5)}
    assert order == ["a", "b"] * (1 + ROUNDS)


def test_models_do_the_same_work(tokenizer, monkeypatch):
    """Every answer has all its tokens, whatever a model would end with; a short context shortens all alike."""
    models = {"one": Policy(tiny_model()), "two": Policy(tiny_model("gpt2", n_positions=24))}
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}, {"input_ids": [9, 3], "labels": [9, 3]}]
    batch = Collator(0)(rows)
    answered, read = [], []
    inner, forward = LocalEngine.generate, Policy.forward

    def generate(self, prompts, *args, **kwargs):
        answered.append((prompts, [[len(c.ids) for c in group] for group in inner(self, prompts, *args, **kwargs)]))
        return inner(self, prompts, *args, **kwargs)

    monkeypatch.setattr(LocalEngine, "generate", generate)
    monkeypatch.setattr(Policy, "forward", lambda self, given: read.append(given) or forward(self, given))
    found = model_speed(models, tokenizer, batch, [[5, 6], list(range(1, 21))], 16)
    assert all(prompts == [[5, 6], list(range(9, 21))] and lengths == [[12], [12]] for prompts, lengths in answered)
    assert len(answered) == len(read) == 2 * (1 + ROUNDS) and all(given is batch for given in read)
    assert found.keys() == models.keys()
    for figures in found.values():
        assert list(figures) == ["forward tokens/s", "generation tokens/s"] and min(figures.values()) > 0
    assert all(not torch.is_tensor(value) for figures in found.values() for value in figures.values())
