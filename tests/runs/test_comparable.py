"""Which figures compare across a sweep."""

from pathlib import Path

from rlhf.runs.comparable import comparable_metrics, last_figures, lower_is_better, scaled_by
from rlhf.runs.figures import Figures
from rlhf.runs.files import Run
from rlhf.runs.report_tables import final_figures


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


def test_the_report_marks_no_best_of_what_does_not_compare():
    def figures(beta, accuracy):
        line = {"step": 1, "eval_rewards/margins": 9 * beta, "eval_rewards/accuracies": accuracy}
        return Figures(Run(Path(f"beta={beta}"), {"beta": beta}, {}, [line], [], []))

    table = final_figures([figures(0.1, 0.7), figures(0.2, 0.6)])
    best = [(table.rows[row][0], column) for row, column in table.marked]
    assert best == [("preference accuracy (share)", 1)] and len(table.rows) == 2  # of two margins none
