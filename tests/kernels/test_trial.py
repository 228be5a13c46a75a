"""A kernel that cannot run, or is wrong, on somebody's card changes no run: one warning, and torch computes."""

import pytest
import torch

from rlhf.kernels import trial
from rlhf.logprobs import chunks

pytest.importorskip("triton")
CPU = torch.device("cpu")  # under the interpreter
TRIALS = {"scores": trial.kernels_work, "divergences": trial.divergence_kernels_work}


@pytest.fixture(autouse=True)
def anew():
    for works in TRIALS.values():
        works.cache_clear()
    yield
    for works in TRIALS.values():
        works.cache_clear()


@pytest.fixture(params=TRIALS)
def works(request):
    return TRIALS[request.param]


def test_the_kernels_pass(works, caplog):
    seed = torch.random.get_rng_state()
    assert works(CPU)
    assert not caplog.records
    assert torch.equal(seed, torch.random.get_rng_state())


@pytest.mark.parametrize("writes", ["write_gradient", "write_divergence_gradient"])
def test_a_wrong_kernel_is_found(writes, monkeypatch, caplog):
    own = getattr(trial, writes)

    def wrong(*args, **options):
        result = own(*args, **options)
        options.get("out", args[-1])[1, 4000] += 0.5
        return result

    monkeypatch.setattr(trial, writes, wrong)
    works = trial.divergence_kernels_work if writes == "write_divergence_gradient" else trial.kernels_work
    assert not works(CPU) and not works(CPU)
    (record,) = caplog.records
    assert "are wrong on cpu; torch computes them" in record.getMessage()


def test_nan_is_wrong():
    assert not trial._passes(lambda device: [torch.tensor(0.1), torch.tensor(torch.nan)], CPU, "nothing")


def test_a_kernel_that_cannot_be_built(works, monkeypatch, caplog):
    def fails(*_, **__):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(trial, "score_tokens", fails)
    monkeypatch.setattr(trial, "side", fails)
    assert not works(CPU) and not works(CPU)
    (record,) = caplog.records
    assert "cannot run on cpu, so they take longer (RuntimeError: Failed to find C compiler)" in record.getMessage()


def test_without_triton_nothing_is_tried(works, monkeypatch, caplog):
    monkeypatch.setattr(trial, "has_triton", lambda: False)
    assert not works(CPU)
    assert not caplog.records


def test_the_choice_follows_the_trial(monkeypatch):
    gpu = torch.device("cuda", 0)
    for answer in (True, False):
        monkeypatch.setattr(chunks, "kernels_work", lambda device, answer=answer: answer)
        assert chunks.use_fused_kernels(gpu, torch.float32) == answer
        assert not chunks.use_fused_kernels(gpu, torch.float64)
        assert not chunks.use_fused_kernels(CPU, torch.float32)


@pytest.mark.gpu
def test_on_this_gpu(works, gpu):
    assert works(torch.device(gpu.type, 0))
