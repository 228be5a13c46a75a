"""Which figures compare across a sweep."""

from rlhf.runs.comparable import comparable_metrics, last_figures, lower_is_better, scaled_by


def test_margins_grow_with_beta_and_log_ratios_do_not():
    assert scaled_by("eval_rewards/margins", ["beta", "learning_rate"]) == ["beta"]
    assert scaled_by("log_ratios/margins", ["beta"]) == scaled_by("rewards/margins", ["learning_rate"]) == []
    assert scaled_by("rewards/accuracies", ["beta", "loss_type"]) == []
    run = {"eval_loss": 1.0, "eval_rewards/accuracies": 0.7, "eval_log_ratios/margins": 2.0, "loss": 1.0}
    assert comparable_metrics([run, run], ["beta"]) == ["eval_rewards/accuracies", "eval_log_ratios/margins"]
    assert comparable_metrics([run, {"loss": 2.0}], ["learning_rate"]) == ["loss"]


def test_directions_and_last_values():
    assert lower_is_better("eval_perplexity") and lower_is_better("eval_kl") and not lower_is_better("reward")
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "note": "x"}, {"train_runtime": 3.0, "loss": 9.0}]
    assert last_figures(lines) == {"step": 2, "loss": 1.0}
