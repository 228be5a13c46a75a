"""The engine in this process: the model that is trained samples for itself."""

import difflib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
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

from rlhf.models.layout import unsupported_reason
from rlhf.models.positions import finds_own_positions, first_position
from rlhf.models.single_precision import run_trial, tolerance_of
from rlhf.rollouts.cache import DECODING_ATTENTION, Cache
from rlhf.rollouts.decoding import DecodingState
from rlhf.rollouts.engine import Completion, Sampling, check_request
from rlhf.rollouts.graphs import FEWEST_STEPS, GraphedSteps, can_use_graphs
from rlhf.rollouts.static_cache import StaticCache

logger = logging.getLogger(__name__)

PREFILL_TOKENS = 8192  # most tokens of prompts in one forward
STOP_CHECK_INTERVAL = 8  # steps on an accelerator between two copies of which rows have ended
COMPACT_BELOW = 7 / 8  # share of rows that still run, below which dropping the others costs less than it saves
COMPACT_GRAPH_BELOW = 1 / 2  # the same, where a step of fewer rows is captured anew


class LocalEngine:
    """A :class:`RolloutEngine` around a causal LM in memory.

    A prompt is read once for all its samples, without padding. Keys and values are written in place, those of a shared
    prompt exist once, and rows that have ended are dropped. A model whose attention cannot be replaced (recurrent
    layers, soft-capped attention, …) goes through ``model.generate`` with the same sampler: the same completions, more
    slowly. This is decided once, by a comparison with the model's own forward, and logged.

    The model is in evaluation mode during a call, and in its former mode afterwards.

    Args:
        model: a transformers causal LM, or PEFT around one (its active adapter counts). The inner model, not the
            wrapper of DDP or FSDP.
        tokenizer: decodes tokens to find stop strings. Its EOS token and those of ``model.generation_config`` end a
            completion.
        autocast: run the model under autocast in this dtype, as training does; None runs it as it is.
    Raises:
        ValueError: neither the tokenizer nor the model has an EOS token.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, autocast: torch.dtype | None = None
    ) -> None:
        self.model, self.tokenizer, self.autocast = model, tokenizer, autocast
        self.base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        self.end_ids = end_ids(self.base, tokenizer)
        self.version = 0
        self._is_checked = False
        self._fallback_reason: str | None = None  # why `model.generate` is used, once checked
        self._generate_uses_cache = True
        self._can_be_captured = True  # until a CUDA graph of a step fails

    # The protocol

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        index: Sequence[int] | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[list[Completion]]:
        """See :class:`RolloutEngine`.

        Args:
            prompt_ids: each not empty.
            n: completions of each prompt.
            sampling: how tokens are drawn.
            seed: >= 0.
            index: the number of each prompt in a larger request.
            on_token: called with each token as soon as it is drawn, and with its row: sample j of prompt i is row
                ``i * n + j``. The end token is the last of a row. An exception that it raises ends the call.
        Returns:
            ``n`` completions of each prompt.

        Raises:
            ValueError: a prompt that does not fit the model.
            FloatingPointError: the model's logits are not finite.
        """
        check_request(prompt_ids, n, seed)
        self._check_prompts(prompt_ids, sampling)
        if not prompt_ids:
            return []
        prompts = [list(ids) for ids in prompt_ids]
        prompt_numbers = index or range(len(prompts))  # of a larger request, or of this one
        with self._inference() as device:
            if not self._is_checked:
                self._choose_path(device)
            state = DecodingState(
                prompt_numbers, n, sampling, seed, self.end_ids, self.tokenizer, device, prompts, on_token
            )
            if self._fallback_reason is not None:
                self._decode_by_generate(prompts, state, device)
            else:
                with self._decoding_attention():
                    self._decode(prompts, state, device)
            return state.completions(self.version)

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See :class:`RolloutEngine`. Where the model is the one that is trained, ``weights`` is empty."""
        # The tensors of a state dictionary are the model's own, so copying into them changes the model.
        model_weights = self.model.state_dict()
        with torch.no_grad():
            for name, tensor in weights:
                if name not in model_weights:
                    similar = difflib.get_close_matches(name, model_weights, 1)
                    hint = f"; did you mean {similar[0]!r}?" if similar else ""
                    raise ValueError(f"update_weights: the engine's model has no weight {name!r}{hint}")
                expected = tuple(model_weights[name].shape)
                if expected != tuple(tensor.shape):
                    raise ValueError(f"update_weights: {name!r} is {tuple(tensor.shape)}, the engine's is {expected}")
                model_weights[name].copy_(tensor)
        self.version = version

    def sleep(self) -> None:
        """Return the memory of the last call to the device; nothing else is kept between calls."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Nothing to undo."""

    def close(self) -> None:
        """Nothing to release: the model belongs to the caller."""

    # The model's modes

    @contextmanager
    def _inference(self) -> Iterator[torch.device]:
        """Evaluation mode and no gradients; the model is as before afterwards."""
        device = next(self.base.parameters()).device
        # Module by module: a part of the model (a frozen one) may be in evaluation mode during training.
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        # A mixture of experts would compute its load-balancing loss for each token.
        text_config = self.base.config.get_text_config()
        router_logits = getattr(text_config, "output_router_logits", False)
        if router_logits:
            text_config.output_router_logits = False
        autocast = torch.autocast(device.type, self.autocast, enabled=self.autocast is not None)
        try:
            with torch.inference_mode(), autocast:
                yield device
        finally:
            for module in training:
                module.training = True
            if router_logits:
                text_config.output_router_logits = router_logits

    @contextmanager
    def _decoding_attention(self) -> Iterator[None]:
        # Training may use another function (segments), and gets it back.
        trained_attention = self.base.config._attn_implementation
        self.base.set_attn_implementation(DECODING_ATTENTION)
        try:
            yield
        finally:
            self.base.set_attn_implementation(trained_attention)

    @property
    def _vocab_size(self) -> int:
        return int(self.base.config.get_text_config().vocab_size)

    def _check_prompts(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> None:
        context = getattr(self.base.config.get_text_config(), "max_position_embeddings", None)
        for index, ids in enumerate(prompt_ids):
            if context is not None and len(ids) + sampling.max_tokens > context:
                raise ValueError(
                    f"prompt {index} has {len(ids)} tokens; with max_tokens = {sampling.max_tokens} that is more than "
                    f"the model's context of {context}: shorten or filter prompts, or lower max_tokens"
                )
            if not 0 <= min(ids) <= max(ids) < self._vocab_size:
                raise ValueError(f"prompt {index} has ids outside the model's vocabulary of {self._vocab_size}")

    # Decoding with our attention and our cache

    def _decode(self, prompts: list[list[int]], state: DecodingState, device: torch.device) -> None:
        """Sample all completions: one forward for the prompts, then one for each token.

        Args:
            prompts: ids of each.
            state: gets the tokens.
            device: the model's.
        """
        max_tokens = state.sampling.max_tokens
        lengths = torch.tensor([len(ids) for ids in prompts], device=device)
        uses_graphs = can_use_graphs(device) and self._can_be_captured and max_tokens >= FEWEST_STEPS
        # The last token is drawn, but never read.
        cache = (StaticCache if uses_graphs else Cache)(lengths, state.num_samples, max(1, max_tokens - 1))
        rows = torch.arange(len(prompts) * state.num_samples, device=device)
        # The first sampled token comes right after the prompt, whatever the padding.
        positions = lengths.repeat_interleave(state.num_samples)
        logits = self._prefill(prompts, cache, device).repeat_interleave(state.num_samples, 0)

        def run_step(token: Tensor, positions: Tensor) -> Tensor:
            return self._forward(token[:, None], positions[:, None], cache).squeeze(1)

        graphed_steps = GraphedSteps(run_step, cache) if isinstance(cache, StaticCache) else None
        next_logits = graphed_steps or run_step
        compact_below = COMPACT_GRAPH_BELOW if uses_graphs else COMPACT_BELOW
        while True:
            token = state.draw_next(logits, rows.to(state.device)).to(device)
            if state.step == max_tokens:
                break
            # Reading on an accelerator which rows have ended waits for it; finished rows run on until then.
            if not token.is_cuda or state.step % STOP_CHECK_INTERVAL == 0:
                running = (~state.stopped[rows.to(state.device)]).nonzero().squeeze(1).to(device)
                if not len(running):
                    break
                if len(running) <= compact_below * len(rows):
                    cache.keep_rows(running)
                    rows, positions, token = rows[running], positions[running], token[running]
            logits = next_logits(token, positions)
            positions = positions + 1
            cache.advance()
        if graphed_steps is not None:
            self._can_be_captured = graphed_steps.unsupported_reason is None

    def _prefill(self, prompts: list[list[int]], cache: Cache, device: torch.device) -> Tensor:
        """Read the prompts into the cache, as many at once as :data:`PREFILL_TOKENS` allows.

        Args:
            prompts: ids of each.
            cache: empty.
            device: the model's.
        Returns:
            The logits after each prompt, [P, V].
        """
        logits = []
        start = 0
        while start < len(prompts):
            stop = start + 1
            num_tokens = len(prompts[start])
            while stop < len(prompts) and num_tokens + len(prompts[stop]) <= PREFILL_TOKENS:
                num_tokens += len(prompts[stop])
                stop += 1
            prompt_group = prompts[start:stop]
            cache.begin_prefill(len(prompt_group))
            # Side by side in one row: the attention function keeps prompts apart, so nothing is padded.
            ids = torch.tensor([token for prompt in prompt_group for token in prompt], device=device)
            positions = torch.cat([torch.arange(len(prompt)) for prompt in prompt_group]).to(device)
            last_tokens = torch.tensor([len(prompt) for prompt in prompt_group], device=device).cumsum(0) - 1
            logits.append(self._forward(ids[None], positions[None], cache, last_tokens)[0])
            cache.end_prefill()
            start = stop
        return torch.cat(logits)

    def _forward(self, ids: Tensor, positions: Tensor, cache: Cache, logits_to_keep: Tensor | int = 1) -> Tensor:
        """One forward of the model with our cache.

        Args:
            ids: [1, T] for prompts laid out flat, [R, 1] for one token of each row.
            positions: alike, each in its own sequence.
            cache: gets the keys and values.
            logits_to_keep: positions in the row whose logits are needed, or how many of the last ones.
        Returns:
            [1, P, V] or [R, 1, V].
        """
        return self.model(
            input_ids=ids,
            position_ids=positions,
            # A mask of four dimensions is passed on as it is, so transformers builds none.
            attention_mask=ids.new_zeros(1, 1, 1, 1),
            use_cache=False,
            logits_to_keep=logits_to_keep,
            cache=cache,
        ).logits

    # Decoding by model.generate

    def _decode_by_generate(self, prompts: list[list[int]], state: DecodingState, device: torch.device) -> None:
        """The exact fallback: transformers runs the model, we choose the tokens.

        Args:
            prompts: ids of each.
            state: gets the tokens.
            device: the model's.
        """
        config = GenerationConfig(
            max_new_tokens=state.sampling.max_tokens,
            do_sample=False,
            pad_token_id=self.end_ids[0],
            use_cache=self._generate_uses_cache,
        )
        samples = torch.arange(state.num_samples)
        with _empty_generation_config(self.base):
            # Only prompts of one length go together: recurrent and convolutional layers would read padding.
            for length in sorted({len(ids) for ids in prompts}):
                group = [number for number, ids in enumerate(prompts) if len(ids) == length]
                first_rows = torch.tensor(group) * state.num_samples
                rows = (first_rows[:, None] + samples).flatten().to(state.device)
                ids = torch.tensor([prompts[number] for number in group], device=device)
                ids = ids.repeat_interleave(state.num_samples, 0)
                state.step = 0  # each group of rows begins at its own first column
                self.model.generate(  # type: ignore[operator]
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=config,
                    **_position_ids(self.base, ids),
                    logits_processor=LogitsProcessorList([_ForceDrawnToken(state, rows)]),
                    stopping_criteria=StoppingCriteriaList([_RowsHaveStopped(state, rows)]),
                )

    # Which of the two

    def _choose_path(self, device: torch.device) -> None:
        self._fallback_reason = self._unsupported_reason(device)
        self._is_checked = True
        if self._fallback_reason is not None:
            self._generate_uses_cache = self._generate_cache_is_exact(device)
            name = type(self.base).__name__
            logger.warning("%s: sampling by model.generate, because %s (exact, slower)", name, self._fallback_reason)

    def _unsupported_reason(self, device: torch.device) -> str | None:
        """Why our attention cannot be used, if so: it must give the logits of the model's own forward."""
        if reason := unsupported_reason(self.base):
            return reason
        # Two prompts of different lengths with two completions each, so that padding and the grid are tried.
        prompts = self._in_vocabulary([[5, 3, 4, 6], [2]])
        completions = self._in_vocabulary([[3, 4, 2], [5, 6, 3], [7, 2, 4], [6, 5, 5]])
        sequences = [
            torch.tensor([prompts[row // 2] + completion], device=device) for row, completion in enumerate(completions)
        ]

        def largest_difference() -> tuple[float, float]:
            expected = [self.model(input_ids=ids, use_cache=False).logits[0] for ids in sequences]
            largest_logit = max(float(logits.abs().max()) for logits in expected)
            with self._decoding_attention():
                difference = self._largest_difference(prompts, sequences, expected, device)
            return difference, tolerance_of(self.base, expected[0]) * largest_logit

        try:
            difference, tolerance = run_trial(self.model, largest_difference)
        except Exception as error:  # whatever an unknown model raises, its own generate can be used
            first_line = next(iter(str(error).splitlines()), "")
            return f"its attention cannot be replaced ({type(error).__name__}: {first_line})"
        return None if difference <= tolerance else f"its logits differ by {difference:.2g}"

    def _in_vocabulary(self, rows: list[list[int]]) -> list[list[int]]:
        return [[token % self._vocab_size for token in ids] for ids in rows]

    def _largest_difference(
        self, prompts: list[list[int]], sequences: list[Tensor], expected: list[Tensor], device: torch.device
    ) -> float:
        """Decode two prompts, of which one loses a row, and compare logits.

        Args:
            prompts: ids of the two.
            sequences: [1, T] each, prompt and completion of each row.
            expected: [T, V] each, logits of the model's own forward on them.
            device: the model's.
        Returns:
            The largest difference.
        """
        lengths = torch.tensor([len(ids) for ids in prompts], device=device)
        cache = (StaticCache if can_use_graphs(device) else Cache)(lengths, 2, 2)
        # The logits after the prompts are those of rows 0 and 2, the first of each prompt.
        decoded = list(zip((0, 2), lengths - 1, self._prefill(prompts, cache, device), strict=True))
        rows = torch.arange(len(sequences), device=device)
        for step in range(2):
            if step == 1:
                remaining = torch.tensor([0, 2, 3], device=device)
                cache.keep_rows(remaining)
                rows = rows[remaining]
            positions = lengths[rows // 2] + step
            ids = torch.stack([sequences[row][0, position] for row, position in zip(rows, positions, strict=True)])
            logits = self._forward(ids[:, None], positions[:, None], cache)[:, 0]
            decoded += zip(rows, positions, logits, strict=True)
            cache.advance()
        return max(float((logits - expected[row][position]).abs().max()) for row, position, logits in decoded)

    def _generate_cache_is_exact(self, device: torch.device) -> bool:
        """Whether ``model.generate`` with its cache gives the logits of the model's own forward (not so for RWKV)."""
        ids = torch.tensor(self._in_vocabulary([[5, 3, 4, 6], [2, 7, 5, 3]]), device=device)
        config = GenerationConfig(
            max_new_tokens=3, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True
        )

        def logits_both_ways() -> tuple[Tensor, Tensor]:
            with _empty_generation_config(self.base):
                output = self.model.generate(  # type: ignore[operator]
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=config,
                    **_position_ids(self.base, ids),
                )
                return (
                    torch.stack(output.logits, 1),
                    self.model(input_ids=output.sequences[:, :-1], use_cache=False).logits[:, 3:],
                )

        try:
            logits, expected = run_trial(self.model, logits_both_ways)
        except Exception as error:  # whatever an unknown model raises, it can read the whole sequence at each step
            logger.debug("%s: generate fails with its cache (%s)", type(self.base).__name__, error)
            return False
        # A longer path through the model than above, so a wider tolerance in float32.
        tolerance = max(1e-3, tolerance_of(self.base, expected))
        return bool((logits - expected).abs().max() <= tolerance * expected.abs().max())


def end_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's EOS and those that the model's generation config adds (a chat model's end of turn).

    Args:
        model: with a ``generation_config``, or without one.
        tokenizer: with an ``eos_token_id``, or None there.
    Returns:
        Ids without repetition, the tokenizer's first.
    Raises:
        ValueError: neither has one.
    """
    model_end_ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    candidates = [tokenizer.eos_token_id, *(model_end_ids if isinstance(model_end_ids, list) else [model_end_ids])]
    ids = list(dict.fromkeys(token for token in candidates if token is not None))
    if not ids:
        raise ValueError("no token ends a completion: set tokenizer.eos_token or model.generation_config.eos_token_id")
    return ids


@contextmanager
def _empty_generation_config(model: Any) -> Iterator[None]:
    """Without the model's own defaults, which ``model.generate`` would mix into ours."""
    model_defaults, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = model_defaults


def _position_ids(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """An argument for ``model.generate`` where positions of ``ids`` [R, T] do not begin at 0."""
    start = first_position(model) if finds_own_positions(model) else None
    if start is None:
        return {}
    positions = torch.arange(ids.size(1), device=ids.device) + start
    return {"position_ids": positions.expand_as(ids)}


class _ForceDrawnToken(LogitsProcessor):
    """Leave only the token that the state draws for its ``rows``."""

    def __init__(self, state: DecodingState, rows: Tensor) -> None:
        self.state, self.rows = state, rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.state.draw_next(scores, self.rows).to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)


class _RowsHaveStopped(StoppingCriteria):
    def __init__(self, state: DecodingState, rows: Tensor) -> None:
        self.state, self.rows = state, rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return self.state.stopped[self.rows].to(input_ids.device)
