"""Adapters in a folder or on the hub: their configuration, the model under them, and both merged into one model."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from rlhf.models.adapter_base import BASE
from rlhf.models.places import loading, one_line, resolve
from rlhf.models.vocabulary import resize, vocabulary_size
from rlhf.models.weights import check_finite, integer_weights, some_of

logger = logging.getLogger(__name__)

_WEIGHTS = "adapter_model.safetensors"
# Weights with a row for each token, under the names that architectures have for them.
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "lm_head.weight", "embed_in.weight")


def adapter_config(name: str, **hub: Any) -> PeftConfig | None:
    """Read the configuration of an adapter.

    Args:
        name: A folder or a repository, as :func:`resolve` returns it.
        hub: ``revision``, ``token``.

    Returns:
        The configuration; None if the folder holds a model.

    Raises:
        FileNotFoundError: The folder holds neither a model nor an adapter.
        ValueError: PEFT cannot read the configuration.
    """
    folder = Path(name)
    if (folder / "config.json").exists():
        return None
    if folder.is_dir() and not (folder / "adapter_config.json").exists():
        folders = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
        hint = f"; adapters are in its folders {', '.join(folders)}: name one of them" if folders else ""
        raise FileNotFoundError(f"{name}: the folder holds no model (no config.json){hint}")
    if find_adapter_config_file(name, **hub) is None:
        return None
    with loading(name, "an adapter"):
        return PeftConfig.from_pretrained(name, **hub)


def base_of(name: str, config: PeftConfig) -> str:
    """Find the model that an adapter was trained on; one beside the adapter, if the folder was moved as a whole.

    Args:
        name: The adapter's folder.
        config: Its configuration.

    Returns:
        A folder, or a name on the hub.

    Raises:
        FileNotFoundError: The model is in none of these places.
    """
    base_name = config.base_model_name_or_path
    # A checkpoint of a run shares the `base` folder of the run, which is one folder up.
    for folder in (Path(str(base_name)).expanduser(), Path(name) / BASE, Path(name).parent / BASE):
        if (folder / "config.json").exists() or (folder / "adapter_config.json").exists():
            return str(folder)
    if not base_name:
        reason = "it names no base model"
    else:
        try:
            return resolve(str(base_name))  # it may be on the hub
        except FileNotFoundError:
            reason = f"its base model {base_name} is gone"
    raise FileNotFoundError(
        f"{name}: {reason}; write where it is into {name}/adapter_config.json (base_model_name_or_path)"
    )


@contextmanager
def loading_base(name: str) -> Iterator[None]:
    """Name the adapter in the errors of its base model, which the user did not give.

    Args:
        name: The adapter's folder.

    Raises:
        ValueError: As raised inside, after the adapter's folder.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: its base model {error}") from error


def load_adapter(model: PreTrainedModel, adapter: str, name: str = "default", **hub: Any) -> PeftModel:
    """Put a saved adapter on a model, whose vocabulary grows to that of the adapter.

    Args:
        model: The model that the adapter was trained on.
        adapter: A folder or a repository.
        name: Of the adapter in the PEFT model.
        hub: ``revision``, ``token``.

    Returns:
        The PEFT model.

    Raises:
        ValueError: The adapter cannot be loaded, or does not fit.
    """
    with loading(adapter, f"an adapter of {model.config._name_or_path}"):
        vocabulary_rows = _vocabulary_of(adapter)
        if vocabulary_rows is not None and vocabulary_rows != vocabulary_size(model):
            # PEFT does not load rows of tokens that the model lacks.
            resize(model, vocabulary_rows)
        adapted: PeftModel = PeftModel.from_pretrained(model, adapter, adapter_name=name, **hub)
        _check_whole(adapted, Path(adapter) / _WEIGHTS, name)
        check_finite(adapted)
        return adapted


