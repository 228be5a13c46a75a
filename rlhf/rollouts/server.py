"""The engine behind a completion server: vLLM, SGLang, or whatever speaks their form of OpenAI's protocol."""

import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.rollouts.engine import Completion, Sampling, check_request

IDS = (
    "returns no token ids; encoding its text again would shift every log-prob, so it cannot be used "
    "(vLLM from 0.10.2 and SGLang with `return_token_ids` can; `transformers serve` cannot)"
)
RAW = (
    "reports log-probs that are not those of the distribution sampled from: start vLLM with "
    "--logprobs-mode processed_logprobs, or use temperature 1 without top_p and top_k"
)
PROBE = "It costs 1,234.50 €: “naïve” café\n\tdef f(x):  return x"
WRONG_MODEL_HINT = "it must serve the model that is trained"


class ServerError(OSError):
    """A server answers, and not as an engine's must; an ``OSError``, which commands report in one line."""


class ServerEngine:
    """A :class:`RolloutEngine` that asks a server for completions of token ids.

    Each completion is a request of its own, with a seed made from ``(seed, prompt, sample)``, so that nothing depends
    on what else is asked; servers batch them and share their prompts. They are reproducible as far as the server is.
    vLLM reports log-probs before temperature and truncation unless told otherwise; where that would show, it is
    noticed before the first request, and refused.

    Args:
        url: of the server, with or without ``/v1``.
        model: the name it serves the policy under.
        weights_dir: a folder that both sides see; needed by ``update_weights``, which puts a checkpoint there.
        concurrency: requests under way at once.
        timeout: seconds for one request.
        api_key: sent as a bearer token, if given.
        vocab_size: tokens that the policy knows; another one from the server is an error.
        reads_logps: check that its log-probs are of the distribution sampled from.
        end_ids: tokens that end a completion, besides those that the server knows of.
    Raises:
        ConnectionError: no server answers there.
        ValueError: it does not serve ``model``.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        weights_dir: str | Path | None = None,
        concurrency: int = 64,
        timeout: float = 600.0,
        api_key: str | None = None,
        vocab_size: int | None = None,
        reads_logps: bool = True,
        end_ids: Sequence[int] = (),
    ) -> None:
        self.vocab_size, self.reads_logps, self.end_ids = vocab_size, reads_logps, list(end_ids)
        self.url, self.model, self.version = url.rstrip("/").removesuffix("/v1"), model, 0
        self.weights_dir = None if weights_dir is None else Path(weights_dir)
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        limits = httpx2.Limits(max_connections=concurrency)
        self._client = httpx2.Client(base_url=self.url, headers=headers, limits=limits, timeout=timeout)
        self._pool = ThreadPoolExecutor(concurrency)
        self._faithful: dict[tuple[float, bool], bool] = {}
        served = [entry.get("id") for entry in self._call("GET", "/v1/models").json().get("data", [])]
        if model not in served:
            raise ValueError(f"{self.url} serves {', '.join(map(str, served)) or 'nothing'}, not {model!r}")

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        index: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """See :class:`RolloutEngine`.

        Raises:
            ConnectionError: the server is gone.
            ServerError: it returns no token ids, other ids than were sent, or log-probs of another distribution.
        """
        check_request(prompt_ids, n, seed)
        prompts = [list(ids) for ids in prompt_ids]
        if prompts and self.reads_logps:
            self._check_logps(prompts[0], sampling)
        numbers = index or range(len(prompts))
        asked = [(ids, (seed, i, j)) for ids, i in zip(prompts, numbers, strict=True) for j in range(n)]
        done = list(self._pool.map(lambda one: self._complete(one[0], sampling, one[1]), asked))
        return [done[start : start + n] for start in range(0, len(done), n)]

    def read(self, sequences: Sequence[Sequence[int]], k: int) -> list[list[dict[int, float]]]:
        """What the model makes of given tokens: for each place but the first, which is empty, ``{token: log-prob}`` of
        the k likeliest tokens and of the one that is there, in nats at temperature 1.

        Raises:
            ConnectionError: the server is gone.
            ServerError: it reports no log-probs of a prompt (vLLM does, SGLang and others do not), or too few.
        """
        return list(self._pool.map(lambda ids: self._read(list(ids), k), sequences))

    def tokenizer_difference(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """Where the server's tokenizer and this one part; None if they do not, or it does not say (vLLM does)."""
        asked = {"model": self.model, "prompt": PROBE, "add_special_tokens": False}
        try:
            reply = self._first_offered(("/tokenize", asked))
        except ServerError:  # it takes another request than vLLM's
            return None
        theirs = None if reply is None else reply.json().get("tokens")
        own = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        return None if theirs in (None, own) else f"{PROBE.split()[0]!r}… is {theirs[:8]} there, {own[:8]} here"

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See :class:`RolloutEngine`: writes a checkpoint, and has the server load it (SGLang, or vLLM in dev mode).

        Raises:
            ValueError: there is no ``weights_dir``.
            ServerError: the server offers no way to load weights, or does not load these.
        """
        if self.weights_dir is None:
            raise ValueError("update_weights needs weights_dir=, a folder that this process and the server both see")
        folder = (self.weights_dir / f"version-{version}").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        save_torch_state_dict(dict(weights), folder)
        # Each drops the prefix cache, whose keys and values are those of the old weights.
        try:
            reply = self._first_offered(
                ("/update_weights_from_disk", {"model_path": str(folder), "flush_cache": True}),
                ("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}),
            )
        except ServerError as error:
            raise ServerError(f"{error} (the policy's weights are in {folder}; {WRONG_MODEL_HINT})") from error
        if reply is None:
            raise ServerError(
                f"{self.url} offers no way to load weights: use SGLang (/update_weights_from_disk), or start vLLM with "
                "VLLM_SERVER_DEV_MODE=1 (/collective_rpc); without one, the server would go on with the old policy"
            )
        if reply.url.path == "/collective_rpc":
            self._call("POST", "/reset_prefix_cache")
        elif not reply.json().get("success", True):
            raise ServerError(f"{self.url} did not load {folder}: {reply.json().get('message', 'no reason given')}")
        self.version = version
        for old in self.weights_dir.glob("version-*"):
            if old.resolve() != folder:
                shutil.rmtree(old)

    def sleep(self) -> None:
        """Ask the server to free its accelerator, where it offers that."""
        self._first_offered(("/release_memory_occupation", {}), ("/sleep?level=1", {}))

    def wake(self) -> None:
        """Ask the server to come back."""
        self._first_offered(("/resume_memory_occupation", {}), ("/wake_up", {}))

    def close(self) -> None:
        """Close the connections; the server goes on."""
        self._pool.shutdown()
        self._client.close()

    def _complete(self, prompt: list[int], sampling: Sampling, key: tuple[int, int, int]) -> Completion:
        ends: dict[str, Any] = {"stop": list(sampling.stop)} if sampling.stop else {}
        ends |= {"stop_token_ids": self.end_ids} if self.end_ids else {}
        choice = self._ask(
            prompt,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            min_tokens=sampling.min_tokens,
            max_tokens=sampling.max_tokens,
            seed=int(np.random.SeedSequence(key).generate_state(1)[0] >> 1),
            **ends,
        )
        reason = choice.get("finish_reason")
        if reason not in ("stop", "length"):
            raise ServerError(f"{self.url} ended a completion with {reason!r}, not 'stop' or 'length'")
        return Completion(choice["token_ids"], choice["logprobs"]["token_logprobs"], reason, self.version)

    def _ask(self, prompt: list[int], **options: Any) -> dict[str, Any]:
        """One completion, as the server tells it, with ids and log-probs that fit."""
        # All that a model's own generation config could change is sent, or servers would take it from there.
        plain = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
        body = {"model": self.model, "prompt": prompt, "n": 1, "logprobs": 2, "return_token_ids": True}
        choice = self._call("POST", "/v1/completions", body | plain | options).json()["choices"][0]
        ids, sent = choice.get("token_ids"), choice.get("prompt_token_ids")
        if ids is None:
            raise ServerError(f"{self.url} {IDS}")
        if self.vocab_size is not None and max(ids, default=0) >= self.vocab_size:
            raise ServerError(
                f"{self.url} sampled token {max(ids)}, and the policy has {self.vocab_size}: {WRONG_MODEL_HINT}"
            )
        if sent is not None and sent != prompt:
            raise ServerError(f"{self.url} read other prompt ids than were sent: {len(sent)} for {len(prompt)}")
        logps = (choice.get("logprobs") or {}).get("token_logprobs") or []
        if len(logps) != len(ids) or None in logps:
            raise ServerError(f"{self.url} returned {len(logps)} log-probs for {len(ids)} tokens")
        return choice

    def _read(self, ids: list[int], k: int) -> list[dict[int, float]]:
        body = {"model": self.model, "prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k}
        places = self._call("POST", "/v1/completions", body).json()["choices"][0].get("prompt_logprobs")
        if places is None:
            raise ServerError(f"{self.url} reports no prompt_logprobs, which a teacher must: serve it with vLLM")
        found = [{int(v): told["logprob"] for v, told in (place or {}).items()} for place in places]
        if len(found) != len(ids) or any(len(f) < k or i not in f for i, f in zip(ids[1:], found[1:], strict=True)):
            raise ServerError(f"{self.url} reported log-probs that do not fit the {len(ids)} tokens sent, {k} of each")
        return found

    def _check_logps(self, prompt: list[int], sampling: Sampling) -> None:
        """Two short questions, where raw log-probs would be wrong: what do they say of a distribution that is known?"""
        key = (sampling.temperature, sampling.reshapes)
        if key not in self._faithful:
            faithful = True
            if sampling.reshapes:  # the one token that is left has probability 1
                choice = self._ask(prompt, max_tokens=1, temperature=1.0, top_k=1)
                faithful = abs(choice["logprobs"]["token_logprobs"][0]) < 1e-3
            if faithful and sampling.temperature not in (0, 1):  # temperature divides the gap of the best two
                plain, hot = (self._gap(prompt, temperature) for temperature in (1.0, 2.0))
                faithful = abs(hot - plain / 2) <= abs(hot - plain)
            self._faithful[key] = faithful
        if not self._faithful[key]:
            raise ServerError(f"{self.url} {RAW}")

    def _gap(self, prompt: list[int], temperature: float) -> float:
        choice = self._ask(prompt, max_tokens=1, temperature=temperature, top_p=1.0, top_k=-1)
        best, second = sorted(choice["logprobs"]["top_logprobs"][0].values(), reverse=True)[:2]
        return best - second

    def _first_offered(self, *calls: tuple[str, dict[str, Any]]) -> httpx2.Response | None:
        """The reply to the first of these that the server knows."""
        for path, body in calls:
            reply = self._call("POST", path, body, missing=True)
            if reply.status_code not in (404, 405):
                return reply
        return None

    def _call(
        self, method: str, path: str, body: dict[str, Any] | None = None, missing: bool = False
    ) -> httpx2.Response:
        try:
            reply = self._client.request(method, path, json=body)
        except httpx2.TransportError as error:
            raise ConnectionError(
                f"{self.url}: no server answers ({type(error).__name__}: {error}); start it, or check the address"
            ) from error
        if reply.is_success or (missing and reply.status_code in (404, 405)):
            return reply
        raise ServerError(f"{self.url}{path} answered {reply.status_code}: {' '.join(reply.text.split())[:200]}")
