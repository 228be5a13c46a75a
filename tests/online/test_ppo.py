"""What on-policy training promises: ratios of one, exact objectives, masks, resuming, and what it tells its user."""

import copy
import json
import math
from itertools import pairwise

import pytest
import torch
from conftest import close, sentences, tiny_model
from datasets import Dataset
from family import FAMILY, vowels
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from rlhf import OnlineDPOConfig, PPOConfig, PPOTrainer
from rlhf.data import Dialogue
from rlhf.logprobs import Scores
from rlhf.losses import POLICY_LOSSES
from rlhf.models import add_scalar_head
from rlhf.online.objective import make_objective
from rlhf.online.samples import Sample, add_advantages, collate_samples, select_of_groups
from rlhf.rollouts import LocalEngine, Reply, Sampling, play
from rlhf.runs.rollout_faults import diagnose


def lora():
    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")


@pytest.fixture
def prompts():
    return Dataset.from_list([{"prompt": text, "number": i} for i, text in enumerate(sentences(1, 12))])


@pytest.fixture
def make(tmp_path, tokenizer, prompts):
    def one(kind="ppo", model=None, reward=vowels, peft_config=None, callbacks=(), name="run", rows=prompts, **changes):
        trainer, config = FAMILY[kind]
        own = {k: changes.pop(k) for k in ("environment_factory", "ref_model", "engine") if k in changes}
        options = dict(
            per_device_train_batch_size=8, max_steps=3, logging_steps=1, learning_rate=1e-3, report_to="none",
            save_strategy="no", max_length=64, max_completion_length=10,
        ) | changes  # fmt: skip
        return trainer(
            model=tiny_model() if model is None else model,
            reward_funcs=reward,
            args=config(str(tmp_path / name), use_cpu=True, disable_tqdm=True, **options),
            train_dataset=rows,
            eval_dataset=prompts.select(range(5)),
            processing_class=tokenizer,
            peft_config=peft_config,
            callbacks=list(callbacks),
            **own,
        )

    return one


