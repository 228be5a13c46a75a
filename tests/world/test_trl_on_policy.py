"""What people write for TRL's GRPO, RLOO and PPO means the same here, or is refused by its name."""

import math

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rlhf import DistillConfig, GRPOConfig, GRPOTrainer, RLOOConfig
from rlhf.data import in_memory
from rlhf.losses import group_advantages
from rlhf.online.objective import make_objective
from rlhf.online.prompts import Prompts
from rlhf.online.samples import Sample, add_advantages, mark_high_entropy
from rlhf.rewards import ModelReward, reward_functions
from rlhf.rollouts import Sampling
from rlhf.rollouts.sampling import draw
from rlhf.trainers.preparation import for_each_set
from tests.conftest import tiny_model


def config(folder, kind=GRPOConfig, **changes):
    fixed = dict(per_device_train_batch_size=4, num_generations=2, max_completion_length=6, max_length=64)
    return kind(str(folder), report_to="none", use_cpu=True, **fixed | changes)


def trainer_of(folder, tokenizer, rows, reward, **changes):
    return GRPOTrainer(
        tiny_model(), reward, config(folder, max_steps=2, logging_steps=1, **changes), train_dataset=rows,
        processing_class=tokenizer,
    )  # fmt: skip


def length(completions, **columns):
    return [float(len(text)) for text in completions]


@pytest.fixture
def rows():
    return Dataset.from_list([{"prompt": text} for text in ("the cat", "a dog is", "the end", "big")])


# Options


@pytest.mark.parametrize(
    ("given", "name", "means"),
    [
        (dict(steps_per_generation=6, gradient_accumulation_steps=2), "num_mini_batches", 3),
        (dict(generation_batch_size=8), "num_mini_batches", 2),
        (dict(steps_per_generation=1, gradient_accumulation_steps=2), "num_mini_batches", 1),
        (dict(scale_rewards=True), "scale_rewards", "group"),
        (dict(scale_rewards=False), "scale_rewards", "none"),
        (dict(scale_rewards="False"), "scale_rewards", "none"),
        (dict(loss_type="cispo", epsilon_high=5.0), "loss_kwargs", {"max_ratio": 5.0}),
        (dict(loss_type="sapo", sapo_temperature_neg=1.1), "loss_kwargs", {"temperature_negative": 1.1}),
        (dict(loss_type="vespo", vespo_k_pos=1.5), "loss_kwargs", {"k_pos": 1.5}),
        (dict(kl_coef=0.2), "beta", 0.2),
        (dict(max_tool_calling_iterations=2), "max_turns", 3),
        (dict(vllm_importance_sampling_cap=3.0), "importance_sampling_cap", 3.0),
    ],
)
def test_trls_names_are_taken_over(tmp_path, given, name, means):
    assert getattr(config(tmp_path, **given), name) == means


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(max_prompt_length=5), "max_prompt_length is not offered: a prompt is never cut"),
        (dict(steps_per_generation=3, gradient_accumulation_steps=2), "no whole number of optimizer steps"),
        (dict(steps_per_generation=2, generation_batch_size=8), "say the same: give one"),
        (dict(generation_batch_size=6), "generation_batch_size 6 is no multiple"),
        (dict(use_vllm=True, vllm_mode="server"), "use_vllm: start `vllm serve MODEL`"),
        (dict(use_vllm=True, vllm_mode="nearby"), "vllm_mode must be server or colocate, got 'nearby'"),
        (dict(use_vllm=True, vllm_mode="colocate", vllm_server_port=9), "in this process: leave vllm_server_port out"),
        (dict(vllm_gpu_memory_utilization=0.3), "vllm_gpu_memory_utilization: an option of `vllm serve` itself"),
        (dict(generation_kwargs={"num_beams": 2}), "generation_kwargs: num_beams=2 is not offered"),
        (dict(generation_kwargs={"temperature": 2.0}), "give temperature as temperature"),
        (dict(use_bias_correction_kl=False), "k3 without the ratio"),
        (dict(importance_sampling_level="word"), "must be one of token, sequence"),
        (dict(loss_type="vespo", importance_sampling_level="sequence"), "has no ratios of tokens"),
        (dict(loss_type="grpo", sapo_temperature_pos=1.0), "is for loss_type sapo, not for grpo"),
        (dict(scale_rewards="always"), "scale_rewards must be group"),
        (dict(min_p=1.5), "min_p must be in"),
        (dict(use_adaptive_entropy=True), "use_adaptive_entropy is not offered: give a constant entropy_coef"),
        (dict(log_completions_hub_repo="me/mine"), "log_completions_hub_repo is not offered"),
    ],
)
def test_what_has_no_meaning_here_is_refused_by_name(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **given)


