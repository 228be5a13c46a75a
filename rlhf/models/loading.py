"""Models and tokenizers from a folder or the hub."""

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.models.adapter_files import adapter_config, base_of, loading_base, merged
from rlhf.models.places import broken_file, loading, reason_of, resolve
from rlhf.models.weights import load_whole

HUB = ("revision", "token", "trust_remote_code")  # arguments that select files, and allow to run code


def load_model(name_or_path: str, **kwargs: Any) -> PreTrainedModel:
    """Load a causal LM, in the dtype of its checkpoint unless ``dtype`` is passed.

    A folder that holds a PEFT adapter is loaded with its base model and merged, so that another adapter or a frozen
    reference starts from the tuned weights.

    Args:
        name_or_path: A folder, or a name on the hub.
        kwargs: Of transformers' ``from_pretrained``: ``dtype``, ``quantization_config``, ``revision`` and others. The
            revision is an adapter's own; its base model has the one that the adapter names.

    Returns:
        The model.

    Raises:
        FileNotFoundError: A path that is no folder, or a folder without a model.
        ValueError: Neither a folder here nor a model on the hub, or a package is missing.
    """
    # Older versions of transformers load float32 by default, whatever the checkpoint has.
    kwargs.setdefault("dtype", "auto")
    location = resolve(name_or_path)
    hub_arguments = hub_kwargs(kwargs)
    adapter = adapter_config(location, **hub_arguments)
    if adapter is not None:
        # The base of an adapter may have an adapter itself, so this function is called again.
        base_name = base_of(location, adapter)
        with loading_base(location):
            base_model = load_model(base_name, **base_kwargs(kwargs, adapter))
        return merged(base_model, location, **hub_arguments)
    with loading(name_or_path, "a causal LM"):
        model: PreTrainedModel = load_whole(AutoModelForCausalLM, location, **kwargs)
        return model


def hub_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Select the arguments that find an adapter's files.

    Args:
        kwargs: Arguments for a model.

    Returns:
        ``revision`` and ``token``, if they are given.
    """
    return {name: kwargs[name] for name in ("revision", "token") if kwargs.get(name) is not None}


def base_kwargs(kwargs: dict[str, Any], adapter: Any) -> dict[str, Any]:
    """Turn the arguments for an adapter into those for its base model: another repository has other revisions.

    Args:
        kwargs: Arguments for the adapter.
        adapter: Its configuration, which may name a revision of the base model.

    Returns:
        New arguments.
    """
    base_arguments = {name: value for name, value in kwargs.items() if name != "revision"}
    return base_arguments if adapter.revision is None else {**base_arguments, "revision": adapter.revision}


def load_tokenizer(
    name_or_path: str,
    chat_template_path: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool | None = None,
) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    For an adapter's folder without a tokenizer, the one of its base model is loaded.

    Args:
        name_or_path: A folder, or a name on the hub.
        chat_template_path: Replaces the chat template: a ``.jinja`` file, or a model's folder.
        revision: Of the model on the hub.
        trust_remote_code: Whether to run code that the model's folder brings along.

    Returns:
        The tokenizer.

    Raises:
        FileNotFoundError: A path to nothing.
        ValueError: There is no tokenizer.
    """
    arguments = {"revision": revision, "trust_remote_code": trust_remote_code}
    # An argument that is not given is left to the defaults of transformers.
    hub_arguments = {name: value for name, value in arguments.items() if value is not None}
    location = resolve(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, **hub_arguments)
    # OSError: a file is missing. ValueError: the config is of no model with a known tokenizer.
    # The library of tokenizers raises a plain Exception for a file that it cannot read.
    except Exception as error:
        # Asked only now: a tokenizer in the adapter's own folder comes first, as it may have new tokens.
        is_adapter = (Path(location) / "adapter_config.json").exists()
        adapter = adapter_config(location, **hub_kwargs(hub_arguments)) if is_adapter else None
        if adapter is not None:
            base_name = base_of(location, adapter)
            with loading_base(location):
                return load_tokenizer(base_name, chat_template_path, **base_kwargs(hub_arguments, adapter))
        raise ValueError(_tokenizer_problem(name_or_path, Path(location), error)) from error
    if chat_template_path is not None:
        tokenizer.chat_template = _read_chat_template(chat_template_path)
    return tokenizer


def _tokenizer_problem(name: str, folder: Path, error: Exception) -> str:
    broken = broken_file(folder)
    if broken is not None:
        return broken
    if (folder / "tokenizer.json").exists():
        return f"{name}: its tokenizer cannot be loaded ({reason_of(error)}); copy or download its files again"
    return f"{name}: no tokenizer found there; copy the base model's files in"


def _read_chat_template(name_or_path: str) -> Any:
    """The chat template in a ``.jinja`` file, or of another model."""
    path = Path(name_or_path).expanduser()
    # A name of the hub is no file here, so the two cannot be mixed up.
    if path.is_file():
        return path.read_text(encoding="utf-8")
    return load_tokenizer(name_or_path).chat_template
