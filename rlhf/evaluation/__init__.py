"""Answers, figures and calibration. (Corpus perplexity and accuracies come from the trainers' ``evaluate``.)"""

from rlhf.evaluation.calibration import calibration_bins, calibration_error
from rlhf.evaluation.completions import complete, prompts_of
from rlhf.evaluation.tables import show_completions, show_metrics

__all__ = ["calibration_bins", "calibration_error", "complete", "prompts_of", "show_completions", "show_metrics"]
