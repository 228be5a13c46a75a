"""The options of each stage, the same for both sides, and the seconds that each stage may train."""

from typing import Any

import torch

SIDES = ("ours", "trl")
STAGES = ("sft", "dpo", "grpo")
ON_GPU = torch.cuda.is_available()
# Seconds of training; loading, tokenising and evaluating are not counted. On a CPU they are seconds of one core.
SECONDS = (
    {"sft": 8.0, "dpo": 12.0, "grpo": 16.0, "reward": 15.0, "ppo": 36.0}
    if ON_GPU
    else {"sft": 80.0, "dpo": 120.0, "grpo": 110.0, "reward": 420.0, "ppo": 1138.0}
)
WARMUP_STEPS = 5  # of the learning rate, which then falls to 0 over the seconds
# Rows that a seed draws, for the tokeniser's sake: on a CPU it would take longer than the training.
ROWS = None if ON_GPU else 192
LONGEST = 1200  # characters of a prompt with its answer there

COMMON: dict[str, Any] = {
    "max_steps": 100_000,  # the clock ends a run
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "max_grad_norm": 1.0,
    "bf16": True,
    "use_cpu": not ON_GPU,
}
SFT: dict[str, Any] = {
    "per_device_train_batch_size": 32 if ON_GPU else 4,
    "learning_rate": 1e-4 if ON_GPU else 5e-5,
    "max_length": 1024 if ON_GPU else 384,
}
DPO: dict[str, Any] = {
    "per_device_train_batch_size": 32 if ON_GPU else 4,
    "learning_rate": 2e-5,
    "max_length": 1024 if ON_GPU else 384,
    "beta": 0.1,
    "precompute_ref_log_probs": False,  # most pairs are read once
}
GRPO: dict[str, Any] = {
    "per_device_train_batch_size": 256 if ON_GPU else 24,
    "num_generations": 8 if ON_GPU else 6,
    "max_completion_length": 48,
    "learning_rate": 3e-5,
    "beta": 0.0,
    "loss_type": "dapo",
}
# TRL checkpoints activations unless it is told not to; its other defaults stay.
TRL: dict[str, Any] = {"gradient_checkpointing": False}

# The reward model: the first layers with a fitted head, which are then fine-tuned.
REWARD_LAYERS = 6
REWARD: dict[str, Any] = {
    "per_device_train_batch_size": 64 if ON_GPU else 16,
    "per_device_eval_batch_size": 64 if ON_GPU else 16,
    "learning_rate": 3e-5,
    "max_length": 1024,
    "center_rewards_coefficient": 0.01,
}
# PPO: 32 prompts with two answers a rollout, two passes of four steps.
PPO: dict[str, Any] = {
    "per_device_train_batch_size": 64 if ON_GPU else 16,
    "num_mini_batches": 4,
    "num_iterations": 2,
    "num_generations": 2,
    "max_length": 512 if ON_GPU else 192,
    "max_completion_length": 64,
    "missing_eos_penalty": 0.3,  # the reward model has seen whole answers alone
    "learning_rate": 2e-5,
    "beta": 0.02,
    "lam": 1.0,  # the reward comes with the last token
    "critic_learning_rate": 3e-4,
    "critic_warmup": 4,
    "cliprange_value": None,
    "vf_coef": 0.1,
    # One norm clips policy and critic together: a bound that is seldom reached keeps them apart.
    "max_grad_norm": 10.0,
    "adam_beta2": 0.99,
}
# Of the rewards of 512 answers of the model after SFT (seed 0) to 128 prompts of training.
REWARD_MEAN, REWARD_STD = -0.47, 0.53
# Among answers to one prompt that ended, the reward grows by 0.0148 a token. It is taken off, so that length gains
# nothing.
LENGTH_PENALTY = 0.0148 / REWARD_STD
MEAN_TOKENS = 38  # of those answers
ANSWER_TOKENS = 256 if ON_GPU else 128
SAMPLES = 4 if ON_GPU else 1
PPO_SAMPLES = 4