def lines(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def sample(reward=1.0, group=0, ids=(5, 6, 7), **changes):
    ids = list(ids)
    count = sum(changes["sampled"]) if changes.get("sampled") else len(ids)
    tokens = {name: torch.zeros(count) for name in ("sampler_logps", "old_logps", "ref_logps", "values")}
    return Sample(
        **{
            **dict(group=group, row={}, prompt_ids=[3, 4], ids=ids, sampled=None, completion="", truncated=False),
            **dict(tokens=tokens | changes.pop("tokens", {}), reward=reward),
            **changes,
        }
    )


# The ratio


@pytest.mark.parametrize("layout", ["segments", "rows"])
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_the_first_ratio_is_exactly_one(make, name, peft, layout):
    """In padding, with shared prompts, at a temperature that is not 1, the adapter on."""
    trainer = make(
        "grpo", model=tiny_model(name), peft_config=lora() if peft else None, num_generations=4, num_iterations=2,
        num_mini_batches=2, temperature=0.7, layout=layout, beta=0.1,
    )  # fmt: skip
    trainer.train()
    first, *later = lines(trainer)
    assert first["ratio/first_deviation"] == 0 and first["ratio/max"] == 1 and first["approx_kl"] == 0
    assert first["sampler_kl"] < 1e-10  # the sampler's own log-probs, at the same temperature
    assert any(entry["ratio/max"] != 1 for entry in later)


def test_temperature_divides_the_logits_of_policy_and_reference(make):
    trainer = make(temperature=0.5, model=tiny_model("granite"))
    trainer.train()
    samples = trainer.schedule.minibatches[0][0]
    one = samples[0]
    ids = torch.tensor([one.prompt_ids + one.ids])
    with torch.no_grad():
        logits = trainer.ref_policy.model(input_ids=ids).logits[0, len(one.prompt_ids) - 1 : -1] / 0.5
    want = logits.log_softmax(-1).gather(1, torch.tensor(one.ids)[:, None])[:, 0]
    close(one.tokens["ref_logps"], want)


# The objective


def tokens_of(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    logps, old, ref = (-3 * torch.rand(count, generator=g, dtype=torch.float64) for _ in range(3))
    return logps.requires_grad_(), old, ref, torch.randn(count, generator=g, dtype=torch.float64)


OPTIONS = dict(epsilon=None, epsilon_high=None, max_completion_length=7, loss_kwargs={})


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_the_objective_is_the_catalogues_loss(name):
    """Token by token, in chunks, times what it is divided by: the loss on the whole batch."""
    lengths, count = (3, 5, 1), 9
    sequence = torch.tensor([0] * 3 + [1] * 5 + [2])
    logps, old, _, advantages = tokens_of(count)
    objective = make_objective(name, **OPTIONS)
    weight = objective.token_weights(lengths, sequence, torch.float64)
    ones = torch.ones_like(weight)
    if objective.is_coupled:
        got = objective.sequence_loss(Scores(logps), advantages, weight, ones, old, old, sequence, lengths)
    else:
        chunks = (slice(0, 4), slice(4, 5), slice(5, 9))
        got = sum(
            objective.token_loss(Scores(logps[c]), advantages[c], weight[c], ones[c], old[c], old[c]) for c in chunks
        )
    got = got / objective.count(lengths)
    own = {"max_completion_length": 7} if name == "dr_grpo" else {}
    want = POLICY_LOSSES[name](logps, old, advantages, sequence, num_sequences=3, **own)
    close(got, want, torch.float64)
    close(*(torch.autograd.grad(x, logps, retain_graph=True)[0] for x in (got, want)), torch.float64)


@pytest.mark.parametrize("name", ["ppo", "grpo", "dr_grpo", "gspo"])
def test_samples_that_are_not_learned_count_nowhere(name):
    objective = make_objective(name, **OPTIONS, beta=0.3)
    logps, old, ref, advantages = tokens_of(8)
    sequence = torch.tensor([0] * 3 + [1] * 5)

    def loss(lengths, learned):
        weight = objective.token_weights(lengths, sequence, torch.float64) * learned
        ones = torch.ones_like(weight)
        if objective.is_coupled:
            total = objective.sequence_loss(Scores(logps), advantages, weight, ones, old, ref, sequence, lengths)
        else:
            total = objective.token_loss(Scores(logps), advantages, weight, ones, old, ref)
        return total / objective.count(lengths)

    got = loss((3, 0), torch.tensor([True] * 3 + [False] * 5))
    (gradient,) = torch.autograd.grad(got, logps)
    assert (gradient[3:] == 0).all() and (gradient[:3] != 0).all()
    logps, old, ref, advantages, sequence = (x[:3].detach() for x in (logps, old, ref, advantages, sequence))
    close(got.detach(), loss((3,), torch.ones(3)), torch.float64)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_in_the_loss_has_the_gradient_of_the_kl(kind):
    """All tokens of a small vocabulary, each with its probability under an old policy that is another one."""
    g = torch.Generator().manual_seed(1)
    logits, old, ref = (torch.randn(6, generator=g, dtype=torch.float64) for _ in range(3))
    logits.requires_grad_()
    old, ref = old.log_softmax(0), ref.log_softmax(0)
    logps = logits.log_softmax(0)
    objective = make_objective("ppo", **OPTIONS, beta=1.0, kl_estimator=kind)
    got = objective.kl_and_entropy(Scores(logps), old.exp(), old, ref)
    want = (logps.exp() * (logps - ref)).sum()
    (gradient,) = torch.autograd.grad(got, logits, retain_graph=True)
    (true,) = torch.autograd.grad(want, logits)
    close(gradient, true, torch.float64)


def test_entropy_bonus_and_importance_weights():
    objective = make_objective("reinforce", **OPTIONS, entropy_coef=0.5)
    logps, old, _, advantages = tokens_of(4)
    entropy = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    correction = torch.tensor([1.0, 0.5, 2.0, 1.0])
    got = objective.token_loss(Scores(logps, entropy), advantages, torch.ones(4), correction, old, old)
    close(got, -(correction * advantages * logps).sum() - 0.5 * 10, torch.float64)


# Advantages


def test_gae_with_kl_in_the_reward_against_a_double_loop():
    """Reward on the last sampled token; -beta k1 on each; observations (not sampled) are not there at all."""
    g = torch.Generator().manual_seed(0)
    beta, gamma, lam = 0.3, 0.9, 0.8
    samples = [
        sample(reward=2.0, tokens={k: torch.randn(3, generator=g) for k in ("old_logps", "ref_logps", "values")}),
        sample(
            reward=-1.0, ids=(5, 9, 9, 6), sampled=[True, False, False, True],
            tokens={k: torch.randn(2, generator=g) for k in ("old_logps", "ref_logps", "values")},
        ),
    ]  # fmt: skip
    add_advantages(samples, "gae", kl_coef=beta, gamma=gamma, lam=lam, whitened=False)
    for one in samples:
        old, ref, values = (one.tokens[k].double() for k in ("old_logps", "ref_logps", "values"))
        rewards = -beta * (old - ref)
        rewards[-1] += one.reward
        following = torch.cat([values[1:], values.new_zeros(1)])
        deltas = rewards + gamma * following - values
        for t in range(len(values)):
            want = sum((gamma * lam) ** (j - t) * deltas[j] for j in range(t, len(values)))
            close(one.tokens["advantages"][t], want)
            close(one.tokens["returns"][t], want + values[t])


def test_advantages_of_groups():
    samples = [sample(1.0), sample(3.0), sample(0.0, group=1), sample(math.nan, group=1), sample(4.0, group=1)]
    add_advantages(samples, "rloo")
    assert [float(s.tokens["advantages"][0]) for s in samples] == [-2.0, 2.0, -4.0, 0.0, 4.0]
    assert [s.in_loss for s in samples] == [True, True, True, False, True]
    add_advantages(samples, "reinforce++_baseline", whitened=False)
    assert [float(s.tokens["advantages"][0]) for s in samples] == [-1.0, 1.0, -2.0, 0.0, 2.0]
    add_advantages(samples, "remax", baselines=torch.tensor([2.0, 2.0, 1.0, 1.0, 1.0]))
    assert [float(s.tokens["advantages"][0]) for s in samples] == [-1.0, 1.0, -1.0, 0.0, 3.0]


def test_kl_of_the_whole_sequence_comes_off_group_rewards():
    kl = {"old_logps": torch.tensor([-1.0, -1.0, -1.0]), "ref_logps": torch.tensor([-2.0, -1.0, -3.0])}
    samples = [sample(1.0, tokens=kl), sample(3.0)]
    add_advantages(samples, "rloo", kl_coef=0.5)  # 1 - 0.5 * 3 against 3
    assert float(samples[0].tokens["advantages"][0]) == -3.5


def test_reinforce_plus_plus_is_the_whitened_reward_to_go():
    kl = {"old_logps": torch.tensor([-1.0, -1.0, -1.0]), "ref_logps": torch.tensor([-2.0, -1.0, -3.0])}
    one = sample(5.0, tokens=kl)
    add_advantages([one], "reinforce++", kl_coef=1.0, whitened=False)
    assert one.tokens["advantages"].tolist() == [2.0, 3.0, 3.0]
    add_advantages([one, sample(1.0)], "reinforce++", kl_coef=1.0)
    both = torch.tensor([2.0, 3.0, 3.0, 1.0, 1.0, 1.0])
    close(one.tokens["advantages"], (both[:3] - both.mean()) / both.std(correction=0))


def test_best_and_worst_of_a_group():
    one, two, three = sample(1.0), sample(3.0), sample(2.0)
    tied = [sample(1.0, group=1) for _ in range(3)]
    assert select_of_groups([one, two, three, *tied], with_worst=True) == [two, one, tied[0], tied[2]]
    assert not tied[0].in_loss and two.in_loss
    assert select_of_groups([one, two, three], with_worst=False) == [two]


def test_a_prompt_is_laid_out_once_for_neighbours(tokenizer):
    from rlhf.data import Collator

    batch = collate_samples([sample(group=0), sample(group=0, ids=(8,)), sample(group=1)], Collator(layout="segments"))
    assert batch.input_ids.tolist() == [[3, 4, 5, 6, 7, 8, 3, 4, 5, 6, 7]]
    assert batch.targets.source.tolist() == [1, 2, 3, 1, 7, 8, 9]
    other = sample(group=0)
    other.prompt_ids = [4]  # an environment may begin each of a group in its own way
    batch = collate_samples([sample(group=0), other], Collator(layout="segments"))
    assert batch.input_ids.tolist() == [[3, 4, 5, 6, 7, 4, 5, 6, 7]]


# Whole runs


@pytest.mark.parametrize("kind", FAMILY)
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_everyone_of_the_family_raises_its_reward(make, kind, peft):
    """Vowels in ten tokens; and the checkpoint is an ordinary one."""
    trainer = make(
        kind, peft_config=lora() if peft else None, max_steps=25, per_device_train_batch_size=32,
        learning_rate=2e-2 if peft else 3e-3, lr_scheduler_type="constant", beta=0.01,
        **({"num_iterations": 1} if kind == "ppo" else {"num_generations": 4}),
    )  # fmt: skip
    trainer.train()
    rewards = [entry["reward"] for entry in lines(trainer) if "reward" in entry]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 1
    trainer.save_model()
    if not peft:
        AutoModelForCausalLM.from_pretrained(trainer.args.output_dir)


def test_estimators_and_losses_by_name(make):
    for estimator, loss, more in (
        ("group", "gspo", {}), ("group", "cispo", {}), ("reinforce++_baseline", "ppo", {}), ("rloo", "ppo", {}),
        ("reinforce++", "ppo", {"num_generations": 1}), ("remax", "reinforce", {"num_generations": 1}),
        ("gae", "ppo", {"num_generations": 1, "loss_kwargs": {"dual_clip": 3.0}, "entropy_coef": 0.01}),
    ):  # fmt: skip
        options = {"num_generations": 4, "beta": 0.05, **more}
        trainer = make("grpo", advantage_estimator=estimator, loss_type=loss, **options)
        trainer.train()
        assert all(math.isfinite(entry["loss"]) and entry["grad_norm"] > 0 for entry in lines(trainer)), (
            estimator,
            loss,
        )


def test_a_critic_of_its_own_learns_and_is_saved(make, tmp_path, tokenizer):
    critic = add_scalar_head(tiny_model(seed=3))
    critic.save_pretrained(tmp_path / "critic")
    tokenizer.save_pretrained(tmp_path / "critic")
    trainer = make(value_model=str(tmp_path / "critic"), max_steps=6, vf_coef=1.0, learning_rate=1e-2)
    trainer.train()
    entries = [entry for entry in lines(trainer) if "critic/explained_variance" in entry]
    assert entries[0]["critic/values"] == 0 and entries[-1]["critic/values"] != 0
    trainer.save_model()
    saved = load_file(tmp_path / "run" / "value_head.safetensors")
    assert "critic.model.score.weight" in saved
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")


def test_a_critic_that_warms_up_leaves_the_policy_as_it_is(make, tmp_path, tokenizer):
    critic = add_scalar_head(tiny_model(seed=3))
    critic.save_pretrained(tmp_path / "critic")
    tokenizer.save_pretrained(tmp_path / "critic")
    steps = 2 * make().args.num_iterations * make().args.num_mini_batches  # two rollouts
    options = {"value_model": str(tmp_path / "critic"), "vf_coef": 1.0, "learning_rate": 1e-2, "logging_steps": 1}
    trainer = make(critic_warmup=1, max_steps=steps, **options)
    first_half = StopAt(steps // 2)
    trainer.add_callback(first_half)
    before = {name: weight.clone() for name, weight in trainer.policy.model.state_dict().items()}
    trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.policy.model.state_dict().items())
    assert trainer.policy.critic.model.score.weight.abs().max() > 0
    # The second rollout trains both.
    trainer.remove_callback(first_half)
    trainer.train(resume_from_checkpoint=False)
    assert any(not torch.equal(weight, before[name]) for name, weight in trainer.policy.model.state_dict().items())


@pytest.mark.parametrize("is_shared", [True, False], ids=["shared", "own"])
def test_a_critic_learns_at_its_own_rate(make, tmp_path, tokenizer, is_shared):
    critic = add_scalar_head(tiny_model(seed=3))
    critic.save_pretrained(tmp_path / "critic")
    tokenizer.save_pretrained(tmp_path / "critic")
    options = {} if is_shared else {"value_model": str(tmp_path / "critic")}
    # With a rate of 0 for the policy, only the critic moves.
    trainer = make(critic_learning_rate=1e-2, learning_rate=0.0, max_steps=1, **options)
    before = {name: weight.clone() for name, weight in trainer.policy.state_dict().items()}
    trainer.train()
    moved = {name for name, weight in trainer.policy.state_dict().items() if not torch.equal(weight, before[name])}
    assert moved and all(name.startswith("value_head" if is_shared else "critic.") for name in moved)
    groups = trainer.optimizer.param_groups
    assert {group["initial_lr"] for group in groups if group["params"]} == {0.0, 1e-2}
    # A second call changes nothing, and each weight is in one group.
    assert trainer.create_optimizer().param_groups == groups
    trained = [parameter for parameter in trainer.policy.parameters() if parameter.requires_grad]
    assert sum(len(group["params"]) for group in groups) == len(trained)


@pytest.mark.parametrize("head", ["zeros", "model"])
def test_a_reward_model_as_critic_starts_with_a_head_of_zeros(make, tmp_path, tokenizer, head):
    critic = add_scalar_head(tiny_model(seed=3))
    critic.score.weight.data.normal_()
    critic.save_pretrained(tmp_path / "critic")
    tokenizer.save_pretrained(tmp_path / "critic")
    trainer = make(value_model=str(tmp_path / "critic"), critic_head=head)
    start = trainer.policy.critic.model.score.weight
    assert torch.equal(start, torch.zeros_like(start) if head == "zeros" else critic.score.weight)


def test_a_shared_critic_has_no_head_of_its_own_to_start_from(make):
    with pytest.raises(ValueError, match="critic_head model: a shared critic has a new head"):
        make(critic_head="model")


def test_a_critics_rate_needs_a_critic(make):
    with pytest.raises(ValueError, match="critic_learning_rate has no effect with advantage_estimator group"):
        make("grpo", num_generations=4, critic_learning_rate=1e-4)


def test_a_shared_critic_cannot_warm_up_alone(make):
    with pytest.raises(ValueError, match="critic_warmup 2: a shared critic moves"):
        make(critic_warmup=2)


def test_a_critic_with_another_tokenizer_is_refused(make, tmp_path, tokenizer):
    add_scalar_head(tiny_model()).save_pretrained(tmp_path / "critic")
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["brand-new"])
    other.save_pretrained(tmp_path / "critic")
    with pytest.raises(ValueError, match="its tokenizer is not the policy's"):
        make(value_model=str(tmp_path / "critic"))


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("kind", ["ppo", "grpo", "online-dpo"])
@pytest.mark.parametrize("step", [3, 4], ids=["inside a rollout", "between two"])
def test_resumed_is_uninterrupted(make, kind, step, tmp_path):
    options = dict(max_steps=7, num_mini_batches=2, num_iterations=2, adaptive_kl_target=0.1, adaptive_kl_horizon=50)
    if kind != "ppo":
        options |= dict(num_generations=2, beta=0.1)
    if kind == "online-dpo":
        options |= dict(adaptive_kl_target=None)
    whole = make(kind, **options)
    whole.train()
    cut = make(kind, name="cut", callbacks=[StopAt(step)], save_strategy="steps", save_steps=step, **options)
    cut.train()
    again = make(kind, name="cut", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{step}"))
    assert len(lines(again)) == 7
    for one, other in zip(lines(whole), lines(again), strict=True):
        for key in one.keys() - {"tokens_per_second/rollout", "tokens_per_second/training"}:
            close(other[key], one[key])
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def rare(completions, number, **_):
    """Only prompts with an even number tell completions apart."""
    return [float(len(c)) if n % 2 == 0 else 0.0 for c, n in zip(completions, number, strict=True)]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ppo", dict(peft_config=lora(), num_mini_batches=2)),
        ("grpo", dict(reward=rare, num_generations=2, dynamic_sampling=2)),
        ("grpo", dict(num_generations=2, num_iterations=3, early_stop_kl=1e-6, learning_rate=1e-2)),
    ],
    ids=["lora", "dynamic", "early"],
)
def test_resumed_is_uninterrupted_in_special_cases_too(make, kind, options, tmp_path):
    options = dict(max_steps=5, **options)
    whole = make(kind, **options)
    whole.train()
    make(kind, name="cut", callbacks=[StopAt(3)], save_strategy="steps", save_steps=3, **options).train()
    again = make(kind, name="cut", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert again.collector.prompts.drawn == whole.collector.prompts.drawn
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_dynamic_sampling_replaces_groups_of_equal_rewards(make):
    plain = make("grpo", reward=rare, num_generations=2, max_steps=2)
    plain.train()
    assert lines(plain)[0]["frac_reward_zero_std"] > 0
    dynamic = make("grpo", reward=rare, num_generations=2, max_steps=2, dynamic_sampling=8)
    dynamic.train()
    assert all(0 < entry["frac_reward_zero_std"] < 1 for entry in lines(dynamic))  # of all that were drawn
    groups = {}
    for one in (s for step in dynamic.schedule.minibatches for micro in step for s in micro):
        groups.setdefault(one.group, set()).add(one.reward)
    assert all(len(rewards) > 1 for rewards in groups.values())
    assert dynamic.collector.prompts.drawn > plain.collector.prompts.drawn


def test_a_rollout_is_left_once_the_policy_strays(make):
    trainer = make(num_iterations=4, early_stop_kl=1e-6, max_steps=6, learning_rate=1e-2)
    trainer.train()
    assert trainer.collector.num_rollouts == 3  # two steps each: the second one shows the distance
    free = make(num_iterations=4, max_steps=6, learning_rate=1e-2)
    free.train()
    assert free.collector.num_rollouts == 2


def test_beta_follows_the_kl(make):
    trainer = make(
        beta=0.1, adaptive_kl_target=1e-3, adaptive_kl_horizon=16, max_steps=6, num_iterations=1, learning_rate=1e-2
    )
    trainer.train()
    betas = [entry["beta"] for entry in lines(trainer)]
    assert betas[0] == pytest.approx(0.1) and betas[1] == pytest.approx(0.1 * (1 - 0.2 * 8 / 16))
    assert betas[-1] > betas[2]


def test_truncated_completions(make):
    trainer = make(mask_truncated_completions=True, max_completion_length=2, max_steps=1)
    trainer.train()
    for one in (s for step in trainer.schedule.minibatches for micro in step for s in micro):
        assert one.in_loss != one.truncated
        assert one.truncated or one.ids[-1] == 0
    penalised = make(missing_eos_penalty=7.0, reward_clip=1.0, max_completion_length=2, max_steps=1)
    penalised.train()
    for one in (s for step in penalised.schedule.minibatches for micro in step for s in micro):
        assert one.reward == min(vowels([one.completion])[0], 1.0) - 7.0 * one.truncated


def test_a_sample_that_cannot_be_scored_is_dropped(make, caplog):
    def picky(completions, number, **_):
        if any(n % 3 == 0 for n in number):
            raise RuntimeError("no such number")
        return [1.0 * len(c) for c in completions]

    trainer = make("rloo", reward=picky, on_reward_error="drop", num_generations=2)
    trainer.train()
    assert all(0 < entry["frac_not_learned"] < 1 and math.isfinite(entry["loss"]) for entry in lines(trainer)[:1])
    assert "no such number" in caplog.text
    from rlhf.rewards import RewardError

    with pytest.raises(RewardError, match="no such number"):
        make("rloo", reward=picky, num_generations=2).train()


def test_nothing_usable_changes_nothing(make):
    def useless(completions, **_):
        return [None] * len(completions)

    trainer = make("grpo", reward=useless, num_generations=2, max_steps=1)
    trainer.train()
    assert lines(trainer)[0]["grad_norm"] == 0 and lines(trainer)[0]["frac_not_learned"] == 1
    # A mean of nothing is left out of the line.
    assert "reward" not in lines(trainer)[0] and all(math.isfinite(value) for value in lines(trainer)[0].values())


def test_a_step_without_iterations_needs_no_pass_before_it(make, monkeypatch):
    trainer = make("grpo", num_generations=2, max_steps=1)
    calls, forward = [], trainer.model.forward
    monkeypatch.setattr(trainer.model, "forward", lambda *args: calls.append(args) or forward(*args))
    trainer.train()
    assert len(calls) == 1
    assert lines(trainer)[0]["sampler_kl"] < 1e-10  # the step itself compares


# Evaluation, samples, and what is off


def test_evaluation_answers_held_out_prompts(make):
    trainer = make()
    first, again = trainer.evaluate(), trainer.evaluate()
    assert first == again and 0 <= first["eval_completions/clipped_ratio"] <= 1
    assert {"eval_reward", "eval_reward_std", "eval_rewards/vowels/mean"} <= first.keys()


def test_completions_are_kept_with_their_rewards(make, tmp_path):
    trainer = make("grpo", num_generations=4, num_completions_to_print=2)
    trainer.train()
    entries = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1] * 8 + [2] * 8 + [3] * 8
    for entry in entries:
        assert entry["reward"] == entry["rewards"]["vowels"] == vowels([entry["completion"]])[0]
        assert entry["prompt"] in sentences(1, 12)
    for group, other in pairwise(entries[start : start + 4] for start in range(0, 24, 4)):
        assert len({entry["prompt"] for entry in group}) == 1
        assert abs(sum(entry["advantage"] for entry in other)) < 1e-4


