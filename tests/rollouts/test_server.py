"""The engine behind a server: what it sends, what it repeats, and what it refuses."""

import os
import signal
import socket
import threading
import time
from types import SimpleNamespace

import pytest
from conftest import tiny_model
from fake_server import FakeServer
from tenacity import wait_fixed

from rlhf.data.http_client import Cancelled
from rlhf.rollouts import Sampling, ServerEngine, ServerError

PROMPTS = [[5, 6, 7], [9]]


@pytest.fixture
def serve(tokenizer, tmp_path):
    servers, engines = [], []

    def start(**options):
        servers.append(FakeServer(tiny_model(), tokenizer, **options))
        engines.append(ServerEngine(servers[-1].url + "/v1/", "tiny", weights_dir=tmp_path))
        return servers[-1], engines[-1]

    yield start
    for server, engine in zip(servers, engines, strict=True):
        engine.close()
        server.shutdown()


def test_what_is_sent(serve):
    server, engine = serve()
    sampling = Sampling(temperature=0.5, top_p=0.9, top_k=0, max_tokens=5, min_tokens=2, stop="x")
    engine.generate(PROMPTS, 2, sampling, 0)
    bodies = server.bodies[-4:]
    assert sorted(body["prompt"] for body in bodies) == [[5, 6, 7], [5, 6, 7], [9], [9]]
    assert len({body["seed"] for body in bodies}) == 4
    want = dict(
        model="tiny", n=1, temperature=0.5, top_p=0.9, top_k=-1, max_tokens=5, min_tokens=2, stop=["x"], min_p=0.0,
        repetition_penalty=1.0, return_token_ids=True,
    )  # fmt: skip
    assert all(body[name] == value for body in bodies for name, value in want.items())
    ServerEngine(server.url, "tiny", end_ids=[7]).generate(PROMPTS, 1, sampling, 0)
    assert server.bodies[-1]["stop_token_ids"] == [7] and "stop_token_ids" not in bodies[0]


def test_no_server():
    with pytest.raises(ConnectionError, match=r"http://127\.0\.0\.1:9 does not answer .* refused"):
        ServerEngine("http://127.0.0.1:9", "tiny", startup_timeout=0)
    # A name that nobody knows is not waited for.
    with pytest.raises(ConnectionError, match=r"^http://no-such-host\.invalid does not answer .*check the address"):
        ServerEngine("http://user:hunter2@no-such-host.invalid", "tiny")


def test_another_model_is_served(serve):
    server, _ = serve()
    with pytest.raises(ValueError, match="serves tiny, not 'small'"):
        ServerEngine(server.url, "small")


def test_without_token_ids(serve):
    _, engine = serve(ids=False)
    with pytest.raises(ServerError, match="returns no token ids"):
        engine.generate(PROMPTS, 1, Sampling(max_tokens=2), 0)


def test_other_prompt_ids(serve):
    _, engine = serve(echo=False)
    with pytest.raises(ServerError, match="other prompt ids"):
        engine.generate(PROMPTS, 1, Sampling(max_tokens=2), 0)


@pytest.mark.parametrize("options", [dict(temperature=0.5), dict(top_k=5), dict(top_p=0.5)], ids=str)
def test_raw_log_probs_are_refused_where_they_differ(serve, options):
    _, engine = serve(processed=False)
    engine.generate(PROMPTS, 1, Sampling(max_tokens=2), 0)
    with pytest.raises(ServerError, match="--logprobs-mode processed_logprobs"):
        engine.generate(PROMPTS, 1, Sampling(max_tokens=2, **options), 0)


@pytest.mark.parametrize("weights", ["sglang", "vllm"])
def test_weights_are_loaded_and_old_ones_removed(serve, tmp_path, weights):
    server, engine = serve(weights=weights)
    for version in (1, 2):
        engine.update_weights(tiny_model(seed=version).state_dict().items(), version)
    assert ("/reset_prefix_cache" in server.posts) == (weights == "vllm")
    assert [folder.name for folder in tmp_path.iterdir()] == ["version-2"]
    assert server.posts.count("/weight_checker") == (3 if weights == "vllm" else 1)  # at the first update alone
    state = tiny_model(seed=2).state_dict()
    assert all((value == state[name]).all() for name, value in server.model.state_dict().items())


