"""A client of an HTTP server: it repeats requests, bounds what it reads, and shows addresses without their secrets."""

import json
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_attempt,
    stop_after_delay,
    stop_when_event_set,
    wait_exponential,
    wait_fixed,
    wait_random,
)

from rlhf.data.open_sockets import OpenSockets
from rlhf.data.proxies import is_loopback, proxy_of

logger = logging.getLogger(__name__)

# The server had a fault that may pass; the same request may succeed later.
BUSY = (429, 502, 503, 504)
SECONDS_BETWEEN_WARNINGS = 30.0
SECONDS_BETWEEN_LOOKS = 2.0  # at a server that is still loading
_ADDRESS = re.compile(
    r"(?P<scheme>https?://)"
    r"(?:[^\s'\"/?#]*@)?"  # user:password@
    r"(?P<place>[^\s'\"?#]*)"  # host, port and path
    r"(?:[?#][^\s'\")]*)?",  # a query may hold a token
    re.IGNORECASE,
)


class ServerError(OSError):
    """A server replied, but not as it must; an ``OSError``, which commands report in one line."""


class Cancelled(OSError):
    """This process has ended its own requests; see :meth:`HttpClient.cancelled`."""


class Unavailable(ConnectionError):
    """No reply, or one that says that the server cannot answer now.

    Args:
        problem: what the server does, as the end of a sentence.
        has_replied: whether there was a reply.
    """

    def __init__(self, problem: str, has_replied: bool = False) -> None:
        super().__init__(problem)
        self.has_replied = has_replied


def shown_address(text: str) -> str:
    """Remove what an address may keep secret: ``user:password@`` and the query.

    Args:
        text: an address, or a text with addresses in it.
    Returns:
        The same with ``scheme://host:port/path`` in place of each address.
    """
    return _ADDRESS.sub(r"\g<scheme>\g<place>", text)


@dataclass(frozen=True)
class Reply:
    """What a server answered.

    Args:
        address: that was asked, without secrets.
        status: of HTTP.
        reason: the status in words.
        body: uncompressed.
    """

    address: str
    status: int
    reason: str
    body: bytes

    @property
    def is_success(self) -> bool:
        """Whether the status is one of success."""
        return 200 <= self.status < 300

    @property
    def excerpt(self) -> str:
        """The beginning of the body, in one line."""
        return " ".join(self.body[:800].decode(errors="replace").split())[:200]

    def json(self) -> Any:
        """Read the body.

        Returns:
            Its value.
        Raises:
            ServerError: the body is not JSON.
        """
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            raise ServerError(f"{self.address}: expected JSON, got {self.excerpt!r}") from None


