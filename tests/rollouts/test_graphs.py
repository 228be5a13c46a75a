"""Decoding for CUDA graphs: the static cache, and when a step is captured. The capture is a stand-in, for a CPU."""

import contextlib

import pytest
import torch
from conftest import close, tiny_model

from rlhf.rollouts import LocalEngine, Sampling, graphs, local, static_cache

PROMPTS = [[5, 6, 7], [9], [40, 50, 60, 70, 80, 90, 100, 110, 120], [9, 9]]


class Captured:
    """What stands for a CUDA graph: the replay computes the step with the tensors of the capture."""

    count, replays, fails = 0, 0, False
    runner = None

    def __init__(self):
        Captured.count += 1

    def replay(self):
        Captured.replays += 1
        runner = Captured.runner
        runner._logits.copy_(runner.step(runner._token, runner._positions))


@contextlib.contextmanager
def capture(graph, **options):
    if Captured.fails:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")
    yield


@pytest.fixture
def captured(monkeypatch):
    """An engine on a CPU that takes the way of a GPU."""

    def make_runner(step, cache):
        Captured.runner = graphs.GraphedSteps(step, cache)
        return Captured.runner

    Captured.count, Captured.replays, Captured.fails = 0, 0, False
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Captured)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(local, "GraphedSteps", make_runner)
    monkeypatch.setattr(local, "can_use_graphs", lambda device: True)
    return Captured


@pytest.mark.parametrize("window", [None, 2, 7])
def test_completions_and_log_probs_are_those_without_graphs(window, tokenizer, captured, monkeypatch):
    model = tiny_model("mixtral", sliding_window=window)
    engine = LocalEngine(model, tokenizer)
    sampling = Sampling(max_tokens=20, temperature=1.5)
    monkeypatch.setattr(static_cache, "FIRST_COLUMNS", 4)
    whole = engine.generate(PROMPTS, 3, sampling, 0)
    assert not engine._fallback_reason
    # Once for 4, 8, 16 and 19 columns; the other steps are replays.
    assert (captured.count, captured.replays) == (4, 19 - 4)
    # Rows that end are dropped where half of them have ended, and the rest is captured anew.
    usual_ends, some_ends = engine.end_ids, [one.ids[3] for group in whole for one in group][:9]
    engine.end_ids = some_ends
    cut = engine.generate(PROMPTS, 3, sampling, 0)
    assert captured.count > 8

    monkeypatch.setattr(local, "can_use_graphs", lambda device: False)
    for with_graphs, end_ids in ((whole, usual_ends), (cut, some_ends)):
        engine.end_ids = end_ids
        for group, expected_group in zip(with_graphs, engine.generate(PROMPTS, 3, sampling, 0), strict=True):
            for one, expected in zip(group, expected_group, strict=True):
                assert (one.ids, one.finish_reason) == (expected.ids, expected.finish_reason)
                close(one.logps, expected.logps)


def test_a_model_that_cannot_be_captured_decodes_as_usual(tokenizer, captured, caplog):
    engine = LocalEngine(tiny_model(), tokenizer)
    captured.fails = True
    sampling = Sampling(max_tokens=20, temperature=0)
    first = engine.generate(PROMPTS, 2, sampling, 0)
    engine.generate(PROMPTS, 2, sampling, 0)
    warning = "decoding without CUDA graphs, because a step cannot be captured (operation not permitted when stream is"
    assert caplog.text.count(warning) == 1
    assert captured.replays == 0 and captured.count == 1
    captured.fails, engine._can_be_captured = False, True
    again = engine.generate(PROMPTS, 2, sampling, 0)
    assert captured.replays > 0
    assert [[one.ids for one in group] for group in first] == [[one.ids for one in group] for group in again]


def test_short_completions_are_not_captured(tokenizer, captured):
    engine = LocalEngine(tiny_model(), tokenizer)
    engine.generate(PROMPTS, 2, Sampling(max_tokens=graphs.FEWEST_STEPS - 1), 0)
    assert captured.count == 0
