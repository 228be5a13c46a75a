"""The model, the tokenizer and the rows that a trainer starts from, out of what the caller gave."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import set_seed, validate_quantization_for_training

from rlhf.data import Endless, is_tokenised
from rlhf.data.packing import Packed, largest_token, longest_sequences
from rlhf.kernels import optimize
from rlhf.models import add_adapter, disable_dropout, load_model, load_tokenizer, vocabulary_size
from rlhf.models.adapters import learn_tokens
from rlhf.models.positions import max_positions, trained_length
from rlhf.models.vocabulary import grow
from rlhf.trainers.config import BaseConfig
from rlhf.trainers.sharding import check_packed_weights, check_whole

logger = logging.getLogger(__name__)

# bfloat16 keeps 8 bits of a weight, so that a smaller step is rounded away. AdamW moves a weight by about the
# learning rate; most weights are larger than 256 times this one.
_SAFE_HALF_PRECISION_RATE = 1e-4


def load_model_and_tokenizer(
    model: Any, tokenizer: PreTrainedTokenizerBase | None, args: BaseConfig, quantization_config: Any = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load what is given by name, and set the special tokens that were asked for.

    Args:
        model: a model, or a name or folder to load one from.
        tokenizer: by default the model's own.
        args: the configuration.
        quantization_config: of transformers, for a model that is given by name.
    Returns:
        The model and the tokenizer.
    Raises:
        ValueError: the model is loaded already and cannot be quantised; only a part of it is here; an unknown special
            token.
    """
    name = model if isinstance(model, str) else None
    model_kwargs = args.model_kwargs()
    if name is not None:
        quantization = {} if quantization_config is None else {"quantization_config": quantization_config}
        model_kwargs |= quantization
        check_packed_weights(model_kwargs.get("quantization_config"), args)
        model = load_model(name, **model_kwargs)
    elif quantization_config is not None:
        raise ValueError("quantization_config acts when a model is loaded: pass the model by name, or load it so")
    check_packed_weights(getattr(model.config, "quantization_config", None), args)
    check_whole(model)
    if tokenizer is None:
        # By the given name: an adapter's folder may hold a tokenizer, and its config names the base.
        hub_options = {key: model_kwargs.get(key) for key in ("revision", "trust_remote_code")}
        tokenizer = load_tokenizer(name or model.config._name_or_path, args.chat_template_path, **hub_options)
    set_tokens(tokenizer, args)
    return model, tokenizer


def set_tokens(tokenizer: PreTrainedTokenizerBase, args: BaseConfig) -> None:
    """Give the tokenizer the special tokens of the configuration.

    Args:
        tokenizer: changed in place.
        args: its ``add_tokens``, ``eos_token`` and ``pad_token`` are read.
    Raises:
        ValueError: a token that the tokenizer does not have.
    """
    # First, so that the end and padding tokens may be among them.
    if args.add_tokens:
        tokenizer.add_tokens(list(args.add_tokens), special_tokens=True)
    for name in ("eos_token", "pad_token"):
        token = getattr(args, name)
        if token is None:
            continue
        if token not in tokenizer.get_vocab():
            raise ValueError(f"{name} {token!r} is not in the tokenizer's vocabulary: pass --add_tokens {token!r} too")
        setattr(tokenizer, name, token)


def prepare_model(
    model: Any, tokenizer: PreTrainedTokenizerBase, args: BaseConfig, peft_config: PeftConfig | None, train_rows: Any
) -> Any:
    """Give a model rows for new tokens, an adapter, and no dropout, as far as asked for.

    Args:
        model: a loaded model.
        tokenizer: with all special tokens.
        args: the configuration.
        peft_config: of the adapter to train, if any; new tokens are noted in it.
        train_rows: tokenised training rows, or None in a run that only evaluates.
    Returns:
        The model, or a PEFT model around it.
    Raises:
        ValueError: quantised weights without an adapter cannot be trained.
    """
    # transformers seeds later, but new embedding rows and LoRA's A are drawn here.
    set_seed(args.seed)
    # Before the adapter: it must know of the new rows, to train and to save them.
    if args.add_tokens or uses_new_tokens(train_rows, tokenizer, vocabulary_size(model)):
        learn_tokens(model, peft_config, grow(model, tokenizer))
    if peft_config is not None:
        model = add_adapter(model, peft_config)
    # After the adapter, which has a dropout of its own.
    if args.disable_dropout:
        disable_dropout(model)
    if train_rows is not None:  # quantised weights may be evaluated
        validate_quantization_for_training(model)
        warn_of_lost_updates(model, args)
    return model


def wrapped(model: nn.Module, wrapper: Callable[[Any], Any], args: BaseConfig) -> Any:
    """A model in its wrapper, with faster modules unless ``optimize_model`` is off.

    Args:
        model: as it is trained or asked: with its adapter, and with rows for new tokens.
        wrapper: makes the module that accelerate wraps, such as :class:`Policy`.
        args: the configuration.
    Returns:
        What ``wrapper`` makes.
    """
    if args.optimize_model:
        optimize(model)
    return wrapper(model)


