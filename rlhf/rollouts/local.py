"""The engine in this process: the model that is trained samples for itself."""

import difflib
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from rlhf.kernels.linear import speed_up_linear
from rlhf.models.attention import unfit
from rlhf.models.positions import first_position, own_positions
from rlhf.rollouts.cache import NAME, Cache
from rlhf.rollouts.draft import Draft
from rlhf.rollouts.engine import Completion, Sampling, check_request

logger = logging.getLogger(__name__)

READ = 8192  # tokens of prompts in one forward
EVERY = 8  # steps between questions to an accelerator: which rows have ended?


class LocalEngine:
    """A :class:`RolloutEngine` around a causal LM in memory.

    A prompt is read once for all its samples, without padding. Keys and values are written in place, those of a shared
    prompt exist once, and rows that have ended are dropped. A model whose attention cannot be replaced (recurrent
    layers, soft-capped attention, …) goes through ``model.generate`` with the same sampler: the same completions, more
    slowly. It is said once, after a check against the model's own forward.

    The model is put into evaluation mode for the time of a call, and given back as it was.

    Args:
        model: a transformers causal LM, or PEFT around one (its active adapter counts). The inner model, not the
            wrapper of DDP or FSDP.
        tokenizer: spells stop strings. Its EOS token and those of ``model.generation_config`` end a completion.
        autocast: run the model under autocast in this dtype, as training does; None runs it as it is.
    Raises:
        ValueError: neither names an EOS token.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, autocast: torch.dtype | None = None
    ) -> None:
        self.model, self.tokenizer, self.autocast = model, tokenizer, autocast
        self.base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        speed_up_linear(model)
        self.end_ids = end_ids(self.base, tokenizer)
        self.version = 0
        self._checked = False
        self._keeps = True  # model.generate may keep what it has read
        self._problem: str | None = None

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        index: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """See :class:`RolloutEngine`.

        Raises:
            FloatingPointError: the model's logits are not finite.
        """
        check_request(prompt_ids, n, seed)
        self._check_fit(prompt_ids, sampling)
        if not prompt_ids:
            return []
        prompts = [list(ids) for ids in prompt_ids]
        with self._serving() as device:
            if not self._checked:
                self._problem = self._check(device)
                self._checked = True
                if self._problem:
                    self._keeps = self._continues(device)
                    name = type(self.base).__name__
                    logger.warning("%s: sampling by model.generate, because %s (exact, slower)", name, self._problem)
            numbers = index or range(len(prompts))
            draft = Draft(numbers, n, sampling, seed, self.end_ids, self.tokenizer, device, prompts)
            if self._problem:
                self._generate(prompts, draft, device)
            else:
                with self._our_attention():
                    self._decode(prompts, draft, device)
            return draft.completions(self.version)

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See :class:`RolloutEngine`. Where the model is the one that is trained, ``weights`` is empty."""
        own = self.model.state_dict()
        with torch.no_grad():
            for name, tensor in weights:
                if name not in own:
                    near = difflib.get_close_matches(name, own, 1)
                    hint = f"; did you mean {near[0]!r}?" if near else ""
                    raise ValueError(f"update_weights: the engine's model has no weight {name!r}{hint}")
                if own[name].shape != tensor.shape:
                    raise ValueError(
                        f"update_weights: {name!r} is {tuple(tensor.shape)}, the engine's is {tuple(own[name].shape)}"
                    )
                own[name].copy_(tensor)
        self.version = version

    def sleep(self) -> None:
        """Nothing is kept between calls; the memory of the last one goes back to the device."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Nothing to undo."""

    def close(self) -> None:
        """Nothing to let go of: the model belongs to the caller."""

    @contextmanager
    def _serving(self) -> Iterator[torch.device]:
        """Evaluation mode and no gradients; and everything as it was afterwards."""
        device = next(self.base.parameters()).device
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        text_config = self.base.config.get_text_config()
        routers = getattr(text_config, "output_router_logits", False)
        if routers:  # a loss of them would be made for each token
            text_config.output_router_logits = False
        try:
            with (
                torch.inference_mode(),
                torch.autocast(device.type, self.autocast, enabled=self.autocast is not None),
            ):
                yield device
        finally:
            for module in training:
                module.training = True
            if routers:
                text_config.output_router_logits = routers

    @contextmanager
    def _our_attention(self) -> Iterator[None]:
        usual = self.base.config._attn_implementation
        self.base.set_attn_implementation(NAME)
        try:
            yield
        finally:
            self.base.set_attn_implementation(usual)

    def _check_fit(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> None:
        config = self.base.config.get_text_config()
        context, vocab = getattr(config, "max_position_embeddings", None), config.vocab_size
        for index, ids in enumerate(prompt_ids):
            if context is not None and len(ids) + sampling.max_tokens > context:
                raise ValueError(
                    f"prompt {index} has {len(ids)} tokens; with max_tokens = {sampling.max_tokens} that is more than "
                    f"the model's context of {context}: shorten or filter prompts, or lower max_tokens"
                )
            if not 0 <= min(ids) <= max(ids) < vocab:
                raise ValueError(f"prompt {index} has ids outside the model's vocabulary of {vocab}")

    def _decode(self, prompts: list[list[int]], draft: Draft, device: torch.device) -> None:
        """The fast way: our attention and our cache."""
        sampling = draft.sampling
        lengths = torch.tensor([len(ids) for ids in prompts], device=device)
        cache = Cache(lengths, draft.n, max(1, sampling.max_tokens - 1))
        rows = torch.arange(len(prompts) * draft.n, device=device)
        positions = lengths.repeat_interleave(draft.n)
        logits = self._read(prompts, cache, device).repeat_interleave(draft.n, 0)
        while True:
            token = draft.take(logits, rows.to(draft.device)).to(device)
            if draft.step == sampling.max_tokens:
                return
            if not token.is_cuda or draft.step % EVERY == 0:
                live = (~draft.stopped[rows.to(draft.device)]).nonzero().squeeze(1).to(device)
                if not len(live):
                    return
                if len(live) <= 7 / 8 * len(rows):  # else the copying costs more than the rows
                    cache.keep(live)
                    rows, positions, token = rows[live], positions[live], token[live]
            logits = self._forward(token[:, None], positions[:, None], cache).squeeze(1)
            positions = positions + 1
            cache.step += 1

    def _read(self, prompts: list[list[int]], cache: Cache, device: torch.device) -> Tensor:
        """Read the prompts into the cache; the logits after each, [P, V]."""
        logits = []
        start = 0
        while start < len(prompts):
            stop, count = start + 1, len(prompts[start])
            while stop < len(prompts) and count + len(prompts[stop]) <= READ:
                count += len(prompts[stop])
                stop += 1
            part = prompts[start:stop]
            cache.start(len(part))
            ids = torch.tensor([i for one in part for i in one], device=device)[None]
            positions = torch.cat([torch.arange(len(one)) for one in part]).to(device)[None]
            last = torch.tensor([len(one) for one in part], device=device).cumsum(0) - 1
            logits.append(self._forward(ids, positions, cache, last)[0])
            cache.finish()
            start = stop
        return torch.cat(logits)

    def _forward(self, ids: Tensor, positions: Tensor, cache: Cache, keep: Tensor | int = 1) -> Tensor:
        return self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=ids.new_zeros(1, 1, 1, 1),  # passed on as it is, so that no mask is built
            use_cache=False,
            logits_to_keep=keep,
            cache=cache,
        ).logits

    def _generate(self, prompts: list[list[int]], draft: Draft, device: torch.device) -> None:
        """The exact fallback: transformers runs the model, we choose the tokens.

        Prompts of one length go together: recurrent and convolutional layers would read padding.
        """
        pad = self.end_ids[0]
        config = GenerationConfig(
            max_new_tokens=draft.sampling.max_tokens, do_sample=False, pad_token_id=pad, use_cache=self._keeps
        )
        usual, self.base.generation_config = self.base.generation_config, GenerationConfig()  # no defaults of its own
        try:
            for length in sorted({len(ids) for ids in prompts}):
                group = [index for index, ids in enumerate(prompts) if len(ids) == length]
                rows = torch.tensor([index * draft.n + sample for index in group for sample in range(draft.n)])
                ids = torch.tensor([prompts[index] for index in group], device=device).repeat_interleave(draft.n, 0)
                draft.step = 0
                self.model.generate(  # type: ignore[operator]
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=config,
                    **_places(self.base, ids),
                    logits_processor=LogitsProcessorList([_Choose(draft, rows.to(draft.device))]),
                    stopping_criteria=StoppingCriteriaList([_Ended(draft, rows.to(draft.device))]),
                )
        finally:
            self.base.generation_config = usual

    def _continues(self, device: torch.device) -> bool:
        """Whether ``model.generate`` goes on from what it keeps as the model's own forward does (RWKV forgets it)."""
        size = self.base.config.get_text_config().vocab_size
        ids = torch.tensor([[5, 3, 4, 6], [2, 7, 5, 3]], device=device) % size
        config = GenerationConfig(
            max_new_tokens=3, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True
        )
        usual, self.base.generation_config = self.base.generation_config, GenerationConfig()
        try:
            found = self.model.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, **_places(self.base, ids)
            )
            got = torch.stack(found.logits, 1).float()
            want = self.model(input_ids=found.sequences[:, :-1], use_cache=False).logits[:, 3:].float()
        except Exception as error:  # whatever an unknown model raises, it can read all anew
            logger.debug("%s: generate fails with what it keeps (%s)", type(self.base).__name__, error)
            return False
        finally:
            self.base.generation_config = usual
        half = self.autocast is not None or next(self.base.parameters()).dtype in (torch.float16, torch.bfloat16)
        return bool((got - want).abs().max() <= (5e-2 if half else 1e-3) * want.abs().max())

    def _check(self, device: torch.device) -> str | None:
        """Why the fast way is closed, if it is: it must give the logits of the model's own forward."""
        if reason := unfit(self.base):
            return reason
        size = self.base.config.get_text_config().vocab_size
        prompts, tokens = (
            [[i % size for i in ids] for ids in rows]
            for rows in ([[5, 3, 4, 6], [2]], [[3, 4, 2], [5, 6, 3], [7, 2, 4], [6, 5, 5]])
        )
        whole = [torch.tensor([prompts[row // 2] + own], device=device) for row, own in enumerate(tokens)]
        try:
            want = [self.model(input_ids=ids, use_cache=False).logits[0] for ids in whole]
            with self._our_attention():
                apart = self._apart(prompts, whole, want, device)
        except Exception as error:  # whatever an unknown model raises, its own generate is the answer
            first = next(iter(str(error).splitlines()), "")
            return f"its attention cannot be replaced ({type(error).__name__}: {first})"
        half = self.autocast is not None or want[0].dtype not in (torch.float32, torch.float64)
        scale = max(float(logits.abs().max()) for logits in want)
        return None if apart <= (5e-2 if half else 1e-4) * scale else f"its logits differ by {apart:.2g}"

    def _apart(self, prompts: list[list[int]], whole: list[Tensor], want: list[Tensor], device: torch.device) -> float:
        """How far decoding two groups of two, one of which loses a row, is from ``want``."""
        lengths = torch.tensor([len(ids) for ids in prompts], device=device)
        cache = Cache(lengths, 2, 2)
        got = list(zip((0, 2), lengths - 1, self._read(prompts, cache, device), strict=True))
        rows = torch.arange(len(whole), device=device)
        for step in range(2):
            if step == 1:
                cache.keep(kept := torch.tensor([0, 2, 3], device=device))
                rows = rows[kept]
            places = lengths[rows // 2] + step
            ids = torch.stack([whole[row][0, place] for row, place in zip(rows, places, strict=True)])
            got += zip(rows, places, self._forward(ids[:, None], places[:, None], cache)[:, 0], strict=True)
            cache.step += 1
        return max(float((logits - want[row][place]).abs().max()) for row, place, logits in got)


def end_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's EOS and those that the model's generation config adds (a chat model's end of turn).

    Raises:
        ValueError: neither names one.
    """
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    ends = list(dict.fromkeys(i for i in found if i is not None))
    if not ends:
        raise ValueError("no token ends a completion: set tokenizer.eos_token or model.generation_config.eos_token_id")
    return ends


def _places(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """The positions of ``ids`` [R, T], where they do not begin at 0, for ``model.generate``."""
    start = first_position(model) if own_positions(model) else None
    return (
        {} if start is None else {"position_ids": (torch.arange(ids.size(1), device=ids.device) + start).expand_as(ids)}
    )


class _Choose(LogitsProcessor):
    """All probability to the token that the draft draws for ``rows`` of it."""

    def __init__(self, draft: Draft, rows: Tensor) -> None:
        self.draft, self.rows = draft, rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.draft.take(scores, self.rows).to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)


class _Ended(StoppingCriteria):
    def __init__(self, draft: Draft, rows: Tensor) -> None:
        self.draft, self.rows = draft, rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return self.draft.stopped[self.rows].to(input_ids.device)
