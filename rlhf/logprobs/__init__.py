"""Log-probabilities of the tokens that count: targets, the head as data, and the bridge to Hugging Face models."""

from rlhf.logprobs.bridge import model_scores
from rlhf.logprobs.head import Head, HeadSettings, head_settings, read_head, verified_settings
from rlhf.logprobs.score import LocalLoss, Plan, Scores, plan, score
from rlhf.logprobs.targets import Targets
from rlhf.logprobs.topk import TopK, TopKScores, model_top_k, model_top_k_divergence, top_k, top_k_divergence
from rlhf.losses import perplexity, sequence_logps, shift, token_logps

__all__ = [
    "Head",
    "HeadSettings",
    "LocalLoss",
    "Plan",
    "Scores",
    "Targets",
    "TopK",
    "TopKScores",
    "head_settings",
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
