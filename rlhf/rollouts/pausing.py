"""Pausing a completion server, so that it takes new weights while requests are under way."""

import logging
from typing import Any

from rlhf.rollouts.server_calls import NOT_OFFERED, ServerCalls

logger = logging.getLogger(__name__)

Call = tuple[str, dict[str, Any]]  # path and body of a POST request

# vLLM, then SGLang. Requests that are under way keep their tokens. Their keys and values are computed again from the
# new weights, because the cache is emptied too.
PAUSE: tuple[Call, ...] = (("/pause?mode=keep&clear_cache=true", {}), ("/pause_generation", {"mode": "retract"}))
RESUME: tuple[Call, ...] = (("/resume", {}), ("/continue_generation", {}))


def can_pause(calls: ServerCalls) -> bool:
    """Whether a server can be paused.

    Args:
        calls: to the server.
    Returns:
        False where the server has no such path (vLLM in dev mode and SGLang have one).
    """
    # Resuming a server that is not paused changes nothing.
    return calls.first_offered(*RESUME) is not None


def pause(calls: ServerCalls) -> None:
    """Let requests wait, also those that are under way.

    Args:
        calls: to the server.
    """
    calls.first_offered(*PAUSE)


def resume(calls: ServerCalls) -> None:
    """Undo :func:`pause`.

    Args:
        calls: to the server.
    """
    calls.first_offered(*RESUME)


def resume_if_paused(calls: ServerCalls) -> None:
    """Resume a server that someone else left paused: its completions would never come. Only vLLM tells.

    Args:
        calls: to the server.
    """
    reply = calls.request("GET", "/is_paused", may_be_missing=True)
    if reply.status not in NOT_OFFERED and reply.json().get("is_paused"):
        logger.warning("%s is paused: resuming it", calls.url)
        calls.first_offered(*RESUME)
