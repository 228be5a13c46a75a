"""Fixtures: tiny models made from configs and a small trained tokenizer. No network, no checkpoint."""

import atexit
import json
import os
import shutil
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_HOME"] = tempfile.mkdtemp()  # the user's caches stay as they are
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

# Without a GPU the kernels run in Triton's interpreter, which must be on before its first import.
os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))

from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
disable_progress_bars()
torch.set_num_threads(1)  # tiny models: a second thread only waits

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "the a cat dog bird house tree river is was big small red blue green says hello world yes no why how".split()  # noqa: SIM905


def sentences(seed: int, count: int, shortest: int = 3, longest: int = 9) -> list[str]:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=g).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=g).tolist()) for n in lengths]


def small_tokenizer():
    bpe = Tokenizer(models.BPE(unk_token=None))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|im_end|>", "<|im_start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=bpe.pre_tokenizer.alphabet(), show_progress=False
    )  # fmt: skip
    bpe.train_from_iterator([*sentences(0, 200), "user assistant system"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def pytest_addoption(parser):
    parser.addoption("--device", help="where the tests marked gpu run: cpu checks the tests themselves")


@pytest.fixture(scope="session")
def gpu(request):
    """The device of the tests marked gpu; they are skipped where there is none."""
    chosen = request.config.getoption("--device")
    if chosen is None and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device(chosen or "cuda")


@pytest.fixture(scope="session")
def tokenizer():
    return small_tokenizer()


_SMALL = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, initializer_range=0.2,
)  # fmt: skip
ARCHITECTURES = {
    "llama": dict(model_type="llama", **_SMALL),
    "qwen2": dict(model_type="qwen2", tie_word_embeddings=True, **_SMALL),
    "qwen3": dict(model_type="qwen3", head_dim=8, **_SMALL),
    "gpt2": dict(model_type="gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2),
    "gemma2": dict(model_type="gemma2", head_dim=8, final_logit_softcapping=3.0, query_pre_attn_scalar=8, **_SMALL),
    "granite": dict(model_type="granite", logits_scaling=4.0, **_SMALL),
    "cohere": dict(model_type="cohere", logit_scale=0.25, **_SMALL),
    "mixtral": dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, **_SMALL),
    "qwen3_moe": dict(
        model_type="qwen3_moe", head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, **_SMALL
    ),
    "phi": dict(model_type="phi", **_SMALL),  # a head with a bias
}
# Its attention cannot be replaced: padded rows, and `model.generate`.
ROWS_ONLY = {"stablelm": dict(model_type="stablelm", **_SMALL)}


def tiny_model(name: str = "llama", vocab_size: int = 330, seed: int = 0, **changes):
    torch.manual_seed(seed)
    ids = dict(pad_token_id=0, bos_token_id=None, eos_token_id=0)
    config = AutoConfig.for_model(**{**(ARCHITECTURES | ROWS_ONLY)[name], **ids, "vocab_size": vocab_size, **changes})
    for key in ("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout"):
        if hasattr(config, key):
            setattr(config, key, 0.0)
    return AutoModelForCausalLM.from_config(config)


def close(got, want, dtype=torch.float32):
    """The one place that owns tolerances."""
    got, want = (torch.as_tensor(t, dtype=torch.float64) for t in (got, want))
    rtol, atol = {torch.float64: (1e-9, 1e-9), torch.float32: (1e-5, 1e-5), torch.bfloat16: (2e-2, 2e-2)}[dtype]
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def sft_rows():
    return Dataset.from_list(
        [{"prompt": p, "completion": " " + c} for p, c in zip(sentences(1, 48), sentences(2, 48), strict=True)]
    )


@pytest.fixture(scope="session")
def preference_rows():
    trios = zip(sentences(3, 48), sentences(4, 48), sentences(5, 48), strict=True)
    return Dataset.from_list([{"prompt": p, "chosen": " " + c, "rejected": " " + r} for p, c, r in trios])


@pytest.fixture(scope="session")
def unpaired_rows():
    trios = zip(sentences(6, 48), sentences(7, 48), range(48), strict=True)
    return Dataset.from_list([{"prompt": p, "completion": " " + c, "label": i % 3 != 0} for p, c, i in trios])


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_files(tmp_path_factory, sft_rows, preference_rows, unpaired_rows):
    folder = tmp_path_factory.mktemp("data")
    for name, rows in (("sft", sft_rows), ("preferences", preference_rows), ("unpaired", unpaired_rows)):
        write_rows(folder / f"{name}.jsonl", rows)
    return folder