def merged(model: PreTrainedModel, adapter: str, **hub: Any) -> PreTrainedModel:
    """Add a saved adapter to the weights of a model. All of them can be trained.

    Args:
        model: The model that the adapter was trained on.
        adapter: A folder or a repository.
        hub: ``revision``, ``token``.

    Returns:
        The model.

    Raises:
        ValueError: The adapter cannot be loaded or merged.
    """
    logger.info("%s: an adapter; merging it into %s", adapter, model.config._name_or_path)
    return merge_loaded(load_adapter(model, adapter, **hub), adapter)


def merge_loaded(adapted: Any, adapter: str) -> PreTrainedModel:
    """Add an adapter to the weights of the model that it is on.

    Args:
        adapted: The PEFT model of :func:`load_adapter`.
        adapter: Where it came from.

    Returns:
        The model inside, without the adapter.

    Raises:
        ValueError: The adapter cannot be merged.
    """
    _untie_adapted(adapted.get_base_model())
    with one_line(f"{adapter}: cannot be merged"):
        merged_model: PreTrainedModel = adapted.merge_and_unload()
    # Weights of few bits are integers, which cannot have a gradient.
    if not getattr(merged_model, "is_quantized", False):
        merged_model.requires_grad_(True)  # PEFT froze the base
    merged_model.config._name_or_path = adapter  # where its tokenizer and its value head are
    merged_model.name_or_path = ""  # no checkpoint holds these weights
    return merged_model


def _check_whole(adapted: PeftModel, file: Path, name: str) -> None:
    """Refuse an adapter with missing weights, which PEFT draws at random, or with integers, which it converts."""
    # Older adapters, and those on the hub, are other files.
    if not file.exists():
        return
    with safe_open(file, framework="pt") as weights:
        # PEFT's own two lists differ in this end, for the lengths of DoRA.
        stored = {key.removesuffix(".weight") for key in weights.keys()}  # noqa: SIM118  # not a dict
    expected = get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)
    missing = sorted(key for key in expected if key.removesuffix(".weight") not in stored)
    if missing:
        raise ValueError(f"weights are missing: {some_of(missing)}; copy or download its files again")
    # Some kinds of adapters store indices too.
    floats = {key.removesuffix(".weight") for key, weight in expected.items() if weight.is_floating_point()}
    for weight_name, dtype in integer_weights(file).items():
        if weight_name.removesuffix(".weight") in floats:
            raise ValueError(f"{file.name}: {weight_name} is of type {dtype}, expected a float")


def _vocabulary_of(adapter: str) -> int | None:
    """Rows of the embeddings that an adapter's file holds; None if it holds none."""
    adapter_file = Path(adapter) / _WEIGHTS
    if not adapter_file.exists():
        return None
    with safe_open(adapter_file, framework="pt") as weights:
        for weight_name in weights.keys():  # noqa: SIM118  # not a dict
            if weight_name.endswith(_EMBEDDINGS):
                # The shape is in the header of the file: no weight is read.
                return int(weights.get_slice(weight_name).get_shape()[0])
    return None


def _untie_adapted(model: PreTrainedModel) -> None:
    """Give the head weights of its own if an adapter is on it or on the embeddings: a merge would change both."""
    embeddings: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    is_adapted = isinstance(embeddings, BaseTunerLayer) or isinstance(head, BaseTunerLayer)
    if head is None or not is_adapted:
        return
    embeddings = getattr(embeddings, "base_layer", embeddings)
    head = getattr(head, "base_layer", head)
    if embeddings.weight is head.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        # Both, because a model with an image part has a text config inside its own.
        # Still set, it would tie the weights again when the merged model is loaded.
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False


def unserved_part(adapter: Any) -> str | None:
    """Why vLLM cannot serve an adapter as it was trained, if so.

    Args:
        adapter: its configuration.
    Returns:
        The end of a sentence about the adapter; None for a plain LoRA.
    """
    kind = str(getattr(adapter.peft_type, "value", adapter.peft_type))
    if kind != "LORA":
        return f"is of kind {kind}"
    parts = {
        "use_dora": "is DoRA",
        "modules_to_save": "has layers that were trained whole",
        "trainable_token_indices": "has rows of new tokens",
        "target_parameters": "is on weights that are no layers",
    }
    return next((reason for name, reason in parts.items() if getattr(adapter, name, None)), None)
