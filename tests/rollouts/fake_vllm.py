"""The fake server with what vLLM adds for reinforcement learning: weight transfer, and adapters loaded at run time."""

import base64
import copy
import json
import subprocess
import sys
from pathlib import Path

import torch
from fake_server import FakeServer, Handler
from peft import PeftModel

from rlhf.rollouts import LocalEngine


class FakeVLLM(FakeServer):
    """``backend`` of the weight transfer, or None; ``max_lora_rank``, or 0; ``worker``: the process that receives."""

    def __init__(self, model, tokenizer, *, backend=None, max_lora_rank=0, folder=None, **options):
        super().__init__(model, tokenizer, weights="vllm", **options)
        self.RequestHandlerClass = VLLMHandler
        self.backend, self.max_lora_rank, self.folder = backend, max_lora_rank, folder
        self.base, self.worker, self.requests = copy.deepcopy(model), None, []
        self.weight_version = "default"

    def start_again(self):
        """As a server that died: with its original weights, and a member of no connection."""
        with self.lock:
            self.model = copy.deepcopy(self.base)
            self.engine = LocalEngine(self.model, self.engine.tokenizer)
            self.weight_version = "default"

    def start_worker(self):
        command = [sys.executable, str(Path(__file__).parent / "transfer_worker.py")]
        self.worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask_worker(self, **request):
        self.worker.stdin.write(json.dumps(request) + "\n")
        self.worker.stdin.flush()
        assert self.worker.stdout.readline() == "done\n"

    def shutdown(self):
        super().shutdown()
        if self.worker is not None:
            self.worker.stdin.close()
            self.worker.wait(10)

    def config(self):
        transfer = None if self.backend is None else {"backend": self.backend}
        lora = {"max_lora_rank": self.max_lora_rank} if self.max_lora_rank else None
        return {"vllm_config": {"weight_transfer_config": transfer, "lora_config": lora}}

    def load_adapter(self, body):
        assert body["load_inplace"] is True
        adapted = PeftModel.from_pretrained(copy.deepcopy(self.base), body["lora_path"]).merge_and_unload()
        with self.lock:
            self.model, self.engine = adapted, LocalEngine(adapted, self.engine.tokenizer)

    def transfer(self, path, body):
        self.requests.append((path, body))
        self.weight_version = body.get("weight_version", self.weight_version)
        if path == "/init_weight_transfer_engine":
            port = int(base64.b64decode(body["init_info"]["nccl_unique_id_b64"]).rstrip(b"\0"))
            self.ask_worker(path=path, body=body, port=port)
        elif path == "/update_weights":
            file = str(self.folder / "received.pt")
            self.ask_worker(path=path, body=body, file=file)
            received = torch.load(file)
            with self.lock:
                self.model.load_state_dict(
                    {k: v for k, v in received.items() if k not in self.overlooked}, strict=False
                )


class VLLMHandler(Handler):
    TRANSFER = ("/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update")

    def do_GET(self):
        if self.path == "/server_info?config_format=json":
            self.reply(self.server.config())
        elif self.path == "/weight_info":
            self.reply({"weight_version": self.server.weight_version})
        elif self.path == "/get_world_size":
            self.reply({"world_size": 1})
        elif self.path == "/v1/load_lora_adapter" and self.server.max_lora_rank:
            self.reply({"detail": "Method Not Allowed"}, 405)
        else:
            super().do_GET()

    def answer(self):
        mine = self.path in self.TRANSFER or (self.path == "/v1/load_lora_adapter" and self.server.max_lora_rank)
        if not mine or self.server.faults.get(self.path):
            return super().answer()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
        self.server.posts.append(self.path)
        if self.path == "/v1/load_lora_adapter":
            self.server.load_adapter(body)
        else:
            self.server.transfer(self.path, body)
        self.reply({"message": "done"})
