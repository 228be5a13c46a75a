"""What an on-policy run shows: metrics of rollouts and of steps, samples, and a line when something is off."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rlhf.logprobs import Scores
from rlhf.losses import kl_estimate
from rlhf.online.diagnosis import diagnose
from rlhf.online.objective import Objective
from rlhf.online.samples import RolloutBatch, Sample, varied_groups
from rlhf.rewards import completion_text
from rlhf.rewards.scoring import Scored
from rlhf.trainers.metric_sums import sum_dtype

logger = logging.getLogger(__name__)

Sums = dict[str, tuple[Tensor, Tensor]]


class RolloutReport:
    """Keeps what an on-policy trainer logs; see ``docs/metrics.md``."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.args = trainer, trainer.args
        self._largest: dict[str, Tensor] = {}
        self._step_kl: Tensor | None = None  # sum and count of KL(old, new) in the last step
        self._entropy: float | None = None  # of the first line
        self._said: set[str] = set()
        self._samples: list[Sample] = []
        self._learned_tokens = 0

    def state(self) -> dict[str, Any]:
        return dict(kl=self._step_kl, entropy=self._entropy, said=self._said)

    def load(self, state: dict[str, Any]) -> None:
        self._step_kl, self._entropy, self._said = state["kl"], state["entropy"], state["said"]

    # Sums and counts

    def of_rollout(
        self, samples: list[Sample], kept: list[Sample], seconds: float, trained: float, beta: float
    ) -> Sums:
        self._samples = samples
        sums = self._of_samples(samples)
        device = self.args.device

        def add(name: str, total: float | Tensor, count: float | Tensor) -> None:
            sums[name] = torch.as_tensor(total, device=device).float(), torch.as_tensor(count, device=device).float()

        groups = {sample.group for sample in samples}
        if self.args.dynamic_sampling:
            add("frac_reward_zero_std", *self.trainer.roller.equal_groups)
        elif self.args.num_generations > 1:
            add("frac_reward_zero_std", len(groups) - len(varied_groups(samples)), len(groups))
        add("frac_not_learned", sum(not sample.learned for sample in kept), len(kept))
        sampled = sum(map(len, samples))
        add("tokens_per_second/rollout", sampled, seconds)
        if trained:
            add("tokens_per_second/training", self._learned_tokens, trained)
        self._learned_tokens = sum(map(len, kept)) * self.args.num_iterations
        if self.args.beta > 0:
            add("beta", beta, 1)
        if self.args.entropy_coef:
            add("entropy_coef", self.args.entropy_coef, 1)
        if "old_logps" in kept[0].tokens:
            old, sampler = (torch.cat([s.tokens[name] for s in kept]) for name in ("old_logps", "sampler_logps"))
            add("entropy", -old.sum(), len(old))
            add("sampler_kl", kl_estimate(sampler, old, "k3").sum(), len(old))
            if "ref_logps" in kept[0].tokens:
                add("kl", (old - torch.cat([s.tokens["ref_logps"] for s in kept])).sum(), len(kept))
        if "returns" in kept[0].tokens:
            values, returns = (torch.cat([s.tokens[name] for s in kept]) for name in ("values", "returns"))
            one = torch.ones_like(values)
            for name, vector in (("values", values), ("returns", returns), ("errors", returns - values)):
                add(f"critic/{name}", vector.sum(), one.sum())
                add(f"critic/{name}_squared", (vector**2).sum(), one.sum())
        return sums

    def of_evaluation(self, samples: list[Sample]) -> Sums:
        return self._of_samples(samples)

    def _of_samples(self, samples: list[Sample]) -> Sums:
        device = self.args.device

        def column(values: list[float]) -> tuple[Tensor, Tensor]:
            vector = torch.tensor(values, device=device, dtype=sum_dtype(device))
            return vector.nan_to_num(0.0), (~vector.isnan()).to(vector)

        rewards = [sample.reward for sample in samples]
        sums = {"reward": column(rewards), "reward_squared": column([r * r for r in rewards])}
        for name in self._reward_names():
            each = [sample.each[name] for sample in samples]
            sums[f"rewards/{name}/mean"] = column(each)
            sums[f"rewards/{name}/squared"] = column([r * r for r in each])
        sums["completions/mean_length"] = column([float(len(sample)) for sample in samples])
        sums["completions/clipped_ratio"] = column([float(sample.truncated) for sample in samples])
        sums["completions/eos_ratio"] = column([float(not sample.truncated) for sample in samples])
        return sums

    def of_rewards(self, scored: Scored) -> None:
        """What the functions logged themselves, and how often each failed."""
        device = self.args.device
        found = {name: (value, 1) for name, value in scored.metrics.items()}
        if self.args.on_reward_error == "drop":
            found |= {f"rewards/{name}/failed": (n, len(scored.rewards)) for name, n in scored.failed.items()}
        for name, (total, count) in found.items():
            self.trainer.add_metrics({name: (torch.tensor(total, device=device), torch.tensor(count, device=device))})

    def _reward_names(self) -> list[str]:
        """The same on every process, whether it has samples or not."""
        own = [] if self.trainer.rewards is None else self.trainer.rewards.names
        return [*(["environment"] if self.trainer.roller.environment_factory is not None else []), *own]

    def of_step(
        self,
        batch: RolloutBatch,
        scores: Scores,
        before: Tensor,
        weight: Tensor,
        total: Tensor,
        critic: Tensor,
        objective: Objective,
    ) -> Sums:
        mask = batch.per_token["in_loss"].float()
        logps = scores.logps.detach()
        log_ratio = logps - before
        ratio, count = log_ratio.clamp(-20, 20).exp(), mask.sum()
        divisor = count.new_tensor(float(objective.count(batch.lengths)))
        sums: Sums = {
            "ratio/mean": ((ratio * mask).sum(), count),
            "approx_kl": ((kl_estimate(before, logps, "k3") * mask).sum(), count),
            "policy_loss": (total.detach() - self.args.vf_coef * critic.detach(), divisor),
        }
        if objective.clip is not None:
            low, high = objective.clip
            advantages = batch.per_token["advantages"]
            below, above = (ratio < 1 - low) & (advantages < 0), (ratio > 1 + high) & (advantages > 0)
            sums["clip_ratio/low"] = ((below * mask).sum(), count)
            sums["clip_ratio/high"] = ((above * mask).sum(), count)
        if "returns" in batch.per_token:
            sums["value_loss"] = (critic.detach(), divisor)
        if "old_logps" not in batch.per_token:
            sums["entropy"] = ((-logps * mask).sum(), count)
            sums["sampler_kl"] = ((kl_estimate(batch.per_token["sampler_logps"], logps, "k3") * mask).sum(), count)
            if "ref_logps" in batch.per_token:
                sums["kl"] = ((logps - batch.per_token["ref_logps"]).sum(), count.new_tensor(float(len(batch.lengths))))
        elif batch.is_first_step:
            self._keep_largest("ratio/first_deviation", ((ratio - 1).abs() * mask).max())
        self._keep_largest("ratio/max", (ratio * mask).max())
        kl = torch.stack(sums["approx_kl"])
        self._step_kl = kl if self._step_kl is None else self._step_kl + kl
        return sums

    def _keep_largest(self, name: str, value: Tensor) -> None:
        self._largest[name] = torch.maximum(self._largest[name], value) if name in self._largest else value

    def strayed(self, threshold: float | None) -> bool:
        """Whether the last step's KL(old, new) was above the threshold, on all processes together."""
        kl, self._step_kl = self._step_kl, None
        if threshold is None or kl is None:
            return False
        total, count = self.trainer.accelerator.reduce(kl.to(self.args.device)).tolist()
        return count > 0 and total / count > threshold

    # What is logged

    def maxima(self) -> dict[str, float]:
        found = {}
        for name, value in sorted(self._largest.items()):
            found[name] = float(self.trainer.accelerator.gather(value[None]).max())
        self._largest = {}
        return found

    def derive(self, values: dict[str, float]) -> dict[str, float]:
        """Deviations and explained variance, from means and mean squares."""
        known = dict(values)

        def variance(mean: str, square: str) -> float:
            return max(known.pop(square) - known[mean] ** 2, 0.0)

        if "reward_squared" in known:
            known["reward_std"] = math.sqrt(variance("reward", "reward_squared"))
        for name in [name for name in known if name.endswith("/squared")]:
            root = name.removesuffix("squared")
            known[f"{root}std"] = math.sqrt(variance(f"{root}mean", name))
        if "critic/returns" in known:
            spread, unexplained = (variance(f"critic/{x}", f"critic/{x}_squared") for x in ("returns", "errors"))
            known["critic/explained_variance"] = 1 - unexplained / spread if spread > 0 else math.nan
            del known["critic/errors"], known["critic/values_squared"]
        return known

    def line(self, logs: dict[str, float]) -> None:
        """After a line of the log: keep and print samples, and say what is off (each trouble once a run)."""
        half = self.trainer.accelerator.mixed_precision != "no" or self.trainer.policy.dtype in (
            torch.bfloat16,
            torch.float16,
        )
        if self._entropy is None:
            self._entropy = logs.get("entropy")
        troubles = diagnose(logs, self._entropy, half)
        if not self.trainer.is_world_process_zero():
            return
        for name in troubles.keys() - self._said:
            logger.warning("step %d: %s", self.trainer.state.global_step, troubles[name])
        self._said |= troubles.keys()
        samples = self._samples
        if self.args.log_unique_prompts:
            samples = list({sample.group: sample for sample in reversed(samples)}.values())[::-1]
        if self.args.log_completions and samples:
            self._keep_samples(samples)
        if self.args.num_completions_to_print != 0 and samples:
            self._print_samples(samples[: self.args.num_completions_to_print])

    def _keep_samples(self, samples: list[Sample]) -> None:
        file = Path(str(self.args.output_dir)) / "completions.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as out:
            for sample in samples:
                advantages = sample.tokens.get("advantages")
                entry = {
                    "step": self.trainer.state.global_step,
                    "prompt": sample.row.get("prompt"),
                    "completion": sample.completion,
                    "reward": _number(sample.reward),
                    "rewards": {name: _number(value) for name, value in sample.each.items()},
                    **sample.extra,
                    "advantage": None if advantages is None else _number(float(advantages.mean())),
                    "tokens": len(sample),
                    "truncated": sample.truncated,
                }
                out.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self._samples = []

    def _print_samples(self, samples: list[Sample]) -> None:
        table = Table("prompt", "completion", "reward", title=f"step {self.trainer.state.global_step}")
        for sample in samples:
            prompt: Any = sample.row.get("prompt", "")
            asked = prompt if isinstance(prompt, str) else str(prompt[-1].get("content")) if prompt else ""
            table.add_row(asked[:300], completion_text(sample.completion)[:600], f"{sample.reward:.3g}")
        Console().print(table, markup=False)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)
