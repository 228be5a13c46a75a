"""New weights for a vLLM server without a disk: over NCCL, or by CUDA IPC to a server on the same GPU.

vLLM is not needed in this process. The two sides agree on names, dtypes and shapes by HTTP, and the bytes of many
tensors are packed into one buffer, cut at the same places on both sides.
"""

import base64
import logging
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.cuda import nccl
from torch.multiprocessing.reductions import reduce_tensor

from rlhf.data.http_client import ServerError
from rlhf.rollouts.server_calls import NOT_OFFERED, ServerCalls
from rlhf.rollouts.server_weights import check_that_all_are_loaded, reset_prefix_cache

logger = logging.getLogger(__name__)

BUFFER_BYTES = 2**30  # of packed tensors; the server learns it at the start
NUM_BUFFERS = 2
# Several servers get their bytes from one device, which has no memory for the buffers of all at the same time.
_SENDING = threading.Lock()
NamedTensors = Sequence[tuple[str, Tensor]]
PostUpdate = Callable[[dict[str, Any]], Any]  # sends the description of some tensors, and waits for the reply


@dataclass(frozen=True)
class Chunk:
    """Tensors that lie one after the other in one buffer.

    Args:
        weights: name and tensor of each.
        packed: their bytes, uint8.
    """

    weights: NamedTensors
    packed: Tensor

    @property
    def sizes(self) -> list[int]:
        """Bytes of each tensor."""
        return [tensor.nbytes for _, tensor in self.weights]


def packed_chunks(weights: NamedTensors, buffer_bytes: int, device: torch.device) -> Iterator[Chunk]:
    """Pack tensors in their order; a chunk ends with the tensor that makes it larger than the buffer, as in vLLM.

    Args:
        weights: name and tensor of each, on any device.
        buffer_bytes: limit that ends a chunk.
        device: of the buffers.
    Yields:
        The chunks.
    """
    chunk: list[tuple[str, Tensor]] = []
    num_bytes = 0
    for position, (name, tensor) in enumerate(weights):
        chunk.append((name, tensor))
        num_bytes += tensor.nbytes
        if num_bytes > buffer_bytes or position == len(weights) - 1:
            yield Chunk(chunk, torch.cat([_bytes_of(tensor, device) for _, tensor in chunk]))
            chunk, num_bytes = [], 0


def _bytes_of(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device).contiguous().view(-1).view(torch.uint8)


def describe(weights: NamedTensors) -> dict[str, Any]:
    """What a server must know of tensors before their bytes come.

    Args:
        weights: name and tensor of each.
    Returns:
        The fields of vLLM's update request.
    """
    return {
        "names": [name for name, _ in weights],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in weights],
        "shapes": [list(tensor.shape) for _, tensor in weights],
    }


class Transport(Protocol):
    """Moves the bytes of weights to a server."""

    name: str

    def connect(self, num_workers: int, post_init: PostUpdate) -> None:
        """Set up the connection.

        Args:
            num_workers: processes of the server that need the weights.
            post_init: sends the description of the connection to the server, and returns when it has joined.
        """
        ...

    def send(self, weights: NamedTensors, post_update: PostUpdate) -> None:
        """Send weights.

        Args:
            weights: name and tensor of each.
            post_update: sends the description of tensors, and returns when the server has them.
        """
        ...


class Communicator(Protocol):
    """A group of this process, at rank 0, and the workers of a server."""

    def broadcast(self, tensor: Tensor) -> None:
        """Send a tensor from rank 0 to all others.

        Args:
            tensor: uint8, on the device of the group.
        """
        ...


