"""What is asked of a completion server: paths that it may not have, and numbers that must be log-probs."""

import math
from collections.abc import Sequence
from typing import Any

from rlhf.data.http_client import HttpClient, Reply, ServerError, Unavailable

NOT_OFFERED = (404, 405)  # HTTP status of a path that a server does not have
# The log-prob of a certain token may be above 0 by rounding: 1e-4 for logits of 1000 in float32.
LARGEST_LOGP = 1e-3


class ServerCalls:
    """Requests to one server, whose failures are errors of one line.

    Args:
        client: of the server.
    """

    def __init__(self, client: HttpClient) -> None:
        self.client = client
        self.url = client.address

    def wait_until_ready(self, path: str, seconds: float) -> Reply:
        """Ask a server that may still be loading.

        Args:
            path: which it answers once it is ready.
            seconds: to wait at most.
        Returns:
            The reply.
        Raises:
            ConnectionError: no server answers.
            ServerError: it refuses the request.
        """
        try:
            reply = self.client.wait_until_ready(path, seconds)
        except ConnectionError as error:
            raise ConnectionError(f"{self.url} {error}; start the server, or check the address") from error
        return self._checked(reply)

    def request(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        may_be_missing: bool = False,
        repeats_errors: bool = True,
        tries: int | None = None,
    ) -> Reply:
        """Ask the server.

        Args:
            method: GET or POST.
            path: from the root of the server.
            body: sent as JSON.
            may_be_missing: whether to return the reply of a server that has no such path.
            repeats_errors: whether a status of 500 is repeated: not where the request may be its cause.
            tries: of this request; None for the client's.
        Returns:
            The reply.
        Raises:
            ConnectionError: the server is gone.
            ServerError: it refuses the request, or cannot answer.
        """
        try:
            reply = self.client.request(method, path, body, repeats_errors=repeats_errors, tries=tries)
        except Unavailable as error:
            raise ConnectionError(
                f"{self.url}{path}: the server {error}, {tries or self.client.tries} tries"
            ) from error
        return self._checked(reply, may_be_missing)

    def first_offered(self, *calls: tuple[str, dict[str, Any]]) -> Reply | None:
        """The reply to the first of some POST requests that the server has.

        Args:
            calls: path and body of each.
        Returns:
            The reply; None if the server has none of these paths.
        """
        for path, body in calls:
            reply = self.request("POST", path, body, may_be_missing=True, repeats_errors=False)
            if reply.status not in NOT_OFFERED:
                return reply
        return None

    def _checked(self, reply: Reply, may_be_missing: bool = False) -> Reply:
        if reply.is_success or (may_be_missing and reply.status in NOT_OFFERED):
            return reply
        raise ServerError(f"{reply.address} answered {reply.status}: {reply.excerpt}")


def check_logps(logps: Sequence[Any], url: str, what: str) -> None:
    """Refuse numbers that cannot be log-probs, before they spread into a loss.

    Args:
        logps: one for each token.
        url: of the server, for the message.
        what: they are log-probs of, for the message: ``"token"`` is followed by its position.
    Raises:
        ServerError: names the first that is no finite number of at most 0.
    """
    for position, logp in enumerate(logps):
        is_number = isinstance(logp, float | int) and math.isfinite(logp)
        if not is_number or logp > LARGEST_LOGP:
            raise ServerError(f"{url}: the log-prob of {what} {position} of {len(logps)} is {logp}, expected at most 0")
