"""A reward model from a folder or the hub, with its own tokenizer and chat template."""

import logging
import statistics
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
from rlhf.data.formats import Dialogue, Turns
from rlhf.kernels.linear import speed_up_linear
from rlhf.models import load_tokenizer
from rlhf.models.adapters import adapter_config, base_of, merged

logger = logging.getLogger(__name__)


class ModelReward:
    """The scalar of a sequence classifier with one label, read at the last token of prompt and completion.

    The text is rendered with the model's own chat template and tokenised with its own tokenizer, whatever the
    policy's are. The last token is found by counting, not by ``id != pad``, which would miss an EOS that is also the
    padding. A sample longer than the model takes is refused, never cut.

    Args:
        path: a folder (of a model, or of a PEFT adapter), or a name on the hub; or the model itself.
        tokenizer: its tokenizer, where it does not lie beside the model.
        rendering: must be that of its training. ``"answer"``: prompt and completion tokenised apart, up to the token
            that ends the answer, as :class:`rlhf.RewardTrainer` does; ``"template"``: all that the chat template
            writes (for plain text, the text and EOS), tokenised as one, as TRL and most published models do.
        batch_size: sequences in one forward pass.
        mean, std: the reward is (score - mean) / std; :meth:`calibrate` measures them.
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
        given = None if isinstance(path, str) else path
        path = path if isinstance(path, str) else str(path.config._name_or_path)  # type: ignore[union-attr]
        self.path, self.rendering, self.batch_size, self.mean, self.std = path, rendering, batch_size, mean, std
        self.__name__ = Path(path).name or type(given).__name__
        self.tokenizer = tokenizer if tokenizer is not None else load_tokenizer(path)
        place = device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
        folder = Path(path).expanduser()
        with patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"):  # else ranks other than 0 get no weights
            self.model = given if given is not None else _load(str(folder) if folder.is_dir() else path, dtype)
        self.model.to(place).eval().requires_grad_(False)
        speed_up_linear(self.model)
        config: Any = self.model.config
        self._limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        config.get_text_config().pad_token_id = None  # HF's own forward then reads the last token of a row
        self._batched = self._reads_last_token()

    def check(self, row: Mapping[str, Any]) -> None:
        """Render a row's prompt with a short answer.

        Raises:
            ValueError: conversations, and the tokenizer has no chat template.
        """
        prompt = row.get("prompt", "")
        self._ids(prompt, "a" if isinstance(prompt, str) else [{"role": "assistant", "content": "a"}])

    def calibrate(self, prompts: Sequence[Turns], completions: Sequence[Turns]) -> tuple[float, float]:
        """Set ``mean`` and ``std`` to those of the model's scores for samples of the reference policy.

        Rewards then have mean 0 and standard deviation 1 where training begins, so that a KL weight means the same
        under every reward model. Returns them, to be written into a config.

        Source: arXiv 1909.08593 §2.1; arXiv 2009.01325 (mean only).
        """
        scores = self._scores(prompts, completions)
        mean, std = statistics.fmean(scores), statistics.pstdev(scores)
        if not std > 1e-6 * abs(mean):  # rounding apart
            raise ValueError(f"{self.path}: all {len(scores)} reference samples have the same score, {mean:g}")
        self.mean, self.std = mean, std
        logger.info("%s: mean %.6g, std %.6g on %d reference samples", self.path, mean, std, len(scores))
        return mean, std

    def __call__(self, prompts: Sequence[Turns], completions: Sequence[Turns], **columns: Any) -> list[float]:
        """One reward for each completion.

        Raises:
            ValueError: a sample is longer than the model takes.
        """
        return [(score - self.mean) / self.std for score in self._scores(prompts, completions)]

    def _scores(self, prompts: Sequence[Turns], completions: Sequence[Turns]) -> list[float]:
        rows = [self._ids(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        for number, ids in enumerate(rows, start=1):
            if self._limit is not None and len(ids) > self._limit:
                raise ValueError(
                    f"sample {number} has {len(ids)} tokens for the reward model {self.path}, which takes {self._limit}"
                )
        scores = [0.0] * len(rows)
        with torch.no_grad():
            for indices in self._batches(rows):
                values = self._forward([rows[i] for i in indices]).tolist()
                for index, value in zip(indices, values, strict=True):
                    scores[index] = value
        return scores

    def _batches(self, rows: list[list[int]]) -> Iterator[list[int]]:
        """Indices of rows of about one length."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        size = self.batch_size if self._batched else 1
        return (order[first : first + size] for first in range(0, len(order), size))

    def _forward(self, rows: list[list[int]]) -> Tensor:
        """Scores [B], float32."""
        model: Any = self.model
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(model.device)
        if not self._batched:
            return model(input_ids=ids).logits[:, 0].float()
        lengths = torch.tensor([len(row) for row in rows], device=model.device)
        mask = (torch.arange(ids.size(1), device=model.device) < lengths[:, None]).long()
        hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
        return model.score(hidden[torch.arange(len(rows)), lengths - 1])[:, 0].float()

    def _reads_last_token(self) -> bool:
        """Whether the score is the head's of the last hidden state, so that we may pool ourselves, in batches."""
        if not isinstance(getattr(self.model, "score", None), nn.Module):
            return False
        row = self._ids("a", "a")
        with torch.no_grad():
            self._batched = True
            ours = self._forward([row])
            self._batched = False
            same = torch.allclose(ours, self._forward([row]), rtol=1e-3, atol=1e-3)
        if not same:
            logger.warning("%s: more than a head on the last token; scoring one sample at a time", self.path)
        return same

    def _ids(self, prompt: Turns, completion: Turns) -> list[int]:
        tokenizer: Any = self.tokenizer
        if not isinstance(prompt, str) and not tokenizer.chat_template:
            raise ValueError(
                f"{self.path}: the reward model's tokenizer has no chat template, and the prompts are conversations: "
                "put a chat_template.jinja into its folder"
            )
        if self.rendering == "answer":
            found = encode(tokenizer, Dialogue(prompt, (completion,)))
            return found.prompt_ids + found.completions[0][0]
        if isinstance(prompt, str):
            text, end = prompt + str(completion), tokenizer.eos_token or ""
            return tokenizer(text if text.endswith(end) else text + end)["input_ids"]
        text = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
        return tokenizer(text, add_special_tokens=False)["input_ids"]


