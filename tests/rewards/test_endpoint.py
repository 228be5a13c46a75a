"""A reward over HTTP, against a real server on this machine."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from rlhf.rewards import HttpReward, RewardError, RewardSet, load_reward


@pytest.fixture
def server(monkeypatch):
    """A server whose ``answer(payload)`` gives status and body; ``seen`` is what it was asked."""
    waits = []
    monkeypatch.setattr("tenacity.nap.time", SimpleNamespace(sleep=waits.append))
    monkeypatch.setattr("rlhf.data.http_client.sleep_using_event", lambda event: waits.append)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            http.seen.append(payload)
            http.paths.append(self.path), http.headers.append(self.headers)
            status, body = http.answer(payload)
            text = (body if isinstance(body, str) else json.dumps(body)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.seen, http.paths, http.headers, http.waits = [], [], [], waits
    http.answer = lambda payload: (200, {"rewards": [len(c) for c in payload["completions"]]})
    http.url = f"http://127.0.0.1:{http.server_port}/score"
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    yield http
    http.shutdown()
    http.server_close()


PROMPTS, COMPLETIONS = ["p", "q", "r"], ["a", "bb", "ccc"]


def test_what_is_sent_and_what_comes_back(server):
    reward = load_reward(server.url)
    assert isinstance(reward, HttpReward) and reward.__name__ == server.url.removeprefix("http://")
    scored = RewardSet([reward], [0.5])(PROMPTS, COMPLETIONS, [[1]] * 3, trainer_state=object(), answer=[1, None, "x"])
    assert scored.rewards.tolist() == [0.5, 1.0, 1.5]
    assert server.seen == [{"prompts": PROMPTS, "completions": COMPLETIONS, "answer": [1, None, "x"]}]


def test_batches_and_conversations(server):
    turns = [[{"role": "assistant", "content": c}] for c in COMPLETIONS]
    server.answer = lambda payload: (200, {"rewards": [len(c[0]["content"]) for c in payload["completions"]]})
    assert HttpReward(server.url, batch_size=2)(prompts=PROMPTS, completions=turns, n=[1, 2, 3]) == [1, 2, 3]
    assert [payload["n"] for payload in server.seen] == [[1, 2], [3]]


def test_null_does_not_apply(server):
    server.answer = lambda payload: (200, {"rewards": [None, 1.0, 0.0]})
    assert RewardSet([server.url])(PROMPTS, COMPLETIONS).usable.tolist() == [False, True, True]


def test_an_overloaded_server_is_asked_again(server):
    answers = iter([(503, "busy"), (429, "slow down"), (200, {"rewards": [1, 2, 3]})])
    server.answer = lambda payload: next(answers)
    assert HttpReward(server.url)(PROMPTS, COMPLETIONS) == [1, 2, 3]
    assert 1 <= server.waits[0] < 2 <= server.waits[1] < 3
    server.answer = lambda payload: (500, "broken")
    with pytest.raises(ConnectionError, match=r"the reward server answers 500 Internal Server Error 'broken', 3 tries"):
        HttpReward(server.url, retries=2)(PROMPTS, COMPLETIONS)


def test_a_sample_that_the_server_refuses_is_named(server):
    server.answer = lambda payload: (422, "no") if "bb" in payload["completions"] else (200, {"rewards": [1.0]})
    with pytest.raises(RewardError, match=r"sample 2 of 3 \(prompt 'q', completion 'bb'\): .* 422 .*'no'"):
        RewardSet([server.url])(PROMPTS, COMPLETIONS)


@pytest.mark.parametrize(
    "body, said",
    [
        ({"rewards": [1.0]}, "1 rewards for 3 completions"),
        ({"scores": [1, 2, 3]}, 'expected {"rewards": […]}, got \'{"scores"'),
        ({"rewards": 1.0}, 'expected {"rewards": […]}'),
        ([1, 2, 3], 'expected {"rewards": […]}'),
        ("<html>", "got '<html>'"),
    ],
)
def test_answers_that_were_not_agreed(body, said, server):
    server.answer = lambda payload: (200, body)
    with pytest.raises(ValueError) as raised:
        HttpReward(server.url)(PROMPTS, COMPLETIONS)
    assert said in str(raised.value) and server.url in str(raised.value)


def test_a_column_that_is_no_json(server):
    with pytest.raises(ValueError, match="a column cannot be sent as JSON"):
        HttpReward(server.url)(PROMPTS, COMPLETIONS, thing=[object()] * 3)


def test_the_server_is_checked_at_the_start(server):
    reward = HttpReward(server.url)
    reward.check({})
    assert server.seen == [{"prompts": [], "completions": []}]
    server.answer = lambda payload: (500, "an empty batch!")  # which says nothing about others
    reward.check({})
    server.answer = lambda payload: (503, "busy")  # for now
    reward.check({})
    assert server.waits == []
    server.answer = lambda payload: (404, "")
    with pytest.raises(ValueError, match="the reward server answers 404 Not Found ''; check the address"):
        RewardSet([reward]).check({"prompt": "p"})
    server.answer = lambda payload: (200, "hello")
    with pytest.raises(ValueError, match="got 'hello'"):
        reward.check({})


def test_no_server():
    reward = HttpReward("http://127.0.0.1:9/score", retries=0)
    with pytest.raises(ConnectionError, match=r"http://127\.0\.0\.1:9/score: the reward server does not answer"):
        RewardSet([reward]).check({})
    with pytest.raises(ConnectionError, match=r"does not answer .*, 1 tries"):
        reward(PROMPTS, COMPLETIONS)


def test_addresses_and_options_are_checked():
    for url in ("http://host:port/score", "https:///score"):
        with pytest.raises(ValueError, match=f"{url}: no address"):
            load_reward(url)
    with pytest.raises(ValueError, match=r"^http://host/score: no address"):
        load_reward("http://user:pass/word@host/score")  # read as the host "user" and the port "pass"
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        HttpReward("http://localhost", batch_size=0)


def test_a_password_in_an_address_is_used_and_shown_nowhere(server, caplog):
    url = server.url.replace("http://", "http://user:hunter2@") + "?token=t0ken"
    caplog.set_level("DEBUG")
    answers = iter([(503, "busy"), (200, {"rewards": [1, 2, 3]}), (422, "no"), (200, "hello")])
    server.answer = lambda payload: next(answers)
    reward = load_reward(url)
    rewards = RewardSet([reward])
    assert rewards(PROMPTS, COMPLETIONS).rewards.tolist() == [1, 2, 3]
    assert server.paths[-1] == "/score?token=t0ken" and server.headers[-1]["Authorization"].startswith("Basic ")
    shown = [caplog.text, *rewards.names, reward.url]
    for _ in range(2):
        with pytest.raises(ValueError, match="/score: ") as raised:
            reward(PROMPTS, COMPLETIONS)
        shown.append(str(raised.value))
    for spec in (f"http_reward('{url}', color=1)", f"http_reward('{url}', x)", f"http_revard('{url}')"):
        with pytest.raises(ValueError) as raised:
            load_reward(spec)
        shown.append(str(raised.value))
    assert "trying again" in caplog.text and "/score" in shown[-1]
    assert not any(secret in text for text in shown for secret in ("user", "hunter2", "t0ken"))


def test_a_reply_without_end_is_refused(server, monkeypatch):
    monkeypatch.setattr("rlhf.rewards.endpoint.LARGEST_REPLY", 1000)
    server.answer = lambda payload: (200, "[" * 5000)
    with pytest.raises(OSError, match=r"/score: the reply is larger than 1000 bytes"):
        HttpReward(server.url)(PROMPTS, COMPLETIONS)
