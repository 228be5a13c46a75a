"""Students made from a teacher: some of its layers, or a fresh model that reads the same tokens.

A copied student starts far better than a fresh one, and keeps the teacher's width and vocabulary. Layers are copied
into a model that is built from a smaller configuration, so that everything a layer knows of its own place (its slot in
the cache, its kind of attention) is right. Settings that a configuration has for each layer are taken for the copied
ones.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.models.places import loading, resolve

# Settings of a configuration that list layers by number. Other lists have one entry for each layer.
_LAYER_NUMBERS = ("mlp_only_layers",)


def spread_layers(total: int, count: int) -> list[int]:
    """Choose layers evenly spread over a model, the first and the last among them (a single one: the first).

    Args:
        total: layers of the model.
        count: layers to choose.
    Returns:
        Increasing layer numbers, from 0.
    Raises:
        ValueError: fewer than one, or more than there are.
    Example:
        >>> spread_layers(30, 5)
        [0, 7, 15, 22, 29]
    """
    if not 1 <= count <= total:
        raise ValueError(f"layers must be between 1 and {total}, as many as the teacher has; got {count}")
    num_gaps = max(count - 1, 1)
    # i * (total - 1) / gaps, rounded half up in integers.
    return [(2 * index * (total - 1) + num_gaps) // (2 * num_gaps) for index in range(count)]


def matched_layers(student: PretrainedConfig, teacher: PretrainedConfig) -> list[int]:
    """Find the teacher's layer to compare each layer of the student with.

    That is the layer it was copied from, where :func:`copy_layers` recorded it and the teacher is as deep as the one it
    was copied from; else layers are matched evenly. In ``output_hidden_states``, layer i is entry i + 1, and the last
    entry has the final norm.

    Args:
        student: configuration of the student.
        teacher: configuration of the teacher.
    Returns:
        For each layer of the student, a layer number of the teacher.
    Raises:
        ValueError: the student is deeper than the teacher.
    """
    student_depth = student.get_text_config().num_hidden_layers
    teacher_depth = teacher.get_text_config().num_hidden_layers
    # The record is of a teacher as deep as this one; of another teacher it would be wrong.
    record = getattr(student, "copied_layers", None) or {}
    if record.get("of") == teacher_depth and len(record["kept"]) == student_depth:
        return list(record["kept"])
    return spread_layers(teacher_depth, student_depth)


def layer_list(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Find the decoder's layers.

    Args:
        model: of transformers.
    Returns:
        The name of the list within the model, and the list.
    Raises:
        ValueError: there is no such list, or more than one.
    """
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    }
    # A list within a layer, of its experts say, may happen to be as long.
    outermost_lists = {
        name: module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists)
    }
    if depth is None or len(outermost_lists) != 1:
        description = f"found {', '.join(outermost_lists)}" if outermost_lists else "found none"
        raise ValueError(f"{type(model).__name__}: its layers are not one list of {depth} modules ({description})")
    return next(iter(outermost_lists.items()))


def copy_layers(teacher: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """Make a model of some of the teacher's layers and of everything that is not a layer, with the weights copied.

    The configuration records the layers (``copied_layers``), for :func:`matched_layers`.

    Args:
        teacher: a causal LM.
        kept: increasing layer numbers, from 0.
    Returns:
        The student, in evaluation mode.
    Raises:
        ValueError: no layer, one that the teacher has not, numbers that do not increase, a teacher whose layers are not
            in one list, or one whose layers would not be the same at another place.
    """
    path, teacher_layers = layer_list(teacher)
    layer_numbers = list(kept)
    is_increasing = layer_numbers == sorted(set(layer_numbers))
    is_inside = all(0 <= layer_number < len(teacher_layers) for layer_number in layer_numbers)
    if not (layer_numbers and is_increasing and is_inside):
        raise ValueError(
            f"keep must be increasing layer numbers from 0 to {len(teacher_layers) - 1}; got {layer_numbers}"
        )
    # Built from a configuration rather than cut out of the teacher, so that each layer knows its new position.
    student = AutoModelForCausalLM.from_config(_shorter_config(teacher.config, layer_numbers), dtype=teacher.dtype)
    try:
        student.load_state_dict(_weights_of_layers(teacher.state_dict(), path, layer_numbers))
    except RuntimeError as error:
        load_error = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{type(teacher).__name__}: layers {layer_numbers} do not fit a model of their own ({load_error})"
        ) from error
    for position, layer in enumerate(layer_list(student)[1]):
        layer_number = layer_numbers[position]
        _check_same_settings(teacher_layers[layer_number], layer, layer_number, position)
    # A new model has the defaults of transformers; the student should generate as the teacher does.
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.eval()


