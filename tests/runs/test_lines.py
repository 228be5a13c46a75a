"""A line of the log, as text."""

import math

import pytest

from rlhf.runs.lines import FIGURES, Pace, duration, figures_of, log_line, number, scientific, span, thousands

DPO = {
    "loss": 0.6922, "grad_norm": 0.1463, "learning_rate": 6.667e-5, "logps/chosen": -47.72, "logps/rejected": -34.79,
    "perplexity/chosen": 63.96, "rewards/accuracies": 0.6875, "rewards/chosen": 0.0001879, "rewards/margins": 0.001849,
    "rewards/rejected": -0.001662, "num_tokens": 5500, "epoch": 0.1852,
}  # fmt: skip
PACE = Pace(40, 104, tokens_per_second=1234.0, seconds_left=79.4)


def test_a_line_of_training_has_the_figures_of_its_trainer_first():
    line = log_line({"loss": 0.46, "perplexity": 1.584, "learning_rate": 2e-5}, FIGURES["SFTTrainer"], PACE)
    assert line.text() == "step  40/104 · loss 0.460 · ppl 1.584 · lr 2e-5 · 1.23k tok/s · 1:19 left"
    line = log_line(DPO, FIGURES["DPOTrainer"], PACE)
    assert line.text() == (
        "step  40/104 · loss 0.692 · accuracy 0.688 · margin 0.00185 · lr 6.7e-5 · 1.23k tok/s · 1:19 left"
    )


def test_a_narrow_terminal_gets_the_figures_and_not_what_its_bar_shows():
    line = log_line(DPO, FIGURES["DPOTrainer"], PACE)
    assert line.text(80) == "step  40/104 · loss 0.692 · accuracy 0.688 · margin 0.00185 · lr 6.7e-5"
    assert line.text(30) == "step  40/104 · loss 0.692"


def test_all_other_metrics_are_lines_below_that_break_between_two_of_them():
    line = log_line(DPO, FIGURES["DPOTrainer"], PACE)
    (whole,) = line.other_lines()
    assert whole == (
        "    grad_norm 0.146 · logps/chosen -47.72 · logps/rejected -34.79 · perplexity/chosen 63.96 · rewards/chosen "
        "1.9e-4 · rewards/rejected -0.00166"
    )
    lines = line.other_lines(80)
    assert [len(text) <= 80 for text in lines] == [True, True]
    assert " · ".join(text.strip() for text in lines) == whole.strip()


def test_an_evaluation_has_a_line_of_its_own_also_each_of_several():
    logs = {"eval_loss": 4.655, "eval_perplexity": 105.2, "eval_runtime": 0.0749, "eval_steps_per_second": 12.0}
    assert log_line(logs, FIGURES["SFTTrainer"], PACE).text() == (
        "eval  40/104 · loss 4.655 · ppl 105.2 · took 0.075 s"
    )
    logs = {"eval_two_words_reward": 0.5, "eval_two_words_rewards/length/mean": 0.5}
    line = log_line(logs, FIGURES["PPOTrainer"], PACE)
    assert line.text() == "eval two_words  40/104 · reward 0.500"
    assert line.others == {"rewards/length/mean": 0.5}


def test_the_summary_of_a_run_is_no_line_and_an_entry_of_somebody_else_is():
    assert log_line({"train_runtime": 1.5, "train_loss": 5.0}, FIGURES["SFTTrainer"], PACE) is None
    assert log_line({"epoch": 1.0, "note": "text"}, FIGURES["SFTTrainer"], PACE) is None
    line = log_line({"my_metric": 3, "epoch": 1.0}, FIGURES["SFTTrainer"], PACE)
    assert line.text() == "step  40/104 · my_metric 3.000 · 1.23k tok/s · 1:19 left"


def test_a_line_between_two_rollouts_has_its_loss():
    line = log_line({"loss": -0.25, "approx_kl": 0.1}, FIGURES["PPOTrainer"], Pace(2, 2))
    assert line.text() == "step 2/2 · loss -0.250" and line.others == {"approx_kl": 0.1}


def test_steps_that_were_skipped_are_on_the_line_and_the_last_step_has_no_time_left():
    line = log_line({"loss": math.nan, "nonfinite_steps": 2}, FIGURES["SFTTrainer"], Pace(7, 7, None, 0.0))
    assert line.text() == "step 7/7 · loss nan · 2 steps skipped"


def test_a_trainer_without_a_table_has_that_of_its_base_class():
    assert figures_of(["MyTrainer", "GRPOTrainer", "PPOTrainer", "BaseTrainer"]) == FIGURES["PPOTrainer"]
    assert figures_of(["MyTrainer"]) == {"loss": "loss", "perplexity": "ppl"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf"), (0.0, "0"), (1e-12, "1e-12"), (1.0142e304, "1e304"),
        (-0.00185, "-0.00185"), (0.05, "0.0500"), (0.99999, "1.00"), (4.6551, "4.655"), (52.3749, "52.37"),
        (999.96, "1000"), (12345.6, "12346"), (1.26e6, "1.3e6"),
    ],
)  # fmt: skip
def test_numbers_of_any_size_are_short(value, text):
    assert number(value) == text


def test_learning_rates_counts_and_times():
    assert [scientific(x) for x in (2e-5, 0.002819, 0.0, math.nan)] == ["2e-5", "2.8e-3", "0", "nan"]
    assert [thousands(x) for x in (0, 950, 1234, 99_960, 999_600, 34.5e6)] == [
        "0",
        "950",
        "1.23k",
        "100k",
        "1000k",
        "34.5M",
    ]
    assert [duration(x) for x in (0.4, 79.4, 3599.6, 7390, 273_600)] == [
        "0:00",
        "1:19",
        "1:00:00",
        "2:03:10",
        "3d 04:00",
    ]
    assert [span(x) for x in (0.0749, 9.4, 45.4, 59.6)] == ["0.075 s", "9.4 s", "45 s", "1:00"]
