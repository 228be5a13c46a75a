"""Adapters of PEFT to be trained: which kinds are supported, and how one is put on a model."""

import logging
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from rlhf.models.adapter_files import adapter_config, load_adapter
from rlhf.models.adapter_layers import fill_in_targets
from rlhf.models.adapter_off import are_same, logits_without_adapter, probe_logits
from rlhf.models.places import one_line, resolve

logger = logging.getLogger(__name__)

# Here the model inside is called, not PeftModel.forward, and it gets ids alone. So kinds that act in that forward, or
# need more than ids, cannot be trained. Kinds that PEFT cannot merge cannot be loaded again from a folder.
REFUSED = {
    PeftType.POLY: "it wants a task with each row",
    PeftType.XLORA: "it runs the model twice for each batch",
    PeftType.SHADOW: "it runs a second model beside this one",
    PeftType.LILY: "PEFT cannot merge it into the weights",
    PeftType.BEFT: "PEFT cannot merge it into layers without a bias",
}


def check_adapter(model: nn.Module, peft_config: PeftConfig | None) -> None:
    """Refuse an adapter that could not be trained, before any work.

    Args:
        model: The model, which may have an adapter already.
        peft_config: The adapter to add, if any.

    Raises:
        ValueError: A second adapter on a PEFT model, or a kind that is not supported.
    """
    current_configs = dict(getattr(model, "peft_config", None) or {})
    if current_configs and peft_config is not None:
        raise ValueError(
            "the model has an adapter already, and peft_config is for another: pass one of them, or merge the first "
            "(model = model.merge_and_unload())"
        )
    configs = list(current_configs.values()) if peft_config is None else [peft_config]
    for config in configs:
        _check_kind(config)


def _check_kind(config: Any) -> None:
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    reason = REFUSED.get(config.peft_type)
    if config.is_prompt_learning or config.is_adaption_prompt:
        reason = "it puts tokens of its own around each row, and losses here are of the rows' tokens alone"
    elif getattr(config, "alora_invocation_tokens", None):
        kind, reason = "aLoRA", "it acts from its invocation tokens on, and rows here share their prompts"
    elif getattr(config, "layer_replication", None):
        kind, reason = "layer_replication", "the repeated layers share weights, which cannot be saved"
    if reason is not None:
        raise ValueError(f"{kind} adapters cannot be trained here: {reason}; use LoRA (LoraConfig) or another kind")


def add_adapter(model: Any, peft_config: PeftConfig) -> PeftModel:
    """Freeze a model and put an adapter on it.

    Args:
        model: A transformers model.
        peft_config: The adapter; its target modules are filled in if they are not named.

    Returns:
        The PEFT model.

    Raises:
        ValueError: A kind of adapter that is not supported, or no layer that it fits.
    """
    check_adapter(model, peft_config)
    fill_in_targets(model, peft_config)
    if peft_config.task_type is None and model.get_output_embeddings() is not None:
        peft_config.task_type = "CAUSAL_LM"  # AutoPeftModelForCausalLM loads no other
    # Taken first: some kinds of adapters change the frozen weights when they are added.
    logits_before = probe_logits(model)
    with one_line("the adapter"):
        adapted: Any = get_peft_model(model, peft_config)
    if logits_before is None:
        return adapted
    adapted.off_was_before = are_same(logits_before, logits_without_adapter(adapted))
    if not adapted.off_was_before:
        # PiSSA and similar kinds move a part of the frozen weights into the adapter. No checkpoint holds the rest, so
        # it is saved beside the adapter; loaded again, it must not be split once more.
        model.name_or_path = ""
        peft_config.base_model_name_or_path = None
        if isinstance(peft_config, LoraConfig):
            peft_config.init_lora_weights = True
    return adapted


def add_adapter_beside(model: PreTrainedModel, folder: str, name: str, peft_config: PeftConfig) -> PeftModel:
    """Put two adapters on a model: a frozen one from a folder, and a new one, ``"default"``, that is trained.

    Args:
        model: A transformers model.
        folder: Holds the frozen adapter.
        name: Of the frozen adapter in the PEFT model.
        peft_config: The adapter to train.

    Returns:
        The PEFT model.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It holds no adapter, or one that does not fit ``model``.
    """
    config = adapter_config(resolve(folder))
    if config is None:
        raise ValueError(f"{folder}: holds no adapter (no adapter_config.json)")
    check_adapter(model, peft_config)
    base_name = config.base_model_name_or_path
    if base_name != model.config._name_or_path:
        logger.warning(
            "%s: an adapter that was trained on %s goes on %s", folder, base_name, model.config._name_or_path
        )
    # Before the frozen adapter is there: the matrices inside it are linear layers, too.
    fill_in_targets(model, peft_config)
    adapted = load_adapter(model, resolve(folder), name)
    adapted.add_adapter("default", peft_config)
    adapted.set_adapter("default")
    return adapted


def learn_tokens(model: Any, peft_config: PeftConfig | None, tokens: list[int]) -> None:
    """Let a new adapter train the rows of new tokens, in the embeddings and in the head.

    Nothing is to do if all weights are trained, or if the adapter is on the embeddings anyway.

    Args:
        model: A transformers or PEFT model.
        peft_config: The adapter that will be added; changed if it is LoRA's.
        tokens: Ids of the new tokens.
    """
    has_adapter = peft_config is not None or hasattr(model, "peft_config")
    if not tokens or not has_adapter:
        return
    if not isinstance(peft_config, LoraConfig) or peft_config.trainable_token_indices is not None:
        logger.warning("the rows of %d new tokens stay as they are drawn: the adapter does not learn them", len(tokens))
        return
    config: Any = peft_config
    targets = [] if isinstance(config.target_modules, str) else config.target_modules or []  # text is a pattern
    adapted = [*targets, *(config.modules_to_save or [])]
    not_adapted = [name for name in _embedding_names(model) if not _is_covered(name, adapted)]
    if not_adapted:
        config.trainable_token_indices = {name.rpartition(".")[2]: tokens for name in not_adapted}


def _embedding_names(model: Any) -> list[str]:
    """Names of the embeddings and of the head; of tied ones the embeddings alone, as PEFT lets the head follow."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    has_own_head = head is not None and head.weight is not embeddings.weight
    layers = [embeddings, head] if has_own_head else [embeddings]
    return [name for name, module in model.named_modules() if any(module is layer for layer in layers)]


def _is_covered(name: str, adapted: list[str]) -> bool:
    # PEFT matches the name of a target from the right, at a dot.
    return any(name == target or name.endswith(f".{target}") for target in adapted)
