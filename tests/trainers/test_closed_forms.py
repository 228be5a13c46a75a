"""Problems whose solution is known: reward less beta KL is maximised by pi_ref exp(r / beta), normalised."""

import itertools

import pytest
import torch
from conftest import tiny_model
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf import (
    GRPOConfig,
    GRPOTrainer,
    OnlineDPOConfig,
    OnlineDPOTrainer,
    PPOConfig,
    PPOTrainer,
    RLOOConfig,
    RLOOTrainer,
)

BETA = 0.4
FAMILY = {
    "ppo": (PPOTrainer, PPOConfig, dict(whiten_advantages=False, num_iterations=2, vf_coef=1.0, cliprange_value=None)),
    "rloo": (RLOOTrainer, RLOOConfig, dict(num_generations=4)),
    "grpo": (
        GRPOTrainer, GRPOConfig,
        # Deviations would change the reward's scale, the mean over tokens its weights: Dr. GRPO's remedies.
        dict(num_generations=4, scale_rewards="none", loss_type="dr_grpo", kl_in="reward"),
    ),
    "grpo, KL in the loss": (GRPOTrainer, GRPOConfig, dict(num_generations=4, scale_rewards="none")),
    "online DPO": (OnlineDPOTrainer, OnlineDPOConfig, dict(num_generations=2)),
}  # fmt: skip
# A coin decides each pair of online DPO: many are needed.
COINS = dict(max_steps=150, per_device_train_batch_size=256, learning_rate=5e-3)
# Three minutes together: `pytest -m "slow or not slow" tests/trainers/test_closed_forms.py`.
SLOWEST = pytest.param("online DPO", marks=pytest.mark.slow)
LATER = [pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2)]


def tokenizer_of(words):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=words[0])


def distribution(model, prompt, outcomes):
    """log-probs of whole completions."""
    found = []
    with torch.no_grad():
        for outcome in outcomes:
            ids = torch.tensor([prompt + list(outcome)])
            logps = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            found.append(logps.gather(1, torch.tensor(outcome)[:, None]).sum())
    return torch.stack(found)


def distance(kind, seed, words, outcomes, worth, length, tmp_path, **changes):
    """Total variation between what is learned and the solution; and between the start and the solution."""
    trainer_class, config_class, own = FAMILY[kind]
    # Positions of their own: to rotary ones alone, `go` and `go go` look the same.
    model = tiny_model("gpt2", vocab_size=len(words), seed=seed)
    tokenizer = tokenizer_of(words)
    prompt = tokenizer("go")["input_ids"]
    noise = torch.Generator().manual_seed(seed)

    def reward(completion_ids, **_):
        rewards = torch.tensor([worth(tuple(ids)) for ids in completion_ids])
        if kind == "online DPO":  # Gumbel noise: the better of two with probability sigmoid(difference)
            rewards -= (-torch.rand(len(rewards), generator=noise).log()).log()
        return rewards.tolist()

    args = config_class(
        str(tmp_path), use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no", logging_steps=1000,
        log_completions=False, max_length=16, max_completion_length=length, seed=seed,
        **{"learning_rate": 1e-2, "max_steps": 120, "per_device_train_batch_size": 128, "beta": BETA, **own, **changes},
    )  # fmt: skip
    start = distribution(model, prompt, outcomes)
    assert float(start.exp().sum()) == pytest.approx(1.0)
    # A group's mean holds the sample itself, which shrinks the reward's gradient by 1 - 1 / 4; KL in the reward shrinks
    # with it, KL in the loss does not.
    scale = 0.75 if kind == "grpo, KL in the loss" else 1.0
    want = (start + scale * torch.tensor([worth(outcome) for outcome in outcomes]) / BETA).softmax(0)
    rows = Dataset.from_list([{"prompt": "go"}] * 8)
    trainer_class(model, reward, args, train_dataset=rows, processing_class=tokenizer).train()
    got = distribution(model, prompt, outcomes).exp()
    return float((got - want).abs().sum() / 2), float((start.exp() - want).abs().sum() / 2)


@pytest.mark.parametrize("seed", [0, *LATER])
@pytest.mark.parametrize("kind", [*(name for name in FAMILY if name != "online DPO"), SLOWEST])
def test_a_bandit_is_solved(kind, seed, tmp_path):
    """One token out of six."""
    worth = {0: 0.0, 1: 0.2, 2: 1.0, 3: -0.5, 4: 0.6, 5: 0.4}
    outcomes = [(token,) for token in worth]
    words = ["end", "go", "a", "b", "c", "d"]
    options = COINS if kind == "online DPO" else {}
    learned, start = distance(kind, seed, words, outcomes, lambda ids: worth[ids[0]], 1, tmp_path, **options)
    assert start > 0.2 and learned < 0.05


# The bandit of the first two is solved in each run of the tests; two tokens take twice as long.
OTHERS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("rloo", "grpo", "online DPO")]


@pytest.mark.parametrize("seed", [0, *LATER])
@pytest.mark.parametrize("kind", ["ppo", *OTHERS])
def test_a_token_mdp_is_solved(kind, seed, tmp_path):
    """Up to three tokens of four, the first of which ends: 40 completions, whose worth depends on all their tokens."""
    short = [(0,), *((x, 0) for x in (1, 2, 3))]
    outcomes = [*short, *itertools.product((1, 2, 3), (1, 2, 3), (0, 1, 2, 3))]

    def worth(ids):
        pairs = list(itertools.pairwise(ids))
        return 0.8 * ((2, 3) in pairs) + 0.4 * (ids[-1] == 0) - 0.5 * ((1, 1) in pairs)

    words = ["end", "go", "a", "b"]
    options = COINS if kind == "online DPO" else dict(max_steps=200)
    learned, start = distance(kind, seed, words, outcomes, worth, 3, tmp_path, **options)
    assert start > 0.25 and learned < (0.12 if kind == "online DPO" else 0.03)
