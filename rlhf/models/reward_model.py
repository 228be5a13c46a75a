"""A causal LM with a scalar head: the reward of an answer, read at its last token."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf.data import Batch, Collator, RowFormat, encode
from rlhf.data.formats import sft_dialogue
from rlhf.data.messages import Turns
from rlhf.kernels.recompute import fewer_activations
from rlhf.models.adapter_files import adapter_config, base_of, loading_base, merged
from rlhf.models.loading import HUB, base_kwargs, hub_kwargs, load_model
from rlhf.models.places import loading, resolve
from rlhf.models.policy import Wrapper
from rlhf.models.positions import inputs_of
from rlhf.models.weights import load_whole


class RewardModel(Wrapper):
    """A causal LM with a scalar head (plain, or PEFT around one) whose forward gives a reward for each sequence.

    Args:
        model: One of transformers' ``...ForSequenceClassification`` with one label and a linear head named ``score``.

    Raises:
        ValueError: Another kind of model, or more than one label.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        outputs = getattr(getattr(self.without_adapter, "score", None), "out_features", None)
        if outputs != 1:
            head = "no head `score`" if outputs is None else f"a head `score` of {outputs} outputs"
            raise ValueError(
                f"{type(self.without_adapter).__name__} has {head}, a reward model one output on a causal LM: "
                "use rlhf.models.load_reward_model, or from_pretrained(..., num_labels=1)"
            )

    def forward(self, batch: Batch, rows: Tensor | None = None) -> Tensor:
        """Apply the head to the hidden state of each sequence's last token.

        Args:
            batch: The sequences.
            rows: int64 [N], rows of the flattened hidden states to apply the head to instead.

        Returns:
            [S] or [N], at least float32.
        """
        model = self.without_adapter
        with fewer_activations():
            hidden = model.base_model(**inputs_of(model, batch), use_cache=False)[0]
        flat_hidden = hidden.reshape(-1, hidden.size(-1))
        last_hidden = flat_hidden[batch.last() if rows is None else rows]
        weight: Tensor = model.score.weight
        head_dtype = torch.promote_types(weight.dtype, torch.float32)
        # In float32: rewards of two answers may differ by less than bfloat16 can tell.
        with torch.autocast(last_hidden.device.type, enabled=False):
            return F.linear(last_hidden.to(head_dtype), weight.to(head_dtype)).squeeze(1)

    @torch.no_grad()
    def rewards(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Turns],
        completions: Sequence[Turns],
        batch_size: int = 8,
    ) -> Tensor:
        """Score answers given as text or messages. They are tokenised as in training; dropout is off.

        Args:
            tokenizer: The tokenizer of the model.
            prompts: Text, or lists of messages.
            completions: The answer to each prompt, in the same forms.
            batch_size: Answers in a forward pass; it does not change the rewards.

        Returns:
            Rewards, one for each answer, at least float32.

        Raises:
            ValueError: The numbers of prompts and answers differ, or one of them cannot be read.
        """
        self.eval()
        rows = []
        for prompt, completion in zip(prompts, completions, strict=True):
            row = {"prompt": prompt, "completion": completion}
            encoded = encode(tokenizer, sft_dialogue(row, "completion", RowFormat()))
            ((completion_ids, _),) = encoded.completions
            input_ids = encoded.prompt_ids + completion_ids  # the labels do not matter: the last token is scored
            rows.append({"input_ids": input_ids, "labels": input_ids})
        collate = Collator()
        # A generator: one batch is on the device at a time.
        batches = (collate(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size))
        return torch.cat([self(batch.to(self.device)) for batch in batches])


