"""The engine behind a completion server: vLLM, SGLang, or another with their form of OpenAI's protocol."""

import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data.http_client import HttpClient, ServerError
from rlhf.rollouts.engine import Completion, Sampling, check_request, sample_seed
from rlhf.rollouts.pausing import can_pause, pause, resume, resume_if_paused
from rlhf.rollouts.policy_weights import AdapterWeights
from rlhf.rollouts.served_policy import ServedPolicy
from rlhf.rollouts.server_calls import NOT_OFFERED, ServerCalls, check_logps
from rlhf.rollouts.server_weights import WRONG_MODEL_HINT, VersionFolders

logger = logging.getLogger(__name__)

NO_TOKEN_IDS = (
    "returns no token ids; encoding its text again would shift every log-prob, so it cannot be used "
    "(vLLM from 0.10.2 and SGLang with `return_token_ids` can; `transformers serve` cannot)"
)
RAW_LOGPS = (
    "reports log-probs that are not those of the distribution sampled from: start vLLM with "
    "--logprobs-mode processed_logprobs, or use temperature 1 without top_p and top_k"
)
CANNOT_SLEEP = (
    "cannot sleep: start vLLM with --enable-sleep-mode and VLLM_SERVER_DEV_MODE=1, or leave --rollout_server_sleep out"
)
FURTHER_CONNECTIONS = 4
MAX_TRIES = 12  # of a request: three and a half minutes of waiting
SHORTEST_PATIENCE = 60.0  # seconds
MAX_RESTARTS = 3  # within one request for completions
# A text on which tokenizers differ: digits, symbols, quotes, accents and white space.
TOKENIZER_PROBE = "It costs 1,234.50 €: “naïve” café\n\tdef f(x):  return x"