class NcclCommunicator:
    """NCCL as PyTorch has it built in.

    Args:
        unique_id: from :func:`torch.cuda.nccl.unique_id`.
        world_size: workers and this process.
        device: of this process.
    """

    def __init__(self, unique_id: bytes, world_size: int, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self._communicator = nccl.init_rank(world_size, unique_id, 0)
            # vLLM's side begins with the same sum of one number.
            nccl.all_reduce([torch.zeros(1, device=device)], comms=[self._communicator])
            torch.cuda.synchronize(device)

    def broadcast(self, tensor: Tensor) -> None:
        """See :class:`Communicator`.

        Args:
            tensor: uint8, on the device.
        """
        with torch.cuda.device(self.device):
            nccl.broadcast([tensor], 0, comms=[self._communicator])


class BroadcastTransport:
    """Broadcasts packed tensors to the workers of a server, which may be on other machines.

    Args:
        device: of the buffers.
        unique_id: names the group, 128 bytes.
        join: forms the group of this process (rank 0) and the workers, given their number in all.
        buffer_bytes: of packed tensors.
    """

    name = "NCCL"

    def __init__(
        self,
        device: torch.device,
        unique_id: bytes,
        join: Callable[[int], Communicator],
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        self.device, self.unique_id, self.join, self.buffer_bytes = device, unique_id, join, buffer_bytes
        self._communicator: Communicator | None = None

    def connect(self, num_workers: int, post_init: PostUpdate) -> None:
        """See :class:`Transport`.

        Args:
            num_workers: of the server.
            post_init: sends the description of the group.
        """
        world_size = num_workers + 1
        init_info = {
            "nccl_unique_id_b64": base64.b64encode(self.unique_id).decode(),
            "rank_offset": 1,
            "world_size": world_size,
            "packed": True,
            "packed_buffer_size_bytes": self.buffer_bytes,
            "packed_num_buffers": NUM_BUFFERS,
        }
        self._communicator = _run_both(lambda: post_init(init_info), lambda: self.join(world_size))

    def send(self, weights: NamedTensors, post_update: PostUpdate) -> None:
        """See :class:`Transport`.

        Args:
            weights: name and tensor of each.
            post_update: sends the description of all tensors.
        """
        _run_both(lambda: post_update(describe(weights)), lambda: self._broadcast(weights))

    def _broadcast(self, weights: NamedTensors) -> None:
        assert self._communicator is not None
        for chunk in packed_chunks(weights, self.buffer_bytes, self.device):
            self._communicator.broadcast(chunk.packed)
        if self.device.type == "cuda":
            # The optimizer may change the weights as soon as this returns.
            torch.cuda.synchronize(self.device)


class IpcTransport:
    """Hands a buffer of this process's GPU to a server on the same GPU. No bytes leave the device.

    Args:
        device: of the buffer, and of the server's only worker.
        buffer_bytes: of packed tensors.
    """

    name = "CUDA IPC"

    def __init__(self, device: torch.device, buffer_bytes: int = BUFFER_BYTES) -> None:
        self.device, self.buffer_bytes = device, buffer_bytes

    def connect(self, num_workers: int, post_init: PostUpdate) -> None:
        """See :class:`Transport`.

        Args:
            num_workers: of the server: 1.
            post_init: sends that tensors are packed.
        Raises:
            ValueError: there are more workers.
        """
        if num_workers != 1:
            raise ValueError(
                f"CUDA IPC reaches one GPU, and the server has {num_workers} workers: start it with "
                """--weight-transfer-config '{"backend": "nccl"}'"""
            )
        post_init({"packed": True})

    def send(self, weights: NamedTensors, post_update: PostUpdate) -> None:
        """See :class:`Transport`.

        Args:
            weights: name and tensor of each.
            post_update: sends the description of the tensors of a buffer, and returns when they are copied.
        """
        gpu = str(torch.cuda.get_device_properties(self.device).uuid)
        for chunk in packed_chunks(weights, self.buffer_bytes, self.device):
            _, rebuild_arguments = reduce_tensor(chunk.packed)
            # The other process reads the buffer on its own stream.
            torch.cuda.synchronize(self.device)
            handles = base64.b64encode(pickle.dumps({gpu: rebuild_arguments})).decode()
            post_update(describe(chunk.weights) | {"tensor_sizes": chunk.sizes, "ipc_handles_pickled": handles})
        torch.cuda.ipc_collect()


class TransferredWeights:
    """Sends weights by vLLM's weight-transfer calls.

    Args:
        calls: to the server.
        transport: that the server was started for.
    """

    def __init__(self, calls: ServerCalls, transport: Transport) -> None:
        self.calls, self.transport = calls, transport
        self._is_connected = False
        self._sent_version: str | None = None

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Send weights, and have the server load them.

        Args:
            weights: by the names of a checkpoint.
            version: of the policy.
        Raises:
            ServerError: the server does not take them.
        """
        named_tensors = list(weights)
        if not self._is_connected:
            num_workers = self.calls.request("GET", "/get_world_size").json()["world_size"]
            with self._one_line_errors():
                self.transport.connect(num_workers, self._post_init)
            self._is_connected = True
        self._send(named_tensors, version)
        if self._sent_version is None:
            check_that_all_are_loaded(self.calls, lambda: self._send(named_tensors, version), "the weights sent")
        self._sent_version = str(version)

    def are_there(self) -> bool:
        """Whether the server has the weights that were sent last.

        Returns:
            False where it was started again, so that it is no member of the connection: sending would never end.
        """
        if self._sent_version is None:
            return True
        reply = self.calls.request("GET", "/weight_info", may_be_missing=True)
        return reply.status in NOT_OFFERED or reply.json().get("weight_version") == self._sent_version

    def _send(self, weights: NamedTensors, version: int) -> None:
        self._post("/start_weight_update", {})
        with _SENDING, self._one_line_errors():
            self.transport.send(weights, self._post_update)
        self._post("/finish_weight_update", {"weight_version": str(version)})
        reset_prefix_cache(self.calls)

    def _post_init(self, info: dict[str, Any]) -> None:
        self._post("/init_weight_transfer_engine", {"init_info": info})

    def _post_update(self, info: dict[str, Any]) -> None:
        self._post("/update_weights", {"update_info": info})

    @contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:
            # No ConnectionError, after which a run could go on with other servers: this side may wait forever for a
            # part of the transfer, and with it the device.
            raise ServerError(f"{error} (weights by {self.transport.name})") from error

    def _post(self, path: str, body: dict[str, Any]) -> None:
        # Never twice: the server would wait for bytes that are not sent again.
        self.calls.request("POST", path, body, repeats_errors=False, tries=1)


def choose_transport(calls: ServerCalls, device: torch.device) -> Transport | None:
    """The way to send weights that both this process and the server have.

    Args:
        calls: to the server.
        device: of the policy.
    Returns:
        None where weights must go through a folder: a policy on a CPU, a server that was not started for weight
        transfer, or one that does not tell its configuration.
    """
    backend = (server_config(calls).get("weight_transfer_config") or {}).get("backend")
    if backend is None:
        return None
    if device.type != "cuda":
        logger.info("%s takes weights by %s, and the policy is on no GPU: they go through a folder", calls.url, backend)
        return None
    if backend == "nccl":
        unique_id = nccl.unique_id()
        return BroadcastTransport(device, unique_id, lambda world_size: NcclCommunicator(unique_id, world_size, device))
    if backend == "ipc":
        return IpcTransport(device)
    logger.warning("%s: weight transfer by %r is not known here: weights go through a folder", calls.url, backend)
    return None


def server_config(calls: ServerCalls) -> dict[str, Any]:
    """vLLM's configuration of a server.

    Args:
        calls: to the server.
    Returns:
        By section; empty if it does not tell (vLLM does in dev mode).
    """
    reply = calls.request("GET", "/server_info?config_format=json", may_be_missing=True)
    if reply.status in NOT_OFFERED:
        return {}
    config = reply.json().get("vllm_config")
    return config if isinstance(config, dict) else {}  # older versions answer with a text


def _run_both(request: Callable[[], Any], work: Callable[[], Any]) -> Any:
    """Run a request and this side's part of a collective operation at once.

    Each waits for the other, so that an error of one must be raised although the other never ends.

    Args:
        request: to the server.
        work: of this process.
    Returns:
        What the work returns.
    """
    request_result, work_result = _in_daemon_thread(request), _in_daemon_thread(work)
    done, _ = wait([request_result, work_result], return_when=FIRST_EXCEPTION)
    for result in done:
        result.result()
    return work_result.result()


def _in_daemon_thread(function: Callable[[], Any]) -> "Future[Any]":
    """Run a function in a thread that does not keep the process from ending, as one of an executor would."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