def test_weights_are_refused_where_nothing_loads_them(serve):
    server, engine = serve(weights=None)
    with pytest.raises(ServerError, match="offers no way to load weights"):
        engine.update_weights(tiny_model().state_dict().items(), 1)
    assert engine.version == 0
    with pytest.raises(ValueError, match="weights_dir"):
        ServerEngine(server.url, "tiny").update_weights([], 1)


# Faults that pass


@pytest.fixture
def waits(monkeypatch):
    """Seconds that would have been waited between tries."""
    waited = []
    monkeypatch.setattr("tenacity.nap.time", SimpleNamespace(sleep=waited.append))
    monkeypatch.setattr("rlhf.data.http_client.sleep_using_event", lambda event: waited.append)
    return waited


def test_requests_are_repeated_and_give_the_same_completions(serve, waits):
    server, engine = serve()
    sampling = Sampling(max_tokens=4)
    want = engine.generate(PROMPTS, 2, sampling, 0)
    server.faults["/v1/completions"] = [503, None, 429, 500]
    assert engine.generate(PROMPTS, 2, sampling, 0) == want
    assert len(waits) == 4 and all(1 <= seconds < 10 for seconds in waits)
    server.faults["/v1/completions"] = [502] * 100
    with pytest.raises(ConnectionError, match=r"/v1/completions: the server answers 502 .*, 12 tries"):
        engine.generate(PROMPTS, 1, sampling, 0)
    server.faults.clear()
    assert engine.generate(PROMPTS, 2, sampling, 0) == want


