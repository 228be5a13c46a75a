"""A reward model from a folder or the hub, with its own tokenizer and chat template."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import patch_environment
from peft import PeftConfig
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from rlhf.data.chat import encode
from rlhf.data.formats import Dialogue
from rlhf.data.messages import Turns
from rlhf.models import load_tokenizer
from rlhf.models.adapter_files import adapter_config, base_of, merged
from rlhf.models.weights import load_whole

logger = logging.getLogger(__name__)


class ModelReward:
    """The scalar of a sequence classifier with one label, read at the last token of prompt and completion.

    The text is rendered with the model's own chat template and tokenised with its own tokenizer, whatever the
    policy's are. The last token is found by counting, not by ``id != pad``, which would miss an EOS that is also the
    padding. A sample longer than the model takes is refused, never cut.

    Args:
        path: a folder (of a model, or of a PEFT adapter), or a name on the hub; or the model itself.
        tokenizer: its tokenizer, if it is not in the model's folder.
        rendering: must be that of its training. ``"answer"``: prompt and completion tokenised apart, up to the token
            that ends the answer, as :class:`rlhf.RewardTrainer` does; ``"template"``: all that the chat template
            writes (for plain text, the text and EOS), tokenised as one, as TRL and most published models do.
        batch_size: sequences in one forward pass.
        mean: subtracted from the score, so that a KL weight means the same under every reward model; by default 0.
        std: > 0, the score less ``mean`` is divided by it.
        dtype: "auto" for the checkpoint's, or "float32", "bfloat16", …
        device: the accelerator, if there is one.
    Raises:
        FileNotFoundError: no such folder.
        ValueError: no reward model there, or no tokenizer; ``std`` not positive.
    """

    def __init__(
        self,
        path: str | nn.Module,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        rendering: Literal["answer", "template"] = "answer",
        batch_size: int = 16,
        mean: float = 0.0,
        std: float = 1.0,
        dtype: str = "auto",
        device: str | torch.device | None = None,
    ) -> None:
        if rendering not in ("answer", "template"):
            raise ValueError(f"rendering must be answer or template, got {rendering!r}")
        if not std > 0:
            raise ValueError(f"std must be positive, got {std}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        model = None if isinstance(path, str) else path
        self.path = path if isinstance(path, str) else str(path.config._name_or_path)  # type: ignore[union-attr]
        self.rendering = rendering
        self.batch_size = batch_size
        self.mean = mean
        self.std = std
        self.__name__ = Path(self.path).name or type(model).__name__
        self.tokenizer = tokenizer if tokenizer is not None else load_tokenizer(self.path)
        self.model = _load(self.path, dtype) if model is None else model
        self.model.to(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
        self.model.eval().requires_grad_(False)
        config: Any = self.model.config.get_text_config()  # type: ignore[operator,union-attr]
        self._max_tokens = getattr(config, "max_position_embeddings", None)
        config.pad_token_id = None  # the model's own forward then scores the last token of a row
        self._is_batched = self._scores_last_token()

    def check(self, row: Mapping[str, Any]) -> None:
        """Render a row's prompt with a short answer.

        Args:
            row: one row of the data, by column.
        Raises:
            ValueError: conversations, and the tokenizer has no chat template.
        """
        prompt = row.get("prompt", "")
        answer: Turns = "a" if isinstance(prompt, str) else [{"role": "assistant", "content": "a"}]
        self._encode(prompt, answer)

    def __call__(self, prompts: Sequence[Turns], completions: Sequence[Turns], **columns: Any) -> list[float]:
        """Score each completion.

        Args:
            prompts: texts, or lists of messages.
            completions: the same.
            **columns: not read.
        Returns:
            One reward for each completion.
        Raises:
            ValueError: a sample is longer than the model takes.
        """
        rows = [self._encode(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        # Refused, not cut: the score of a cut answer would be of another answer.
        for sample_number, ids in enumerate(rows, start=1):
            if self._max_tokens is not None and len(ids) > self._max_tokens:
                raise ValueError(
                    f"sample {sample_number} has {len(ids)} tokens for the reward model {self.path}, "
                    f"which takes {self._max_tokens}"
                )
        rewards = [0.0] * len(rows)
        with torch.no_grad():
            for indices in self._batches(rows):
                scores = self._forward([rows[index] for index in indices]).tolist()
                for index, score in zip(indices, scores, strict=True):
                    rewards[index] = (score - self.mean) / self.std
        return rewards

    def _batches(self, rows: list[list[int]]) -> Iterator[list[int]]:
        """Indices of rows of similar length, so that batches need little padding."""
        # Neighbours in length need little padding. Rewards are put back into the order of the samples.
        by_length = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        size = self.batch_size if self._is_batched else 1
        for start in range(0, len(by_length), size):
            yield by_length[start : start + size]

    def _forward(self, rows: list[list[int]]) -> Tensor:
        """Scores [B], float32."""
        model: Any = self.model
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(model.device)
        if not self._is_batched:  # one row without padding, by the model's own forward
            return model(input_ids=ids).logits[:, 0].float()
        lengths = torch.tensor([len(row) for row in rows], device=model.device)
        positions = torch.arange(ids.size(1), device=model.device)
        mask = (positions < lengths[:, None]).long()
        # Only the last position of each row is needed, so the head reads that alone.
        hidden_states = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
        last_hidden = hidden_states[torch.arange(len(rows)), lengths - 1]
        return model.score(last_hidden)[:, 0].float()

    def _scores_last_token(self) -> bool:
        """Whether the score is the head's of the last hidden state, so that batches can be pooled here."""
        # Llama and most others call their head `score`; BERT has a pooler and a `classifier`.
        if not isinstance(getattr(self.model, "score", None), nn.Module):
            return False
        row = self._encode("a", "a")
        with torch.no_grad():
            self._is_batched = True
            pooled_here = self._forward([row])
            self._is_batched = False
            by_model = self._forward([row])
        scores_agree = torch.allclose(pooled_here, by_model, rtol=1e-3, atol=1e-3)
        if not scores_agree:
            logger.warning("%s: more than a head on the last token; scoring one sample at a time", self.path)
        return scores_agree

    def _encode(self, prompt: Turns, completion: Turns) -> list[int]:
        """Token ids of prompt and completion, rendered as in the model's training."""
        tokenizer: Any = self.tokenizer
        if not isinstance(prompt, str) and not tokenizer.chat_template:
            raise ValueError(
                f"{self.path}: the reward model's tokenizer has no chat template, and the prompts are conversations: "
                "put a chat_template.jinja into its folder"
            )
        if self.rendering == "answer":
            row = encode(tokenizer, Dialogue(prompt, (completion,)))
            return row.prompt_ids + row.completions[0][0]
        if isinstance(prompt, str):
            text = prompt + str(completion)
            # As in training: a text ends with EOS once, and with none where the tokenizer has no EOS.
            eos_token = tokenizer.eos_token or ""
            return tokenizer(text if text.endswith(eos_token) else text + eos_token)["input_ids"]
        # The template writes BOS itself: a second one would change the score.
        text = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
        return tokenizer(text, add_special_tokens=False)["input_ids"]


