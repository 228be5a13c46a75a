"""A proxy of the environment: never for this machine, and named where a server does not answer."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rlhf.data.http_client import HttpClient, Unavailable
from rlhf.data.proxies import proxy_of

NAMES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture
def proxy(monkeypatch):
    """Sets the variables of the environment; the proxy itself is not there."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("http_proxy", "http://me:secret@127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "inside.example")


@pytest.mark.usefixtures("proxy")
def test_which_requests_take_it():
    assert proxy_of("http://gpu7:8000/v1") == "http://me:secret@127.0.0.1:9"
    for direct in ("http://127.0.0.1:8000", "http://localhost:8000", "http://[::1]:8000", "http://inside.example"):
        assert proxy_of(direct) is None
    assert proxy_of("https://gpu7") is None  # a proxy for http alone


@pytest.mark.usefixtures("proxy")
def test_a_server_on_this_machine_is_asked_directly():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    client = HttpClient(f"http://127.0.0.1:{server.server_port}", tries=1)
    assert client.request("GET", "/health").status == 204
    client.close(), server.shutdown(), server.server_close()


@pytest.mark.usefixtures("proxy")
def test_the_proxy_is_named_without_its_password():
    client = HttpClient("http://gpu7:8000", tries=1)
    with pytest.raises(Unavailable, match=r"does not answer through the proxy http://127\.0\.0\.1:9 of") as e:
        client.request("GET", "/health")
    assert "NO_PROXY=gpu7" in str(e.value) and "secret" not in str(e.value)
    client.close()