FINE = {"kl": 1.0, "entropy": 2.0, "reward_std": 1.0, "completions/clipped_ratio": 0.1, "completions/mean_length": 9.0}


@pytest.mark.parametrize(
    ("trouble", "changes"),
    [
        ("kl", {"kl": -3.0}),
        ("ratio", {"ratio/first_deviation": 0.01}),
        ("entropy", {"entropy": 0.01}),
        ("truncated", {"completions/clipped_ratio": 1.0}),
        ("variance", {"reward_std": 0.0}),
        ("variance", {"frac_reward_zero_std": 1.0}),
        ("sampler", {"sampler_kl": 0.5}),
    ],
)
def test_what_is_off_is_said(trouble, changes):
    assert diagnose(FINE, 2.0, False) == {}
    assert list(diagnose(FINE | changes, 2.0, False)) == [trouble]


def test_a_trouble_is_said_once_a_run(make, caplog):
    make("grpo", reward=lambda completions, **_: [1.0] * len(completions), num_generations=2).train()
    assert caplog.text.count("every reward is the same") == 1


def test_rewards_without_variance_are_seen_at_any_value(make, caplog):
    """Not a power of two: in float32 its mean square less its squared mean would not be 0."""
    trainer = make("ppo", reward=lambda completions, **_: [0.7] * len(completions))
    trainer.train()
    assert "every reward is the same" in caplog.text