def uses_new_tokens(rows: Any, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> bool:
    """Whether training reads a token without a row in the embeddings.

    Args:
        rows: tokenised rows; None; or a stream, which may hold any token.
        tokenizer: its end and padding count too.
        vocab_size: rows of the embeddings.
    Returns:
        True for a stream.
    """
    if rows is None:
        return False
    if not isinstance(rows, Dataset):
        return True
    # Ends and padding are added after tokenising, by the collator and by generation.
    special = [token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None]
    return max([largest_token(rows), *special]) >= vocab_size


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with. Any would do: lengths, not ids, tell where a sequence ends."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


@contextmanager
def unchanged_use_cache(model: Any) -> Iterator[None]:
    """Keep ``config.use_cache``: ``Trainer`` turns it off when it is made, and would save that with the model."""
    config = model.config.get_text_config()
    use_cache = getattr(config, "use_cache", None)
    yield
    if use_cache is not None:
        config.use_cache = use_cache


def warn_of_lost_updates(model: nn.Module, args: BaseConfig) -> None:
    """Warn where most updates of half-precision weights would be rounded away."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    half_dtypes = dtypes & {torch.bfloat16, torch.float16}
    if half_dtypes and args.learning_rate < _SAFE_HALF_PRECISION_RATE:
        logger.warning(
            "training %s weights in place: an update below 1/256 of a weight is rounded away, and at learning rate %g "
            "most are; load in float32 (--dtype float32) and add --bf16 on a GPU",
            str(half_dtypes.pop()).removeprefix("torch."), args.learning_rate,
        )  # fmt: skip


# Rows


def for_each_set(action: Callable[[Any], Any], rows: Any) -> Any:
    """``action`` of one data set, or of each data set of a dictionary, under the same names."""
    if isinstance(rows, dict):
        return {name: action(part) for name, part in rows.items()}
    return action(rows)


def sets_of(*groups: Any) -> list[Any]:
    """The data sets among these and among the dictionaries of them; None for one that is not given."""
    all_sets: list[Any] = []
    for rows in groups:
        all_sets += rows.values() if isinstance(rows, dict) else [rows]
    return all_sets


def check_rows(rows: Any) -> None:
    """Refuse rows that cannot be tokenised.

    Args:
        rows: as the caller passed them.
    Raises:
        ValueError: another type than those of ``datasets``, or rows that change when they are read.
    """
    if not isinstance(rows, Dataset | IterableDataset):
        raise ValueError(f"expected a Dataset or an IterableDataset of `datasets`, got {type(rows).__name__}")
    if isinstance(rows, Dataset) and rows.format["type"] == "custom":
        raise ValueError("the rows have a with_transform(), which acts when they are read: apply it with map() first")


def check_drop_last(rows: Any, args: BaseConfig) -> None:
    """Refuse to leave out the last batch where it is the only one.

    Args:
        rows: tokenised training rows.
        args: the configuration.
    Raises:
        ValueError: nothing would be left to train on.
    """
    batch = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and isinstance(rows, Dataset | Packed) and len(rows) < batch:
        raise ValueError(
            f"--dataloader_drop_last leaves nothing to train on: {len(rows)} rows, and {batch} in a batch of all "
            "processes; use a smaller --per_device_train_batch_size"
        )


def repeat_stream(stream: IterableDataset, args: BaseConfig, plans_rows: bool) -> Endless:
    """A tokenised stream that begins again at its end.

    Args:
        stream: tokenised rows.
        args: must have ``max_steps``, as the length of a stream is not known.
        plans_rows: whether batches are planned by the lengths of all rows.
    Returns:
        A stream without end.
    Raises:
        ValueError: no ``max_steps``, or planned batches.
    """
    if args.max_steps <= 0:
        raise ValueError("a stream does not say how many rows it has: pass --max_steps")
    if plans_rows:
        raise ValueError("--packing and --tokens_per_batch plan batches of all rows: they need rows, not a stream")
    # Each process reads the stream and takes its own rows, instead of rank 0 sending batches to the others.
    args.accelerator_config.dispatch_batches = False  # type: ignore[union-attr]
    return Endless(stream)


def check_positions(model: nn.Module, *groups: Any) -> None:
    """Compare the lengths of tokenised rows with what the model can read.

    Args:
        model: a transformers model.
        *groups: data sets, or dictionaries of them.
    Raises:
        ValueError: rows are longer than the model has positions.
    """
    # Beyond the limit there are no embeddings of positions; beyond the trained length the model only gets worse.
    limit, trained_positions = max_positions(model), trained_length(model)
    for rows in sets_of(*groups):
        if not (isinstance(rows, Dataset) and is_tokenised(rows)):
            continue
        lengths = longest_sequences(rows)
        longest = int(lengths.max())
        if limit is not None and longest > limit:
            raise ValueError(
                f"{int((lengths > limit).sum())} of {len(rows)} rows have more tokens than the model has positions "
                f"({longest} in row {int(lengths.argmax()) + 1}, {limit} positions): pass --max_length {limit} or less"
            )
        if trained_positions is not None and longest > trained_positions:
            logger.warning(
                "%d of %d rows are longer than the %d tokens that the model was made for (up to %d)",
                int((lengths > trained_positions).sum()), len(rows), trained_positions, longest,
            )  # fmt: skip
