"""A completion server in the form of vLLM's, around a tiny model: each option off the plain one is a way to differ."""

import hashlib
import json
import select
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from safetensors.torch import load_file

from rlhf.rollouts import LocalEngine, Sampling


class FakeServer(ThreadingHTTPServer):
    """``weights``: None, "sglang" or "vllm", the way in which weights are loaded.

    ``faults``: by path, statuses or bodies that it answers first; ``overlooked``: tensors that it does not load.
    ``delay``: seconds for a completion; ``given_up``: completions whose client went away meanwhile.
    """

    daemon_threads = True
    request_queue_size = 128  # an engine opens 64 connections at once

    def __init__(self, model, tokenizer, *, ids=True, processed=True, weights="sglang", echo=True, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.model, self.engine, self.lock = model, LocalEngine(model, tokenizer), threading.Lock()
        self.ids, self.processed, self.weights, self.echo = ids, processed, weights, echo
        self.bodies, self.posts, self.asleep = [], [], False
        self.delay, self.under_way, self.given_up = 0.0, 0, 0
        self.context_length = None  # it does not tell
        self.goes_on = threading.Event()  # not paused
        self.goes_on.set()
        self.faults, self.overlooked, self.sees = {}, (), lambda choice: None
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def read(self, body):
        """As vLLM tells a prompt: the k likeliest at each place, and what is there."""
        with self.lock, torch.no_grad():
            self.model.eval()
            logps = self.model(torch.tensor([body["prompt"]])).logits[0].log_softmax(-1)
        places = [None]
        for row, token in zip(logps, body["prompt"][1:], strict=False):
            best = {*row.topk(body["prompt_logprobs"]).indices.tolist(), token}
            places.append({str(v): {"logprob": float(row[v]), "rank": 1, "decoded_token": "…"} for v in best})
        return {"choices": [{"index": 0, "text": "…", "finish_reason": "length", "prompt_logprobs": places}]}

    def complete(self, body):
        sampling = Sampling(
            **{k: body[k] for k in ("temperature", "top_p", "min_tokens", "max_tokens") if k in body},
            top_k=max(0, body.get("top_k", 0)),
            stop=tuple(body.get("stop", ())),
        )
        with self.lock:
            ((one,),) = self.engine.generate([body["prompt"]], 1, sampling, body.get("seed", 0))
            with torch.no_grad():
                self.model.eval()
                logits = self.model(torch.tensor([body["prompt"] + one.ids])).logits[0, len(body["prompt"]) - 1 : -1]
        raw = logits.log_softmax(-1)
        shown = (logits / sampling.temperature).log_softmax(-1) if sampling.temperature and self.processed else raw
        logps = one.logps if self.processed else raw.gather(1, torch.tensor(one.ids)[:, None]).squeeze(1).tolist()
        top = [{str(int(i)): float(v) for v, i in zip(*row.topk(2), strict=True)} for row in shown]
        choice = {"index": 0, "text": "…", "finish_reason": one.finish_reason}
        choice["logprobs"] = {"token_logprobs": logps, "top_logprobs": top}
        if self.ids and body.get("return_token_ids"):
            choice |= {"token_ids": one.ids, "prompt_token_ids": body["prompt"] if self.echo else body["prompt"][1:]}
        return {"choices": [choice]}

    def load(self, folder):
        found = {k: v for file in Path(folder).glob("*.safetensors") for k, v in load_file(file).items()}
        with self.lock:
            for name in self.overlooked:
                found.pop(name)
            self.model.load_state_dict(found, strict=False)  # raises where shapes differ

    def checksums(self):
        weights = self.model.named_parameters()
        return {name: hashlib.sha256(weight.detach().numpy().tobytes()).hexdigest() for name, weight in weights}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer

    def reply(self, value, status=200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def fails(self):
        """Answer with the next fault of this path, if one is left."""
        left = self.server.faults.get(self.path)
        if not left:
            return False
        fault = left.pop(0)
        if fault is None or callable(fault):
            self.close_connection = True  # no answer at all
            if fault:
                fault()
        else:
            self.reply({"detail": "a fault"}, fault) if isinstance(fault, int) else self.reply(fault)
        return True

    def waits(self):
        """As long as a completion takes, and as long as the server is paused; False if the client goes away."""
        server = self.server
        with server.lock:
            server.under_way += 1
        deadline, has_ended = time.monotonic() + server.delay, []
        # A pause ends the delay: what is left to sample comes after it.
        while not has_ended and time.monotonic() < deadline and server.goes_on.is_set():
            has_ended, _, _ = select.select([self.connection], [], [], min(0.02, server.delay))
        is_here = not has_ended or bool(self.connection.recv(1, socket.MSG_PEEK))
        server.goes_on.wait(10)
        with server.lock:
            server.under_way -= 1
            server.given_up += not is_here
        self.close_connection = not is_here
        return is_here

    def do_GET(self):
        if self.fails():
            return
        if self.path == "/v1/models":
            self.reply({"data": [{"id": "tiny", "max_model_len": self.server.context_length}]})
        elif self.path == "/is_paused" and self.server.weights == "vllm":
            self.reply({"is_paused": not self.server.goes_on.is_set()})
        elif self.path == "/is_sleeping" and self.server.weights == "vllm":
            self.reply({"is_sleeping": self.server.asleep})
        else:
            self.reply({"detail": "Not Found"}, 404)

    def do_POST(self):
        try:
            self.answer()
        except RuntimeError as error:
            self.reply({"error": str(error)}, 500)

    def answer(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
        self.server.posts.append(self.path)
        if self.fails():
            return
        if self.path in ("/sleep?level=1", "/wake_up") and self.server.weights == "vllm":
            self.server.asleep = self.path != "/wake_up"
            self.reply({})
        elif self.server.asleep and self.path in (
            "/v1/completions",
            "/collective_rpc",
        ):  # its weights are not on the device: nothing to answer with, nothing to write into
            self.reply({"detail": "asleep"}, 503)
        elif self.path == "/v1/completions":
            self.server.bodies.append(body)
            reads = "prompt_logprobs" in body and self.server.weights == "vllm"
            if not self.waits():
                return
            reply = self.server.read(body) if reads else self.server.complete(body)
            self.server.sees(reply["choices"][0])
            self.reply(reply)
        elif self.path == "/tokenize" and self.server.weights == "vllm":
            ids = self.server.engine.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
            self.reply({"tokens": ids, "count": len(ids)})
        elif self.path == "/update_weights_from_disk" and self.server.weights == "sglang":
            self.server.load(body["model_path"])
            self.reply({"success": True, "message": ""})
        elif self.path == "/collective_rpc" and self.server.weights == "vllm":
            assert body["method"] == "reload_weights"
            self.server.load(body["kwargs"]["weights_path"])
            self.reply({"results": [None]})
        elif self.path.partition("?")[0] in ("/pause", "/resume") and self.server.weights == "vllm":
            self.server.goes_on.set() if self.path == "/resume" else self.server.goes_on.clear()
            self.reply({})
        elif self.path == "/reset_prefix_cache" and self.server.weights == "vllm":
            self.reply({"success": True})
        elif self.path == "/weight_checker" and self.server.weights == "vllm":
            if body["action"] == "reset":
                with self.server.lock, torch.no_grad():
                    for weight in self.server.model.parameters():
                        weight.zero_()
            self.reply({"checksums": self.server.checksums()})
        else:
            self.reply({"detail": "Not Found"}, 404)

    def log_message(self, *args):
        pass
