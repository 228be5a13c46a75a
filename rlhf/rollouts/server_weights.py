"""New weights for a completion server: saved in a folder, loaded by the server, and checked."""

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from tenacity import Retrying, retry_if_result, stop_after_attempt, wait_exponential
from torch import Tensor

from rlhf.data.http_client import Reply, ServerError
from rlhf.rollouts.server_calls import NOT_OFFERED, ServerCalls

logger = logging.getLogger(__name__)

NO_WEIGHT_UPDATE = (
    "offers no way to load weights: use SGLang (/update_weights_from_disk), or start vLLM with "
    "VLLM_SERVER_DEV_MODE=1 (/collective_rpc); without one, the server would go on with the old policy"
)
WRONG_MODEL_HINT = "it must serve the model that is trained"
RESET_TRIES = 8  # about two minutes of waiting


class ServerWeights:
    """Sends weights to a server.

    Args:
        calls: to the server.
        folder: that both sides see.
    """

    def __init__(self, calls: ServerCalls, folder: Path) -> None:
        self.calls, self.folder = calls, folder
        self._own_folder: Path | None = None  # with the weights that the server loaded last

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Save weights, and have the server load them.

        Args:
            weights: by the names of a checkpoint.
            version: of the policy.
        Raises:
            ServerError: the server has no call to load weights, or fails to load these.
        """
        folder = self._new_folder(version)
        save_torch_state_dict(dict(weights), folder)
        is_first = self._own_folder is None
        self._load_from(folder)
        if is_first:
            self._check_that_all_are_loaded(folder)
        # Only now: the server has loaded the new weights, and nobody reads the older ones. Other folders beside it
        # are not of this run.
        if self._own_folder is not None:
            shutil.rmtree(self._own_folder)
        self._own_folder = folder

    @property
    def are_loaded(self) -> bool:
        """Whether this process had the server load weights."""
        return self._own_folder is not None

    def load_again(self) -> None:
        """Have the server load the last weights again: it may have been started anew, with its original ones."""
        assert self._own_folder is not None
        self._load_from(self._own_folder)

    def _new_folder(self, version: int) -> Path:
        """A folder that was not there: the server may still read the one before, and others may belong to the user."""
        self.folder.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            name = f"version-{version}" if number == 1 else f"version-{version}-{number}"
            folder = (self.folder / name).resolve()
            try:
                folder.mkdir()
            except FileExistsError:
                number += 1
                continue
            return folder

    def _load_from(self, folder: Path) -> None:
        try:
            reply = self.calls.first_offered(
                ("/update_weights_from_disk", {"model_path": str(folder), "flush_cache": True}),
                ("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}),
            )
        except ServerError as error:
            raise ServerError(f"{error} (the policy's weights are in {folder}; {WRONG_MODEL_HINT})") from error
        url = self.calls.url
        if reply is None:
            raise ServerError(f"{url} {NO_WEIGHT_UPDATE}")
        # The prefix cache holds keys and values of the old weights; SGLang was asked to flush it with the update.
        if reply.address.endswith("/collective_rpc"):
            self._reset_prefix_cache()
        elif not reply.json().get("success", True):
            raise ServerError(f"{url} did not load {folder}: {reply.json().get('message', 'no reason given')}")

    def _reset_prefix_cache(self) -> None:
        """Ask until the cache is empty: vLLM keeps it while other requests run."""
        retrying = Retrying(
            retry=retry_if_result(_says_no),
            wait=wait_exponential(multiplier=0.5, max=30),
            stop=stop_after_attempt(RESET_TRIES),
            # After the last try: the reply as it is.
            retry_error_callback=lambda state: state.outcome and state.outcome.result(),
        )
        reply: Reply = retrying(self.calls.request, "POST", "/reset_prefix_cache", {})
        if _says_no(reply):
            raise ServerError(
                f"{self.calls.url}/reset_prefix_cache fails after {RESET_TRIES} tries, so answers would mix old and "
                "new weights: end the other requests to this server, or start it with --no-enable-prefix-caching"
            )

    def _check_that_all_are_loaded(self, folder: Path) -> None:
        """Find tensors of the server that the checkpoint does not hold: they would keep their old values in silence.

        All weights are set to zero, and loaded again: a tensor that is now another one was not loaded, or only in part.
        Names are the same in all updates, so one check is enough. Only vLLM has the call, from 0.32 on. Its CPU kernels
        keep packed copies of matrices, which it does not tell of.
        """
        loaded = self._checksums()
        if loaded is None:
            return
        self.calls.request("POST", "/weight_checker", {"action": "reset"})
        self._load_from(folder)
        now = self._checksums() or {}
        missing = sorted(name for name in loaded.keys() | now.keys() if loaded.get(name) != now.get(name))
        if missing:
            raise ServerError(
                f"{self.calls.url} did not load {len(missing)} of its {len(now)} tensors from {folder}: "
                f"{', '.join(missing[:3])}; {WRONG_MODEL_HINT}; start it again: it has only a part of them now"
            )

    def _checksums(self) -> dict[str, str] | None:
        """A hash of each tensor of the server; None if it does not tell."""
        reply = self.calls.request("POST", "/weight_checker", {"action": "checksum"}, may_be_missing=True)
        if reply.status in NOT_OFFERED:
            return None
        checksums: dict[str, str] = reply.json()["checksums"]
        return checksums


def _says_no(reply: Any) -> bool:
    # Older versions answer with an empty body.
    return bool(reply.body) and reply.json().get("success") is False
