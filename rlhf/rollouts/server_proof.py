"""Whether an engine samples from the weights it was sent: its log-probs of one completion against the trainer's."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from rlhf.data import Collator
from rlhf.data.batch import IGNORE
from rlhf.data.http_client import ServerError
from rlhf.models import Policy
from rlhf.rollouts.colocated import ColocatedEngine
from rlhf.rollouts.engine import Sampling
from rlhf.rollouts.server import ServerEngine
from rlhf.rollouts.server_weights import WRONG_MODEL_HINT

# Nats a token, in the mean. Measured on SmolLM2-135M over 16 tokens: up to 0.06 for a server in bfloat16 and 0.08 for
# weights in 8 bits; 0.2 to 0.45 for one tensor of zeros among 272 (median; 0.14 to 1.0 over tensors and completions).
LARGEST_GAP = 0.2
# At temperature 1, where every server reports the same log-probs. Few tokens, because each update waits for them.
PROBE = Sampling(max_tokens=16)


def check_served_weights(
    engine: ServerEngine | ColocatedEngine,
    policy: Policy,
    trained_model: nn.Module,
    accelerator: Accelerator,
    prompt_ids: Sequence[int],
) -> None:
    """Have an engine complete one prompt, and compare its log-probs with those of the policy.

    Args:
        engine: a server, or vLLM in this process; the first process alone asks it.
        policy: the policy itself.
        trained_model: what accelerate made of it; all processes run it.
        accelerator: of the run.
        prompt_ids: of the prompt.
    Raises:
        ServerError: they are too far apart, so that the server has other weights.
    """
    answer: list[tuple[list[int], list[float]] | None] = [None]
    if accelerator.is_main_process:
        ((completion,),) = engine.generate([prompt_ids], 1, PROBE, seed=engine.version)
        answer = [(completion.ids, completion.logps)]
    broadcast_object_list(answer)
    assert answer[0] is not None
    ids, served_logps = answer[0]
    logps = _policy_logps(policy, trained_model, accelerator, prompt_ids, ids)
    gap = sum(abs(ours - theirs) for ours, theirs in zip(logps, served_logps, strict=True)) / len(ids)
    # Not `>`: NaN is no proof.
    if not gap <= LARGEST_GAP:
        place = engine.url if isinstance(engine, ServerEngine) else "vLLM in this process"
        raise ServerError(
            f"{place}: after the update its log-probs differ from the policy's by {gap:.2g} nats a token "
            f"(the first: {served_logps[0]:.4f} there, {logps[0]:.4f} here); it has other weights, or another model: "
            f"{WRONG_MODEL_HINT}"
        )


def _policy_logps(
    policy: Policy, trained_model: nn.Module, accelerator: Accelerator, prompt_ids: Sequence[int], ids: Sequence[int]
) -> list[float]:
    """Log-probs of a completion at temperature 1, without dropout."""
    row = {"input_ids": [*prompt_ids, *ids], "labels": [IGNORE] * len(prompt_ids) + list(ids)}
    batch = Collator()([row]).to(accelerator.device)
    temperature, was_training = policy.temperature, trained_model.training
    policy.temperature = PROBE.temperature
    trained_model.eval()
    try:
        with torch.no_grad(), accelerator.autocast():
            logps: list[float] = trained_model(batch).logps.float().tolist()
    finally:
        policy.temperature = temperature
        trained_model.train(was_training)
    return logps
