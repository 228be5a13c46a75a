"""Audits of data files; answers, calibration and cost of models. (Trainers compute perplexity and accuracies.)"""

from rlhf.evaluation.audit import Audit, audit, command_for
from rlhf.evaluation.audit_page import audit_page
from rlhf.evaluation.audit_tables import show_audit
from rlhf.evaluation.calibration import calibration_bins, calibration_error
from rlhf.evaluation.completions import complete, prompts_of
from rlhf.evaluation.cost import model_size, model_speed, tokens_per_second
from rlhf.evaluation.tables import show_completions, show_metrics

__all__ = [
    "Audit",
    "audit",
    "audit_page",
    "calibration_bins",
    "calibration_error",
    "command_for",
    "complete",
    "model_size",
    "model_speed",
    "prompts_of",
    "show_audit",
    "show_completions",
    "show_metrics",
    "tokens_per_second",
]
