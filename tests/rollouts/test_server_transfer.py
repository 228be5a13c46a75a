"""Weights without a disk: what is packed, what is sent in which order, and what is told when it fails.

The group is gloo's, between two processes on a CPU. NCCL itself needs a GPU in each process.
"""

import itertools
import socket
import threading
import time
from dataclasses import replace
from multiprocessing.pool import ThreadPool

import pytest
import torch
from conftest import tiny_model
from fake_vllm import FakeVLLM
from transfer_worker import broadcast, join

from rlhf.data.http_client import Reply
from rlhf.rollouts import LocalEngine, Sampling, ServerEngine, ServerError, served_policy, server_transfer
from rlhf.rollouts.server_calls import ServerCalls
from rlhf.rollouts.server_transfer import (
    BroadcastTransport,
    IpcTransport,
    TransferredWeights,
    choose_transport,
    describe,
    packed_chunks,
)

CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7], [9]]


class GlooCommunicator:
    def __init__(self, world_size, port):
        self.group = join(0, world_size, port, is_host=True)

    def broadcast(self, tensor):
        broadcast(self.group, tensor)


def gloo_transport(buffer_bytes=10_000):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    name = str(port).encode().ljust(128, b"\0")
    return BroadcastTransport(CPU, name, lambda world_size: GlooCommunicator(world_size, port), buffer_bytes)


@pytest.fixture
def server(tokenizer, tmp_path, monkeypatch):
    one = FakeVLLM(tiny_model(), tokenizer, backend="nccl", folder=tmp_path)
    monkeypatch.setattr(served_policy, "choose_transport", lambda calls, device: gloo_transport())
    yield one
    one.shutdown()


def test_tensors_are_packed_in_order_and_cut_as_in_vllm():
    weights = [("a", torch.arange(3.0)), ("b", torch.ones(2, 2, dtype=torch.bfloat16).t()), ("c", torch.ones(5)[::2])]
    chunks = list(packed_chunks(weights, 12, CPU))
    # 12 bytes are not more than the buffer, so that the second tensor ends the first chunk.
    assert [[name for name, _ in chunk.weights] for chunk in chunks] == [["a", "b"], ["c"]]
    assert [chunk.sizes for chunk in chunks] == [[12, 8], [12]]
    assert torch.equal(chunks[0].packed[:12].view(torch.float32), torch.arange(3.0))
    assert torch.equal(chunks[1].packed.view(torch.float32), torch.ones(3))
    assert describe(weights) == {
        "names": ["a", "b", "c"],
        "dtype_names": ["float32", "bfloat16", "float32"],
        "shapes": [[3], [2, 2], [3]],
    }


def test_servers_get_their_bytes_one_after_another():
    class Calls:
        url = "http://host"

        def request(self, method, path, *_, **__):
            return Reply(path, 404 if path == "/weight_checker" else 200, "", b'{"world_size": 1}')

    class Transport:
        under_way, most = 0, 0

        def connect(self, num_workers, post_init):
            pass

        def send(self, weights, post_update):
            Transport.under_way += 1
            Transport.most = max(Transport.most, Transport.under_way)
            time.sleep(0.05)
            Transport.under_way -= 1

    ways = [TransferredWeights(Calls(), Transport()) for _ in range(3)]
    with ThreadPool(3) as pool:
        pool.map(lambda way: way.load([("a", torch.ones(1))], 1), ways)
    assert Transport.most == 1