def _load(path: str, dtype: str) -> nn.Module:
    """The reward model in a folder or on the hub, or the merged one of an adapter.

    Raises:
        ValueError: it is no reward model, or cannot be read.
    """
    if is_deepspeed_zero3_enabled():
        raise ValueError(f"{path}: no reward model in the process under ZeRO-3; serve it over HTTP, or use FSDP2")
    folder = Path(path).expanduser()
    name = str(folder) if folder.is_dir() else path
    try:
        # Without this, FSDP's loading gives ranks other than 0 no weights.
        with patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"):
            adapter = adapter_config(name)
            return _load_classifier(name, dtype) if adapter is None else _load_adapter(name, adapter, dtype)
    except (OSError, ValueError, RuntimeError) as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{name}: cannot be loaded as a reward model ({first_line})") from error


def _load_classifier(name: str, dtype: str) -> nn.Module:
    config = AutoConfig.from_pretrained(name)
    architectures = config.architectures or []
    # A causal LM would load too, under a new head that scores at random.
    if not any(architecture.endswith("ForSequenceClassification") for architecture in architectures):
        raise ValueError(f"it is a {', '.join(architectures) or config.model_type}, not a …ForSequenceClassification")
    if config.num_labels != 1:
        raise ValueError(f"its head has {config.num_labels} labels, expected 1")
    model: nn.Module = load_whole(AutoModelForSequenceClassification, name, dtype=dtype)
    return model


def _load_adapter(name: str, config: PeftConfig, dtype: str) -> nn.Module:
    """The adapter with its own score head, merged into its base model."""
    if config.task_type != "SEQ_CLS":
        raise ValueError(f"its adapter is for {config.task_type}, expected SEQ_CLS")
    # The adapter has the score head.
    base_model = load_whole(
        AutoModelForSequenceClassification, base_of(name, config), new_head="score", num_labels=1, dtype=dtype
    )
    return merged(base_model, name)