class HttpClient:
    """Keeps connections to one server open, and asks it again where it has a fault that may pass.

    Connection faults and the statuses 429 and 5xx are repeated, after 1, 2, 4, … seconds and a random part of one.

    Args:
        url: http:// or https://; paths of requests are added to it.
        headers: of every request.
        connections: largest number at once.
        timeout: seconds of silence after which a request is given up.
        tries: of a request.
        patience: seconds after which a request is not tried again.
        largest_body: bytes of a reply.
    Raises:
        ValueError: the address has no host, or a port that is no number.
    """

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        connections: int = 100,
        timeout: float = 60.0,
        tries: int = 6,
        patience: float = float("inf"),
        largest_body: int = 2**30,
    ) -> None:
        self.address = shown_address(url)
        self.tries, self.patience, self.largest_body = tries, patience, largest_body
        # The message of the library would show a part of a password that has a slash in it.
        try:
            host = httpx2.URL(url).host
        except httpx2.InvalidURL:
            raise ValueError(f"{_shown_wrong_address(url)}: no address (the port is not a number)") from None
        if not host:
            raise ValueError(f"{_shown_wrong_address(url)}: no address (no host in it)")
        self._url = url
        self._client = httpx2.Client(
            headers=headers,
            limits=httpx2.Limits(max_connections=connections),
            timeout=timeout,
            # A proxy of the environment would look for the server on its own machine.
            trust_env=not is_loopback(host),
        )
        # The library logs every request with its whole address.
        logging.getLogger("httpx2").setLevel(logging.WARNING)
        # A server that was started again does not say so; whoever depends on its state looks here.
        self.connection_faults = 0
        self._sockets = OpenSockets()
        self._cancelled = threading.Event()  # another one after each cancellation
        self._warned_at = -SECONDS_BETWEEN_WARNINGS

    def request(
        self, method: str, path: str, body: Any = None, *, repeats_errors: bool = True, tries: int | None = None
    ) -> Reply:
        """Ask the server.

        Args:
            method: GET, POST, ….
            path: added to the address.
            body: sent as JSON; None for no body.
            repeats_errors: whether a status of 500 is repeated too: not where the request itself may be its cause.
            tries: of this request; None for the client's.
        Returns:
            The reply, whatever its status, unless the status says that the server cannot answer now.
        Raises:
            Unavailable: the server does not answer, or cannot, after all tries.
            Cancelled: see :meth:`cancelled`.
            ServerError: the reply is too large.
            ValueError: the body cannot be written as JSON.
        """
        content = None if body is None else _as_json(body, self.address)
        cancelled = self._cancelled  # this one stays set for the requests that were under way
        retrying = Retrying(
            retry=retry_if_exception_type(Unavailable),
            wait=wait_exponential(multiplier=1, max=30) + wait_random(0, 1),
            stop=stop_after_attempt(tries or self.tries)
            | stop_after_delay(self.patience)
            | stop_when_event_set(cancelled),
            sleep=sleep_using_event(cancelled),
            before_sleep=self._warn,
            reraise=True,
        )

        def send() -> Reply:
            if cancelled.is_set():
                raise Cancelled(f"{self.address}{path}: the request was cancelled")
            return self._send(method, path, content, repeats_errors)

        try:
            return retrying(send)
        except Unavailable:
            if cancelled.is_set():
                raise Cancelled(f"{self.address}{path}: the request was cancelled") from None
            raise

    def wait_until_ready(self, path: str, seconds: float) -> Reply:
        """Ask a server that may still be loading.

        Args:
            path: which it answers once it is ready.
            seconds: to wait at most.
        Returns:
            The reply.
        Raises:
            Unavailable: it does not answer in this time, or there is no such host.
        """
        retrying = Retrying(
            retry=retry_if_exception_type(Unavailable),
            wait=wait_fixed(SECONDS_BETWEEN_LOOKS),
            stop=stop_after_delay(seconds),
            before_sleep=lambda state: self._tell_of_waiting(state, seconds),
            reraise=True,
        )
        return retrying(self._send, "GET", path, None, True)

    @contextmanager
    def cancelled(self) -> Iterator[None]:
        """End the requests of other threads that are under way; inside, none is made: each raises :class:`Cancelled`.

        A completion server gives up what it samples for a connection that ends.

        Yields:
            Nothing.
        """
        self._cancelled.set()
        self._sockets.shut_down()
        try:
            yield
        finally:
            self._cancelled = threading.Event()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _send(self, method: str, path: str, content: bytes | None, repeats_errors: bool) -> Reply:
        headers = {} if content is None else {"Content-Type": "application/json"}
        try:
            extensions = {"trace": self._sockets.trace}
            with self._client.stream(
                method, self._url + path, content=content, headers=headers, extensions=extensions
            ) as response:
                body = self._read(response)
                reply = Reply(self.address + path, response.status_code, response.reason_phrase, body)
        except httpx2.TransportError as error:
            self.connection_faults += 1
            # A name that is not known is a typing error: waiting does not help.
            problem = f"does not answer{self._way()} ({type(error).__name__}: {error})"
            raise ConnectionError(problem) if _is_unknown_host(error) else Unavailable(problem) from error
        is_busy = reply.status in BUSY or (repeats_errors and reply.status >= 500)
        if is_busy:
            # A gateway that cannot reach the server behind it.
            self.connection_faults += reply.status == 502
            raise Unavailable(f"answers{self._way()} {reply.status} {reply.reason} {reply.excerpt!r}", has_replied=True)
        return reply

    def _way(self) -> str:
        """How requests reach the server, where it is not directly."""
        proxy = proxy_of(self._url)
        if proxy is None:
            return ""
        host = httpx2.URL(self._url).host
        return f" through the proxy {shown_address(proxy)} of the environment (NO_PROXY={host} leaves it out)"

    def _read(self, response: httpx2.Response) -> bytes:
        body = bytearray()
        # In pieces: a body without end would otherwise fill the memory.
        for piece in response.iter_bytes():
            body += piece
            if len(body) > self.largest_body:
                raise ServerError(f"{self.address}: the reply is larger than {self.largest_body} bytes")
        return bytes(body)

    def _warn(self, state: RetryCallState) -> None:
        # Many requests meet the same fault at once.
        if time.monotonic() - self._warned_at < SECONDS_BETWEEN_WARNINGS:
            return
        self._warned_at = time.monotonic()
        logger.warning("%s %s; trying again (%d tries)", self.address, _problem(state), self.tries)

    def _tell_of_waiting(self, state: RetryCallState, seconds: float) -> None:
        if state.attempt_number == 1:
            logger.warning("%s %s; waiting up to %g s for it", self.address, _problem(state), seconds)


def _problem(state: RetryCallState) -> BaseException | None:
    return None if state.outcome is None else state.outcome.exception()


def _as_json(body: Any, address: str) -> bytes:
    try:
        # NaN is no JSON: a server would refuse it, or read something else.
        return json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{address}: what is sent cannot be written as JSON ({error})") from error


def _shown_wrong_address(url: str) -> str:
    """An address that cannot be taken apart; everything up to its last @ may be a password."""
    scheme, separator, rest = url.partition("://")
    return shown_address(scheme + separator + rest.rpartition("@")[2])


def _is_unknown_host(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, socket.gaierror):
            return True
        error = error.__cause__ or error.__context__
    return False
