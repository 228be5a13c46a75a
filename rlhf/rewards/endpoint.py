"""A reward that a server computes."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx2

from rlhf.data.messages import Turns


class HttpReward:
    """Ask a server: POST ``{"prompts": […], "completions": […], **columns}``, answered by ``{"rewards": […]}``.

    A reward is a number, or null where it does not apply. Token ids are not sent. A connection that fails, a status
    of 429 and those from 500 are tried again after 1, 2, 4, … seconds.

    Args:
        url: http:// or https://.
        batch_size: completions in one request.
        timeout: seconds of silence after which a request is given up.
        retries: further tries of a request.
    """

    def __init__(self, url: str, *, batch_size: int = 64, timeout: float = 60.0, retries: int = 3) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.url = url
        self.batch_size = batch_size
        self.retries = retries
        # The name in the log and in messages.
        self.__name__ = url.partition("://")[2]
        try:
            host = httpx2.URL(url).host
        except httpx2.InvalidURL as error:
            raise ValueError(f"{url}: no address ({error})") from error
        if not host:
            raise ValueError(f"{url}: no address (no host in it)")
        # One client keeps its connections open over all rollouts.
        self._client = httpx2.Client(timeout=timeout)

    def check(self, row: Mapping[str, Any]) -> None:
        """Ask for the rewards of no completions, to see that a reward server answers.

        Args:
            row: a row of the data, which is not sent.
        Raises:
            ConnectionError: the server does not answer.
            ValueError: it answers, and not as a reward server does.
        """
        try:
            response = self._client.post(self.url, json={"prompts": [], "completions": []})
        except httpx2.TransportError as error:
            raise ConnectionError(f"{self.url}: the reward server does not answer ({_describe(error)})") from error
        # These do not depend on what was sent, so that they would come for every batch.
        if response.status_code in (401, 403, 404, 405):
            raise ValueError(f"{self.url}: the reward server answers {_status(response)}; check the address")
        if response.is_success:  # else it may only dislike an empty batch
            self._rewards(response, 0)

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
            rewards += self._rewards(self._post(payload), len(payload["prompts"]))
        return rewards

    def _post(self, payload: dict[str, Any]) -> httpx2.Response:
        try:
            request = self._client.build_request("POST", self.url, json=payload)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.url}: a column cannot be sent as JSON ({error})") from error
        for attempt in range(self.retries + 1):
            if attempt:
                # 1, 2, 4, … seconds: a server that is restarting or overloaded gets time to recover.
                time.sleep(min(2.0 ** (attempt - 1), 30.0))
            try:
                response = self._client.send(request)
            except httpx2.TransportError as error:
                problem = f"does not answer ({_describe(error)})"
                continue
            # Of other errors below 500 the request is the cause: the same request would fail again.
            is_overloaded = response.status_code == 429
            if not is_overloaded and response.status_code < 500:
                return response
            problem = f"answers {_status(response)}"
        raise ConnectionError(f"{self.url}: the reward server {problem}, {self.retries + 1} tries")

    def _rewards(self, response: httpx2.Response, count: int) -> list[float | None]:
        if not response.is_success:
            raise ValueError(f"{self.url}: the reward server answers {_status(response)}")
        try:
            rewards = response.json()["rewards"]
        except (ValueError, KeyError, TypeError):
            rewards = None
        if not isinstance(rewards, list):
            raise ValueError(f'{self.url}: expected {{"rewards": […]}}, got {response.text[:200]!r}')
        # A shorter list would give rewards to the wrong completions.
        if len(rewards) != count:
            raise ValueError(f"{self.url}: {len(rewards)} rewards for {count} completions")
        return rewards


def _status(response: httpx2.Response) -> str:
    return f"{response.status_code} {response.reason_phrase} {response.text[:200]!r}"


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
