"""What a model is worth: answers side by side, tables. (Corpus perplexity and accuracies: the trainers' ``evaluate``.)"""

from rlhf.evaluation.completions import complete, prompts_of
from rlhf.evaluation.tables import show_completions, show_metrics

__all__ = ["complete", "prompts_of", "show_completions", "show_metrics"]
