"""What a server needs of a model folder: its weights, tokenizer, template, and the tokens that end an answer."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig

from rlhf.data import answer_end_ids
from rlhf.models import load_tokenizer
from rlhf.models.kinds import refuse_reward_model
from rlhf.models.places import loading, resolve

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class ServedModel:
    """A model as a server reads it.

    Attributes:
        location: a folder, or a name on the hub.
        name: the last part of its location.
        dtype: of its weights, such as ``"bfloat16"``.
        tokenizer: of the model.
        end_ids: tokens that end an answer, as training taught them.
        missing_end_ids: those that neither the tokenizer's EOS nor ``generation_config.json`` has.
        configured_ids: those that these two have.
    """

    location: str
    name: str
    dtype: str
    tokenizer: Any
    end_ids: list[int]
    missing_end_ids: list[int]
    configured_ids: list[int]

    @property
    def end_texts(self) -> list[str]:
        """The end tokens as text."""
        return [str(self.tokenizer.convert_ids_to_tokens(token)) for token in self.end_ids]


def served_model(name: str) -> ServedModel:
    """Read and check a model, without its weights.

    Args:
        name: a folder, or a name on the hub. No adapter.

    Returns:
        The model.

    Raises:
        FileNotFoundError: there is no such folder, or weights are missing.
        ValueError: it is no causal LM, or has no tokenizer.
    """
    refuse_reward_model(name)
    location = resolve(name)
    with loading(name, "a model"):
        config = AutoConfig.from_pretrained(location)
    _check_weights(Path(location))
    tokenizer: Any = load_tokenizer(name)
    try:
        configured = GenerationConfig.from_pretrained(location).eos_token_id
    except OSError:  # older models have none
        configured = config.get_text_config().eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    configured_ids = list(dict.fromkeys(token for token in [tokenizer.eos_token_id, *listed] if token is not None))
    taught_ids = answer_end_ids(tokenizer)
    return ServedModel(
        location=location,
        name=Path(location).resolve().name if Path(location).is_dir() else location.rpartition("/")[2],
        dtype=str(getattr(config, "dtype", None) or "float32").removeprefix("torch."),
        tokenizer=tokenizer,
        end_ids=list(dict.fromkeys([*taught_ids, *configured_ids])),
        missing_end_ids=[token for token in taught_ids if token not in configured_ids],
        configured_ids=configured_ids,
    )


def _check_weights(folder: Path) -> None:
    """All files of the weights are there. A model on the hub is left to the server."""
    if not folder.is_dir():
        return
    index = folder / _INDEX
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.exists() else set()
    missing = sorted(name for name in names if not (folder / name).exists())
    if missing:
        raise FileNotFoundError(f"{folder}: weights are missing ({', '.join(missing[:3])}); copy them again")
    if not (names or any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))):
        raise FileNotFoundError(f"{folder}: holds no weights (no *.safetensors)")
