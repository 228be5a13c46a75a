"""Sampling completions from a policy: one protocol, an engine in this process, and one that talks to a server."""

from rlhf.data.http_client import ServerError
from rlhf.rollouts.engine import Completion, RolloutEngine, Sampling
from rlhf.rollouts.environment import Environment, Episode, Reply, play
from rlhf.rollouts.local import LocalEngine
from rlhf.rollouts.server import ServerEngine

__all__ = [
    "Completion",
    "Environment",
    "Episode",
    "LocalEngine",
    "Reply",
    "RolloutEngine",
    "Sampling",
    "ServerEngine",
    "ServerError",
    "play",
]
