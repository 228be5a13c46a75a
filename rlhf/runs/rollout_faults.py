"""Faults that one line of the log of on-policy training shows; training warns of them, and so does the report."""

from collections.abc import Mapping

TRUNCATED = 0.95  # share of completions that are cut
STALE_KL = 0.1  # nats a token; a typical importance weight is then between 0.6 and 1.6


def diagnose(logs: Mapping[str, float], first_entropy: float | None, half_precision: bool) -> dict[str, str]:
    """Troubles that a line of the log shows.

    Args:
        logs: one line of the log of :class:`rlhf.PPOTrainer`.
        first_entropy: that of the first line, in nats a token; None if it had none.
        half_precision: whether log-probs come from bf16 or fp16 products, which need wider tolerances.
    Returns:
        Name of each trouble to a sentence: what was found, and what to do.
    """
    deviation = logs.get("ratio/first_deviation", 0.0)
    kl = logs.get("kl", 0.0)
    # An unbiased estimate of a KL near 0 may be negative; its noise grows with the root of the length.
    kl_noise = max(1.0, logs.get("completions/mean_length", 1.0) ** 0.5)
    entropy = logs.get("entropy")
    has_collapsed = entropy is not None and first_entropy is not None and entropy < min(0.1 * first_entropy, 0.1)
    truncated = logs.get("completions/clipped_ratio", 0.0)
    all_rewards_equal = logs.get("reward_std", 1.0) == 0
    no_group_varies = logs.get("frac_reward_zero_std", 0.0) == 1
    same_rewards = "every reward is the same" if all_rewards_equal else "no group has two different rewards"
    sampler_kl = logs.get("sampler_kl", 0.0)
    age = logs.get("rollout/staleness/mean", 0.0)
    # Old samples come from another policy by intention, and are corrected; only a large distance is a trouble.
    largest_sampler_kl = STALE_KL if age else (0.05 if half_precision else 0.01)
    sampler_hint = (
        f"samples are {age:.1f} updates old: lower max_staleness or learning_rate"
        if age
        else "set importance_sampling_cap, switch top_p and top_k off, or check that the server got the new weights"
    )

    checks = {
        "ratio": (
            deviation > (0.1 if half_precision else 1e-3),
            f"the first ratio after a rollout is {deviation:.2g} away from 1: the policy that is trained is not the "
            "one whose log-probs were recorded (dropout on? a layer that draws random numbers?)",
        ),
        "kl": (
            kl < -0.1 * kl_noise,
            f"KL to the reference is {kl:.3g}, below 0: the sampler draws from another distribution than the trainer "
            "scores (top_p or top_k on? another temperature? a server with old weights?)",
        ),
        "entropy": (
            has_collapsed,
            f"entropy fell from {first_entropy or 0:.3g} to {entropy or 0:.3g} nats a token: the policy hardly "
            "explores any more; raise beta or entropy_coef, or lower learning_rate",
        ),
        "truncated": (
            truncated >= TRUNCATED,
            f"{truncated:.0%} of the completions are cut at max_completion_length: raise it, or set "
            "missing_eos_penalty",
        ),
        "variance": (
            all_rewards_equal or no_group_varies,
            f"{same_rewards}: there is nothing to learn from; check the reward function, use easier prompts or "
            "larger groups",
        ),
        "sampler": (
            sampler_kl > largest_sampler_kl,
            f"sampler and trainer differ by {sampler_kl:.2g} nats a token: {sampler_hint}",
        ),
    }
    return {name: message for name, (is_wrong, message) in checks.items() if is_wrong}