@pytest.fixture
def python_handles_ctrl_c():
    """A worker of pytest-xdist ignores it."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


def test_ctrl_c_does_not_wait_for_requests(serve, python_handles_ctrl_c):
    server, engine = serve()
    is_asked, goes_on = threading.Event(), threading.Event()

    def hang(choice):
        is_asked.set()
        goes_on.wait()

    def press_ctrl_c():
        is_asked.wait()
        os.kill(os.getpid(), signal.SIGINT)

    server.sees = hang
    threading.Thread(target=press_ctrl_c).start()
    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, 2, Sampling(max_tokens=2), 0)
    goes_on.set()  # only now, so that nothing waited for the request


def test_a_server_that_is_started_again_gets_the_weights_again(serve, waits, caplog):
    server, engine = serve()
    engine.update_weights(tiny_model(seed=7).state_dict().items(), 1)
    sampling = Sampling(max_tokens=6)
    want = engine.generate(PROMPTS, 2, sampling, 0)

    def start_again():
        server.model.load_state_dict(tiny_model().state_dict())

    server.faults["/v1/completions"] = [start_again]
    assert engine.generate(PROMPTS, 2, sampling, 0) == want
    assert "it loads version 1 again" in caplog.text


def test_a_request_that_is_wrong_itself_is_not_repeated(serve, waits):
    server, engine = serve(weights="vllm")
    server.faults = {"/v1/completions": [400], "/collective_rpc": [500]}
    with pytest.raises(ServerError, match="answered 400"):
        engine.generate(PROMPTS[:1], 1, Sampling(max_tokens=2), 0)
    with pytest.raises(ServerError, match="answered 500"):
        engine.update_weights(tiny_model().state_dict().items(), 1)
    assert waits == []


def test_a_server_that_is_still_loading_is_waited_for(tokenizer, caplog, monkeypatch):
    monkeypatch.setattr("rlhf.data.http_client.SECONDS_BETWEEN_LOOKS", 0.01)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    servers = []
    start = threading.Timer(0.2, lambda: servers.append(FakeServer(tiny_model(), tokenizer, port=port)))
    start.start()
    engine = ServerEngine(f"http://127.0.0.1:{port}", "tiny", startup_timeout=60)
    assert engine.generate(PROMPTS, 1, Sampling(max_tokens=2), 0)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "does not answer" in line and "waiting up to 60 s for it" in line
    servers[0].shutdown()


# Sleep


def test_a_server_that_is_asleep_is_woken_at_the_start(serve, caplog):
    server, _ = serve(weights="vllm")
    server.asleep = True
    ServerEngine(server.url, "tiny").generate(PROMPTS, 1, Sampling(max_tokens=2), 0)
    assert "is asleep: waking it" in caplog.text


def test_sleep_is_an_option(serve):
    server, engine = serve(weights="vllm")
    engine.sleep()
    assert not server.asleep
    sleeper = ServerEngine(server.url, "tiny", sleeps=True)
    sleeper.sleep()
    assert server.asleep
    sleeper.wake()
    assert not server.asleep
    with pytest.raises(ServerError, match="cannot sleep: start vLLM with --enable-sleep-mode"):
        ServerEngine(serve(weights=None)[0].url, "tiny", sleeps=True).sleep()


# Weights


def test_a_prefix_cache_that_is_in_use_is_reset_again(serve, waits):
    server, engine = serve(weights="vllm")
    server.faults["/reset_prefix_cache"] = [{"success": False}] * 2
    engine.update_weights(tiny_model(seed=1).state_dict().items(), 1)
    assert len(waits) == 2
    server.faults["/reset_prefix_cache"] = [{"success": False}] * 100
    with pytest.raises(ServerError, match="/reset_prefix_cache fails after 8 tries"):
        engine.update_weights(tiny_model(seed=2).state_dict().items(), 2)


def test_a_tensor_that_is_not_loaded_is_an_error(serve):
    server, engine = serve(weights="vllm")
    server.overlooked = ("model.layers.0.mlp.up_proj.weight",)
    with pytest.raises(ServerError, match=r"did not load 1 of its \d+ tensors from .*version-1: model.layers.0.mlp.up"):
        engine.update_weights(tiny_model(seed=1).state_dict().items(), 1)


def test_folders_of_the_user_stay(serve, tmp_path):
    (tmp_path / "version-1").mkdir()
    (tmp_path / "version-final").mkdir()
    (tmp_path / "version-1" / "notes.txt").write_text("mine")
    _, engine = serve()
    for version in (1, 2):
        engine.update_weights(tiny_model(seed=version).state_dict().items(), version)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["version-1", "version-2", "version-final"]
    assert [file.name for file in (tmp_path / "version-1").iterdir()] == ["notes.txt"]


# Numbers that are no log-probs


@pytest.mark.parametrize("logp", [float("nan"), 5.0, float("-inf"), None])
def test_numbers_that_are_no_log_probs_are_refused(serve, logp):
    server, engine = serve(weights="vllm")

    def spoil(choice):
        if "prompt_logprobs" in choice:
            next(iter(choice["prompt_logprobs"][2].values()))["logprob"] = logp
        else:
            choice["logprobs"]["token_logprobs"][1] = logp

    server.sees = spoil
    with pytest.raises(ServerError, match=rf"the log-prob of token 1 of 4 is {logp}, expected at most 0"):
        engine.generate(PROMPTS[:1], 1, Sampling(max_tokens=4, min_tokens=4), 0)
    with pytest.raises(ServerError, match=rf"the log-prob of position 2, candidate \d of \d is {logp}, expected at"):
        engine.read([[5, 6, 7]], 2)


@pytest.mark.parametrize("body", [{}, {"choices": []}, []])
def test_other_replies_are_refused_in_one_line(serve, body):
    server, engine = serve()
    server.faults["/v1/completions"] = [body]
    with pytest.raises(ServerError, match=r"/v1/completions: expected \{\"choices\": \[…\]\}, got"):
        engine.generate(PROMPTS[:1], 1, Sampling(max_tokens=2), 0)


def in_a_thread(call):
    """The thread, and a list that gets what the call returns or raises."""
    results = []

    def work():
        try:
            results.append(call())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, results


def until(is_so):
    for _ in range(500):
        if is_so():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come about in five seconds")


def test_requests_of_another_thread_are_ended(serve):
    server, engine = serve()
    engine.generate(PROMPTS, 1, Sampling(max_tokens=2), 0)  # connections that are used again have to end too
    server.delay = 30.0
    thread, results = in_a_thread(lambda: engine.generate(PROMPTS, 3, Sampling(max_tokens=2), 0))
    until(lambda: server.under_way == 6)
    with engine.cancelled():
        thread.join(5)
        with pytest.raises(Cancelled, match="/v1/completions: the request was cancelled"):
            engine.generate(PROMPTS, 1, Sampling(max_tokens=2), 0)
    assert not thread.is_alive() and isinstance(results[0], Cancelled)
    until(lambda: server.given_up == 6)  # the server need not sample for nobody
    server.delay = 0.0
    assert engine.generate(PROMPTS, 1, Sampling(max_tokens=2), 0)


def test_a_wait_between_tries_is_ended_too(serve, monkeypatch):
    server, engine = serve()
    monkeypatch.setattr("rlhf.data.http_client.wait_exponential", lambda **_: wait_fixed(60))
    server.faults["/v1/completions"] = [503] * 20
    thread, results = in_a_thread(lambda: engine.generate(PROMPTS, 1, Sampling(max_tokens=2), 0))
    until(lambda: "/v1/completions" in server.posts)
    with engine.cancelled():
        thread.join(5)
        assert isinstance(results[0], Cancelled)


def test_an_error_of_one_request_does_not_stop_those_of_another_thread(serve):
    server, engine = serve()
    server.delay = 0.2
    thread, results = in_a_thread(lambda: engine.generate(PROMPTS, 3, Sampling(max_tokens=2), 0))
    until(lambda: server.under_way == 6)
    server.faults["/v1/completions"] = [400]
    with pytest.raises(ServerError, match="answered 400"):
        engine.generate(PROMPTS, 1, Sampling(max_tokens=2), 0)
    thread.join(5)
    assert [len(completions) for completions in results[0]] == [3, 3]


def test_requests_wait_while_the_server_is_paused(serve):
    server, engine = serve()
    server.weights = "vllm"
    server.delay = 0.05
    assert engine.can_pause()
    engine.pause()
    thread, results = in_a_thread(lambda: engine.generate(PROMPTS, 1, Sampling(max_tokens=2), 0))
    thread.join(0.3)
    assert thread.is_alive()
    engine.update_weights(tiny_model(seed=3).state_dict().items(), 1)
    engine.resume()
    thread.join(5)
    assert len(results[0]) == 2


def test_a_server_that_was_left_paused_is_resumed_at_the_start(serve, caplog):
    server, _ = serve()
    server.weights = "vllm"
    server.goes_on.clear()
    ServerEngine(server.url, "tiny")
    assert server.goes_on.is_set() and "is paused: resuming it" in caplog.text


def test_not_every_server_can_be_paused(serve):
    _, engine = serve()
    assert not engine.can_pause()


def test_a_server_takes_weights_while_all_connections_are_in_use(serve, tmp_path):
    server, _ = serve()
    server.weights, server.delay = "vllm", 0.3
    engine = ServerEngine(server.url, "tiny", weights_dir=tmp_path, concurrency=2)
    thread, results = in_a_thread(lambda: engine.generate(PROMPTS, 4, Sampling(max_tokens=2), 0))
    until(lambda: server.under_way == 2)
    engine.pause()
    engine.update_weights(tiny_model(seed=3).state_dict().items(), 1)
    engine.resume()
    assert engine.generate([[5]], 1, Sampling(max_tokens=2), 0)  # as the check of an update does
    assert thread.is_alive()
    thread.join(10)
    assert len(results[0]) == 2
    engine.close()