def test_the_clip_is_the_losss_own():
    def clip(name, **options):
        return make_objective(
            name, epsilon=None, epsilon_high=None, max_completion_length=4, loss_kwargs={}, **options
        ).clip

    assert clip("dapo") == (0.2, 0.28) and clip("ppo") == clip("grpo") == clip("bnpo") == (0.2, 0.2)
    assert clip("gspo") is None and clip("cispo") is None
    assert make_objective(
        "ppo", epsilon=0.1, epsilon_high=0.4, max_completion_length=4, loss_kwargs={"dual_clip": 3}
    ).clip == (0.1, 0.4)


def test_what_reward_functions_log_is_logged(make, tmp_path):
    def told(completions, log_metric, log_extra, **_):
        log_metric("letters", sum(map(len, completions)) / len(completions))
        log_extra("first", [text[:1] for text in completions])
        return [1.0 * len(text) if len(text) % 2 else None for text in completions]

    def broken(completions, **_):
        raise RuntimeError("no")

    trainer = make("grpo", reward=[told, broken], num_generations=4, on_reward_error="drop")
    trainer.train()
    assert all(entry["letters"] > 0 and entry["rewards/broken/failed"] == 1 for entry in lines(trainer))
    entries = [json.loads(line) for line in (tmp_path / "run/completions.jsonl").read_text().splitlines()]
    assert all(entry["first"] == entry["completion"][:1] for entry in entries)


