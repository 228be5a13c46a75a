"""Which attention runs, and in which precision the products are, for each type of weights with and without autocast."""

import itertools
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.measuring import Results, Row, Setup, llama, random_rows

TITLE = "Kernels and precisions of a forward pass (2 layers)"
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn::_linear_pointwise")
VOCABULARY = 1000


class Operations(TorchDispatchMode):
    """Counts operators of attention and products of matrices as they reach the device, with their types."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.attention: Counter[str] = Counter()
        self.layers: Counter[str] = Counter()
        self.head: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        tensors = [tensor for tensor in args if torch.is_tensor(tensor)]
        if tensors and name in PRODUCTS:
            # The head is the one product with the whole vocabulary.
            is_head = any(self.vocabulary in tensor.shape for tensor in tensors)
            (self.head if is_head else self.layers)[_short(tensors[-1].dtype)] += 1
        elif tensors and ("attention" in name or "varlen" in name) and "backward" not in name:
            self.attention[f"{name.split('::')[1].strip('_')} {_short(tensors[0].dtype)}"] += 1
        return func(*args, **(kwargs or {}))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{name} × {count}" for name, count in counter.items())


def measure(setup: Setup) -> Results:
    results = Results(setup)
    for dtype, autocast in itertools.product((torch.float32, torch.bfloat16), (True, False)):
        labels = {"weights": _short(dtype), "autocast": "bfloat16" if autocast else "off"}
        results.measure(labels, _forward, setup, dtype, autocast)
    return results


def _forward(setup: Setup, dtype: torch.dtype, autocast: bool) -> Row:
    from rlhf.data import Collator
    from rlhf.logprobs import TokenLoss
    from rlhf.models import Policy, use_segments

    model = llama(setup, dtype, vocab_size=VOCABULARY)
    reason = use_segments(model)
    policy = Policy(model)
    batch = Collator(layout="rows" if reason else "segments")(random_rows([24, 17, 40], VOCABULARY)).to(setup.device)
    loss = TokenLoss(lambda scores: -scores.logps)
    policy(batch, loss)  # the head is verified, kernels are chosen
    with Operations(VOCABULARY) as seen, torch.autocast(setup.device.type, torch.bfloat16, enabled=autocast):
        policy(batch, loss).loss.backward()
    return {
        "layout": reason or "segments",
        "attention": _counted(seen.attention),
        "products of layers": _counted(seen.layers),
        "products of the head": _counted(seen.head),
    }