def test_sampling_takes_trls_options(tmp_path):
    args = config(
        tmp_path, top_k=None, min_p=0.1, repetition_penalty=1.2, generation_kwargs={"do_sample": True, "top_p": 0.5}
    )
    assert args.sampling() == Sampling(top_p=0.5, top_k=0, min_p=0.1, repetition_penalty=1.2, max_tokens=6)
    server = config(
        tmp_path, use_vllm=True, vllm_server_host="here", vllm_server_port=9, rollout_server_model="m",
        rollout_weights_dir="w", vllm_enable_sleep_mode=True, vllm_server_timeout=30.0,
    )  # fmt: skip
    assert server.rollout_server_url == ["http://here:9"] and server.colocated_vllm() is None
    assert config(tmp_path, use_vllm=True).colocated_vllm() == (0.3, None)
    colocated = config(
        tmp_path, use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=0.5, vllm_max_model_length=64
    )
    assert colocated.colocated_vllm() == (0.5, 64)
    assert server.rollout_server_sleep and server.server_startup_timeout == 30


@pytest.mark.parametrize(
    "options",
    [dict(min_p=0.3), dict(min_p=0.2, top_k=4), dict(min_p=0.05, top_p=0.8), dict(repetition_penalty=1.5),
     dict(repetition_penalty=0.7, min_p=0.1, top_k=5, temperature=0.7)],
)  # fmt: skip
def test_tokens_are_drawn_as_transformers_would(options):
    """Min-p and the penalty too: the same distribution as that of generate's own processors."""
    sampling = Sampling(**options)
    g = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(3, 12, generator=g) * 2, torch.tensor([[1, 2, 2], [5, 1, 7], [0, 0, 0]])
    warpers = [
        RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        TemperatureLogitsWarper(sampling.temperature),
        TopKLogitsWarper(sampling.top_k or 12),
        TopPLogitsWarper(sampling.top_p),
        MinPLogitsWarper(sampling.min_p),
    ]
    want = LogitsProcessorList(warpers)(ids, logits.clone()).log_softmax(-1)
    seen = torch.zeros(3, 12, dtype=torch.bool).scatter_(1, ids, True)
    for u in torch.linspace(0, 0.999, 41, dtype=torch.float64):
        token, logp = draw(logits, u.expand(3), sampling, seen=seen)
        torch.testing.assert_close(logp, want.gather(1, token[:, None])[:, 0])


def test_the_penalty_reads_the_prompt_and_the_answer(tokenizer):
    from rlhf.rollouts import LocalEngine

    engine = LocalEngine(tiny_model(), tokenizer)
    sampling = Sampling(temperature=0, max_tokens=12, repetition_penalty=1e6)
    ((one,), (other,)) = engine.generate([[5, 6, 7], [8]], 1, sampling, 0)
    for prompt, answer in (([5, 6, 7], one), ([8], other)):
        assert len({*prompt, *answer.ids}) == len(set(prompt)) + len(answer.ids)  # nothing comes twice


# Losses and advantages


def test_one_ratio_for_a_sequence_is_gspo():
    """Loss_type grpo at the level of sequences is GSPO; a loss of token sums weighs by length."""
    fixed = dict(epsilon=0.1, epsilon_high=0.2, max_completion_length=5, loss_kwargs={})
    g = torch.Generator().manual_seed(1)
    logps, old = (-2 * torch.rand(7, generator=g, dtype=torch.float64) for _ in range(2))
    sequence, lengths = torch.tensor([0, 0, 0, 1, 1, 1, 1]), (3, 4)
    advantages = torch.tensor([1.0, -0.5], dtype=torch.float64)[sequence]
    logps.requires_grad_()

    def loss(name, level):
        objective = make_objective(name, **fixed, level=level)
        from rlhf.logprobs import Scores

        weight = objective.token_weights(lengths, sequence, torch.float64)
        ones = torch.ones_like(weight)
        total = objective.sequence_loss(Scores(logps), advantages, weight, ones, old, old, sequence, lengths)
        return total / objective.count(lengths)

    grpo, gspo = loss("grpo", "sequence"), loss("gspo", "token")
    torch.testing.assert_close(grpo, gspo)
    torch.testing.assert_close(*(torch.autograd.grad(x, logps, retain_graph=True)[0] for x in (grpo, gspo)))
    ratios = [math.exp((logps - old).detach()[sequence == s].mean()) for s in (0, 1)]
    pessimistic = [min(r * a, min(max(r, 0.9), 1.2) * a) for r, a in zip(ratios, (1.0, -0.5), strict=True)]
    assert float(grpo.detach()) == pytest.approx(-sum(pessimistic) / 2)
    assert float(loss("dapo", "sequence").detach()) == pytest.approx(-(3 * pessimistic[0] + 4 * pessimistic[1]) / 7)


