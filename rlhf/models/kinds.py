"""What a folder or a name on the hub holds: a causal LM, an adapter, or a reward model."""

from typing import Any

from peft import PeftConfig
from transformers import AutoConfig

from rlhf.models.adapter_files import adapter_config
from rlhf.models.places import loading, resolve

_REWARD_HEAD = "ForSequenceClassification"


def kind_of(name: str, **hub: Any) -> str:
    """Tell what a folder holds, in words for a message.

    Args:
        name: a folder, or a name on the hub.
        hub: ``revision``, ``token``.

    Returns:
        Such as ``"an adapter (LORA)"``, ``"a reward model (LlamaForSequenceClassification)"`` or
        ``"a model (LlamaForCausalLM)"``.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no model.
        ValueError: its configuration cannot be read.
    """
    location = resolve(name)
    adapter = adapter_config(location, **hub)
    if adapter is not None:
        noun = "an adapter of a reward model" if _is_of_reward_model(adapter) else "an adapter"
        return f"{noun} ({getattr(adapter.peft_type, 'value', adapter.peft_type)})"
    with loading(name, "a model"):
        config = AutoConfig.from_pretrained(location, **hub)
    architecture = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    noun = "a reward model" if architecture.endswith(_REWARD_HEAD) else "a model"
    return f"{noun} ({architecture})"


def refuse_reward_model(name: str) -> None:
    """Refuse a model that gives scores where one that writes is needed.

    Args:
        name: a folder, or a name on the hub.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no model.
        ValueError: it holds a reward model.
    """
    kind = kind_of(name)
    if "reward model" in kind:
        raise ValueError(
            f"{name}: {kind}: it scores answers and writes none; name a causal LM here, and this one in --reward_funcs "
            "of rlhf grpo"
        )


def _is_of_reward_model(adapter: PeftConfig) -> bool:
    return str(getattr(adapter.task_type, "value", adapter.task_type)) == "SEQ_CLS"
