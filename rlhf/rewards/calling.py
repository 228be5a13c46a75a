"""Calling a reward function under a time limit."""

import asyncio
import inspect
import signal
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from functools import cache
from typing import Any

from rlhf.rewards.functions import RewardFunction


class TimedOut(Exception):
    """A function gave no answer in time. (No ``TimeoutError``, which is what a function's own connections raise.)"""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"no answer within {seconds:g} s")


class _Expired(BaseException):
    """Raised inside the function; no ``Exception``, so that its own ``except Exception`` does not eat it."""


def is_async(function: RewardFunction) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def call(function: RewardFunction, arguments: dict[str, Any], timeout: float | None) -> Any:
    """Call a reward function, sync or async, under a time limit.

    In the main thread an alarm interrupts the function wherever Python runs, also inside a regular expression that
    backtracks for ever: that holds the interpreter's lock, so no other thread could give up waiting for it. In
    another thread (or without ``SIGALRM``) the function runs in a thread of its own, which is abandoned when the time
    is up: it goes on until it ends by itself. Neither ends a call into C that never returns to Python.

    Args:
        function: the reward function.
        arguments: its keyword arguments.
        timeout: seconds; None for no limit.
    Returns:
        What the function returns.
    Raises:
        TimedOut: no answer within ``timeout`` seconds; and whatever the function raises.
    """
    if is_async(function):
        return finish(start(function, arguments, timeout), timeout)
    if timeout is None:
        return function(**arguments)
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGALRM"):
        return _with_alarm(function, arguments, timeout)
    return _in_thread(function, arguments, timeout)


def _without_exit(function: RewardFunction, arguments: dict[str, Any]) -> Any:
    """Call a function whose ``sys.exit`` is an error: it would end the training without a word."""
    try:
        return function(**arguments)
    except SystemExit as error:
        raise RuntimeError(f"it ended the process (sys.exit({error.code!r}))") from error


def _with_alarm(function: RewardFunction, arguments: dict[str, Any], timeout: float) -> Any:
    is_armed = True

    def expire(*_: Any) -> None:
        if is_armed:
            raise _Expired

    previous = signal.signal(signal.SIGALRM, expire)
    started_at = time.monotonic()
    # Again each second: an exception that lands in a destructor is lost.
    seconds_left, interval = signal.setitimer(signal.ITIMER_REAL, timeout, 1.0)
    try:
        return _without_exit(function, arguments)
    except _Expired:
        raise TimedOut(timeout) from None
    finally:
        is_armed = False  # first, and a plain store: from here on an alarm does nothing
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        if seconds_left:  # someone else's alarm goes on
            signal.setitimer(signal.ITIMER_REAL, max(seconds_left - (time.monotonic() - started_at), 1e-3), interval)


def _in_thread(function: RewardFunction, arguments: dict[str, Any], timeout: float) -> Any:
    answer: Future[Any] = Future()

    def work() -> None:
        try:
            answer.set_result(function(**arguments))
        except BaseException as error:
            answer.set_exception(error)

    # A daemon, unlike the threads of an executor: one that never ends must not keep the process from ending.
    threading.Thread(target=work, daemon=True).start()
    return _wait(answer, timeout)


def start(function: RewardFunction, arguments: dict[str, Any], timeout: float | None) -> "Future[Any]":
    """Begin an async function's work in the background; :func:`finish` gets its answer."""
    return asyncio.run_coroutine_threadsafe(_limited(function(**arguments), timeout), _loop())


def finish(answer: "Future[Any]", timeout: float | None) -> Any:
    try:
        return _wait(answer, None if timeout is None else timeout + 1.0)  # the loop's own limit comes first
    except TimedOut:
        if not answer.done():
            _loop.cache_clear()  # the function blocks the loop: leave both behind
        raise


async def _limited(answer: Coroutine[Any, Any, Any], timeout: float | None) -> Any:
    try:
        async with asyncio.timeout(timeout) as time_limit:
            return await answer
    except TimeoutError:
        if time_limit.expired():
            raise TimedOut(timeout or 0.0) from None
        raise


def _wait(answer: "Future[Any]", timeout: float | None) -> Any:
    try:
        return answer.result(timeout)
    except TimeoutError:
        if answer.done():  # the function's own
            raise
        raise TimedOut(timeout or 0.0) from None


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """One loop for all calls: connections that an async function keeps belong to the loop that opened them."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop
