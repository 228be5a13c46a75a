"""The options of each stage, the same for both sides, and the seconds that each stage may train."""

import os
from typing import Any

SIDES = ("ours", "trl")
STAGES = ("sft", "dpo", "grpo")
# Seconds of training; loading, tokenising and evaluating are not counted.
SECONDS = {"sft": 8.0, "dpo": 12.0, "grpo": 16.0, "reward": 20.0, "ppo": 36.0}
WARMUP_STEPS = 5  # of the learning rate, which then falls to 0 over the seconds

COMMON: dict[str, Any] = {
    "max_steps": 100_000,  # the clock ends a run
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "max_grad_norm": 1.0,
}
SFT: dict[str, Any] = {"per_device_train_batch_size": 32, "learning_rate": 1e-4, "max_length": 1024}
DPO: dict[str, Any] = {
    "per_device_train_batch_size": 32,
    "learning_rate": 2e-5,
    "max_length": 1024,
    "beta": 0.1,
    "precompute_ref_log_probs": False,  # most pairs are read once
}
GRPO: dict[str, Any] = {
    "per_device_train_batch_size": 256,
    "num_generations": 8,
    "max_completion_length": 48,
    "learning_rate": 3e-5,
    "beta": 0.0,
    "loss_type": "dapo",
}
# TRL checkpoints activations unless it is told not to; its other defaults stay.
TRL: dict[str, Any] = {"gradient_checkpointing": False}

# Reward models, by name. The first one is PPO's judge, the last one judges what it has not trained.
REWARD: dict[str, dict[str, Any]] = {
    "judge": {"learning_rate": 3e-5, "seed": 0},
    "second": {"learning_rate": 3e-5, "seed": 1},
}
REWARD_COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 64,
    "max_length": 1024,
    "center_rewards_coefficient": 0.01,
    "weight_decay": 0.01,
}
PPO: dict[str, Any] = {
    "per_device_train_batch_size": 64,
    "num_mini_batches": 4,
    "num_iterations": 2,
    "max_length": 512,
    "max_completion_length": 192,
    "learning_rate": 1e-5,
    "beta": 0.03,
    "lam": 1.0,  # the reward comes with the last token
    "critic_warmup": 1,
    "cliprange_value": None,
    "vf_coef": 0.1,
    "adam_epsilon": 1e-5,
    "missing_eos_penalty": None,
}
ANSWER_TOKENS = 256
SAMPLES = 4

if os.environ.get("LEARNING_TINY"):  # a rehearsal on a CPU with a model of a few thousand parameters
    SFT["per_device_train_batch_size"] = DPO["per_device_train_batch_size"] = 2
    REWARD_COMMON["per_device_train_batch_size"] = REWARD_COMMON["per_device_eval_batch_size"] = 4
    GRPO |= {"per_device_train_batch_size": 8, "max_completion_length": 6}
    PPO |= {"per_device_train_batch_size": 2, "num_mini_batches": 2, "max_completion_length": 6}
    ANSWER_TOKENS, SAMPLES = 6, 2
