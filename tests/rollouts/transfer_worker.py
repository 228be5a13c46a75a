"""The worker of a fake vLLM in a process of its own: receives packed weights over gloo, as vLLM's does over NCCL."""

import json
import math
import sys
from datetime import timedelta

import torch
from torch.distributed import BroadcastOptions, ProcessGroupGloo, TCPStore


def join(rank, world_size, port, is_host=False):
    """The group of a trainer and its workers; the trainer, rank 0, holds the store."""
    store = TCPStore("127.0.0.1", port, world_size, is_host, timedelta(seconds=30))
    return ProcessGroupGloo(store, rank, world_size, timedelta(seconds=30))


def broadcast(group, tensor):
    options = BroadcastOptions()
    options.rootRank = 0
    group.broadcast([tensor], options).wait()


def receive(group, buffer_bytes, names, dtype_names, shapes):
    """vLLM's `packed_nccl_broadcast_consumer`: a buffer ends with the tensor that makes it too large."""
    tensors, chunk, size = {}, [], 0
    for position, (name, dtype_name, shape) in enumerate(zip(names, dtype_names, shapes, strict=True)):
        dtype = getattr(torch, dtype_name)
        chunk.append((name, dtype, shape, math.prod(shape) * dtype.itemsize))
        size += chunk[-1][-1]
        if size > buffer_bytes or position == len(names) - 1:
            packed = torch.empty(size, dtype=torch.uint8)
            broadcast(group, packed)
            parts = packed.split([entry[-1] for entry in chunk])
            for (key, kind, form, _), part in zip(chunk, parts, strict=True):
                tensors[key] = part.contiguous().view(kind).view(form)
            chunk, size = [], 0
    return tensors


def serve():
    """Requests as lines of JSON on stdin; each is answered by a line."""
    group, info = None, {}
    for line in sys.stdin:
        request = json.loads(line)
        if request["path"] == "/init_weight_transfer_engine":
            info = request["body"]["init_info"]
            group = join(info["rank_offset"], info["world_size"], request["port"])
        else:
            tensors = receive(group, info["packed_buffer_size_bytes"], **request["body"]["update_info"])
            torch.save(tensors, request["file"])
        print("done", flush=True)


if __name__ == "__main__":
    serve()
