"""The command that serves a model with vLLM."""

import json
import shlex
from pathlib import Path
from typing import Any

from rlhf.models import load_tokenizer
from rlhf.models.adapter_files import adapter_config, base_of, unserved_part
from rlhf.models.places import resolve
from rlhf.serving.model_folder import ServedModel, served_model

# Values that `--max-lora-rank` takes.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def vllm_command(name: str) -> str:
    """Check a model or an adapter, and write the command that serves it.

    Args:
        name: a folder, or a name on the hub.

    Returns:
        The command line.

    Raises:
        FileNotFoundError: there is no such folder, or weights are missing.
        ValueError: vLLM could not serve it as it was trained.
    """
    location = resolve(name)
    adapter = adapter_config(location)
    if adapter is not None:
        return _adapter_command(location, adapter)
    model = served_model(name)
    _check_ends(model, model.missing_end_ids)
    return shlex.join(["vllm", "serve", model.location, "--served-model-name", model.name, *_dtype(model)])


def _adapter_command(location: str, adapter: Any) -> str:
    merge = f"merge it first: rlhf merge {location} -o FOLDER"
    reason = unserved_part(adapter)
    if reason is not None:
        raise ValueError(f"{location}: vLLM serves plain LoRA, and this adapter {reason}; {merge}")
    base_name = base_of(location, adapter)
    if adapter_config(base_name) is not None:
        raise ValueError(f"{location}: its base model {base_name} is an adapter too; {merge}")
    base = served_model(base_name)
    tokenizer: Any = load_tokenizer(location)
    if len(tokenizer) > len(base.tokenizer):
        raise ValueError(f"{location}: it has more tokens than its base model; {merge}")
    rank = max([adapter.r, *(adapter.rank_pattern or {}).values()])
    allowed = next((value for value in _RANKS if value >= rank), None)
    if allowed is None:
        raise ValueError(f"{location}: its rank {rank} is more than vLLM's largest, {_RANKS[-1]}; {merge}")
    words = ["vllm", "serve", base.location, *_dtype(base), "--enable-lora", "--max-lora-rank", str(allowed)]
    words += ["--lora-modules", f"{Path(location).resolve().name}={location}"]
    if tokenizer.chat_template and tokenizer.chat_template != base.tokenizer.chat_template:
        template = Path(location) / "chat_template.jinja"
        if not template.exists():
            raise ValueError(f"{location}: it has another chat template than its base model; {merge}")
        words += ["--chat-template", str(template)]
    if base.missing_end_ids:
        raise ValueError(f"{location}: answers end with a token that its base model does not list; {merge}")
    return shlex.join(words)


def _check_ends(model: ServedModel, missing: list[int]) -> None:
    if missing:
        texts = ", ".join(map(str, model.tokenizer.convert_ids_to_tokens(missing)))
        ids = json.dumps([*model.configured_ids, *missing])
        raise ValueError(
            f"{model.location}: answers end with {texts}, which generation_config.json does not list, so that vLLM "
            f'would not stop there; write "eos_token_id": {ids} into that file'
        )


def _dtype(model: ServedModel) -> list[str]:
    # vLLM would run float32 weights in 16 bits, float16 on some cards; bfloat16 has the range of float32.
    return ["--dtype", "bfloat16"] if model.dtype == "float32" else []
