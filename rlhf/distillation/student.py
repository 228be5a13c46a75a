"""Students made from a teacher: some of its layers, or a fresh model that reads the same tokens.

A copied student starts far better than a fresh one, and keeps the teacher's width and vocabulary. The layers are copied
into a model that is built anew from a smaller configuration, so that whatever a layer knows of its own place (the slot
of its cache, its kind of attention) is right; what a configuration has for each layer is taken for the kept ones.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.models.places import loading, resolve

_INDICES = ("mlp_only_layers",)  # of a configuration: lists of layers by number, not one entry for each layer


def spread_layers(total: int, count: int) -> list[int]:
    """``count`` of ``total`` layers, evenly spread, the first and the last among them (one alone: the first).

    Raises:
        ValueError: fewer than one, or more than there are.
    Example:
        >>> spread_layers(30, 5)
        [0, 7, 15, 22, 29]
    """
    if not 1 <= count <= total:
        raise ValueError(f"layers must be between 1 and {total}, as many as the teacher has; got {count}")
    gaps = max(count - 1, 1)
    return [(2 * i * (total - 1) + gaps) // (2 * gaps) for i in range(count)]  # rounded, halves up


def matched_layers(student: PretrainedConfig, teacher: PretrainedConfig) -> list[int]:
    """For each layer of the student, the teacher's layer whose output its own is compared with.

    The layer that it was copied from, where :func:`copy_layers` recorded one of a teacher as deep as this; else evenly
    spread. (In ``output_hidden_states`` layer i is entry i + 1, and the last entry has the final norm.)

    Raises:
        ValueError: the student is deeper than the teacher.
    """
    depth, total = (config.get_text_config().num_hidden_layers for config in (student, teacher))
    record = getattr(student, "copied_layers", None) or {}
    if record.get("of") == total and len(record["kept"]) == depth:
        return list(record["kept"])
    return spread_layers(total, depth)


def layer_list(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The decoder's layers, and their name within the model.

    Raises:
        ValueError: there is no such list, or more than one.
    """
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth}
    # A list within a layer (of its experts, say) may happen to be as long.
    outer = {n: m for n, m in found.items() if not any(n.startswith(f"{other}.") for other in found)}
    if depth is None or len(outer) != 1:
        seen = f"found {', '.join(outer)}" if outer else "found none"
        raise ValueError(f"{type(model).__name__}: its layers are not one list of {depth} modules ({seen})")
    return next(iter(outer.items()))


def copy_layers(teacher: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """A model of the teacher's kind with its layers ``kept`` and all that is not a layer, weights copied.

    The configuration records which layers they were (``copied_layers``), for :func:`matched_layers`.

    Args:
        kept: increasing layer numbers, from 0.
    Raises:
        ValueError: no layer, one that the teacher has not, numbers that do not increase, a teacher whose layers are not
            in one list, or one whose layers would not be the same at another place.
    """
    path, layers = layer_list(teacher)
    kept = list(kept)
    if not kept or kept != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < len(layers):
        raise ValueError(f"keep must be increasing layer numbers from 0 to {len(layers) - 1}; got {kept}")
    student = AutoModelForCausalLM.from_config(_shorter(teacher.config, kept), dtype=teacher.dtype)
    weights = {}
    for name, value in teacher.state_dict().items():
        if name.startswith(f"{path}."):
            number, _, rest = name.removeprefix(f"{path}.").partition(".")
            if int(number) not in kept:
                continue
            name = f"{path}.{kept.index(int(number))}.{rest}"
        weights[name] = value
    try:
        student.load_state_dict(weights)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{type(teacher).__name__}: layers {kept} do not fit a model of their own ({first})"
        ) from error
    for place, copied in enumerate(layer_list(student)[1]):
        _check_same(layers[kept[place]], copied, kept[place], place)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.eval()


def fresh_student(
    config: PretrainedConfig, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int = 0
) -> PreTrainedModel:
    """A model with drawn weights, in the teacher's dtype, that reads the teacher's tokens and stops at its ends.

    Raises:
        ValueError: the vocabulary of ``config`` is too small for the tokenizer, or no causal LM can be made from it.
    """
    text, tokens = config.get_text_config(), max(tokenizer.get_vocab().values()) + 1
    if text.vocab_size < tokens:
        raise ValueError(
            f"the configuration has a vocabulary of {text.vocab_size}, the teacher's tokenizer {tokens} tokens: "
            f"set vocab_size to {teacher.config.get_text_config().vocab_size}, the teacher's"
        )
    config = copy.deepcopy(config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # a copied configuration has those of its own tokens
        setattr(config.get_text_config(), name, getattr(teacher.config.get_text_config(), name, None))
    torch.manual_seed(seed)
    with loading("the configuration", "a causal LM"):
        student = AutoModelForCausalLM.from_config(config, dtype=teacher.dtype)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.eval()


def load_config(name_or_path: str) -> PretrainedConfig:
    """From a folder, a ``config.json`` under any name, or the hub.

    Raises:
        FileNotFoundError: a path to nothing. ValueError: what is there is no configuration.
    """
    path = Path(name_or_path).expanduser()
    found = str(path) if path.is_file() else resolve(name_or_path)
    with loading(name_or_path, "a model's configuration"):
        return AutoConfig.from_pretrained(found)


def _shorter(config: PretrainedConfig, kept: list[int]) -> PretrainedConfig:
    """``config`` for a model of the layers ``kept``."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    depth = text.num_hidden_layers
    for name, value in text.to_dict().items():
        if not isinstance(value, (list, tuple)):
            continue
        if name in _INDICES:
            setattr(text, name, [kept.index(layer) for layer in value if layer in kept])
        elif len(value) == depth and ("layer" in name or name.endswith("types")):
            setattr(text, name, [value[layer] for layer in kept])
    text.num_hidden_layers = len(kept)
    config.copied_layers = {"kept": kept, "of": depth}
    return config


def _check_same(original: nn.Module, copied: nn.Module, number: int, place: int) -> None:
    """That a layer does at its new place what it did: weights are not all, some layers depend on where they are."""
    for (name, one), (_, other) in zip(original.named_modules(), copied.named_modules(), strict=True):
        ours, theirs = _settings(other), _settings(one)
        for key, value in theirs.items():
            if ours.get(key) != value and (value, ours.get(key)) != (number, place):
                raise ValueError(
                    f"layer {number} would not be the same as layer {place} ({'.'.join(filter(None, (name, key)))} is "
                    f"{value}, there {ours.get(key)}): keep other layers"
                )


def _settings(module: nn.Module) -> dict[str, Any]:
    plain = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str))}
    return {k: v for k, v in plain.items() if not k.startswith("_") and k != "training"}