class ServerEngine:
    """A :class:`RolloutEngine` that asks a server for completions of token ids.

    Each completion is a separate request, with a seed made from ``(seed, prompt, sample)``, so that it does not
    depend on other requests. Servers batch requests and share their prompts. Completions are reproducible as far as the
    server is. vLLM reports log-probs before temperature and truncation unless configured otherwise; where that makes a
    difference, it is noticed before the first request, and refused.

    Args:
        url: of the server, with or without ``/v1``.
        model: the name that it serves the policy under.
        weights_dir: a folder that both sides see, for :meth:`update_weights`. Several engines share one if they are
            given the same :class:`~rlhf.rollouts.server_weights.VersionFolders`.
        device: of the policy; on a GPU, weights can go to the server without a folder, by NCCL or CUDA IPC.
        concurrency: largest number of requests at once.
        timeout: seconds for one request.
        api_key: sent as a bearer token, if given.
        vocab_size: of the policy; a larger token id from the server is an error.
        reads_logps: check that its log-probs are those of the distribution sampled from.
        end_ids: tokens that end a completion, in addition to those of the server's configuration.
        startup_timeout: seconds to wait for a server that is still loading.
        sleeps: whether :meth:`sleep` does anything; without it, the server stays awake for its other users.
        patience: seconds after which a request is given up; by default as long as a server needs to start.
    Raises:
        ConnectionError: no server answers there.
        ValueError: it does not serve ``model``.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        weights_dir: str | Path | VersionFolders | None = None,
        device: torch.device | None = None,
        concurrency: int = 64,
        timeout: float = 600.0,
        api_key: str | None = None,
        vocab_size: int | None = None,
        reads_logps: bool = True,
        end_ids: Sequence[int] = (),
        startup_timeout: float = 240.0,
        sleeps: bool = False,
        patience: float | None = None,
    ) -> None:
        self.model = model
        self.version = 0
        self.vocab_size, self.reads_logps, self.end_ids = vocab_size, reads_logps, list(end_ids)
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        client = HttpClient(
            url.rstrip("/").removesuffix("/v1"),
            headers=headers,
            # A server is paused, and sent weights, also while all completions are under way.
            connections=concurrency + FURTHER_CONNECTIONS,
            timeout=timeout,
            tries=MAX_TRIES,
            # A server may be started again.
            patience=max(startup_timeout, SHORTEST_PATIENCE) if patience is None else patience,
        )
        self._calls = ServerCalls(client)
        self.url = client.address
        folders = VersionFolders(Path(weights_dir)) if isinstance(weights_dir, str | Path) else weights_dir
        self._policy = ServedPolicy(self._calls, model, folders, device)
        # Its threads end with the process, also where a request is still waiting: an executor's would be waited for.
        self._pool = ThreadPool(concurrency)
        # Before the interpreter takes its modules apart, or the pool's end fails with a traceback.
        self._end_pool = weakref.finalize(self, self._pool.terminate)
        # Weights are loaded by one thread at a time: another may find that the server was started again.
        self._loading = threading.RLock()
        # Whether log-probs are right, by what can make them wrong: the temperature, and truncation or a penalty.
        self._logps_are_right: dict[tuple[float, bool], bool] = {}
        self._sleeps, self._is_asleep = sleeps, False
        #: Whether other processes ask the server too, so that none of them alone can mend what a restart did.
        self.is_shared = False
        #: Whether completions may be of the server's original weights, because it was started again.
        self.has_lost_weights = False
        reply = self._calls.wait_until_ready("/v1/models", startup_timeout)
        served_models = {entry.get("id"): entry for entry in reply.json().get("data", [])}
        if model not in served_models:
            raise ValueError(f"{self.url} serves {', '.join(map(str, served_models)) or 'nothing'}, not {model!r}")
        # Tokens of a prompt and its completion; None where the server does not tell (vLLM and SGLang do).
        self.context_length: int | None = served_models[model].get("max_model_len")
        self._wake_if_asleep()
        resume_if_paused(self._calls)

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        index: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """See :class:`RolloutEngine`.

        Args:
            prompt_ids: each not empty.
            n: completions of each prompt.
            sampling: how tokens are drawn.
            seed: >= 0.
            index: the number of each prompt in a larger request.
        Returns:
            ``n`` completions of each prompt.

        Raises:
            ConnectionError: the server is gone.
            ServerError: it returns no token ids, other ids than were sent, or log-probs of another distribution.
        """
        check_request(prompt_ids, n, seed)
        prompts = [list(ids) for ids in prompt_ids]
        if prompts and self.reads_logps:
            self._check_logps(prompts[0], sampling)
        prompt_numbers = index or range(len(prompts))
        prompt_of_request = [prompt for prompt in prompts for _ in range(n)]
        seed_of_request = [(seed, number, sample) for number in prompt_numbers for sample in range(n)]
        completions = self._complete_all(sampling, prompt_of_request, seed_of_request)
        return [completions[start : start + n] for start in range(0, len(completions), n)]

    def read(self, sequences: Sequence[Sequence[int]], k: int) -> list[list[dict[int, float]]]:
        """Log-probs of given tokens, and of the most likely ones at their positions.

        Args:
            sequences: token ids.
            k: how many of the most likely tokens.
        Returns:
            For each sequence and position: token to log-prob, in nats at temperature 1, of the k most likely tokens and
            of the given one. The first position has none.
        Raises:
            ConnectionError: the server is gone.
            ServerError: it reports no log-probs of a prompt (vLLM does, SGLang and others do not), or too few.
        """
        return self._in_parallel(lambda ids: self._read(list(ids), k), sequences)

    def tokenizer_difference(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """Compare the server's tokenizer with the policy's on one text.

        Args:
            tokenizer: the policy's.
        Returns:
            A text with both results if they differ; None if they agree, or if the server has no such call (vLLM has).
        """
        request_body = {"model": self.model, "prompt": TOKENIZER_PROBE, "add_special_tokens": False}
        try:
            reply = self._calls.first_offered(("/tokenize", request_body))
        except ServerError:  # the call takes another request than vLLM's
            return None
        server_ids = None if reply is None else reply.json().get("tokens")
        policy_ids = tokenizer(TOKENIZER_PROBE, add_special_tokens=False)["input_ids"]
        if server_ids is None or server_ids == policy_ids:
            return None
        return f"{TOKENIZER_PROBE.split()[0]!r}… is {server_ids[:8]} there, {policy_ids[:8]} here"

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See :class:`RolloutEngine`: by NCCL, by CUDA IPC, or through ``weights_dir`` (SGLang, or vLLM in dev mode).

        Args:
            weights: by the names of a checkpoint.
            version: of the policy.
        Raises:
            ValueError: there is no ``weights_dir``, and no other way.
            ServerError: the server has no call to load weights, or fails to load these.
        """
        with self._loading:
            self._policy.load_weights(weights, version)
            self.version = version

    def can_pause(self) -> bool:
        """Whether the server takes weights while requests are under way."""
        return can_pause(self._calls)

    def pause(self) -> None:
        """Let the requests that are under way wait, for an update of the weights; they keep their tokens."""
        pause(self._calls)

    def resume(self) -> None:
        """Undo :meth:`pause`."""
        resume(self._calls)

    def cancelled(self) -> AbstractContextManager[None]:
        """End the requests of other threads; inside, none is made."""
        return self._calls.client.cancelled()

    def update_adapter(self, adapter: AdapterWeights, version: int) -> None:
        """Load a LoRA adapter for the model that the server has, instead of a whole model.

        Args:
            adapter: of a rank up to :attr:`max_adapter_rank`.
            version: of the policy.
        Raises:
            ServerError: the server does not load it.
        """
        with self._loading:
            self._policy.load_adapter(adapter, version)
            self.version = version

    def expect_update(self, is_adapter: bool) -> None:
        """Note that another process had the server load weights or an adapter, and ask for these from now on.

        Args:
            is_adapter: whether it is an adapter.
        """
        self._policy.expect_update(is_adapter)

    @cached_property
    def max_adapter_rank(self) -> int:
        """The largest rank of a LoRA adapter that the server loads on its own; 0 if it loads none."""
        return self._policy.max_adapter_rank()

    def is_reachable(self) -> bool:
        """Ask the server once whether it answers.

        Returns:
            False if it does not, or not as it must.
        """
        try:
            self._calls.request("GET", "/v1/models", tries=1)
        except OSError:
            return False
        return True

    def forget_weights(self) -> None:
        """Set up the way of the weights anew at the next update, because the server was started again."""
        self._policy.forget()
        self.has_lost_weights = False

    def sleep(self) -> None:
        """Ask the server to free its accelerator's memory, if ``sleeps`` is set.

        Raises:
            ServerError: it has no such call.
        """
        if not self._sleeps:
            return
        # Before the request: a server that is told to wake once too often does nothing.
        self._is_asleep = True
        if self._calls.first_offered(("/release_memory_occupation", {}), ("/sleep?level=1", {})) is None:
            raise ServerError(f"{self.url} {CANNOT_SLEEP}")

    def wake(self) -> None:
        """Undo :meth:`sleep`."""
        if self._is_asleep:
            self._calls.first_offered(("/resume_memory_occupation", {}), ("/wake_up", {}))
            self._is_asleep = False

    def _wake_if_asleep(self) -> None:
        """Wake a server that someone else left asleep: its completions would never come. Only vLLM tells."""
        reply = self._calls.request("GET", "/is_sleeping", may_be_missing=True)
        if reply.status not in NOT_OFFERED and reply.json().get("is_sleeping"):
            logger.warning("%s is asleep: waking it", self.url)
            self._calls.request("POST", "/wake_up", {})

    def close(self) -> None:
        """Close the connections; the server keeps running."""
        self._end_pool()
        self._calls.client.close()

    # Requests

    def _complete_all(
        self, sampling: Sampling, prompts: list[list[int]], seed_keys: list[tuple[int, int, int]]
    ) -> list[Completion]:
        """All completions, from the weights that were sent last, also where the server was started again meanwhile.

        Where this process cannot have it load them, ``has_lost_weights`` is set.
        """
        for _ in range(MAX_RESTARTS):
            faults_before = self._calls.client.connection_faults
            completions: list[Completion] | None = None
            requests = zip(prompts, seed_keys, strict=True)
            try:
                completions = self._in_parallel(lambda request: self._complete(sampling, *request), requests)
            except ServerError:
                # A server that was started again does not know the adapter.
                if not self._may_have_restarted(faults_before):
                    raise
            if completions is not None and not self._may_have_restarted(faults_before):
                return completions
            if self._policy.can_load_again and not self.is_shared:
                with self._loading:
                    self._policy.load_again(self.version)
                continue
            # All processes must come to the end of the rollout, which they drop together.
            self.has_lost_weights = True
            if completions is not None:
                return completions
            self._policy.forget()  # the original model answers
        raise ConnectionError(f"{self.url}: the connection was lost {MAX_RESTARTS} times while it sampled")

    def _may_have_restarted(self, faults_before: int) -> bool:
        """Whether a connection was lost since, and the server did not have its original weights."""
        return self._policy.are_sent and self._calls.client.connection_faults != faults_before

    def _in_parallel(self, ask: Callable[[Any], Any], requests: Iterable[Any]) -> list[Any]:
        """The results in the order of the requests, whichever is answered first."""
        requests = list(requests)
        # It need not wait for those of another thread: each update of the weights asks for one completion.
        if len(requests) == 1:
            return [ask(requests[0])]
        has_failed = threading.Event()

        def ask_unless_failed(request: Any) -> Any:
            return None if has_failed.is_set() else ask(request)

        try:
            return list(self._pool.imap(ask_unless_failed, requests))
        except BaseException:  # Ctrl-C too
            # Requests that have not begun are dropped. Those of another thread go on.
            has_failed.set()
            raise

    def _complete(self, sampling: Sampling, prompt: list[int], seed_key: tuple[int, int, int]) -> Completion:
        end_options: dict[str, Any] = {}
        if sampling.stop:
            end_options["stop"] = list(sampling.stop)
        if self.end_ids:
            end_options["stop_token_ids"] = self.end_ids
        choice = self._request_completion(
            prompt,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            # Servers write -1 for all tokens.
            top_k=sampling.top_k or -1,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            min_tokens=sampling.min_tokens,
            max_tokens=sampling.max_tokens,
            seed=sample_seed(*seed_key),
            **end_options,
        )
        finish_reason = choice.get("finish_reason")  # others: "abort", "content_filter"
        if finish_reason not in ("stop", "length"):
            raise ServerError(f"{self.url} ended a completion with {finish_reason!r}, not 'stop' or 'length'")
        return Completion(choice["token_ids"], choice["logprobs"]["token_logprobs"], finish_reason, self.version)

    def _request_completion(self, prompt: list[int], **options: Any) -> dict[str, Any]:
        """One completion as the server returns it, once its ids and log-probs are checked.

        Args:
            prompt: token ids.
            options: of sampling, under the server's names.
        Returns:
            The first entry of ``choices``.
        """
        # An option that is not sent would be taken from the generation config of the served model.
        neutral = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
        # Log-probs of two tokens, because the check of the temperature compares the best two.
        request_body = {"model": self._policy.name, "prompt": prompt, "n": 1, "logprobs": 2, "return_token_ids": True}
        choice = self._first_choice(request_body | neutral | options)
        ids, ids_read = choice.get("token_ids"), choice.get("prompt_token_ids")
        if ids is None:
            raise ServerError(f"{self.url} {NO_TOKEN_IDS}")
        largest = max(ids, default=0)
        if self.vocab_size is not None and largest >= self.vocab_size:
            raise ServerError(
                f"{self.url} sampled token {largest}, and the policy has {self.vocab_size}: {WRONG_MODEL_HINT}"
            )
        # A server that adds BOS or cuts the prompt would sample from another context.
        if ids_read is not None and ids_read != prompt:
            raise ServerError(f"{self.url} read other prompt ids than were sent: {len(ids_read)} for {len(prompt)}")
        logps = (choice.get("logprobs") or {}).get("token_logprobs") or []
        if len(logps) != len(ids):
            raise ServerError(f"{self.url} returned {len(logps)} log-probs for {len(ids)} tokens")
        check_logps(logps, self.url, "token")
        return choice

    def _read(self, ids: list[int], k: int) -> list[dict[int, float]]:
        """Log-probs of the k most likely tokens and of the given one at each position; none at the first."""
        # A completion needs at least one token; it is thrown away.
        request_body = {"model": self.model, "prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k}
        positions = self._first_choice(request_body).get("prompt_logprobs")
        if positions is None:
            raise ServerError(f"{self.url} reports no prompt_logprobs, which a teacher must: serve it with vLLM")
        logps_of_positions = [
            {int(token): entry["logprob"] for token, entry in (position or {}).items()} for position in positions
        ]
        is_complete = len(logps_of_positions) == len(ids) and all(
            len(logps) >= k and token in logps for token, logps in zip(ids[1:], logps_of_positions[1:], strict=True)
        )
        if not is_complete:
            raise ServerError(f"{self.url} reported log-probs that do not fit the {len(ids)} tokens sent, {k} of each")
        for position, logps in enumerate(logps_of_positions):
            check_logps(list(logps.values()), self.url, f"position {position}, candidate")
        return logps_of_positions

    def _first_choice(self, request_body: dict[str, Any]) -> dict[str, Any]:
        """The first completion that the server returns."""
        reply = self._calls.request("POST", "/v1/completions", request_body)
        try:
            choice: dict[str, Any] = reply.json()["choices"][0]
        except (KeyError, IndexError, TypeError):
            raise ServerError(f'{reply.address}: expected {{"choices": […]}}, got {reply.excerpt!r}') from None
        return choice

    def _check_logps(self, prompt: list[int], sampling: Sampling) -> None:
        """Find with a few short requests whether log-probs are those of the distribution sampled from.

        Args:
            prompt: any one of those to come.
            sampling: as it will be used. The answer is remembered for this temperature and kind of truncation.
        """
        key = (sampling.temperature, sampling.reshapes)
        if key not in self._logps_are_right:
            self._logps_are_right[key] = self._truncates_logps(prompt, sampling) and self._scales_logps(
                prompt, sampling
            )
        if not self._logps_are_right[key]:
            raise ServerError(f"{self.url} {RAW_LOGPS}")

    def _truncates_logps(self, prompt: list[int], sampling: Sampling) -> bool:
        """Whether log-probs are those after truncation."""
        if not sampling.reshapes:
            return True
        # With top_k 1 a single token is left, and its probability must be 1.
        choice = self._request_completion(prompt, max_tokens=1, temperature=1.0, top_k=1)
        logp: float = choice["logprobs"]["token_logprobs"][0]
        return abs(logp) < 1e-3

    def _scales_logps(self, prompt: list[int], sampling: Sampling) -> bool:
        """Whether log-probs are those after the temperature."""
        if sampling.temperature in (0, 1):
            return True
        # Temperature 2 must halve the gap between the best two tokens; raw log-probs keep it.
        gap, gap_at_2 = (self._gap_of_best_two(prompt, temperature) for temperature in (1.0, 2.0))
        return abs(gap_at_2 - gap / 2) <= abs(gap_at_2 - gap)

    def _gap_of_best_two(self, prompt: list[int], temperature: float) -> float:
        """Difference of the two largest log-probs of the next token, in nats."""
        choice = self._request_completion(prompt, max_tokens=1, temperature=temperature, top_p=1.0, top_k=-1)
        largest_logp, second_logp = sorted(choice["logprobs"]["top_logprobs"][0].values(), reverse=True)[:2]
        return float(largest_logp - second_logp)
