"""Log-probabilities of the tokens that count: targets, the head as data, the bridge to Hugging Face models."""

from rlhf.logprobs.bridge import model_predictions, model_scores
from rlhf.logprobs.chunk_plan import ChunkPlan, plan_chunks
from rlhf.logprobs.chunk_scores import ChunkPredictions
from rlhf.logprobs.chunks import ChunkResult, Step
from rlhf.logprobs.divergence import Divergence, TeacherDivergence, compare
from rlhf.logprobs.head import Head, HeadSettings, Predictions, head_settings, read_head, verified_settings
from rlhf.logprobs.objective import Comparison, HeadObjective, Scores, TokenLoss
from rlhf.logprobs.score import score, score_predictions
from rlhf.logprobs.sorted_comparison import SortedComparison, compare_sorted
from rlhf.logprobs.targets import Targets
from rlhf.logprobs.topk import (
    TopK,
    TopKDivergence,
    TopKScores,
    model_top_k,
    model_top_k_divergence,
    top_k,
    top_k_divergence,
)
from rlhf.losses import perplexity, sequence_logps, shift, token_logps

__all__ = [
    "ChunkPlan",
    "ChunkPredictions",
    "ChunkResult",
    "Comparison",
    "Divergence",
    "Head",
    "HeadObjective",
    "HeadSettings",
    "Predictions",
    "Scores",
    "SortedComparison",
    "Step",
    "Targets",
    "TeacherDivergence",
    "TokenLoss",
    "TopK",
    "TopKDivergence",
    "TopKScores",
    "compare",
    "compare_sorted",
    "head_settings",
    "model_predictions",
    "model_scores",
    "model_top_k",
    "model_top_k_divergence",
    "perplexity",
    "plan_chunks",
    "read_head",
    "score",
    "score_predictions",
    "sequence_logps",
    "shift",
    "token_logps",
    "top_k",
    "top_k_divergence",
    "verified_settings",
]
