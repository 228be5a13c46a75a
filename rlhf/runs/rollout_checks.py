"""Health of training on own completions: PPO and its relatives."""

import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

from rlhf.runs.figures import EVALUATION, Figures, is_finite_number
from rlhf.runs.findings import Check, Finding, FindingOrNot, Level, number
from rlhf.runs.rollout_faults import TRUNCATED, diagnose
from rlhf.runs.training_checks import MIN_LINES_FOR_STANDSTILL, last_mean

EQUAL_GROUPS = 0.5  # share of groups without two different rewards (DAPO, arXiv 2503.14476, leaves such groups out)
CUT = 0.5  # share of completions
LENGTH_FACTOR = 4.0
ENTROPY_RISE = 2.0  # times the entropy of the first fifth
# A reward model is a good measure up to about ten nats (Stiennon et al., arXiv 2009.01325, figure 5).
KL_PER_COMPLETION, KL_PER_TOKEN = 50.0, 1.0  # nats
LARGE_STEP_KL = 0.1  # nats a token; usual limits are 0.01 to 0.05
CLIPPED_TOKENS = 0.3  # share
USELESS_CRITIC, HARMFUL_CRITIC = 0.0, -0.5  # explained variance
_HALF_PRECISION = ("bfloat16", "float16", "bf16", "fp16")


class _Fault(NamedTuple):
    """How a fault of single lines becomes a finding.

    Attributes:
        title: what is wrong, in one sentence.
        share: of the lines from which on it is worth a finding.
    """

    title: str
    share: float


# By the names of :func:`diagnose`. A line in which all rewards are equal is ordinary; most of them are not.
_FAULTS = {
    "ratio": _Fault("The trained policy is not the one that sampled.", 0.05),
    "kl": _Fault("The KL to the reference is below 0.", 0.05),
    "entropy": _Fault("The entropy collapsed.", 0.0),
    "truncated": _Fault("Nearly all completions are cut.", 0.5),
    "variance": _Fault("The reward is flat: completions do not differ in it.", 0.5),
    "sampler": _Fault("Sampler and trainer disagree.", 0.05),
}


def faults_of_lines(figures: Figures) -> FindingOrNot:
    """What training warns of, by the share of lines that have it."""
    if not figures.is_online:
        return None
    lines = [_finite(line) for line in figures.lines_with("reward")]
    first_entropy = next((line["entropy"] for line in lines if "entropy" in line), None)
    half_precision = _is_half_precision(figures)
    faults = [diagnose(line, first_entropy, half_precision) for line in lines]
    findings = []
    for name, fault in _FAULTS.items():
        found = [(line.get("step", 0), messages[name]) for line, messages in zip(lines, faults, strict=True)
                 if name in messages]  # fmt: skip
        if found and len(found) / len(lines) > fault.share:
            level: Level = "problem" if len(found) / len(lines) >= 0.5 else "warning"
            step, message = found[-1]
            evidence, _, advice = message.partition("; ")
            where = f"{len(found)} of {len(lines)} lines, last at step {step}: {evidence}"
            findings.append(Finding(level, fault.title, where, _sentence(advice or evidence)))
    return findings


def rewards_move(figures: Figures) -> FindingOrNot:
    """A reward that falls, or does not rise."""
    reward = figures.series("reward")
    if not figures.is_online or len(reward) < MIN_LINES_FOR_STANDSTILL:
        return None
    change = reward.change()
    evaluation = figures.series(EVALUATION + "reward")
    evaluation_rose = len(evaluation) > 1 and evaluation.values[-1] > evaluation.values[0]
    evidence = f"{number(change.before)} in the first fifth of the log, {number(change.after)} in the last"
    if change.difference < 0 and change.is_clear():
        advice = "Lower learning_rate, raise beta, and check the sign of the reward."
        return [Finding("problem", "The reward fell.", evidence, advice)]
    if not change.is_clear(2.0) and not evaluation_rose and not reward.is_constant:
        advice = "Train longer, raise learning_rate, sample more completions of a prompt, or use easier prompts."
        return [Finding("warning", "The reward did not rise by more than its noise.", evidence, advice)]
    return []


def groups_differ(figures: Figures) -> FindingOrNot:
    """Groups whose rewards are all equal: their completions have no advantage, and teach nothing."""
    equal = figures.series("frac_reward_zero_std")
    if not equal.values:
        return None
    last = last_mean(equal)
    if last <= EQUAL_GROUPS:
        return []
    reward = figures.series("reward")
    at = f", at a mean reward of {number(last_mean(reward))}" if reward.values else ""
    return [
        Finding(
            "hint",
            "Most groups have equal rewards, and so teach nothing.",
            f"{last:.0%} of the groups in the last third{at}",
            "If the reward is near its best, the run is done; else use prompts that are neither too easy nor too hard, "
            "larger groups, or a finer reward.",
        )
    ]


def completions_end(figures: Figures) -> FindingOrNot:
    """Completions that are cut at the length limit."""
    cut = figures.series("completions/clipped_ratio")
    if not cut.values:
        return None
    last = last_mean(cut)
    # In training on rewards, the diagnosis of single lines tells of more.
    if last <= CUT or (figures.is_online and last >= TRUNCATED):
        return []
    return [
        Finding(
            "warning" if figures.is_online else "hint",
            "Many completions are cut at the length limit.",
            f"{last:.0%} of them in the last third",
            "Raise max_completion_length, or set missing_eos_penalty.",
        )
    ]


