"""Models and tokenizers from a folder or the hub."""

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.models.adapters import adapter_config, base_of, merged
from rlhf.models.places import loading, resolve

HUB = ("revision", "token", "trust_remote_code")  # arguments that say which files are meant, and may be run


def load_model(name_or_path: str, **kwargs: Any) -> PreTrainedModel:
    """Load a causal LM, in the dtype of its checkpoint unless ``dtype`` is passed.

    A folder that holds a PEFT adapter is loaded with its base model and merged, so that another adapter or a frozen
    reference starts from the tuned weights.

    Args:
        name_or_path: a folder, or a name on the hub.
        kwargs: of transformers' ``from_pretrained``: ``dtype``, ``revision`` (an adapter's own; its base model has the
            one that the adapter names), ``quantization_config``, …
    Returns:
        The model.
    Raises:
        FileNotFoundError: a path that is no folder, or a folder without a model.
        ValueError: neither a folder here nor a model on the hub, or a package that is missing.
    """
    kwargs.setdefault("dtype", "auto")
    name = resolve(name_or_path)
    hub = hub_kwargs(kwargs)
    adapter = adapter_config(name, **hub)
    if adapter is not None:
        return merged(load_model(base_of(name, adapter), **base_kwargs(kwargs, adapter)), name, **hub)
    with loading(name_or_path, "a causal LM"):
        return AutoModelForCausalLM.from_pretrained(name, **kwargs)


def hub_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of the arguments for a model, those that find an adapter's files."""
    return {name: kwargs[name] for name in ("revision", "token") if kwargs.get(name) is not None}


def base_kwargs(kwargs: dict[str, Any], adapter: Any) -> dict[str, Any]:
    """The same arguments for the model under an adapter: another repository has revisions of its own."""
    own = {name: value for name, value in kwargs.items() if name != "revision"}
    return own if adapter.revision is None else {**own, "revision": adapter.revision}


def load_tokenizer(
    name_or_path: str,
    chat_template_path: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer, with the chat template of a ``.jinja`` file or of another model's folder where one is given.

    For an adapter's folder without a tokenizer, the one of its base model is loaded.

    Args:
        name_or_path: a folder, or a name on the hub.
        chat_template_path: a ``.jinja`` file, or a model's folder.
        revision: of the model on the hub.
        trust_remote_code: run code that the model's folder brings along.
    Returns:
        The tokenizer.
    Raises:
        FileNotFoundError: a path to nothing. ValueError: no tokenizer there.
    """
    given = {"revision": revision, "trust_remote_code": trust_remote_code}
    hub = {name: value for name, value in given.items() if value is not None}
    name = resolve(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **hub)
    except (OSError, ValueError) as error:
        adapter = adapter_config(name, **hub_kwargs(hub)) if (Path(name) / "adapter_config.json").exists() else None
        if adapter is not None:
            return load_tokenizer(base_of(name, adapter), chat_template_path, **base_kwargs(hub, adapter))
        raise ValueError(f"{name_or_path}: no tokenizer found there; copy the base model's files in") from error
    if chat_template_path is not None:
        path = Path(chat_template_path).expanduser()
        if path.is_file():
            tokenizer.chat_template = path.read_text(encoding="utf-8")
        else:
            tokenizer.chat_template = load_tokenizer(chat_template_path).chat_template
    return tokenizer
