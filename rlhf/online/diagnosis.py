"""What is off in an on-policy run, read from a line of its log."""

from collections.abc import Mapping


def diagnose(logs: Mapping[str, float], first_entropy: float | None, half_precision: bool) -> dict[str, str]:
    """Name of each trouble to a line on what was seen, and what to do about it.

    Args:
        logs: one line of the log of :class:`rlhf.PPOTrainer`.
        first_entropy: that of the first line. half_precision: log-probs are those of bf16 or fp16 products.
    """
    found: dict[str, str] = {}

    def look(name: str, wrong: bool, text: str) -> None:
        if wrong:
            found[name] = text

    get = logs.get
    off = get("ratio/first_deviation", 0.0)
    look(
        "ratio",
        off > (0.1 if half_precision else 1e-3),
        f"the first ratio after a rollout is {off:.2g} away from 1: the policy that is trained is not the one whose "
        "log-probs were kept (dropout on? a layer that draws random numbers?)",
    )
    kl = get("kl", 0.0)
    look(
        "kl",
        kl < -0.1 * max(1.0, get("completions/mean_length", 1.0) ** 0.5),
        f"KL to the reference is {kl:.3g}, below 0: the sampler draws from another distribution than the trainer "
        "scores (top_p or top_k on? another temperature? a server with old weights?)",
    )
    entropy = get("entropy")
    look(
        "entropy",
        entropy is not None and first_entropy is not None and entropy < min(0.1 * first_entropy, 0.1),
        f"entropy fell from {first_entropy or 0:.3g} to {entropy or 0:.3g} nats a token: the policy hardly explores "
        "any more; raise beta or entropy_coef, or lower learning_rate",
    )
    look(
        "truncated",
        get("completions/clipped_ratio", 0.0) >= 0.95,
        f"{get('completions/clipped_ratio', 0.0):.0%} of the completions are cut at max_completion_length: raise it, "
        "or set missing_eos_penalty",
    )
    look(
        "variance",
        get("reward_std", 1.0) == 0 or get("frac_reward_zero_std", 0.0) == 1,
        "every reward is the same"
        if get("reward_std", 1.0) == 0
        else "no group has two different rewards: there is "
        "nothing to learn from; check the reward function, use easier prompts or larger groups",
    )
    look(
        "sampler",
        get("sampler_kl", 0.0) > (0.05 if half_precision else 0.01),
        f"sampler and trainer differ by {get('sampler_kl', 0.0):.2g} nats a token: set importance_sampling_cap, "
        "switch top_p and top_k off, or check that the server got the new weights",
    )
    return found