def test_a_value_head_goes_on_where_it_was_saved(make, tmp_path, caplog):
    trainer = make("ppo", max_steps=4, learning_rate=1e-2)
    trainer.train()
    trainer.save_model()
    caplog.set_level("INFO")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    again = make("ppo", model=saved, name="again")
    assert trainer.policy.value_head.weight.any() and "going on with the value head" in caplog.text
    assert torch.equal(again.policy.value_head.weight, trainer.policy.value_head.weight)


def test_values_are_those_of_the_state_before_each_token(tokenizer):
    """Of the hidden states one position earlier, also where two answers share a prompt."""
    from rlhf.data import Collator
    from rlhf.models import ActorCritic, use_segments

    model = tiny_model()
    policy = ActorCritic(model).eval()
    torch.nn.init.normal_(policy.value_head.weight)
    two = [sample(group=0), sample(group=0, ids=(8, 9))]
    rows = [torch.tensor([one.prompt_ids + one.ids]) for one in two]
    want = []
    for ids, one in zip(rows, two, strict=True):
        hidden = model.base_model(input_ids=ids)[0][0]
        value = hidden @ policy.value_head.weight[0] + policy.value_head.bias
        want.append(value[len(one.prompt_ids) - 1 : -1])
    for layout in ("rows", "segments"):
        if layout == "segments":
            assert use_segments(model) is None
        close(policy(collate_samples(two, Collator(layout=layout))).values.detach(), torch.cat(want).detach())


