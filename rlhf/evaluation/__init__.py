"""Answers, figures, calibration, cost. (Corpus perplexity and accuracies come from the trainers' ``evaluate``.)"""

from rlhf.evaluation.calibration import calibration_bins, calibration_error
from rlhf.evaluation.completions import complete, prompts_of
from rlhf.evaluation.cost import model_size, model_speed, tokens_per_second
from rlhf.evaluation.tables import show_completions, show_metrics

__all__ = [
    "calibration_bins",
    "calibration_error",
    "complete",
    "model_size",
    "model_speed",
    "prompts_of",
    "show_completions",
    "show_metrics",
    "tokens_per_second",
]
