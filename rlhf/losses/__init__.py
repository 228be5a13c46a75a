"""Every loss as a pure function of tensors; needs torch alone.

One private file a family, re-exported here. Signature order: predictions, targets or old values, keyword
hyper-parameters, ``reduction``, ``weight``, ``mask``.
"""

from rlhf.losses._anchored import kto_loss
from rlhf.losses._checks import checks
from rlhf.losses._classification import (
    bce_loss,
    bce_with_logits_loss,
    categorical_cross_entropy,
    class_weights,
    cross_entropy_loss,
    focal_loss,
    hinge_loss,
    label_smoothing_loss,
    modified_huber_loss,
    multiclass_focal_loss,
    nll_loss,
    poly1_loss,
)
from rlhf.losses._divergences import (
    alpha_divergence,
    distillation_loss,
    generalized_jsd,
    jensen_shannon,
    kl_divergence,
    skew_kl,
    top_k_kl,
    total_variation,
)
from rlhf.losses._language import (
    bits_per_byte,
    causal_lm_loss,
    dft_loss,
    perplexity,
    sequence_logps,
    shift,
    token_logps,
    unlikelihood_loss,
)
from rlhf.losses._preference import PREFERENCE_LOSSES, arguments_of, dpo_loss
from rlhf.losses._regression import (
    epsilon_insensitive_loss,
    huber_loss,
    log_cosh_loss,
    mae_loss,
    mse_loss,
    quantile_loss,
    smooth_l1_loss,
)
from rlhf.losses._representation import (
    batch_triplet_loss,
    cosine_embedding_loss,
    info_nce_loss,
    siglip_loss,
    supervised_contrastive_loss,
    triplet_loss,
)
from rlhf.losses._rewards import plackett_luce_loss, reward_loss

__all__ = [
    "PREFERENCE_LOSSES",
    "alpha_divergence",
    "arguments_of",
    "batch_triplet_loss",
    "bce_loss",
    "bce_with_logits_loss",
    "bits_per_byte",
    "categorical_cross_entropy",
    "causal_lm_loss",
    "checks",
    "class_weights",
    "cosine_embedding_loss",
    "cross_entropy_loss",
    "dft_loss",
    "distillation_loss",
    "dpo_loss",
    "epsilon_insensitive_loss",
    "focal_loss",
    "generalized_jsd",
    "hinge_loss",
    "huber_loss",
    "info_nce_loss",
    "jensen_shannon",
    "kl_divergence",
    "kto_loss",
    "label_smoothing_loss",
    "log_cosh_loss",
    "mae_loss",
    "modified_huber_loss",
    "mse_loss",
    "multiclass_focal_loss",
    "nll_loss",
    "perplexity",
    "plackett_luce_loss",
    "poly1_loss",
    "quantile_loss",
    "reward_loss",
    "sequence_logps",
    "shift",
    "siglip_loss",
    "skew_kl",
    "smooth_l1_loss",
    "supervised_contrastive_loss",
    "token_logps",
    "top_k_kl",
    "total_variation",
    "triplet_loss",
    "unlikelihood_loss",
]