def length_is_stable(figures: Figures) -> FindingOrNot:
    """Completions that became much longer or shorter."""
    length = figures.series("completions/mean_length")
    if len(length) < MIN_LINES_FOR_STANDSTILL or not figures.is_online:
        return None
    change = length.change()
    if change.before <= 0 or change.before / LENGTH_FACTOR < change.after < change.before * LENGTH_FACTOR:
        return []
    what = "explodes" if change.after > change.before else "collapses"
    return [
        Finding(
            "warning",
            f"The length of the completions {what}.",
            f"{number(change.before)} tokens in the first fifth of the log, {number(change.after)} in the last",
            "Read samples: the reward may pay for length. Add a term for length, or raise beta.",
        )
    ]


def entropy_does_not_rise(figures: Figures) -> FindingOrNot:
    """A policy that becomes random."""
    entropy = figures.series("entropy")
    if len(entropy) < MIN_LINES_FOR_STANDSTILL:
        return None
    change = entropy.change()
    if change.after <= ENTROPY_RISE * change.before or not change.is_clear():
        return []
    return [
        Finding(
            "warning",
            "The entropy rises: completions become random.",
            f"{number(change.before)} nats a token in the first fifth of the log, {number(change.after)} in the last",
            "Lower entropy_coef or learning_rate, or raise beta.",
        )
    ]


def kl_is_limited(figures: Figures) -> FindingOrNot:
    """A policy that is far from its reference."""
    kl, length = figures.series("kl"), figures.series("completions/mean_length")
    if not figures.is_online or not kl.values:
        return None
    last = last_mean(kl)
    per_token = last / max(last_mean(length), 1.0) if length.values else 0.0
    if last <= KL_PER_COMPLETION and per_token <= KL_PER_TOKEN:
        return []
    return [
        Finding(
            "warning",
            "The policy is far from its reference.",
            f"KL {number(last)} nats a completion, {number(per_token)} a token, in the last third",
            "Read samples, as a learned reward is a poor measure so far away (arXiv 2009.01325); raise beta or stop "
            "earlier.",
        )
    ]


def steps_are_small(figures: Figures) -> FindingOrNot:
    """Updates that change the policy too much at once."""
    step_kl = figures.series("approx_kl")
    if not step_kl.values:
        return None
    median = statistics.median(step_kl.values)
    clipped = [figures.series(f"clip_ratio/{side}") for side in ("low", "high")]
    share = sum(statistics.fmean(series.values) for series in clipped if series.values)
    if median <= LARGE_STEP_KL and share <= CLIPPED_TOKENS:
        return []
    return [
        Finding(
            "warning",
            "Updates change the policy too much at once.",
            f"median KL between policy and sampler {number(median)} nats a token; {share:.0%} of the tokens clipped",
            "Lower learning_rate, use fewer passes over a rollout (num_iterations), or set early_stop_kl.",
        )
    ]


def critic_explains_returns(figures: Figures) -> FindingOrNot:
    """A critic that is no better than a constant."""
    explained = figures.series("critic/explained_variance")
    if len(explained) < MIN_LINES_FOR_STANDSTILL:
        return None
    last = last_mean(explained)
    if last >= USELESS_CRITIC:
        return []
    return [
        Finding(
            "warning" if last < HARMFUL_CRITIC else "hint",
            "The critic explains no variance of the returns.",
            f"explained variance {number(last)} in the last third; 1 is perfect, 0 is a constant",
            "Raise vf_coef, train longer, or use GRPO or RLOO, which need no critic.",
        )
    ]


def rewards_do_not_fail(figures: Figures) -> FindingOrNot:
    """Reward functions that failed."""
    names = [name for name in figures.names if name.startswith("rewards/") and name.endswith("/failed")]
    if not names:
        return None
    failures = {name.split("/")[1]: statistics.fmean(figures.series(name).values) for name in names}
    failed = {name: share for name, share in failures.items() if share > 0}
    if not failed:
        return []
    shares = ", ".join(f"`{name}` on {share:.1%} of the completions" for name, share in failed.items())
    return [Finding("warning", "Reward functions failed.", shares, "Look at the warnings of the log, and mend them.")]


def _is_half_precision(figures: Figures) -> bool:
    model = figures.run.record.get("model") or {}
    options = figures.run.options
    precision = (model.get("dtype"), options.get("dtype"), *(name for name in ("bf16", "fp16") if options.get(name)))
    # Unknown for a run without a record: the wide tolerances give no false alarm.
    return not figures.run.record or any(word in str(text) for text in precision for word in _HALF_PRECISION)


def _finite(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if is_finite_number(value)}


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


ROLLOUT_CHECKS = (
    Check("Rewards differ, entropy stays, completions end, sampler and trainer agree", faults_of_lines),
    Check("The reward rises", rewards_move),
    Check("Groups have different rewards", groups_differ),
    Check("Completions are not cut", completions_end),
    Check("The length of completions is stable", length_is_stable),
    Check("The entropy does not rise", entropy_does_not_rise),
    Check("The KL to the reference is limited", kl_is_limited),
    Check("Updates are small", steps_are_small),
    Check("The critic explains returns", critic_explains_returns),
    Check("Reward functions do not fail", rewards_do_not_fail),
)
