"""Several completion servers with the same policy, as one engine."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.pool import ThreadPool
from typing import Any

from torch import Tensor

from rlhf.rollouts.engine import Completion, Sampling, check_request
from rlhf.rollouts.policy_weights import AdapterWeights
from rlhf.rollouts.server import ServerEngine

logger = logging.getLogger(__name__)

PATIENCE = 30.0  # seconds; the other servers do the work of one that does not answer


class ReplicatedEngine:
    """A :class:`~rlhf.rollouts.engine.RolloutEngine` that spreads prompts evenly over several servers.

    All completions of a prompt come from one server, which reads the prompt once. The number of the first prompt
    decides which server comes first, so that the requests of several processes are spread too. Random numbers belong
    to the sample, so that results do not depend on the number of servers (up to the rounding of the servers). A server
    that does not answer is left out until the next update of the weights, and its prompts go to the others.

    Args:
        engines: one for each server, all of the same policy.
    """

    def __init__(self, engines: Sequence[ServerEngine]) -> None:
        self.engines = list(engines)
        self.version = 0
        self._lost: list[ServerEngine] = []
        self._last_error: ConnectionError | None = None

    @property
    def working(self) -> list[ServerEngine]:
        """The servers that answer, in their order."""
        return [engine for engine in self.engines if engine not in self._lost]

    @property
    def lost_urls(self) -> list[str]:
        """The addresses of the servers that are left out."""
        return [engine.url for engine in self._lost]

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        index: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """See :class:`~rlhf.rollouts.engine.RolloutEngine`.

        Args:
            prompt_ids: each not empty.
            n: completions of each prompt.
            sampling: how tokens are drawn.
            seed: >= 0.
            index: the number of each prompt in a larger request.
        Returns:
            ``n`` completions of each prompt.
        Raises:
            ConnectionError: all servers are gone.
        """
        check_request(prompt_ids, n, seed)
        prompt_numbers = list(index or range(len(prompt_ids)))
        groups: dict[int, list[Completion]] = {}
        remaining = list(range(len(prompt_ids)))
        while remaining:
            working = self._working_or_error()
            # Processes have few prompts each: if all began with the first server, the last ones would get none.
            begin = prompt_numbers[0] % len(working)
            working = working[begin:] + working[:begin]
            parts = [remaining[first :: len(working)] for first in range(len(working))]

            def complete(engine: ServerEngine, part: list[int]) -> list[list[Completion]]:
                prompts, numbers = [prompt_ids[row] for row in part], [prompt_numbers[row] for row in part]
                return engine.generate(prompts, n, sampling, seed, numbers) if part else []

            answers = self._ask(complete, list(zip(working, parts, strict=True)))
            for part, part_groups in zip(parts, answers, strict=True):
                groups.update(zip(part, part_groups or [], strict=False))
            remaining = [row for row in remaining if row not in groups]
        return [groups[row] for row in range(len(prompt_ids))]

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Send weights to all servers, also to those that answer again.

        Args:
            weights: by the names of a checkpoint.
            version: of the policy.
        """
        named_tensors = list(weights)
        self._update(lambda engine: engine.update_weights(named_tensors, version), version)

    def update_adapter(self, adapter: AdapterWeights, version: int) -> None:
        """Send a LoRA adapter to all servers, also to those that answer again.

        Args:
            adapter: of a rank up to :attr:`max_adapter_rank`.
            version: of the policy.
        """
        self._update(lambda engine: engine.update_adapter(adapter, version), version)

    @property
    def has_lost_weights(self) -> bool:
        """See :class:`ServerEngine`: of any server that answers."""
        return any(engine.has_lost_weights for engine in self.working)

    def forget_weights(self) -> None:
        """See :meth:`ServerEngine.forget_weights`."""
        for engine in self.engines:
            engine.forget_weights()

    def leave_out(self, urls: Sequence[str]) -> None:
        """Take part with all servers but these, because only the process that sends weights knows who took them.

        Args:
            urls: of servers.
        """
        self._lost = [engine for engine in self.engines if engine.url in urls]

    @property
    def max_adapter_rank(self) -> int:
        """The largest rank of a LoRA adapter that all servers load on its own; 0 if one loads none."""
        return min(engine.max_adapter_rank for engine in self.engines)

    def can_pause(self) -> bool:
        """Whether all servers take weights while requests are under way."""
        return all(engine.can_pause() for engine in self.engines)

    def pause(self) -> None:
        """See :meth:`ServerEngine.pause`."""
        self._ask(lambda engine: engine.pause(), [(engine,) for engine in self.working])

    def resume(self) -> None:
        """See :meth:`ServerEngine.resume`."""
        self._ask(lambda engine: engine.resume(), [(engine,) for engine in self.working])

    @contextmanager
    def cancelled(self) -> Iterator[None]:
        """See :meth:`ServerEngine.cancelled`.

        Yields:
            Nothing.
        """
        with ExitStack() as stack:
            for engine in self.engines:
                stack.enter_context(engine.cancelled())
            yield

    def sleep(self) -> None:
        """See :class:`~rlhf.rollouts.engine.RolloutEngine`."""
        self._ask(lambda engine: engine.sleep(), [(engine,) for engine in self.working])

    def wake(self) -> None:
        """See :class:`~rlhf.rollouts.engine.RolloutEngine`."""
        self._ask(lambda engine: engine.wake(), [(engine,) for engine in self.working])

    def close(self) -> None:
        """Close the connections; the servers keep running."""
        for engine in self.engines:
            engine.close()

    def _update(self, load: Callable[[ServerEngine], None], version: int) -> None:
        returning = [engine for engine in self._lost if engine.is_reachable()]
        for engine in returning:
            engine.forget_weights()

        def load_into(engine: ServerEngine) -> bool:
            load(engine)
            return True

        # The first server alone: files are saved once, and wrong weights are found before all servers have them.
        engines = [*self._working_or_error(returning), *returning]
        loaded = self._ask(load_into, [(engines[0],)]) + self._ask(load_into, [(engine,) for engine in engines[1:]])
        for engine, is_loaded in zip(engines, loaded, strict=True):
            # Only now: another thread may ask for completions at any time.
            if engine in returning and is_loaded:
                self._lost.remove(engine)
                logger.warning("%s answers again, and takes part from now on", engine.url)
        self._working_or_error()
        self.version = version

    def _ask(self, call: Callable[..., Any], requests: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a function with each engine and its further arguments, at the same time.

        Args:
            call: of the engine.
            requests: an engine and the arguments after it, each.
        Returns:
            The results in their order; None for an engine that does not answer, which is left out from now on.
        """

        def call_or_error(request: tuple[Any, ...]) -> Any:
            try:
                return call(*request)
            except ConnectionError as error:
                return error

        # Threads of this call: weights may be sent while another thread waits for completions.
        with ThreadPool(max(1, len(requests))) as pool:
            answers = pool.map(call_or_error, requests)
        for (engine, *_), answer in zip(requests, answers, strict=True):
            if isinstance(answer, ConnectionError):
                self._leave_out(engine, answer)
        return [None if isinstance(answer, ConnectionError) else answer for answer in answers]

    def _working_or_error(self, returning: Sequence[ServerEngine] = ()) -> list[ServerEngine]:
        working = self.working
        if not working and not returning:
            reason = "" if self._last_error is None else f"; the last: {self._last_error}"
            raise ConnectionError(f"none of the {len(self.engines)} servers answers{reason}") from self._last_error
        return working

    def _leave_out(self, engine: ServerEngine, error: ConnectionError) -> None:
        if engine in self._lost:  # found by another thread
            return
        self._lost.append(engine)
        self._last_error = error
        self._working_or_error()
        logger.warning(
            "%s; %d of %d servers go on without it, until it answers at an update of the weights",
            error,
            len(self.working),
            len(self.engines),
        )


def servers_of(engine: object) -> list[ServerEngine]:
    """The servers behind an engine.

    Args:
        engine: of any kind.
    Returns:
        Those that answer; none for an engine in this process.
    """
    if isinstance(engine, ReplicatedEngine):
        return engine.working
    return [engine] if isinstance(engine, ServerEngine) else []
