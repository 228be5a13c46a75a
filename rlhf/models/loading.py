"""Models and tokenizers from a folder or the hub."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def load_model(name_or_path: str, **kwargs: Any) -> PreTrainedModel:
    """A causal LM in the dtype of its checkpoint (``dtype="float32"`` and others override it).

    A folder that holds a PEFT adapter is loaded with its base model and merged, so that what comes next
    (another adapter, a frozen reference) starts from the tuned weights.

    Raises:
        FileNotFoundError: a path that is no folder, or a folder without a model.
        ValueError: neither a folder here nor a model on the hub.
    """
    kwargs.setdefault("dtype", "auto")
    name = resolve(name_or_path)
    adapter = adapter_config(name)
    if adapter is not None:
        return merged(load_model(str(adapter.base_model_name_or_path), **kwargs), name)
    with loading(name_or_path, "a causal LM"):
        return AutoModelForCausalLM.from_pretrained(name, **kwargs)


def adapter_config(name: str) -> PeftConfig | None:
    """Of a folder that holds an adapter alone; None for a model.

    Raises:
        FileNotFoundError: a folder with neither.
    """
    folder = Path(name)
    if not folder.is_dir() or (folder / "config.json").exists():
        return None
    if (folder / "adapter_config.json").exists():
        return PeftConfig.from_pretrained(name)
    raise FileNotFoundError(f"{name}: the folder holds no model (no config.json)")


def merged(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """``model`` with the adapter in the folder ``adapter`` added to its weights, which can all be trained."""
    logger.info("%s: an adapter; merging it into %s", adapter, model.config._name_or_path)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().requires_grad_(True)  # PEFT froze the base


@contextmanager
def loading(name_or_path: str, kind: str) -> Iterator[None]:
    """Say in one line what cannot be loaded."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{name_or_path}: cannot be loaded as {kind} ({first})") from error


def resolve(name_or_path: str) -> str:
    """A folder that exists, or what may be a name on the hub; raises for a path to nothing."""
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return str(folder)
    if folder.exists() or name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        raise FileNotFoundError(f"{name_or_path}: no such model folder")
    return name_or_path


def load_tokenizer(
    name_or_path: str,
    chat_template_path: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer, with the chat template of a ``.jinja`` file or of another model's folder where one is given.

    Args:
        revision, trust_remote_code: as for the model whose tokenizer it is.
    Raises:
        ValueError: no tokenizer there.
    """
    name = resolve(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **hub_kwargs(revision, trust_remote_code))
    except (OSError, ValueError) as error:
        raise ValueError(f"{name_or_path}: no tokenizer found there; copy the base model's files in") from error
    if chat_template_path is not None:
        path = Path(chat_template_path).expanduser()
        if path.is_file():
            tokenizer.chat_template = path.read_text(encoding="utf-8")
        else:
            tokenizer.chat_template = load_tokenizer(chat_template_path).chat_template
    return tokenizer


def hub_kwargs(revision: str | None, trust_remote_code: bool | None) -> dict[str, Any]:
    """Those of both that are given."""
    given = {"revision": revision, "trust_remote_code": trust_remote_code}
    return {name: value for name, value in given.items() if value is not None}


def vocabulary_size(model: nn.Module) -> int:
    """Rows of the input embeddings, also under an adapter."""
    module: Any = model.get_input_embeddings()  # type: ignore[operator]
    for name in ("base_layer", "original_module"):
        module = getattr(module, name, module)
    return int(module.weight.size(0))


def fit_embeddings(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the embeddings grow by tokens that were added to the tokenizer.

    New rows are drawn about the mean of the others (transformers' ``resize_token_embeddings``).
    """
    size = vocabulary_size(model)
    added = [index for index in tokenizer.added_tokens_decoder if index >= size]
    if not added or len(tokenizer) - size != len(added):
        return
    logger.info(
        "the tokenizer has %d more tokens than the model: its embeddings grow to %d", len(added), len(tokenizer)
    )
    model.resize_token_embeddings(len(tokenizer))  # type: ignore[operator]


def add_adapter(model: nn.Module, peft_config: PeftConfig) -> nn.Module:
    """Freeze ``model`` and put the adapter on it."""
    if isinstance(peft_config, LoraConfig) and peft_config.target_modules is None:
        peft_config.target_modules = "all-linear"
    return get_peft_model(model, peft_config)


def add_adapter_beside(model: PreTrainedModel, folder: str, name: str, peft_config: PeftConfig) -> PeftModel:
    """Put the adapter in ``folder`` on ``model``, frozen, as ``name``; and a new one, ``"default"``, which learns.

    Raises:
        FileNotFoundError: no such folder. ValueError: it holds no adapter, or one that does not fit ``model``.
    """
    config = adapter_config(resolve(folder))
    if config is None:
        raise ValueError(f"{folder}: holds no adapter (no adapter_config.json)")
    base = config.base_model_name_or_path
    if base != model.config._name_or_path:
        logger.warning("%s: an adapter that was trained on %s goes on %s", folder, base, model.config._name_or_path)
    with loading(folder, f"an adapter of {model.config._name_or_path}"):
        both = PeftModel.from_pretrained(model, resolve(folder), adapter_name=name)
    if isinstance(peft_config, LoraConfig) and peft_config.target_modules is None:
        peft_config.target_modules = "all-linear"
    both.add_adapter("default", peft_config)
    both.set_adapter("default")
    return both


def disable_dropout(model: nn.Module) -> None:
    """Make repeated forward passes agree, in training mode too."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):  # read by the attention function
            module.attention_dropout = 0.0  # type: ignore[assignment]


def adapter_is_trained(model: nn.Module) -> bool:
    """Whether a PEFT model differs from its base (some LoRA B matrix is not zero)."""
    return any("lora_B" in name and bool(torch.any(p != 0)) for name, p in model.named_parameters())
