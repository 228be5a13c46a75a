"""Adapters of PEFT: put one on a model, know what the model is without it, and save what it sits on."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.peft_utils import find_adapter_config_file

from rlhf.models.adapter_base import BASE
from rlhf.models.adapter_off import off, probe, same
from rlhf.models.places import loading, resolve
from rlhf.models.vocabulary import resize, vocabulary_size

logger = logging.getLogger(__name__)

# Kinds that act around the model, in PeftModel.forward, or need more than ids (here the model within is called); and
# kinds that PEFT cannot merge, which an adapter's folder is loaded by.
REFUSED = {
    PeftType.POLY: "it wants a task with each row",
    PeftType.XLORA: "it runs the model twice for each batch",
    PeftType.SHADOW: "it runs a second model beside this one",
    PeftType.LILY: "PEFT cannot merge it into the weights",
    PeftType.BEFT: "PEFT cannot merge it into layers without a bias",
}


def adapter_config(name: str, **hub: Any) -> PeftConfig | None:
    """The configuration of an adapter, from its folder or repository.

    Args:
        name: as :func:`resolve` returns it.
        hub: ``revision``, ``token``.
    Returns:
        The configuration; None for a folder that holds a model.
    Raises:
        FileNotFoundError: a folder with neither. ValueError: a file that PEFT cannot read.
    """
    folder = Path(name)
    if (folder / "config.json").exists():
        return None
    if folder.is_dir() and not (folder / "adapter_config.json").exists():
        inner = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
        hint = f"; adapters are in its folders {', '.join(inner)}: name one of them" if inner else ""
        raise FileNotFoundError(f"{name}: the folder holds no model (no config.json){hint}")
    if find_adapter_config_file(name, **hub) is None:
        return None
    with loading(name, "an adapter"):
        return PeftConfig.from_pretrained(name, **hub)


def base_of(name: str, config: PeftConfig) -> str:
    """Find the model that an adapter was trained on; a model beside the adapter if the folder was moved as a whole.

    Args:
        name: the adapter's folder.
        config: its configuration.
    Returns:
        A folder, or a name on the hub.
    Raises:
        FileNotFoundError: the model is in none of these places.
    """
    base = config.base_model_name_or_path
    for place in (Path(str(base)).expanduser(), Path(name) / BASE, Path(name).parent / BASE):
        if (place / "config.json").exists() or (place / "adapter_config.json").exists():
            return str(place)
    try:
        if base:
            return resolve(str(base))  # it may be on the hub
    except FileNotFoundError:
        pass
    found = f"its base model {base} is gone" if base else "it names no base model"
    raise FileNotFoundError(
        f"{name}: {found}; write where it is into {name}/adapter_config.json (base_model_name_or_path)"
    )


def merged(model: PreTrainedModel, adapter: str, **hub: Any) -> PreTrainedModel:
    """``model`` with the adapter in ``adapter`` added to its weights, which can all be trained."""
    logger.info("%s: an adapter; merging it into %s", adapter, model.config._name_or_path)
    with loading(adapter, f"an adapter of {model.config._name_or_path}"):
        both: Any = _put_on(model, adapter, **hub)
    _untie_adapted(model)
    with one_line(f"{adapter}: cannot be merged"):
        whole: PreTrainedModel = both.merge_and_unload()
    if not getattr(whole, "is_quantized", False):
        whole.requires_grad_(True)  # PEFT froze the base
    whole.config._name_or_path = adapter  # where its tokenizer and its value head are
    whole.name_or_path = ""  # no checkpoint holds these weights
    return whole


def _put_on(model: PreTrainedModel, adapter: str, name: str = "default", **hub: Any) -> PeftModel:
    """The adapter on ``model``, whose vocabulary grows to that which the adapter was trained with."""
    rows = _vocabulary_of(adapter)
    if rows is not None and rows != vocabulary_size(model):
        resize(model, rows)
    return PeftModel.from_pretrained(model, adapter, adapter_name=name, **hub)


def _vocabulary_of(adapter: str) -> int | None:
    """Rows of the embeddings that an adapter's file brings along; None where it brings none."""
    file = Path(adapter) / "adapter_model.safetensors"
    if not file.exists():
        return None
    with safe_open(file, framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118  # not a dict
            if name.endswith(("embed_tokens.weight", "wte.weight", "lm_head.weight", "embed_in.weight")):
                return int(weights.get_slice(name).get_shape()[0])
    return None


def _untie_adapted(model: PreTrainedModel) -> None:
    """Give the head weights of its own where an adapter sits on it or on the embeddings: a merge would change both."""
    layers: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    if not any(isinstance(layer, BaseTunerLayer) for layer in layers) or layers[1] is None:
        return
    inner, head = (getattr(layer, "base_layer", layer) for layer in layers)
    if inner.weight is head.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False


def check_adapter(model: nn.Module, peft_config: PeftConfig | None) -> None:
    """Refuse an adapter that could not be trained, before any work.

    Args:
        model: the model, which may have an adapter already.
        peft_config: the adapter to add, if any.
    Raises:
        ValueError: a second adapter on a PEFT model, or a kind that acts in ``PeftModel.forward``.
    """
    own = dict(getattr(model, "peft_config", None) or {})
    if own and peft_config is not None:
        raise ValueError(
            "the model has an adapter already, and peft_config is for another: pass one of them, or merge the first "
            "(model = model.merge_and_unload())"
        )
    for config in [*own.values(), *([] if peft_config is None else [peft_config])]:
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        why = REFUSED.get(config.peft_type)
        if config.is_prompt_learning or config.is_adaption_prompt:
            why = "it puts tokens of its own around each row, and losses here are of the rows' tokens alone"
        elif getattr(config, "alora_invocation_tokens", None):
            kind, why = "aLoRA", "it acts from its invocation tokens on, and rows here share their prompts"
        if why is not None:
            raise ValueError(f"{kind} adapters cannot be trained here: {why}; use LoRA (LoraConfig) or another kind")


def add_adapter(model: Any, peft_config: PeftConfig) -> PeftModel:
    """Freeze a model and put an adapter on it.

    Args:
        model: a transformers model.
        peft_config: the adapter; its target modules are filled in if they are not named.
    Returns:
        The PEFT model.
    Raises:
        ValueError: a kind of adapter that is not supported, or no layer that it fits.
    """
    check_adapter(model, peft_config)
    _name_targets(model, peft_config)
    if peft_config.task_type is None and model.get_output_embeddings() is not None:
        peft_config.task_type = "CAUSAL_LM"  # AutoPeftModelForCausalLM loads no other
    before = probe(model)
    with one_line("the adapter"):
        adapted: Any = get_peft_model(model, peft_config)
    if before is None:
        return adapted
    adapted.off_was_before = same(before, off(adapted))
    if not adapted.off_was_before:
        # PiSSA and its kin move a part of the frozen weights into the adapter: what is left is saved beside it.
        model.name_or_path = ""
        peft_config.base_model_name_or_path = None
        if isinstance(peft_config, LoraConfig):
            peft_config.init_lora_weights = True
    return adapted


def learn_tokens(model: Any, peft_config: PeftConfig | None, tokens: list[int]) -> None:
    """Let an adapter that is to come learn the rows of new ``tokens``, in the embeddings and in the head.

    Nothing is to do where all weights learn, or where the adapter is on the embeddings anyway.
    """
    if not tokens or (peft_config is None and not hasattr(model, "peft_config")):
        return
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if ends[1] is None or ends[1].weight is ends[0].weight:  # tied: PEFT lets the head follow
        ends.pop()
    names = [name for name, module in model.named_modules() if any(module is end for end in ends)]
    config: Any = peft_config
    if not isinstance(config, LoraConfig) or config.trainable_token_indices is not None:
        logger.warning("the rows of %d new tokens stay as they are drawn: the adapter does not learn them", len(tokens))
        return
    named = [] if isinstance(config.target_modules, str) else config.target_modules  # a word, or a pattern
    taken = [*(config.modules_to_save or []), *(named or [])]
    left = [name for name in names if not any(name == t or name.endswith(f".{t}") for t in taken)]
    if left:
        config.trainable_token_indices = {name.rpartition(".")[2]: tokens for name in left}


def add_adapter_beside(model: PreTrainedModel, folder: str, name: str, peft_config: PeftConfig) -> PeftModel:
    """Put two adapters on a model: a frozen one from a folder, and a new one, ``"default"``, that is trained.

    Args:
        model: a transformers model.
        folder: holds the frozen adapter.
        name: of the frozen adapter in the PEFT model.
        peft_config: the adapter to train.
    Returns:
        The PEFT model.
    Raises:
        FileNotFoundError: no such folder. ValueError: it holds no adapter, or one that does not fit ``model``.
    """
    config = adapter_config(resolve(folder))
    if config is None:
        raise ValueError(f"{folder}: holds no adapter (no adapter_config.json)")
    check_adapter(model, peft_config)
    base = config.base_model_name_or_path
    if base != model.config._name_or_path:
        logger.warning("%s: an adapter that was trained on %s goes on %s", folder, base, model.config._name_or_path)
    _name_targets(model, peft_config)
    with loading(folder, f"an adapter of {model.config._name_or_path}"):
        both = _put_on(model, resolve(folder), name)
    both.add_adapter("default", peft_config)
    both.set_adapter("default")
    return both


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """PEFT's errors as one line."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError, RuntimeError, ImportError) as error:
        raise ValueError(f"{what}: {' '.join(str(error).split())[:400]}") from error


def _name_targets(model: nn.Module, config: Any) -> None:
    """Say where LoRA sits, where nobody said it."""
    unnamed = (None, "all-linear", ["all-linear"], {"all-linear"})
    if not isinstance(config, LoraConfig) or config.target_modules not in unnamed:
        return
    if config.target_modules is None and config.target_parameters:
        return
    targets: Any = linear_layers(model)
    config.target_modules = targets


@torch.no_grad()
def _is_linear(layer: Any) -> bool:
    """Whether a layer that inherits from a linear one does what that does (Falcon's does, routers do not)."""
    if not isinstance(layer, nn.Linear) or layer.weight.is_meta:
        return False
    x = torch.ones(1, layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device)
    got, want = layer(x), nn.functional.linear(x, layer.weight, layer.bias)
    return isinstance(got, Tensor) and got.shape == want.shape and torch.allclose(got, want, rtol=1e-2, atol=1e-3)


def linear_layers(model: Any) -> set[str]:
    """Names of the linear layers that an adapter takes by default, as short as they can be.

    Left out: heads; routers and the like, which only inherit from a linear layer; layers of a state-space block whose
    weights its kernels read past the layer; experts in one tensor, which are no layers (``lora_target_parameters``).

    Args:
        model: a transformers model.
    Returns:
        Endings of module names.
    Raises:
        ValueError: the model has no such layer.
    """
    heads = {id(model.get_output_embeddings())} if hasattr(model, "get_output_embeddings") else set()
    linear = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and id(m) not in heads}
    modules = dict(model.named_modules())

    def fits(name: str, layer: nn.Module) -> bool:
        own_kind = type(layer).__module__.startswith("transformers.models.") and not _is_linear(layer)
        parent = modules[name.rpartition(".")[0]]
        scans = hasattr(parent, "A_log") and hasattr(parent, "D")
        last = name.rpartition(".")[2]
        return not own_kind and last != "score" and not (scans and last != "in_proj")

    taken = [name for name, layer in linear.items() if fits(name, layer)]
    if not taken:
        seen = sorted({type(module).__name__ for module in modules.values() if not list(module.children())})
        raise ValueError(f"no linear layer for the adapter to sit on: name some (lora_target_modules); layers: {seen}")
    # A layer is known by its last name, unless one that is left out (or no linear layer) is called so too.
    others = {name.rpartition(".")[2] for name in modules.keys() - set(taken)}
    return {last if (last := name.rpartition(".")[2]) not in others else name for name in taken}
