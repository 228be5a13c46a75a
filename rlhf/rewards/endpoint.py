"""A reward that a server computes."""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.data.http_client import HttpClient, Reply, ServerError, Unavailable
from rlhf.data.messages import Turns

LARGEST_REPLY = 16 * 2**20  # bytes: a million numbers with all their digits


class HttpReward:
    """Ask a server: POST ``{"prompts": […], "completions": […], **columns}``, answered by ``{"rewards": […]}``.

    A reward is a number, or null where it does not apply. Token ids are not sent. A connection that fails, a status
    of 429 and those from 500 are tried again after 1, 2, 4, … seconds. A user, a password and a query in the address
    are used for requests, and shown nowhere.

    Args:
        url: http:// or https://.
        batch_size: completions in one request.
        timeout: seconds of silence after which a request is given up.
        retries: further tries of a request.
    """

    def __init__(self, url: str, *, batch_size: int = 64, timeout: float = 60.0, retries: int = 3) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.batch_size = batch_size
        # One client keeps its connections open over all rollouts.
        self._client = HttpClient(url, timeout=timeout, tries=retries + 1, largest_body=LARGEST_REPLY)
        self.url = self._client.address
        # The name in the log and in messages.
        self.__name__ = self.url.partition("://")[2]

    def check(self, row: Mapping[str, Any]) -> None:
        """Ask for the rewards of no completions, to see that a reward server answers.

        Args:
            row: a row of the data, which is not sent.
        Raises:
            ConnectionError: the server does not answer.
            ValueError: it answers, and not as a reward server does.
        """
        payload: dict[str, Any] = {"prompts": [], "completions": []}
        try:
            reply = self._client.request("POST", "", payload, repeats_errors=False, tries=1)
        except ConnectionError as error:
            if isinstance(error, Unavailable) and error.has_replied:
                return  # it is busy now; requests for rewards are repeated
            raise ConnectionError(f"{self.url}: the reward server {error}") from error
        # These do not depend on what was sent, so that they would come for every batch.
        if reply.status in (401, 403, 404, 405):
            raise ValueError(f"{self.url}: the reward server answers {_status(reply)}; check the address")
        if reply.is_success:  # else it may only dislike an empty batch
            self._rewards(reply, 0)

    def __call__(
        self,
        prompts: Sequence[Turns],
        completions: Sequence[Turns],
        completion_ids: Any = None,
        trainer_state: Any = None,
        log_extra: Any = None,
        log_metric: Any = None,
        **columns: Sequence[Any],
    ) -> list[float | None]:
        """Ask the server for the reward of each completion.

        Args:
            prompts: texts, or lists of messages.
            completions: texts, or lists of messages, one for each prompt.
            completion_ids: not sent.
            trainer_state: not sent.
            log_extra: not used.
            log_metric: not used.
            columns: of the data; sent under their names.
        Returns:
            One reward for each completion; None where it does not apply.
        Raises:
            ConnectionError: the server does not answer, or cannot, after all tries.
            ValueError: it refuses the request, or its answer is not as agreed.
        """
        # A column of the data may be called `prompts` too: the server gets ours.
        named_columns = {**columns, "prompts": prompts, "completions": completions}
        rewards: list[float | None] = []
        for start in range(0, len(prompts), self.batch_size):
            batch = slice(start, start + self.batch_size)
            payload = {name: list(column[batch]) for name, column in named_columns.items()}
            rewards += self._rewards(self._ask(payload), len(payload["prompts"]))
        return rewards

    def _ask(self, payload: dict[str, Any]) -> Reply:
        try:
            return self._client.request("POST", "", payload)
        except ConnectionError as error:
            raise ConnectionError(f"{self.url}: the reward server {error}, {self._client.tries} tries") from error
        except ValueError as error:
            raise ValueError(f"{self.url}: a column cannot be sent as JSON ({error.__cause__})") from error

    def _rewards(self, reply: Reply, count: int) -> list[float | None]:
        if not reply.is_success:
            raise ValueError(f"{self.url}: the reward server answers {_status(reply)}")
        try:
            rewards = reply.json()["rewards"]
        except (ServerError, KeyError, TypeError):
            rewards = None
        if not isinstance(rewards, list):
            raise ValueError(f'{self.url}: expected {{"rewards": […]}}, got {reply.excerpt!r}')
        # A shorter list would give rewards to the wrong completions.
        if len(rewards) != count:
            raise ValueError(f"{self.url}: {len(rewards)} rewards for {count} completions")
        return rewards


def _status(reply: Reply) -> str:
    return f"{reply.status} {reply.reason} {reply.excerpt!r}"
