"""Sampling in process on a GPU: the sampler's log-probs are the trainer's, and greedy tokens are transformers'."""

import copy

import pytest
import torch
from conftest import close, tiny_model

from rlhf.data import Collator
from rlhf.data.batch import IGNORE
from rlhf.models import Policy, use_segments
from rlhf.rollouts import LocalEngine, Sampling

pytestmark = pytest.mark.gpu
PROMPTS = [[5, 6, 7], [9], [40, 50, 60, 70, 80, 90, 100, 110, 120], [9, 9]]


def batch_of(prompts, completions):
    """One flat row of all sequences; every token of a completion is scored."""
    rows = [
        {"input_ids": prompt + completion, "labels": [IGNORE] * len(prompt) + completion}
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    return Collator(layout="segments")(rows)


def sampled_and_trained(model, tokenizer, device, autocast):
    """Log-probs of drawn tokens as the sampler gives them, and as a forward pass of training does."""
    engine = LocalEngine(model, tokenizer, autocast=autocast)
    groups = engine.generate(PROMPTS, 2, Sampling(max_tokens=16), 0)
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    samples = [sample for group in groups for sample in group]
    batch = batch_of(prompts, [sample.ids for sample in samples]).to(device)
    assert use_segments(model) is None

    def logps(policy, dtype):
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not None):
            return policy(batch).logps.cpu()

    exact = logps(Policy(copy.deepcopy(model).float()), None)
    sampled = torch.tensor([logp for sample in samples for logp in sample.logps])
    return sampled, logps(Policy(model), autocast), exact


def test_log_probs_of_the_sampler_are_those_of_training(gpu, tokenizer):
    sampled, trained, _ = sampled_and_trained(tiny_model().to(gpu), tokenizer, gpu, None)
    assert len(sampled) > 2 * len(PROMPTS)
    close(sampled, trained)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_in_bfloat16_they_differ_by_rounding_alone(weights, gpu, tokenizer):
    model = tiny_model().to(gpu, weights)
    sampled, trained, exact = sampled_and_trained(model, tokenizer, gpu, torch.bfloat16)
    # Two passes with rounding errors of the same size: their difference is about 1.4 times that of one.
    assert (sampled - trained).norm() < 2 * (trained - exact).norm()


def test_greedy_tokens_are_those_of_transformers(gpu, tokenizer):
    model = tiny_model().to(gpu).eval()
    groups = LocalEngine(model, tokenizer).generate(PROMPTS, 1, Sampling(temperature=0, max_tokens=16), 0)
    for prompt, [sample] in zip(PROMPTS, groups, strict=True):
        ids = torch.tensor([prompt], device=gpu)
        want = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16)
        assert sample.ids == want[0, len(prompt) :].tolist()


def test_samples_do_not_depend_on_the_batch(gpu, tokenizer):
    engine = LocalEngine(tiny_model().to(gpu), tokenizer)
    together = engine.generate(PROMPTS, 2, Sampling(max_tokens=12), 3)
    for index, prompt in enumerate(PROMPTS):
        [alone] = engine.generate([prompt], 2, Sampling(max_tokens=12), 3, index=[index])
        assert [sample.ids for sample in alone] == [sample.ids for sample in together[index]]
