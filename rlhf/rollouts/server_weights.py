"""New weights for a completion server through a folder, and what every way to send weights has to check."""

import logging
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

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


class Reloadable(Protocol):
    """A way in which weights reach a server, and which keeps a copy of them."""

    def load_again(self) -> None:
        """Have the server load the last weights again: it may have been started anew, with its original ones.

        Raises:
            ServerError: they cannot be loaded.
        """
        ...


class VersionFolders:
    """A shared folder in which each version of the weights is saved once, whatever the number of servers that read it.

    Args:
        root: that this process and the servers see.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.newest: Path | None = None
        self._newest_version: int | None = None
        self._read_by: dict[str, Path] = {}  # by address of a server: what it loaded last
        self._created: list[Path] = []

    def create(self, version: int, save: Callable[[Path], None]) -> Path:
        """The folder of a version; it is filled by the first server that asks for it.

        Args:
            version: of the policy.
            save: writes the files.
        Returns:
            The folder.
        """
        if self.newest is None or version != self._newest_version:
            folder = self._new_folder(version)
            save(folder)
            self._created.append(folder)
            self.newest, self._newest_version = folder, version
        return self.newest

    def loaded_by(self, url: str, folder: Path) -> None:
        """Note that a server has loaded a folder, and delete those that no server may read any more.

        Args:
            url: of the server.
            folder: from :meth:`create`.
        """
        self._read_by[url] = folder
        # Other folders beside these are not of this run.
        in_use = {*self._read_by.values(), self.newest}
        for old_folder in [folder for folder in self._created if folder not in in_use]:
            shutil.rmtree(old_folder)
            self._created.remove(old_folder)

    def _new_folder(self, version: int) -> Path:
        """A folder that was not there: the server may still read the one before, and others may belong to the user."""
        self.root.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            name = f"version-{version}" if number == 1 else f"version-{version}-{number}"
            folder = (self.root / name).resolve()
            try:
                folder.mkdir()
            except FileExistsError:
                number += 1
                continue
            return folder


class SavedWeights:
    """Saves weights in a folder, from which the server loads them: works with every server, and without a GPU.

    Args:
        calls: to the server.
        folders: that both sides see.
    """

    def __init__(self, calls: ServerCalls, folders: VersionFolders) -> None:
        self.calls, self.folders = calls, folders
        self._loaded_folder: Path | None = None

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Save weights, and have the server load them.

        Args:
            weights: by the names of a checkpoint.
            version: of the policy.
        Raises:
            ServerError: the server has no call to load weights, or fails to load these.
        """
        folder = self.folders.create(version, lambda path: save_torch_state_dict(dict(weights), path))
        self._load_from(folder)
        if self._loaded_folder is None:
            check_that_all_are_loaded(self.calls, lambda: self._load_from(folder), str(folder))
        self._loaded_folder = folder
        # Only now: the server has loaded the new weights, and does not read the older ones.
        self.folders.loaded_by(self.calls.url, folder)

    def load_again(self) -> None:
        """See :class:`Reloadable`."""
        assert self._loaded_folder is not None
        self._load_from(self._loaded_folder)

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
            reset_prefix_cache(self.calls)
        elif not reply.json().get("success", True):
            raise ServerError(f"{url} did not load {folder}: {reply.json().get('message', 'no reason given')}")


def reset_prefix_cache(calls: ServerCalls) -> None:
    """Ask until the prefix cache is empty: vLLM keeps it while other requests run.

    Args:
        calls: to the server.
    Raises:
        ServerError: it is not emptied after several tries.
    """
    retrying = Retrying(
        retry=retry_if_result(_says_no),
        wait=wait_exponential(multiplier=0.5, max=30),
        stop=stop_after_attempt(RESET_TRIES),
        # After the last try: the reply as it is.
        retry_error_callback=lambda state: state.outcome and state.outcome.result(),
    )
    reply: Reply = retrying(calls.request, "POST", "/reset_prefix_cache", {})
    if _says_no(reply):
        raise ServerError(
            f"{calls.url}/reset_prefix_cache fails after {RESET_TRIES} tries, so answers would mix old and "
            "new weights: end the other requests to this server, or start it with --no-enable-prefix-caching"
        )


def check_that_all_are_loaded(calls: ServerCalls, load: Callable[[], None], source: str) -> None:
    """Find tensors of the server that the weights sent do not hold: they would keep their old values in silence.

    All weights are set to zero, and loaded again: a tensor that is now another one was not loaded, or only in part.
    Names are the same in all updates, so one check is enough. Only vLLM has the call, from 0.32 on. Its CPU kernels
    keep packed copies of matrices, which it does not tell of.

    Args:
        calls: to a server that has loaded the weights.
        load: loads them again.
        source: of the weights, for the message.
    Raises:
        ServerError: names the tensors.
    """
    loaded = _checksums(calls)
    if loaded is None:
        return
    calls.request("POST", "/weight_checker", {"action": "reset"})
    load()
    now = _checksums(calls) or {}
    missing = sorted(name for name in loaded.keys() | now.keys() if loaded.get(name) != now.get(name))
    if missing:
        raise ServerError(
            f"{calls.url} did not load {len(missing)} of its {len(now)} tensors from {source}: "
            f"{', '.join(missing[:3])}; {WRONG_MODEL_HINT}; start it again: it has only a part of them now"
        )


def _checksums(calls: ServerCalls) -> dict[str, str] | None:
    """A hash of each tensor of the server; None if it does not tell."""
    reply = calls.request("POST", "/weight_checker", {"action": "checksum"}, may_be_missing=True)
    if reply.status in NOT_OFFERED:
        return None
    checksums: dict[str, str] = reply.json()["checksums"]
    return checksums


def _says_no(reply: Any) -> bool:
    # Older versions answer with an empty body.
    return bool(reply.body) and reply.json().get("success") is False