def test_a_bad_sequence_that_the_policy_has_left_is_masked():
    from rlhf.logprobs import Scores

    fixed = dict(epsilon=None, epsilon_high=None, max_completion_length=5, loss_kwargs={})
    old, sequence, lengths = torch.zeros(6) - 1, torch.tensor([0, 0, 1, 1, 2, 2]), (2, 2, 2)
    logps = (old - torch.tensor([2.0, 2.0, 0.1, 0.1, 2.0, 2.0])).requires_grad_()
    advantages = torch.tensor([-1.0, -1.0, 1.0])[sequence]
    objective = make_objective("grpo", **fixed, off_policy_threshold=0.5)
    weight = objective.token_weights(lengths, sequence)
    total = objective.sequence_loss(Scores(logps), advantages, weight, torch.ones(6), old, old, sequence, lengths)
    (gradient,) = torch.autograd.grad(total, logps)
    assert gradient[:2].tolist() == [0, 0] and (gradient[2:] != 0).all()


def samples(rewards, **each):
    return [
        Sample(i // 2, {}, [1], [5, 6], None, "", False, {"entropy": torch.tensor([float(i), i + 0.5])}, reward=reward,
               reward_components={name: values[i] for name, values in each.items()})
        for i, reward in enumerate(rewards)
    ]  # fmt: skip


def test_only_tokens_of_high_entropy_are_learned():
    mine = samples([0.0, 1.0, 2.0, 3.0])
    mark_high_entropy(mine, 0.25, lambda own: own)
    assert [s.tokens["high_entropy"].tolist() for s in mine] == [[0, 0], [0, 0], [0, 0], [1, 1]]


def test_rewards_are_normalised_one_by_one_before_they_are_summed():
    each = dict(small=[0.0, 0.01, 0.02, 0.0], large=[100.0, 0.0, 50.0, 50.0])
    mine = samples([1.0] * 4, **each)
    add_advantages(mine, "gdpo", reward_weights={"small": 1.0, "large": 0.5})
    group = torch.tensor([0, 0, 1, 1])
    total = sum(w * group_advantages(torch.tensor(each[n]), group) for n, w in (("small", 1.0), ("large", 0.5)))
    want = (total - total.mean()) / total.std(correction=0)
    torch.testing.assert_close(torch.stack([s.tokens["advantages"][0] for s in mine]), want)


def test_advantages_can_be_normalised_and_rewards_cut(tmp_path):
    args = config(tmp_path, RLOOConfig, normalize_advantages=True, reward_clip_range=[-1.0, 3.0])
    assert args.reward_bounds == (-1.0, 3.0)
    mine = samples([0.0, 1.0, 5.0, 3.0])
    add_advantages(mine, "rloo", normalized=True)
    advantages = torch.stack([s.tokens["advantages"][0] for s in mine])
    assert float(advantages.mean()) == pytest.approx(0, abs=1e-6)
    assert float(advantages.std(correction=0)) == pytest.approx(1)


# Runs


@pytest.mark.parametrize(
    "changes",
    [
        dict(top_entropy_quantile=0.2),
        dict(importance_sampling_level="sequence", loss_type="grpo", num_iterations=2),
        dict(loss_type="vespo", delta=None),
        dict(delta=2.0, min_p=0.01, top_k=10, top_p=0.9, repetition_penalty=1.1),
        dict(off_policy_mask_threshold=0.5, multi_objective_aggregation="normalize_then_sum"),
        dict(beta=0.1, sync_ref_model=True, ref_model_sync_steps=1, num_generations_eval=2),
    ],
)
def test_a_run_with_trls_options_learns(tmp_path, tokenizer, rows, changes):
    trainer = trainer_of(tmp_path, tokenizer, rows, length, learning_rate=1e-2, **changes)
    reference = None if trainer.ref_model is None else trainer.ref_model.get_input_embeddings().weight.clone()
    before = trainer.policy.get_input_embeddings().weight.clone()
    trainer.train()
    after = trainer.policy.get_input_embeddings().weight
    assert not torch.equal(before, after)
    if reference is not None:
        assert not torch.equal(reference, trainer.ref_model.get_input_embeddings().weight)
        assert trainer.evaluate(rows)["eval_reward"] > 0


