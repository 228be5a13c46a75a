"""Whether an engine samples from the weights it was sent: its log-probs of one completion against the trainer's."""

from collections.abc import Sequence
from multiprocessing.pool import ThreadPool

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

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
    engines: Sequence[ServerEngine | ColocatedEngine],
    policy: Policy,
    trained_model: nn.Module,
    accelerator: Accelerator,
    prompt_ids: Sequence[int],
) -> None:
    """Have each engine complete one prompt, and compare its log-probs with those of the policy.

    Args:
        engines: servers, or vLLM in this process; the first process alone asks them, all at the same time.
        policy: the policy itself.
        trained_model: what accelerate made of it; all processes run it, once.
        accelerator: of the run.
        prompt_ids: of the prompt.
    Raises:
        ServerError: log-probs are too far apart, so that an engine has other weights.
    """
    answers: list[list[tuple[list[int], list[float]]]] = [[]]
    if accelerator.is_main_process:

        def answer(engine: ServerEngine | ColocatedEngine) -> tuple[list[int], list[float]]:
            ((completion,),) = engine.generate([prompt_ids], 1, PROBE, seed=engine.version)
            return completion.ids, completion.logps

        with ThreadPool(len(engines)) as pool:
            answers[0] = pool.map(answer, engines)
    broadcast_object_list(answers)
    ids_of_answers = [ids for ids, _ in answers[0]]
    logps_of_answers = _policy_logps(policy, trained_model, accelerator, prompt_ids, ids_of_answers)
    for engine, (_, served_logps), logps in zip(engines, answers[0], logps_of_answers, strict=True):
        gaps = [abs(ours - theirs) for ours, theirs in zip(logps, served_logps, strict=True)]
        gap = sum(gaps) / len(gaps)
        # Not `>`: NaN is no proof.
        if not gap <= LARGEST_GAP:
            place = engine.url if isinstance(engine, ServerEngine) else "vLLM in this process"
            raise ServerError(
                f"{place}: after the update its log-probs differ from the policy's by {gap:.2g} nats a token "
                f"(the first: {served_logps[0]:.4f} there, {logps[0]:.4f} here); it has other weights, or another "
                f"model: {WRONG_MODEL_HINT}"
            )


def _policy_logps(
    policy: Policy,
    trained_model: nn.Module,
    accelerator: Accelerator,
    prompt_ids: Sequence[int],
    ids_of_answers: Sequence[list[int]],
) -> list[list[float]]:
    """Log-probs of completions of one prompt at temperature 1, without dropout."""
    labels = [[IGNORE] * len(prompt_ids) + ids for ids in ids_of_answers]
    rows = [{"input_ids": [*prompt_ids, *ids], "labels": row} for ids, row in zip(ids_of_answers, labels, strict=True)]
    batch = Collator()(rows).to(accelerator.device)
    temperature, was_training = policy.temperature, trained_model.training
    policy.temperature = PROBE.temperature
    trained_model.eval()
    try:
        with torch.no_grad(), accelerator.autocast():
            logps: Tensor = trained_model(batch).logps.float().cpu()
    finally:
        policy.temperature = temperature
        trained_model.train(was_training)
    return [part.tolist() for part in logps.split([len(ids) for ids in ids_of_answers])]
