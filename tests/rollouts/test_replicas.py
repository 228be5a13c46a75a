"""Several servers as one engine."""

import threading
import time
from multiprocessing.pool import ThreadPool

import pytest
from conftest import tiny_model
from fake_server import FakeServer

from rlhf.data.http_client import Cancelled
from rlhf.rollouts import Sampling, ServerEngine
from rlhf.rollouts.replicas import ReplicatedEngine
from rlhf.rollouts.server_weights import VersionFolders

PROMPTS = [[5, 6, 7], [9], [40, 50, 60, 70], [8, 9], [11, 12]]
SAMPLING = Sampling(max_tokens=6)


@pytest.fixture
def servers(tokenizer):
    all_servers = [FakeServer(tiny_model(), tokenizer, weights="vllm") for _ in range(3)]
    yield all_servers
    for server in all_servers:
        server.shutdown()


@pytest.fixture
def connect(tmp_path):
    engines = []

    def make(servers):
        folders = VersionFolders(tmp_path)
        options = dict(weights_dir=folders, patience=0.2, concurrency=8)
        engines.append(ReplicatedEngine([ServerEngine(server.url, "tiny", **options) for server in servers]))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def ids(groups):
    return [[one.ids for one in group] for group in groups]


def test_results_do_not_depend_on_the_number_of_servers(servers, connect):
    one, three = connect(servers[:1]), connect(servers)
    expected = one.generate(PROMPTS, 3, SAMPLING, 4)
    for server in servers:
        server.bodies.clear()
    assert ids(three.generate(PROMPTS, 3, SAMPLING, 4)) == ids(expected)
    # The prompts go around, and all completions of a prompt to one server.
    asked = [[body["prompt"] for body in server.bodies] for server in servers]
    assert [sorted(map(tuple, prompts)) for prompts in asked] == [
        sorted(tuple(PROMPTS[row]) for row in rows for _ in range(3)) for rows in ((0, 3), (1, 4), (2,))
    ]
    # A process with a part of the prompts begins with another server.
    assert ids(three.generate([PROMPTS[4]], 3, SAMPLING, 4, [4])) == ids(expected)[4:]
    assert [len(server.bodies) for server in servers] == [6, 9, 3]
    assert three.generate([], 3, SAMPLING, 4) == []


def test_weights_are_saved_once_and_loaded_by_all(servers, connect, tmp_path):
    engine = connect(servers)
    for version in (1, 2):
        engine.update_weights(tiny_model(seed=version).state_dict().items(), version)
        assert [path.name for path in tmp_path.iterdir()] == [f"version-{version}"]
    expected = tiny_model(seed=2).state_dict()
    for server in servers:
        assert all(tensor.equal(expected[name]) for name, tensor in server.model.state_dict().items())
    assert {one.version for group in engine.generate(PROMPTS, 1, SAMPLING, 0) for one in group} == {2}


def test_weights_are_sent_while_another_thread_samples(servers, connect):
    engine = connect(servers[:2])
    has_sampled, is_updated = threading.Event(), threading.Event()

    def hold(choice):
        has_sampled.set()
        assert is_updated.wait(10)

    for server in servers:
        server.sees = hold
    with ThreadPool(1) as pool:
        completions = pool.apply_async(engine.generate, (PROMPTS, 1, SAMPLING, 0))
        assert has_sampled.wait(10)
        engine.update_weights(tiny_model(seed=1).state_dict().items(), 1)
        assert not completions.ready()
        is_updated.set()
        assert len(completions.get(10)) == len(PROMPTS)


def test_a_server_that_dies_is_named_and_comes_back(servers, connect, tokenizer, tmp_path, caplog):
    engine = connect(servers)
    engine.update_weights(tiny_model(seed=1).state_dict().items(), 1)
    expected = engine.generate(PROMPTS, 2, SAMPLING, 0)
    gone = servers[1]
    gone.shutdown()
    gone.server_close()
    gone.faults["/v1/completions"] = [None] * 99  # also for connections that are open
    assert ids(engine.generate(PROMPTS, 2, SAMPLING, 0)) == ids(expected)
    assert f"{gone.url}/v1/completions: the server does not answer" in caplog.text
    assert "2 of 3 servers go on without it" in caplog.text
    # Another process of the run, which has not noticed, is told.
    lost_urls = engine.lost_urls
    engine.leave_out([])
    assert lost_urls == [gone.url] and len(engine.working) == 3
    engine.leave_out(lost_urls)
    assert engine.lost_urls == lost_urls
    engine.update_weights(tiny_model(seed=2).state_dict().items(), 2)

    # Started again with its original weights: it gets those of the next update.
    servers[1] = FakeServer(tiny_model(), tokenizer, weights="vllm", port=gone.server_port)
    engine.update_weights(tiny_model(seed=3).state_dict().items(), 3)
    assert f"{gone.url} answers again, and takes part from now on" in caplog.text
    engine.generate(PROMPTS, 2, SAMPLING, 0)
    assert servers[1].bodies
    assert [path.name for path in tmp_path.iterdir()] == ["version-3"]

    for server in servers:
        server.faults["/v1/completions"] = [None] * 99
    with pytest.raises(ConnectionError, match=r"none of the 3 servers answers; the last: http://127"):
        engine.generate(PROMPTS, 2, SAMPLING, 0)
    # A thread that comes later finds no server at fault, because none is left.
    with pytest.raises(ConnectionError, match=r"none of the 3 servers answers; the last: http://127"):
        engine.generate(PROMPTS, 2, SAMPLING, 0)


def test_a_server_that_comes_back_samples_only_with_the_new_weights(servers, connect):
    engine = connect(servers[:2])
    engine.leave_out([servers[1].url])
    working_meanwhile = []
    for server in servers[:2]:
        load = server.load
        server.load = lambda folder, load=load: working_meanwhile.append(engine.working) or load(folder)
    engine.update_weights(tiny_model(seed=1).state_dict().items(), 1)
    assert all(working == engine.engines[:1] for working in working_meanwhile) and len(working_meanwhile) == 4
    assert engine.working == engine.engines


def test_requests_to_all_servers_are_ended(servers, connect):
    engine = connect(servers)
    engine.generate(PROMPTS, 1, SAMPLING, 0)
    for server in servers:
        server.delay = 30.0
    results = []

    def generate():
        try:
            engine.generate(PROMPTS, 2, SAMPLING, 0)
        except OSError as error:
            results.append(error)

    thread = threading.Thread(target=generate)
    thread.start()
    while sum(server.under_way for server in servers) < 10:
        time.sleep(0.01)
    with engine.cancelled():
        thread.join(10)
    assert isinstance(results[0], Cancelled) and engine.working == engine.engines  # no server is at fault
    assert engine.can_pause()
    engine.pause()
    assert not any(server.goes_on.is_set() for server in servers)
    engine.resume()
    assert all(server.goes_on.is_set() for server in servers)