def test_a_stream_of_prompts_trains(tmp_path, tokenizer, rows):
    """Prompts as an IterableDataset: in the order of the stream, begun again at its end."""
    seen = []

    def watched(prompts, completions, **columns):
        seen.extend(prompts)
        return [float(len(text)) for text in completions]

    stream = rows.to_iterable_dataset()
    trainer = trainer_of(tmp_path, tokenizer, stream, watched, shuffle_dataset=False, per_device_train_batch_size=6)
    trainer.train()
    assert seen == [text for text in ("the cat", "a dog is", "the end", "big", "the cat", "a dog is") for _ in "12"]
    assert trainer.evaluate(stream)["eval_completions/mean_length"] > 0


def test_a_stream_goes_on_where_it_was(rows):
    whole = Prompts(rows.to_iterable_dataset(), 3, True, lambda part: part)
    first, rest = whole.draw(3), whole.draw(4)
    again = Prompts(rows.to_iterable_dataset(), 3, True, lambda part: part)
    again.drawn = 3
    assert again.draw(4) == rest and len(first) == 3
    assert isinstance(for_each_set(in_memory, {"a": rows.to_iterable_dataset()})["a"], Dataset)
    with pytest.raises(ValueError, match="has no rows"):
        Prompts(IterableDataset.from_generator(lambda: iter(())), 0, False, lambda part: part).draw(1)


def test_reward_models_come_with_their_tokenizers(tokenizer, tmp_path):
    """TRL's reward_processing_classes: one for each reward, or refused; a model itself is a reward too."""
    folder = str(tmp_path)
    model = LlamaForSequenceClassification(LlamaConfig(**tiny_model().config.to_dict() | {"num_labels": 1}))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="1 reward_processing_classes for 2 reward_funcs: their numbers must match"):
        reward_functions([folder, length], tokenizer)
    by_name, function = reward_functions([folder, length], [tokenizer, None])
    assert by_name.tokenizer is tokenizer and function is length
    (whole,) = reward_functions(model, tokenizer)
    assert isinstance(whole, ModelReward)
    torch.testing.assert_close(whole(["the cat"], [" is"]), by_name(["the cat"], [" is"]))


@pytest.mark.parametrize("name", ["tools", "rollout_func", "judge", "reward_model"])
def test_arguments_of_trls_trainers_say_what_to_use(tmp_path, tokenizer, rows, name):
    with pytest.raises(ValueError, match=f"{name} is not an argument of this trainer: "):
        GRPOTrainer(tiny_model(), length, config(tmp_path), rows, None, tokenizer, **{name: [length]})


def test_rewards_have_trls_names():
    from rlhf import rewards

    assert rewards.think_format_reward(["<think>a</think> b", "b"]) == [1.0, 0.0]
    assert rewards.get_soft_overlong_punishment(100, 20)(completion_ids=[[1] * 90]) == [-0.5]
    assert rewards.get_repetition_penalty_reward(2)(completion_ids=[[5] * 5]) == [-0.75]
    pytest.importorskip("math_verify")
    assert rewards.accuracy_reward(["so $2$", "so $3$"], ["$2$", "$2$"]) == [1.0, 0.0]
    thought = ["<think> $3$ </think> so $2$", "<think> so $2$", "<think> $2$ </think> so $3$"]
    assert rewards.reasoning_accuracy_reward(thought, ["$2$"] * 3) == [1.0, 0.0, 0.0]
    assert rewards.load_reward("reasoning_accuracy_reward")(thought[:1], solution=["$2$"]) == [1.0]


def test_distillation_takes_trls_names(tmp_path):
    fixed = dict(output_dir=str(tmp_path), report_to="none", use_cpu=True, max_length=64)
    args = DistillConfig(**fixed, lmbda=0.5, max_new_tokens=7, top_k=None, min_p=0.1, teacher_model_revision="v1")
    assert args.sampling() == Sampling(max_tokens=7, min_p=0.1)
    assert args.teacher_model_init_kwargs == {"revision": "v1"}
    with pytest.raises(ValueError, match="seq_kd is not offered: let `rlhf teacher`"):
        DistillConfig(**fixed, seq_kd=True)
    with pytest.raises(ValueError, match="generation options are for the student's own answers"):
        DistillConfig(**fixed, top_k=5)


def test_the_last_line_has_the_steps_since_the_line_before(tmp_path, tokenizer, rows):
    args = config(tmp_path, max_steps=3, logging_steps=2, entropy_coef=0.1)
    trainer = GRPOTrainer(tiny_model(), length, args, rows, processing_class=tokenizer)
    trainer.train()
    last = trainer.state.log_history[-1]
    assert (
        "train_loss" in last
        and last["entropy_coef"] == pytest.approx(0.1)
        and last["reward"] > 0
        and "rewards/length/mean" in last
    )
    assert last["num_tokens"] > trainer.state.log_history[-2]["num_tokens"]
