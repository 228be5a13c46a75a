"""Every loss as a pure function of tensors; needs torch alone.

One private file a family (language models, preferences; the rest of the catalogue joins them), re-exported here.
Signature order: predictions, targets or old values, keyword hyper-parameters, ``reduction``, ``weight``, ``mask``.
"""

from rlhf.losses._checks import checks
from rlhf.losses._language import causal_lm_loss, perplexity, sequence_logps, shift, token_logps
from rlhf.losses._preference import PREFERENCE_LOSSES, dpo_loss, hinge_loss, ipo_loss, sigmoid_loss

__all__ = [
    "PREFERENCE_LOSSES",
    "causal_lm_loss",
    "checks",
    "dpo_loss",
    "hinge_loss",
    "ipo_loss",
    "perplexity",
    "sequence_logps",
    "shift",
    "sigmoid_loss",
    "token_logps",
]
