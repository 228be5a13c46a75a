"""Decoding for CUDA graphs: the static cache, and when a step is captured. The capture is a stand-in, for a CPU."""

import pytest
import torch
from conftest import close, tiny_model

from rlhf.rollouts import LocalEngine, Sampling, graphs, local, static_cache

PROMPTS = [[5, 6, 7], [9], [40, 50, 60, 70, 80, 90, 100, 110, 120], [9, 9]]


class Captured(graphs.CapturedStep):
    """What stands for a CUDA graph: the replay computes the step with the tensors of the capture."""

    count, replays, fault = 0, 0, None

    def __init__(self, step, token, positions, shape, pool):
        Captured.count += 1
        if Captured.fault == "capture":
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        self.step, self.shape = step, shape
        self._token, self._positions = token.clone(), positions.clone()
        self._logits = step(self._token, self._positions)
        self._graph = self

    def replay(self, *inputs):
        if not inputs:  # of the graph
            return self._logits.copy_(self.step(self._token, self._positions))
        Captured.replays += 1
        logits = super().replay(*inputs)
        return logits + 1 if Captured.fault == "replay" else logits


@pytest.fixture
def captured(monkeypatch):
    """An engine on a CPU that takes the way of a GPU."""
    Captured.count, Captured.replays, Captured.fault = 0, 0, None
    monkeypatch.setattr(graphs, "CapturedStep", Captured)
    for name, value in (("graph_pool_handle", (0, 0)), ("current_stream", None), ("set_stream", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments, value=value: value)
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


@pytest.mark.parametrize(
    "fault, reason",
    [("capture", "operation not permitted when stream is capturing"), ("replay", "its logits differ by 1")],
)
def test_a_model_that_cannot_be_captured_decodes_as_usual(fault, reason, tokenizer, captured, caplog):
    engine = LocalEngine(tiny_model(), tokenizer)
    captured.fault = fault
    sampling = Sampling(max_tokens=20, temperature=0)
    first, second = (engine.generate(PROMPTS, 2, sampling, 0) for _ in range(2))
    assert caplog.text.count(f"decoding without CUDA graphs, because a step cannot be captured ({reason}") == 1
    assert captured.count == 1
    captured.fault, engine._can_be_captured = None, True
    third = engine.generate(PROMPTS, 2, sampling, 0)
    assert captured.replays > 10
    ids = [[[one.ids for one in group] for group in groups] for groups in (first, second, third)]
    assert ids[0] == ids[1] == ids[2]


def test_short_completions_are_not_captured(tokenizer, captured):
    engine = LocalEngine(tiny_model(), tokenizer)
    engine.generate(PROMPTS, 2, Sampling(max_tokens=graphs.FEWEST_STEPS - 1), 0)
    assert captured.count == 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "mixtral"])  # a mixture of experts may not be captured
def test_on_a_gpu(name, gpu, tokenizer, monkeypatch):
    engine = LocalEngine(tiny_model(name).to(gpu), tokenizer)
    sampling = Sampling(max_tokens=90, min_tokens=90, temperature=1.5)
    with_graphs = engine.generate(PROMPTS, 3, sampling, 0)
    assert name == "mixtral" or engine._can_be_captured
    monkeypatch.setattr(local, "can_use_graphs", lambda device: False)
    for group, expected_group in zip(with_graphs, engine.generate(PROMPTS, 3, sampling, 0), strict=True):
        for one, expected in zip(group, expected_group, strict=True):
            assert one.ids == expected.ids
            close(one.logps, expected.logps)
