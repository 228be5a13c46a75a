"""The policy on a completion server: how its weights get there, and the name under which it is asked for."""

import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from rlhf.data.http_client import ServerError
from rlhf.rollouts.policy_weights import AdapterWeights
from rlhf.rollouts.server_calls import NOT_OFFERED, ServerCalls
from rlhf.rollouts.server_transfer import TransferredWeights, choose_transport, server_config
from rlhf.rollouts.server_weights import Reloadable, SavedWeights, VersionFolders

logger = logging.getLogger(__name__)

ADAPTER_NAME = "rlhf-policy"  # of a LoRA adapter on the server
NO_FOLDER = (
    "takes weights through a folder only: pass rollout_weights_dir (weights_dir=), a folder that this process and the "
    "server both see"
)


class ServedPolicy:
    """Sends weights in the best way that the server, the device of the policy and a shared folder allow.

    Weights go by NCCL or CUDA IPC where the server was started for it and the policy is on a GPU, and through the
    folder otherwise. A LoRA adapter goes through the folder, without the model under it.

    Args:
        calls: to the server.
        model: the name that it serves the policy's model under.
        folders: that both sides see; None if there is no such folder.
        device: of the policy; None if its weights are never sent by a transport.
    """

    def __init__(
        self, calls: ServerCalls, model: str, folders: VersionFolders | None, device: torch.device | None
    ) -> None:
        self.calls, self.model, self.folders, self.device = calls, model, folders, device
        self.name = model
        self.are_sent = False  # weights or an adapter, by this process or another one
        self._weights: SavedWeights | TransferredWeights | None = None
        self._adapter: SavedAdapter | None = None
        self._reloadable: Reloadable | None = None  # what this process sent last, if a copy of it is kept

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Have the server load the whole model.

        Args:
            weights: by the names of a checkpoint.
            version: of the policy.
        Raises:
            ValueError: a folder is needed, and there is none.
            ServerError: the server has no call to load weights, or fails to load these.
        """
        if isinstance(self._weights, TransferredWeights) and not self._weights.are_there():
            logger.warning("%s was started again: the connection for weights is set up anew", self.calls.url)
            self._weights = None
        if self._weights is None:
            self._weights = self._weight_loader()
        self._weights.load(weights, version)
        self.name, self.are_sent = self.model, True
        self._reloadable = self._weights if isinstance(self._weights, SavedWeights) else None

    def load_adapter(self, adapter: AdapterWeights, version: int) -> None:
        """Have the server load an adapter for the model that it serves.

        Args:
            adapter: of LoRA, of a rank up to :meth:`max_adapter_rank`.
            version: of the policy.
        Raises:
            ServerError: the server does not load it.
        """
        assert self.folders is not None
        if self._adapter is None:
            self._adapter = SavedAdapter(self.calls, self.folders)
        self._adapter.load_adapter(adapter, version)
        self.name, self.are_sent = ADAPTER_NAME, True
        self._reloadable = self._adapter

    def expect_update(self, is_adapter: bool) -> None:
        """Note that another process had the server load weights or an adapter, and ask for these from now on.

        Args:
            is_adapter: whether it is an adapter.
        """
        self.name, self.are_sent = ADAPTER_NAME if is_adapter else self.model, True

    def max_adapter_rank(self) -> int:
        """The largest rank of an adapter that the server loads without the model under it.

        Returns:
            0 if it loads none, or if there is no folder to read it from.
        """
        if self.folders is None:
            return 0
        lora = server_config(self.calls).get("lora_config") or {}
        # Loading is a POST request: a GET request is refused with another status where the path exists.
        reply = self.calls.request("GET", "/v1/load_lora_adapter", may_be_missing=True)
        is_offered = reply.status != 404
        return int(lora.get("max_lora_rank") or 0) if is_offered else 0

    @property
    def can_load_again(self) -> bool:
        """Whether this process sent the last weights or adapter, and a copy of them is kept."""
        return self._reloadable is not None

    def load_again(self, version: int) -> None:
        """Have the server load the last weights or adapter again, after it was started anew.

        Args:
            version: of the policy, for the log.
        """
        assert self._reloadable is not None
        logger.warning(
            "%s: the connection was lost, and a server that was started again has its original weights: it loads "
            "version %d again, and the completions are sampled anew",
            self.calls.url,
            version,
        )
        self._reloadable.load_again()

    def forget(self) -> None:
        """Set up the way of the weights anew at the next update; until then, ask for the original model."""
        self._weights = self._adapter = self._reloadable = None
        self.name, self.are_sent = self.model, False

    def _weight_loader(self) -> SavedWeights | TransferredWeights:
        transport = None if self.device is None else choose_transport(self.calls, self.device)
        if transport is not None:
            logger.info("%s: weights go to the server by %s", self.calls.url, transport.name)
            return TransferredWeights(self.calls, transport)
        if self.folders is None:
            raise ValueError(f"{self.calls.url} {NO_FOLDER}")
        logger.info("%s: weights go to the server through %s", self.calls.url, self.folders.root)
        return SavedWeights(self.calls, self.folders)


class SavedAdapter:
    """Saves an adapter in a folder, from which vLLM loads it for the model that it serves.

    Args:
        calls: to the server.
        folders: that both sides see.
    """

    def __init__(self, calls: ServerCalls, folders: VersionFolders) -> None:
        self.calls, self.folders = calls, folders
        self._loaded_folder: Path | None = None

    def load_adapter(self, adapter: AdapterWeights, version: int) -> None:
        """Save an adapter, and have the server load it in the place of the one before.

        Args:
            adapter: of LoRA.
            version: of the policy.
        Raises:
            ServerError: the server does not load it.
        """
        folder = self.folders.create(version, adapter.save)
        self._load_from(folder)
        self._loaded_folder = folder
        self.folders.loaded_by(self.calls.url, folder)

    def load_again(self) -> None:
        """See :class:`rlhf.rollouts.server_weights.Reloadable`."""
        assert self._loaded_folder is not None
        self._load_from(self._loaded_folder)

    def _load_from(self, folder: Path) -> None:
        # A folder of its own for each version, because vLLM's prefix cache knows an adapter by its path.
        body = {"lora_name": ADAPTER_NAME, "lora_path": str(folder), "load_inplace": True}
        reply = self.calls.request("POST", "/v1/load_lora_adapter", body, may_be_missing=True, repeats_errors=False)
        if reply.status in NOT_OFFERED:
            raise ServerError(
                f"{reply.address} answered {reply.status}: {reply.excerpt}; start vLLM with --enable-lora and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
            )
