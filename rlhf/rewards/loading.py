"""Rewards by name, as a config has them: a built-in, a function in a file, a model folder, or an address."""

import ast
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf.data.http_client import shown_address
from rlhf.losses.registry import load_object, split_place
from rlhf.rewards import functions, trl_names
from rlhf.rewards.endpoint import HttpReward
from rlhf.rewards.functions import RewardFunction
from rlhf.rewards.models import ModelReward

BUILTINS: dict[str, Callable[..., RewardFunction]] = {
    "exact_match": functions.exact_match,
    "numeric_answer": functions.numeric_answer,
    "math_answer": functions.math_answer,
    "matches": functions.matches,
    "think_format": functions.think_format,
    "length_reward": functions.length_reward,
    "repetition_penalty": functions.repetition_penalty,
    "soft_overlong_punishment": functions.soft_overlong_punishment,
    "http_reward": HttpReward,
    "model_reward": ModelReward,
    # TRL's names
    "accuracy_reward": functions.math_answer,
    "think_format_reward": functions.think_format,
    "reasoning_accuracy_reward": trl_names.reasoning_accuracy,
    "get_repetition_penalty_reward": functions.repetition_penalty,
    "get_soft_overlong_punishment": functions.soft_overlong_punishment,
}


def load_reward(spec: str, tokenizer: PreTrainedTokenizerBase | None = None) -> RewardFunction:
    """The reward function that ``spec`` names.

    * a built-in, with options where it takes some: ``numeric_answer``, ``length_reward(target=200)``
    * a function of yours: ``path/to/file.py:function``, ``package.module:function`` or, as in TRL,
      ``package.module.function``; with options it is a factory: ``file.py:make(strict=True)``
    * a folder with a reward model, or its name on the hub (:class:`ModelReward`)
    * ``https://…`` (:class:`HttpReward`)

    Args:
        spec: the name, one of the forms above.
        tokenizer: of a reward model whose folder has none.
    Returns:
        The reward function.
    Raises:
        ValueError: there is no such reward, its file cannot be imported, or its options do not fit.
        FileNotFoundError: no such file or folder.
    """
    if spec.startswith(("http://", "https://")):
        return HttpReward(spec)
    # Before names are taken apart: a folder may hold dots, colons and brackets.
    if Path(spec).expanduser().is_dir():
        return ModelReward(spec, tokenizer=tokenizer)
    name, options = _parse(spec)
    if name in BUILTINS:
        # A built-in is a factory, also where it is named without brackets.
        return _build(spec, BUILTINS[name], options or _Options())
    module_or_file = split_place(name)[0]
    # A module has no slash before its colon or last dot; a path and a name on the hub have.
    is_module = bool(module_or_file) and "/" not in name
    if module_or_file.endswith(".py") or is_module:
        function = load_object(name, f"reward {spec!r}")
        if not callable(function):
            raise ValueError(f"reward {spec!r}: {function!r} is no function")
        return function if options is None else _build(spec, function, options)
    if "/" in name or name.startswith("~"):
        # A name on the hub; a folder that does not exist is reported by ModelReward.
        return ModelReward(spec, tokenizer=tokenizer)
    similar_names = difflib.get_close_matches(name, BUILTINS, n=1)
    hint = f"; did you mean {similar_names[0]}?" if similar_names else ""
    raise ValueError(
        f"unknown reward {shown_address(spec)!r}{hint} (built in: {', '.join(BUILTINS)}; or file.py:function, "
        "module:function, a model folder, https://…)"
    )


def reward_functions(given: Any, tokenizers: Any = None) -> list[RewardFunction]:
    """The rewards that a trainer is given, as a list of functions.

    Args:
        given: a function, a name or a reward model, or a list of them.
        tokenizers: one for each reward, None for a reward that is not a model; a single one for a single reward.
    Returns:
        One function for each reward.
    Raises:
        ValueError: another number of tokenizers than of rewards; what :func:`load_reward` raises.
    """
    rewards = [given] if callable(given) or isinstance(given, str) else list(given)
    # As in TRL: one tokenizer may stand for a list of one.
    if tokenizers is None:
        tokenizers = [None] * len(rewards)
    elif hasattr(tokenizers, "apply_chat_template"):
        tokenizers = [tokenizers]
    if len(tokenizers) != len(rewards):
        raise ValueError(
            f"{len(tokenizers)} reward_processing_classes for {len(rewards)} reward_funcs: their numbers must match"
        )
    reward_list: list[RewardFunction] = []
    for reward, tokenizer in zip(rewards, tokenizers, strict=True):
        if isinstance(reward, str):
            reward = load_reward(reward, tokenizer)
        elif isinstance(reward, nn.Module):
            reward = ModelReward(reward, tokenizer=tokenizer)
        reward_list.append(reward)
    return reward_list


class _Options(NamedTuple):
    """Arguments of a factory, as written in brackets behind its name."""

    positional: Sequence[Any] = ()
    # All options without brackets share this default, so that it must not change.
    named: Mapping[str, Any] = MappingProxyType({})


def _parse(spec: str) -> tuple[str, _Options | None]:
    """Take ``name(1, key=2)`` apart; no options where there are no brackets.

    Raises:
        ValueError: options that are no plain values.
    """
    call_text = re.fullmatch(r"\s*([^()\s]+)\s*\((.*)\)\s*", spec, re.DOTALL)
    if call_text is None:
        return spec.strip(), None
    name, arguments = call_text.groups()
    try:
        # Parsed as a call of `_`, because a name may hold slashes. Only literals are evaluated.
        call_node: Any = ast.parse(f"_({arguments})", mode="eval").body
        positional = [ast.literal_eval(value) for value in call_node.args]
        named_options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call_node.keywords}
    except (SyntaxError, ValueError):
        raise ValueError(
            f"reward {shown_address(spec)!r}: the options must be plain values, as in name(key=1, other='text')"
        ) from None
    return name, _Options(positional, named_options)


def _build(spec: str, factory: Callable[..., Any], options: _Options) -> RewardFunction:
    try:
        return factory(*options.positional, **options.named)
    except TypeError as error:
        raise ValueError(f"reward {shown_address(spec)!r}: {error}; write the options as name(key=value)") from error