def fresh_student(
    config: PretrainedConfig, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int = 0
) -> PreTrainedModel:
    """Make a model with random weights that reads the teacher's tokens and ends where the teacher does.

    Args:
        config: of the student.
        teacher: gives the dtype, the special tokens and the generation settings.
        tokenizer: the teacher's.
        seed: of the weights.
    Returns:
        The student, in evaluation mode.
    Raises:
        ValueError: the vocabulary of ``config`` is too small for the tokenizer, or no causal LM can be made from it.
    """
    config = copy.deepcopy(config)
    text_config = config.get_text_config()
    teacher_config = teacher.config.get_text_config()
    # The largest id counts, not the number of entries: a vocabulary may have gaps.
    num_tokens = max(tokenizer.get_vocab().values()) + 1
    if text_config.vocab_size < num_tokens:
        raise ValueError(
            f"the configuration has a vocabulary of {text_config.vocab_size}, the teacher's tokenizer {num_tokens} "
            f"tokens: set vocab_size to {teacher_config.vocab_size}, the teacher's"
        )
    # A configuration that was copied from another model has the special tokens of that model.
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text_config, name, getattr(teacher_config, name, None))
    torch.manual_seed(seed)
    with loading("the configuration", "a causal LM"):
        student = AutoModelForCausalLM.from_config(config, dtype=teacher.dtype)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.eval()


def load_config(name_or_path: str) -> PretrainedConfig:
    """Load a configuration from a folder, a ``config.json`` under any name, or the hub.

    Args:
        name_or_path: of it.
    Returns:
        The configuration.
    Raises:
        FileNotFoundError: the path leads to nothing.
        ValueError: there is no configuration.
    """
    path = Path(name_or_path).expanduser()
    place = str(path) if path.is_file() else resolve(name_or_path)
    with loading(name_or_path, "a model's configuration"):
        return AutoConfig.from_pretrained(place)


def _shorter_config(config: PretrainedConfig, numbers: list[int]) -> PretrainedConfig:
    """The configuration of a model that has the given layers only."""
    config = copy.deepcopy(config)
    text_config = config.get_text_config()
    depth = text_config.num_hidden_layers
    for name, value in text_config.to_dict().items():
        if not isinstance(value, (list, tuple)):
            continue
        # Lists of another length, or under another name, are not of layers.
        is_for_each_layer = len(value) == depth and ("layer" in name or name.endswith("types"))
        if name in _LAYER_NUMBERS:
            setattr(text_config, name, [numbers.index(layer) for layer in value if layer in numbers])
        elif is_for_each_layer:
            setattr(text_config, name, [value[layer] for layer in numbers])
    text_config.num_hidden_layers = len(numbers)
    # Saved with the checkpoint, so that a later distillation knows which layers belong together.
    config.copied_layers = {"kept": numbers, "of": depth}
    return config


def _weights_of_layers(state: dict[str, Tensor], path: str, numbers: list[int]) -> dict[str, Tensor]:
    """The weights of the given layers, renumbered, and of everything outside of the layers."""
    position_of = {number: position for position, number in enumerate(numbers)}
    weights = {}
    for name, weight in state.items():
        if not name.startswith(f"{path}."):
            weights[name] = weight
            continue
        number, _, rest = name.removeprefix(f"{path}.").partition(".")
        if int(number) in position_of:
            weights[f"{path}.{position_of[int(number)]}.{rest}"] = weight
    return weights


def _check_same_settings(original: nn.Module, copied: nn.Module, number: int, position: int) -> None:
    """Check that a layer computes the same at its new position: some layers depend on more than their weights."""
    for (name, module), (_, copied_module) in zip(original.named_modules(), copied.named_modules(), strict=True):
        settings = _settings(copied_module)
        for key, value in _settings(module).items():
            copied_value = settings.get(key)
            # The number of the layer itself is expected to change.
            is_layer_number = (value, copied_value) == (number, position)
            if copied_value != value and not is_layer_number:
                setting = ".".join(filter(None, (name, key)))
                raise ValueError(
                    f"layer {number} would not be the same as layer {position} ({setting} is {value}, there "
                    f"{copied_value}): keep other layers"
                )


def _settings(module: nn.Module) -> dict[str, Any]:
    """Numbers, flags and texts that a module holds beside its weights."""
    # Tensors are left out: weights were copied, and buffers follow from the configuration.
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, float, str)) and not name.startswith("_") and name != "training"
    }
