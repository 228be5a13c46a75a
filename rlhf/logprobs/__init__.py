"""Log-probabilities of the tokens that count: targets, the head as data, the bridge to Hugging Face models."""

from rlhf.logprobs.aligned import compare_sorted
from rlhf.logprobs.bridge import model_predictions, model_scores
from rlhf.logprobs.chunks import Plan, plan
from rlhf.logprobs.divergence import Divergence, Predictions, compare
from rlhf.logprobs.head import Head, HeadSettings, head_settings, read_head, verified_settings
from rlhf.logprobs.score import Comparison, LocalLoss, Scores, score
from rlhf.logprobs.targets import Targets
from rlhf.logprobs.topk import TopK, TopKScores, model_top_k, model_top_k_divergence, top_k, top_k_divergence
from rlhf.losses import perplexity, sequence_logps, shift, token_logps

__all__ = [
    "Comparison",
    "Divergence",
    "Head",
    "HeadSettings",
    "LocalLoss",
    "Plan",
    "Predictions",
    "Scores",
    "Targets",
    "TopK",
    "TopKScores",
    "compare",
    "compare_sorted",
    "head_settings",
    "model_predictions",
    "model_scores",
    "model_top_k",
    "model_top_k_divergence",
    "plan",
    "perplexity",
    "read_head",
    "score",
    "sequence_logps",
    "shift",
    "token_logps",
    "top_k",
    "top_k_divergence",
    "verified_settings",
]
