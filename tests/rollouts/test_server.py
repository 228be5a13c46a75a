"""The engine behind a server: what it sends, and what it refuses."""

import pytest
from conftest import tiny_model
from fake_server import FakeServer

from rlhf.rollouts import Sampling, ServerEngine, ServerError

PROMPTS = [[5, 6, 7], [9]]


@pytest.fixture
def serve(tokenizer, tmp_path):
    servers = []

    def start(**options):
        servers.append(FakeServer(tiny_model(), tokenizer, **options))
        return servers[-1], ServerEngine(servers[-1].url + "/v1/", "tiny", weights_dir=tmp_path)

    yield start
    for server in servers:
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
    with pytest.raises(ConnectionError, match=r"http://127\.0\.0\.1:9: no server answers"):
        ServerEngine("http://127.0.0.1:9", "tiny")


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
    state = tiny_model(seed=2).state_dict()
    assert all((value == state[name]).all() for name, value in server.model.state_dict().items())


def test_weights_are_refused_where_nothing_loads_them(serve):
    server, engine = serve(weights=None)
    with pytest.raises(ServerError, match="offers no way to load weights"):
        engine.update_weights(tiny_model().state_dict().items(), 1)
    assert engine.version == 0
    with pytest.raises(ValueError, match="weights_dir"):
        ServerEngine(server.url, "tiny").update_weights([], 1)