def load_reward_model(name_or_path: str, **kwargs: Any) -> RewardModel:
    """Load a reward model, or a causal LM that becomes one with a new head of zeros.

    An adapter is loaded with its base model and merged.

    Args:
        name_or_path: A folder, or a name on the hub.
        kwargs: As in :func:`load_model`.

    Returns:
        The reward model.

    Raises:
        FileNotFoundError: A path that is no folder, or a folder without a model.
        ValueError: No model, or an architecture without a sequence-classification class in transformers.
    """
    kwargs.setdefault("dtype", "auto")
    location = resolve(name_or_path)
    # Asked first: a folder of an adapter has no config of a model to read.
    adapter = adapter_config(location, **hub_kwargs(kwargs))
    # An adapter of a reward model is on one; any other is on a causal LM, which gets a head.
    if adapter is not None and adapter.task_type == "SEQ_CLS":
        base_name = base_of(location, adapter)
        with loading_base(location):
            base_model = load_reward_model(base_name, **base_kwargs(kwargs, adapter))
        return RewardModel(merged(base_model.model, location, **hub_kwargs(kwargs)))  # type: ignore[arg-type]
    if adapter is not None:
        return RewardModel(add_scalar_head(load_model(name_or_path, **kwargs)))
    with loading(name_or_path, "a reward model"):
        config = AutoConfig.from_pretrained(location, **{key: kwargs[key] for key in HUB if key in kwargs})
    _check_architecture(config)
    architectures = config.architectures or []
    # Any other checkpoint has no trained head: transformers would draw one at random.
    if any(architecture.endswith("ForSequenceClassification") for architecture in architectures):
        with loading(name_or_path, "a reward model"):
            return RewardModel(load_whole(AutoModelForSequenceClassification, location, num_labels=1, **kwargs))
    return RewardModel(add_scalar_head(load_model(name_or_path, **kwargs)))


def add_scalar_head(model: PreTrainedModel) -> PreTrainedModel:
    """Move the backbone of a causal LM under a scalar head, as transformers' ``...ForSequenceClassification``.

    The head is zero. So every reward is 0 and the loss is log 2 at the start, two runs begin alike, and the first
    gradients do not move the features towards a random direction (arXiv 2202.10054).

    Args:
        model: A causal LM; its backbone is shared with the result.

    Returns:
        The model with the head.

    Raises:
        ValueError: transformers has no sequence-classification class for the architecture.
    """
    config = model.config
    _check_architecture(config)
    config.num_labels = 1
    with torch.device("meta"):  # without memory for a second backbone
        classifier = AutoModelForSequenceClassification.from_config(config)
    if not isinstance(getattr(classifier, "score", None), nn.Linear):
        raise ValueError(f"{type(classifier).__name__} has no linear head `score`: {config.model_type} is no causal LM")
    setattr(classifier, classifier.base_model_prefix, model.base_model)
    embeddings: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    width = classifier.score.in_features
    # Without bias, as in transformers' classes: a constant cancels in the loss of a pair.
    classifier.score = nn.Linear(width, 1, bias=False, device=embeddings.device, dtype=embeddings.dtype)
    nn.init.zeros_(classifier.score.weight)
    classifier.name_or_path = model.name_or_path  # empty, if no checkpoint holds the weights
    # A new module is in training mode, whatever the model was in.
    return classifier.train(model.training)


def _check_architecture(config: Any) -> None:
    code_of_model = getattr(config, "auto_map", None) or {}
    # A model with code of its own names its classes in its config.
    has_own_class = "AutoModelForSequenceClassification" in code_of_model
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and not has_own_class:
        raise ValueError(
            f"transformers has no sequence-classification class for {config.model_type}, so no reward model of it; "
            "transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING lists what has one"
        )


def spare_pad_token(tokenizer: PreTrainedTokenizerBase, ends: Iterable[int], vocab_size: int) -> int | None:
    """Find a special token to pad with that ends no answer.

    transformers scores a sequence at its last token that is not the pad. If the token that ends answers, usually EOS,
    were the pad as well, it would score the token before it.

    Args:
        tokenizer: The tokenizer of the model.
        ends: Ids that end an answer.
        vocab_size: Rows of the model's embeddings.

    Returns:
        The id of the tokenizer's own pad, of its BOS, or of another special token; None if there is none.
    """
    special_ids = [token_id for token_id, added_token in tokenizer.added_tokens_decoder.items() if added_token.special]
    # A tokenizer may have no pad and no BOS: both are None then.
    excluded = {*ends, None}
    for candidate in (tokenizer.pad_token_id, tokenizer.bos_token_id, *special_ids):
        # A token that was added to the tokenizer may have no embedding yet.
        if candidate not in excluded and candidate < vocab_size:
            return candidate
    return None