def _load(name: str, dtype: str) -> nn.Module:
    if is_deepspeed_zero3_enabled():
        raise ValueError(f"{name}: no reward model in the process under ZeRO-3; serve it over HTTP, or use FSDP2")
    try:
        if (adapter := adapter_config(name)) is not None:
            return _load_adapter(name, adapter, dtype)
        config = AutoConfig.from_pretrained(name)
        kinds = config.architectures or []
        if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
            raise ValueError(f"it is a {', '.join(kinds) or config.model_type}, not a …ForSequenceClassification")
        if config.num_labels != 1:
            raise ValueError(f"its head has {config.num_labels} labels, expected 1")
        model, report = AutoModelForSequenceClassification.from_pretrained(name, dtype=dtype, output_loading_info=True)
        if report["missing_keys"]:
            raise ValueError(f"weights are missing: {', '.join(sorted(report['missing_keys'])[:3])}")
    except (OSError, ValueError, RuntimeError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{name}: cannot be loaded as a reward model ({first})") from error
    return model


def _load_adapter(name: str, config: PeftConfig, dtype: str) -> nn.Module:
    """The adapter with its own score head, merged into its base model."""
    if config.task_type != "SEQ_CLS":
        raise ValueError(f"its adapter is for {config.task_type}, expected SEQ_CLS")
    base = AutoModelForSequenceClassification.from_pretrained(base_of(name, config), num_labels=1, dtype=dtype)
    return merged(base, name)
