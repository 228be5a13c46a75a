"""The log-prob core against autograd's numerical gradient and the dense formula."""

import pytest
import torch
from conftest import ARCHITECTURES, close, tiny_model
from torch.autograd import gradcheck

from rlhf.logprobs import Head, Targets, model_scores, score, verified_settings


@pytest.mark.parametrize("mode", ["save", "recompute"])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_gradcheck(mode, entropy, softcap):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=g, dtype=torch.double, requires_grad=True)
    weight = torch.randn(11, 5, generator=g, dtype=torch.double, requires_grad=True)
    bias = torch.randn(11, generator=g, dtype=torch.double, requires_grad=True)
    targets = Targets(torch.tensor([0, 1, 1, 4, 6]), torch.tensor([3, 4, 0, 10, 2]), torch.tensor([0, 0, 1, 1, 2]))

    def run(hidden, weight, bias):
        scores = score(hidden, Head(weight, bias, 1.7, softcap), targets, entropy=entropy, mode=mode, chunk_size=2)
        return scores if entropy else scores.logps

    assert gradcheck(run, (hidden, weight, bias))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_agree_with_their_own_logits(name):
    model = tiny_model(name).eval()
    assert verified_settings(model) is not None
    ids = torch.randint(1, 330, (2, 12), generator=torch.Generator().manual_seed(0))
    dense = model(ids).logits.double().log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).view(-1)
    close(model_scores(model, Targets.from_labels(ids), input_ids=ids).logps.detach(), dense.detach())