def test_returns_are_those_before_whitening():
    def valued(reward, *values):
        return sample(reward, tokens={"values": torch.tensor(values)})

    samples = [[valued(1.0, 0.5, 0.2, 0.1), valued(3.0, 0.0, 0.4, 0.2)] for _ in range(2)]
    for white, them in zip((False, True), samples, strict=True):
        add_advantages(them, "gae", whitened=white)
    for one, other in zip(*samples, strict=True):
        close(other.tokens["returns"], one.tokens["returns"])
        close(one.tokens["returns"], one.tokens["advantages"] + one.tokens["values"])
    white = torch.cat([s.tokens["advantages"] for s in samples[1]])
    close([white.mean(), white.std(correction=0)], [0.0, 1.0])


# Several turns


class Guess:
    """Say a letter that is in the row's word; the environment answers hot or cold, three times at most."""

    def reset(self, row):
        self.word, self.turns = row["prompt"], 0
        return None

    def step(self, answer):
        self.turns += 1
        hit = any(letter in "aeiou" for letter in answer)
        return Reply(" hot" if hit else " cold", float(hit), self.turns == 3)


def test_an_episode_keeps_the_sampled_ids(tokenizer):
    engine = LocalEngine(tiny_model(), tokenizer)
    prompts = [tokenizer(text)["input_ids"] for text in sentences(1, 3)]
    environments = [Guess() for _ in prompts]
    for environment in environments:
        environment.reset({"prompt": ""})
    episodes = play(
        environments, prompts, engine, tokenizer, Sampling(max_tokens=4, stop=("a", "e", "i")), lambda turn: turn,
        [0, 1, 2], dialogues=[Dialogue("")] * 3, max_turns=3, max_length=60,
    )  # fmt: skip
    told = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" hot", " cold")}
    for episode in episodes:
        assert len(episode.logps) == sum(episode.sampled) <= 12
        runs, start = [], 0
        while start < len(episode.ids):
            end = start
            while end < len(episode.ids) and episode.sampled[end] == episode.sampled[start]:
                end += 1
            runs.append((episode.sampled[start], episode.ids[start:end]))
            start = end
        assert all(ids in told.values() for own, ids in runs if not own)
        assert [turn["role"] for turn in episode.turns] == (["assistant", "user"] * 3)[: len(episode.turns)]


