"""Answers and figures side by side. (Corpus perplexity and accuracies come from the trainers' ``evaluate``.)"""

from rlhf.evaluation.completions import complete, prompts_of
from rlhf.evaluation.tables import show_completions, show_metrics

__all__ = ["complete", "prompts_of", "show_completions", "show_metrics"]
