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
from rlhf.data.formats import Turns, sft_dialogue
from rlhf.kernels.recompute import fewer_activations
from rlhf.models.adapters import adapter_config, base_of, merged
from rlhf.models.loading import HUB, base_kwargs, hub_kwargs, load_model
from rlhf.models.places import loading, resolve
from rlhf.models.policy import Wrapper
from rlhf.models.positions import inputs_of


class RewardModel(Wrapper):
    """A causal LM with a scalar head (plain, or PEFT around one) whose forward gives a reward for each sequence.

    Args:
        model: one of transformers' ``...ForSequenceClassification`` with one label and a linear head named ``score``.
    Raises:
        ValueError: another kind of model, or more than one label.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        outputs = getattr(getattr(self.without_adapter, "score", None), "out_features", None)
        if outputs != 1:
            found = "no head `score`" if outputs is None else f"a head `score` of {outputs} outputs"
            raise ValueError(
                f"{type(self.without_adapter).__name__} has {found}, a reward model one output on a causal LM: "
                "use rlhf.models.load_reward_model, or from_pretrained(..., num_labels=1)"
            )

    def forward(self, batch: Batch, rows: Tensor | None = None) -> Tensor:
        """Rewards [S], at least float32: the head on the hidden state of each sequence's last token.

        With ``rows`` int64 [N], the head on those rows of the flattened hidden states instead: [N].
        """
        model = self.without_adapter
        with fewer_activations():
            hidden = model.base_model(**inputs_of(model, batch), use_cache=False)[0]
        last = hidden.reshape(-1, hidden.size(-1))[batch.last() if rows is None else rows]
        weight: Tensor = model.score.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        with torch.autocast(last.device.type, enabled=False):
            return F.linear(last.to(dtype), weight.to(dtype)).squeeze(1)

    @torch.no_grad()
    def rewards(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Turns],
        completions: Sequence[Turns],
        batch_size: int = 8,
    ) -> Tensor:
        """Rewards of answers given as text or messages, tokenised as in training; without dropout.

        Args:
            prompts, completions: text, or lists of messages; the answer to each prompt.
            batch_size: moves no figure.
        Returns:
            [n], at least float32.
        Raises:
            ValueError: numbers of prompts and answers differ, or one of them cannot be read.
        """
        self.eval()
        rows = []
        for prompt, completion in zip(prompts, completions, strict=True):
            row = {"prompt": prompt, "completion": completion}
            found = encode(tokenizer, sft_dialogue(row, "completion", RowFormat()))
            ids = found.prompt_ids + found.completions[0][0]
            rows.append({"input_ids": ids, "labels": ids})
        parts = (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))
        return torch.cat([self(Collator()(part).to(self.device)) for part in parts])


def load_reward_model(name_or_path: str, **kwargs: Any) -> RewardModel:
    """A reward model from a checkpoint of one, or from a causal LM under a new head of zeros.

    An adapter is loaded with its base model and merged; ``dtype`` and others as in :func:`load_model`.

    Raises:
        FileNotFoundError: a path that is no folder, or a folder without a model.
        ValueError: no model, or an architecture without a sequence-classification class in transformers.
    """
    kwargs.setdefault("dtype", "auto")
    name = resolve(name_or_path)
    adapter = adapter_config(name, **hub_kwargs(kwargs))
    if adapter is not None and adapter.task_type == "SEQ_CLS":
        base = load_reward_model(base_of(name, adapter), **base_kwargs(kwargs, adapter))
        return RewardModel(merged(base.model, name, **hub_kwargs(kwargs)))  # type: ignore[arg-type]
    if adapter is not None:
        return RewardModel(add_scalar_head(load_model(name_or_path, **kwargs)))
    with loading(name_or_path, "a reward model"):
        config = AutoConfig.from_pretrained(name, **{key: kwargs[key] for key in HUB if key in kwargs})
    _check_architecture(config)
    if any(architecture.endswith("ForSequenceClassification") for architecture in config.architectures or []):
        with loading(name_or_path, "a reward model"):
            return RewardModel(AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, **kwargs))
    return RewardModel(add_scalar_head(load_model(name_or_path, **kwargs)))


def add_scalar_head(model: PreTrainedModel) -> PreTrainedModel:
    """Move the backbone of a causal LM under a scalar head, as transformers' ``...ForSequenceClassification``.

    The head is zero: every reward is 0 and the loss log 2 at the start, no random number is left between two runs,
    and the first gradients do not pull the features towards a random direction (arXiv 2202.10054).

    Raises:
        ValueError: transformers has no sequence-classification class for the architecture.
    """
    config = model.config
    _check_architecture(config)
    config.num_labels = 1
    with torch.device("meta"):  # only the shell is wanted
        classifier = AutoModelForSequenceClassification.from_config(config)
    if not isinstance(getattr(classifier, "score", None), nn.Linear):
        raise ValueError(f"{type(classifier).__name__} has no linear head `score`: {config.model_type} is no causal LM")
    setattr(classifier, classifier.base_model_prefix, model.base_model)
    like: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    classifier.score = nn.Linear(classifier.score.in_features, 1, bias=False, device=like.device, dtype=like.dtype)
    nn.init.zeros_(classifier.score.weight)
    classifier.name_or_path = model.name_or_path  # none, where no checkpoint holds the weights
    return classifier.train(model.training)


def _check_architecture(config: Any) -> None:
    own_code = "AutoModelForSequenceClassification" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and not own_code:
        raise ValueError(
            f"transformers has no sequence-classification class for {config.model_type}, so no reward model of it; "
            "transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING lists what has one"
        )


def spare_pad_token(tokenizer: PreTrainedTokenizerBase, ends: Iterable[int], vocab_size: int) -> int | None:
    """A special token to pad with that ends no answer: the tokenizer's own pad, its BOS, or another; else None.

    transformers scores a sequence at its last token that is not the pad, so it would pass over the end of an answer
    whose last token, usually EOS, is the pad as well.
    """
    others = [index for index, token in tokenizer.added_tokens_decoder.items() if token.special]
    candidates = [tokenizer.pad_token_id, tokenizer.bos_token_id, *others]
    used = set(ends)
    return next((i for i in candidates if i is not None and i < vocab_size and i not in used), None)