@pytest.mark.parametrize(
    ("answer", "message"),
    [(ZeroDivisionError("by zero"), "step raised ZeroDivisionError: by zero"), (Reply("", math.nan), "got Reply")],
)
def test_an_environment_that_fails_is_named_with_the_answer(tokenizer, answer, message):
    class Broken(Guess):
        def step(self, text):
            if isinstance(answer, Exception):
                raise answer
            return answer

    environments = [Guess(), Broken()]
    for environment in environments:
        environment.reset({"prompt": ""})
    with pytest.raises(ValueError, match=f"environment Broken, episode 1, turn 1, answer .*{message}"):
        play(
            environments, [[5], [6]], LocalEngine(tiny_model(), tokenizer), tokenizer, Sampling(max_tokens=2),
            lambda turn: turn, [0, 1], dialogues=[Dialogue("")] * 2, max_turns=2, max_length=60,
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_a_game_of_several_turns_is_learned(make, kind):
    trainer = make(
        kind, reward=None, environment_factory=Guess, max_turns=3, max_completion_length=5, stop=list("aeiou"),
        max_length=64, max_steps=20,
        per_device_train_batch_size=32, learning_rate=3e-3, lr_scheduler_type="constant", beta=0.01,
        **({"num_iterations": 1} if kind == "ppo" else {"num_generations": 4}),
    )  # fmt: skip
    trainer.train()
    rewards = [entry["reward"] for entry in lines(trainer) if "reward" in entry]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.3
    samples = [s for step in trainer.schedule.minibatches for micro in step for s in micro]
    assert all(len(s.tokens["advantages"]) == sum(s.sampled) for s in samples)


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(advantage_estimator="grpo"), "advantage_estimator 'grpo' is unknown: one of gae"),
        (dict(advantage_estimator="rloo"), "rloo compares completions of a prompt: num_generations must be 2 or more"),
        (dict(loss_type="pop"), "loss_type 'pop' is unknown: one of ppo"),
        (dict(loss_kwargs={"clip": 3}), "loss_type ppo takes no clip; it takes epsilon, epsilon_high, dual_clip"),
        (dict(loss_type="grpo", loss_kwargs={"beta": 0.5}), "loss_type grpo takes no beta; it takes epsilon,"),
        (dict(loss_type=lambda tokens: tokens.ratio), "is not registered: decorate it with @policy_loss"),
        (dict(kl_estimator="k3"), "in the reward only k1"),
        (dict(temperature=0.0), "temperature must be above 0"),
        (dict(max_length=100, max_completion_length=100), "leaves no room for a prompt"),
        (dict(neftune_noise_alpha=5.0), "samples come from the policy without noise"),
        (dict(per_device_train_batch_size=6, num_generations=4), "no multiple of the 4"),
        (dict(top_p=0.0), "top_p must be in"),
        (dict(loss_type="cispo", epsilon=0.3), "loss_type cispo takes no epsilon; it takes max_ratio"),
        (dict(loss_type="rloo"), "loss_type rloo has no ratio"),
        (dict(dynamic_sampling=2), "dynamic_sampling looks for groups"),
        (dict(advantage_estimator="remax", whiten_rewards=True), "remax subtracts the rewards of greedy answers"),
        (dict(tokens_per_batch=100), "tokens_per_batch is for data that is there before training"),
    ],
)
def test_a_configuration_that_cannot_work(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(str(tmp_path), report_to="none", use_cpu=True, **changes)


@pytest.mark.parametrize(
    "changes", [dict(adaptive_kl_target=1.0), dict(early_stop_kl=0.1), dict(importance_sampling_cap=2.0)]
)
def test_what_pairs_would_ignore_is_refused(tmp_path, changes):
    with pytest.raises(ValueError, match="is for losses of tokens, and pairs have none"):
        OnlineDPOConfig(str(tmp_path), report_to="none", use_cpu=True, **changes)


def test_what_cannot_work_is_said_before_the_first_rollout(make, prompts, tokenizer):
    with pytest.raises(ValueError, match=r"row 1: the prompt has .* leaves room for 2"):
        make(max_length=12)
    with pytest.raises(ValueError, match="needs 'solution', which is no column of the data"):
        make(reward=lambda completions, solution: [0.0])
    with pytest.raises(ValueError, match="would see no completion"):
        make(reward=lambda prompts: [0.0])
    with pytest.raises(ValueError, match="nothing to learn from"):
        make(reward=None)
    with pytest.raises(ConnectionError, match="does not answer"):
        make(
            rollout_server_url="http://127.0.0.1:9", rollout_server_model="m", rollout_weights_dir="w",
            server_startup_timeout=0.0,
        )  # fmt: skip
    endless = tiny_model()
    endless.generation_config.eos_token_id = None
    silent = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no token ends a completion"):
        args = PPOConfig("runs/unused", use_cpu=True, report_to="none", max_length=64, max_completion_length=9)
        PPOTrainer(endless, vowels, args, train_dataset=prompts, processing_class=silent)
