"""Audits of data files; answers, calibration, cost and comparison of models. (Trainers compute perplexity.)"""

from rlhf.evaluation.audit import Audit, audit, command_for
from rlhf.evaluation.audit_page import audit_page
from rlhf.evaluation.audit_tables import show_audit
from rlhf.evaluation.calibration import calibration_bins, calibration_error
from rlhf.evaluation.completions import complete, prompts_of
from rlhf.evaluation.cost import model_size, model_speed, tokens_per_second
from rlhf.evaluation.length_control import length_controlled_win_rate
from rlhf.evaluation.statistics import Estimate, mean_ratio, prompts_needed, share_difference, sign_test, win_rate
from rlhf.evaluation.tables import show_completions, show_metrics

__all__ = [
    "Audit",
    "Estimate",
    "audit",
    "audit_page",
    "calibration_bins",
    "calibration_error",
    "command_for",
    "complete",
    "length_controlled_win_rate",
    "mean_ratio",
    "model_size",
    "model_speed",
    "prompts_needed",
    "prompts_of",
    "share_difference",
    "show_audit",
    "show_completions",
    "show_metrics",
    "sign_test",
    "tokens_per_second",
    "win_rate",
]