def test_weights_reach_another_process(server, tokenizer, caplog, monkeypatch):
    monkeypatch.setattr("rlhf.data.http_client.sleep_using_event", lambda event: lambda seconds: None)
    server.start_worker()
    engine = ServerEngine(server.url, "tiny", device=CPU)
    new = tiny_model(seed=7)
    weights = {name: tensor.bfloat16() if "mlp" in name else tensor for name, tensor in new.state_dict().items()}
    engine.update_weights(weights.items(), 5)
    for name, tensor in server.model.state_dict().items():
        assert torch.equal(tensor, weights[name].float()), name
    (_, init), *_ = server.requests
    assert init["init_info"]["packed"] and init["init_info"]["packed_buffer_size_bytes"] == 10_000
    assert server.requests[2][1]["update_info"] == describe(list(weights.items()))
    assert server.requests[3][1] == {"weight_version": "5"}
    round_trip = ["/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache"]
    checked = ["/weight_checker", "/weight_checker", *round_trip, "/weight_checker"]
    assert server.posts == ["/init_weight_transfer_engine", *round_trip, *checked]

    server.posts.clear()
    engine.update_weights(tiny_model(seed=8).state_dict().items(), 6)
    assert server.posts == round_trip
    sampling = Sampling(max_tokens=6, temperature=0)
    expected = LocalEngine(tiny_model(seed=8), tokenizer).generate(PROMPTS, 1, sampling, 0)
    answered = engine.generate(PROMPTS, 1, sampling, 0)
    assert [[one.ids for one in group] for group in answered] == [[one.ids for one in group] for group in expected]
    assert {one.version for group in answered for one in group} == {6}

    # A server that was started again is no member of the connection: sending to it would never end.
    server.start_again()
    server.posts.clear()
    engine.update_weights(tiny_model(seed=8).state_dict().items(), 7)
    assert server.posts[0] == "/init_weight_transfer_engine" and "is set up anew" in caplog.text
    assert engine.generate(PROMPTS, 1, sampling, 0) == [
        [replace(one, version=7) for one in group] for group in answered
    ]
    # Meanwhile it has its original weights, which the run must learn: no copy of the weights is kept.
    assert not engine.has_lost_weights
    server.faults["/v1/completions"] = [server.start_again]
    original = LocalEngine(tiny_model(), tokenizer).generate(PROMPTS, 1, sampling, 0)
    assert engine.generate([PROMPTS[0]], 1, sampling, 0)[0][0].ids == original[0][0].ids
    assert engine.has_lost_weights

    # A tensor that the server does not load keeps its zeros.
    server.overlooked = ("model.norm.weight",)
    engine.forget_weights()
    with pytest.raises(ServerError, match=r"did not load 1 of its \d+ tensors from the weights sent: model.norm"):
        engine.update_weights(new.state_dict().items(), 7)
    engine.close()


@pytest.mark.parametrize("path", ["/init_weight_transfer_engine", "/update_weights"])
def test_a_refusal_is_an_error_although_the_transfer_never_ends(path, server, monkeypatch):
    never = threading.Event()

    class Waiting(GlooCommunicator):
        def __init__(self, world_size, port):
            if path == "/init_weight_transfer_engine":
                never.wait(20)

        def broadcast(self, tensor):
            never.wait(20)

    monkeypatch.setattr(server, "transfer", lambda *request: None)
    monkeypatch.setitem(globals(), "GlooCommunicator", Waiting)
    server.faults = {path: [500]}
    engine = ServerEngine(server.url, "tiny", device=CPU)
    with pytest.raises(ServerError, match=rf"{path} answered 500: .*a fault.* \(weights by NCCL\)"):
        engine.update_weights(tiny_model().state_dict().items(), 1)
    assert server.posts.count(path) == 1
    never.set()
    engine.close()


def test_the_way_is_chosen_by_what_both_sides_have(server, caplog, monkeypatch):
    calls = ServerCalls(ServerEngine(server.url, "tiny")._calls.client)
    monkeypatch.setattr(server_transfer.nccl, "unique_id", lambda: bytes(128))
    gpu = torch.device("cuda")
    ways = {}
    for backend, device in itertools.product(("nccl", "ipc", "sparse_nccl", None), (CPU, gpu)):
        server.backend = backend
        ways[backend, device.type] = type(choose_transport(calls, device))
    none = type(None)
    assert ways == {
        ("nccl", "cpu"): none, ("nccl", "cuda"): BroadcastTransport,
        ("ipc", "cpu"): none, ("ipc", "cuda"): IpcTransport,
        ("sparse_nccl", "cpu"): none, ("sparse_nccl", "cuda"): none, (None, "cpu"): none, (None, "cuda"): none,
    }  # fmt: skip
    assert "weight transfer by 'sparse_nccl' is not known here: weights go through a folder" in caplog.text


def test_without_a_folder_a_cpu_has_no_way(server, monkeypatch):
    monkeypatch.setattr(served_policy, "choose_transport", choose_transport)
    engine = ServerEngine(server.url, "tiny", device=CPU)
    with pytest.raises(ValueError, match=r"takes weights through a folder only: pass rollout_weights_dir"):
        engine.update_weights(tiny_model().state_dict().items(), 1)


@pytest.mark.gpu
def test_nccl_in_a_group_of_one(gpu):
    """The calls of NCCL; two members need two GPUs."""
    if gpu.type != "cuda":
        pytest.skip("NCCL needs a GPU")
    unique_id = server_transfer.nccl.unique_id()
    assert isinstance(unique_id, bytes) and len(unique_id) == 128
    one = server_transfer.NcclCommunicator(unique_id, 1, gpu)
    tensor = torch.arange(1000, device=gpu, dtype=torch.uint8)
    one.broadcast(tensor)
    torch.cuda.synchronize()
    assert torch.equal(tensor.cpu(), torch.arange(1000, dtype=torch.uint8))
