"""Rollouts that a server samples while the policy trains: one thread fills a queue, the trainer empties it."""

import copy
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from transformers import TrainerState

from rlhf.models import Policy
from rlhf.online.collector import RolloutCollector
from rlhf.online.rollout import Rollout, fresh_rollouts, plain_rollout, rollout_of
from rlhf.online.samples import Sample
from rlhf.rollouts import RolloutEngine
from rlhf.rollouts.server import MAX_RESTARTS

logger = logging.getLogger(__name__)

SECONDS_UNTIL_WARNING = 5.0


@runtime_checkable
class BackgroundEngine(RolloutEngine, Protocol):
    """An engine that samples elsewhere, so that one thread can wait for completions while another trains."""

    def can_pause(self) -> bool:
        """Whether it takes weights while requests are under way."""
        ...

    def pause(self) -> None:
        """Let the requests that are under way wait."""
        ...

    def resume(self) -> None:
        """Undo ``pause``."""
        ...

    def cancelled(self) -> AbstractContextManager[None]:
        """End the requests of other threads; inside, none is made."""
        ...


class RolloutQueue:
    """Finished rollouts in order, and the thread that makes them one after the other.

    Args:
        sample: makes the next rollout; called in the thread, with what :meth:`allow` was given last.
        device: of this process, which a new thread does not know.
    """

    def __init__(self, sample: Callable[[Any], Rollout], device: torch.device) -> None:
        self._sample, self._device = sample, device
        self._changed = threading.Condition()
        self._finished: deque[Rollout] = deque()
        self._begun = 0  # number of the rollout that was begun last
        self._last_allowed = 0
        self._state: Any = None
        self._is_sampling = self._is_held = self._is_closed = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    @property
    def finished(self) -> list[Rollout]:
        """Rollouts that wait to be taken."""
        with self._changed:
            return list(self._finished)

    def restart(self, number: int, finished: Sequence[Rollout] = ()) -> None:
        """Set where to begin.

        Args:
            number: of the last rollout that was taken.
            finished: those after it that are there already.
        """
        assert self._thread is None
        self._finished = deque(finished)
        self._begun = self._last_allowed = number + len(finished)

    def allow(self, last_number: int, state: Any) -> None:
        """Let the thread make rollouts up to a number; the first call starts it.

        Args:
            last_number: of them.
            state: for ``sample``.
        """
        with self._changed:
            self._last_allowed, self._state = last_number, state
            self._changed.notify_all()
        if self._thread is None:
            self._is_closed = False
            self._thread = threading.Thread(target=self._work, name="rollouts", daemon=True)
            self._thread.start()

    def take(self) -> Rollout:
        """The next rollout; waits for it.

        Returns:
            The rollout.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._finished or self._error)
            self.raise_error()
            return self._finished.popleft()

    def raise_error(self) -> None:
        """Raise what the thread raised, if it did."""
        if self._error is not None:
            raise self._error

    @contextmanager
    def held(self, waits_for_all: bool = False) -> Iterator[None]:
        """Wait until the current rollout is complete, and begin none inside.

        Args:
            waits_for_all: whether to wait for all that may begin, also where the thread has not come to it yet.

        Yields:
            Nothing.
        """
        with self._changed:
            if waits_for_all:
                self._changed.wait_for(lambda: self._begun == self._last_allowed or self._error)
            self._is_held = True
            self._changed.wait_for(lambda: not self._is_sampling)
        try:
            self.raise_error()
            yield
        finally:
            with self._changed:
                self._is_held = False
                self._changed.notify_all()

    def close(self, cancelled: Callable[[], AbstractContextManager[None]]) -> None:
        """End the thread, and drop what was not taken.

        Args:
            cancelled: ends the requests of the thread.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            return
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        with cancelled():
            thread.join(SECONDS_UNTIL_WARNING)
            if thread.is_alive():
                logger.warning("waiting for a reward function or an environment that is still at work on a rollout")
                thread.join()
        self._finished.clear()
        self._error = None

    # In the thread

    def _work(self) -> None:
        # The current GPU is a thread's own.
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        try:
            while self._begin():
                rollout = self._sample(self._state)
                with self._changed:
                    self._finished.append(rollout)
                    self._is_sampling = False
                    self._changed.notify_all()
        # Whatever it is: the main thread raises it again.
        except BaseException as error:
            with self._changed:
                self._error, self._is_sampling = error, False
                self._changed.notify_all()

    def _begin(self) -> bool:
        """Wait until the next rollout may begin; False if none shall."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or (not self._is_held and self._begun < self._last_allowed))
            if self._is_closed:
                return False
            self._begun += 1
            self._is_sampling = True
            return True


class RolloutsAhead:
    """Collects rollouts as :class:`RolloutCollector` does, up to ``max_staleness`` of them before they are needed.

    The policy gets a version with each rollout that it was trained on. Rollout n is trained from version n - 1, and
    begins only if the server has version n - 1 - ``max_staleness`` or a newer one. A sample is stamped with the version
    that the server had when its request was sent: the oldest, if new weights come in the middle. So no token of it is
    older than the stamp, and each token's log-prob is that of the weights which did sample it, as the correction needs.

    With 1, the weights are sent between two rollouts: samples depend on seeds alone, and not on how long things take.
    With more, the server is paused in the middle of a rollout, or if it cannot be, the rollout is waited for.

    Args:
        collector: whose sampler has an engine that works in the background.
        max_staleness: updates, at least 1.
    Raises:
        ValueError: the engine samples in this process.
    """

    def __init__(self, collector: RolloutCollector, max_staleness: int) -> None:
        self.collector, self.max_staleness = collector, max_staleness
        engine = collector.sampler.engine
        if not isinstance(engine, BackgroundEngine):
            raise ValueError(
                f"max_staleness {max_staleness} samples while the policy trains, which {type(engine).__name__} cannot "
                "in this process: give a rollout server (--rollout_server_url), or leave max_staleness out"
            )
        self.engine: BackgroundEngine = engine
        self.accelerator = collector.sampler.accelerator
        self.queue = RolloutQueue(collector.next_rollout, self.accelerator.device)
        self.num_rollouts = 0  # that were taken; the collector counts those that were begun
        self.drawn = 0  # rows of the prompts in the rollouts that were taken
        self.dropped = 0  # samples, since the last rollout was taken
        self._can_pause: bool | None = None
        self._restarts_seen = 0

    def collect(self, policy: Policy, trained_model: nn.Module, state: TrainerState) -> Rollout:
        """The next rollout; the weights are sent, and those after it go on.

        Args:
            policy: whose weights are sent.
            trained_model: what accelerate made of it.
            state: the trainer's state; reward functions may ask for it as it is now.
        Returns:
            This process's share.
        """
        started_at = time.perf_counter()
        last_number = self.num_rollouts + min(self.max_staleness + 1, self._rollouts_left(state))
        for _ in range(MAX_RESTARTS):
            with self._between_requests():
                self.collector.sampler.sync(policy, trained_model, state.global_step, self._paused)
                self.collector.version = self.num_rollouts
            # A copy: the trainer's own goes on.
            self.queue.allow(last_number, copy.copy(state))
            rollout = self.queue.take()
            if not self._has_restarted():
                break
            self._drop_rollouts()
        else:
            raise ConnectionError(f"the connection to a rollout server was lost in each of {MAX_RESTARTS} rollouts")
        self.num_rollouts, self.drawn = rollout.number, rollout.drawn
        rollout.waiting_seconds = time.perf_counter() - started_at
        rollout.dropped, self.dropped = self.dropped, 0
        return rollout

    def _has_restarted(self) -> bool:
        """Whether a server may have had its original weights since the last rollout; all processes ask together."""
        sampler = self.collector.sampler
        sampler.has_lost_weights()
        # An evaluation may have noticed it before.
        seen_before, self._restarts_seen = self._restarts_seen, sampler.num_restarts
        return seen_before != self._restarts_seen

    def _drop_rollouts(self) -> None:
        """End the thread and its requests; the prompts of what was not taken come again."""
        self.queue.close(self.engine.cancelled)
        self.collector.load_state({"rollouts": self.num_rollouts, "drawn": self.drawn})
        self.queue.restart(self.num_rollouts)

    def _rollouts_left(self, state: TrainerState) -> int:
        """How many rollouts training still needs at most."""
        args = self.collector.args
        # A rollout that is left early serves fewer steps, at least one.
        steps_of_rollout = args.num_mini_batches * args.num_iterations if args.early_stop_kl is None else 1
        return math.ceil((state.max_steps - state.global_step) / steps_of_rollout)

    def answer(self, policy: Policy, trained_model: nn.Module, rows: Any, state: TrainerState) -> list[Sample]:
        """As :meth:`RolloutCollector.answer`, between two rollouts.

        Args:
            policy: samples the completions.
            trained_model: what accelerate made of it.
            rows: with ``prompt_ids``.
            state: the trainer's state.
        Returns:
            This process's share.
        """
        with self._held():
            return self.collector.answer(policy, trained_model, rows, state)

    def check(self) -> None:
        """Raise what the thread raised, if it did."""
        self.queue.raise_error()

    @contextmanager
    def during_training(self) -> Iterator[None]:
        """End the thread and its requests afterwards, also after an error.

        Yields:
            Nothing.
        """
        with self.collector.during_training():
            try:
                yield
            finally:
                self._drop_rollouts()

    # Weights

    @contextmanager
    def _paused(self) -> Iterator[None]:
        if self._pauses:
            self.engine.pause()
        try:
            yield
        finally:
            if self._pauses:
                self.engine.resume()

    @property
    def _pauses(self) -> bool:
        if self._can_pause is None:
            self._can_pause = self.max_staleness > 1 and self.engine.can_pause()
        return self._can_pause

    def _between_requests(self) -> AbstractContextManager[None]:
        return nullcontext() if self._pauses else self._held()

    @contextmanager
    def _held(self) -> Iterator[None]:
        # With 1, what the next rollout is sampled from must not depend on how soon its thread begins.
        with self.queue.held(waits_for_all=self.max_staleness == 1):
            # All processes ask the same server, which may get new weights now.
            self.accelerator.wait_for_everyone()
            yield

    # State of a checkpoint

    def state(self) -> dict[str, Any]:
        """What is needed to go on: the place in the prompts, and finished rollouts. An unfinished one is begun anew."""
        finished = [plain_rollout(rollout) for rollout in self.queue.finished]
        return {"rollouts": self.num_rollouts, "drawn": self.drawn, "ahead": finished}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` returned. Rollouts that are too old now are dropped, and sampled anew.

        Args:
            state: with ``rollouts`` and ``drawn``; ``ahead`` is missing where nothing was sampled ahead.
        """
        self.num_rollouts, self.drawn = state["rollouts"], state["drawn"]
        saved = [rollout_of(plain) for plain in state.get("ahead", [])]
        fresh = fresh_rollouts(saved, self.max_staleness)
        self.dropped = sum(len(rollout.samples) for rollout in saved[len(fresh) :])
        place = {"rollouts": fresh[-1].number, "drawn": fresh[-1].drawn} if fresh else state
        self.collector.load_state(place)
        self.queue.restart(self.num_rollouts, fresh)
