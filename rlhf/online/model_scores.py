"""What models make of new samples, before training: old log-probs, the reference's log-probs, the critic's values."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rlhf.online.samples import Sample, collate_samples
from rlhf.trainers.reference import Reference


def add_model_scores(
    micro_batches: Sequence[list[Sample]],
    model: nn.Module,
    collate: Any,
    accelerator: Accelerator,
    *,
    reference: Reference | None,
    old_logps: bool,
    entropy: bool,
) -> None:
    """Give samples the token vectors ``old_logps``, ``entropy``, ``values`` and ``ref_logps``, as far as needed.

    They are computed in the batches of training, so that the first ratio is exactly 1.

    Args:
        micro_batches: those of training.
        model: the policy as accelerate wraps it.
        collate: as in training.
        accelerator: of the run.
        reference: None without one.
        old_logps: whether log-probs before the first step are needed, and the critic's values with them.
        entropy: whether the entropy of each token is needed.
    """
    # A rollout of one step takes its old log-probs from the training pass.
    if reference is None and not old_logps:
        return
    # Without dropout: these are the numbers that training's ratios are compared with.
    was_training = model.training
    model.eval()
    for samples in micro_batches:
        batch = collate_samples(samples, collate).to(accelerator.device)
        vectors: dict[str, Tensor | None] = {}
        with torch.no_grad(), accelerator.autocast():
            if old_logps:
                scores = model(batch, entropy=entropy)
                vectors = {"old_logps": scores.logps, "entropy": scores.entropy, "values": scores.values}
            if reference is not None:
                vectors["ref_logps"] = reference.logps(model, batch)
        lengths = [len(sample) for sample in samples]
        for name, vector in vectors.items():
            if vector is None:
                continue
            # On the host, where samples are gathered over processes and saved in checkpoints.
            for sample, sample_vector in zip(samples, vector.cpu().split(lengths), strict=True):
                sample.tokens[name] = sample_vector
    model.train(was_training)
