"""A teacher on a completion server: what it says of given tokens, in place of a teacher in memory."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data.batch import IGNORE
from rlhf.logprobs import TopK
from rlhf.rollouts import ServerEngine


class ServerTeacher:
    """A teacher behind vLLM's completion endpoint, asked for the log-probs of a prompt.

    Args:
        url: of the server. model: the name it serves the teacher under.
        k: likeliest tokens that it is asked for at each place (vLLM allows 20 unless started with --max-logprobs).
        tokenizer: the student's, which must be the teacher's as well.
    Raises:
        ConnectionError: no server answers.
        ValueError: it does not serve ``model``, or tokenises otherwise.
    """

    def __init__(self, url: str, model: str, k: int, tokenizer: PreTrainedTokenizerBase) -> None:
        self.engine, self.k = ServerEngine(url, model), k
        if (difference := self.engine.tokenizer_difference(tokenizer)) is not None:
            raise ValueError(f"the teacher on {url} has another tokenizer than the student: {difference}")

    def take(self, rows: Sequence[dict[str, Any]]) -> tuple[TopK, Tensor]:
        """What the teacher says of the scored tokens of ``rows``, one row after another.

        Args:
            rows: tokenised, ``input_ids`` and ``labels``.
        Returns:
            Its k likeliest tokens [N, k] with the mass of the rest, and the log-probs of the tokens themselves [N].
        Raises:
            ServerError: the server does not report log-probs of a prompt.
        """
        ids, top, own = [], [], []
        for row, places in zip(rows, self.engine.read([row["input_ids"] for row in rows], self.k), strict=True):
            for token, label, found in zip(row["input_ids"][1:], row["labels"][1:], places[1:], strict=True):
                if label == IGNORE:
                    continue
                best = sorted(found, key=found.__getitem__, reverse=True)[: self.k]
                ids.append(best)
                top.append([found[v] for v in best])
                own.append(found[token])
        logps = torch.tensor(top)
        # In float64: of a sure teacher the rest is a small difference of numbers near 1.
        rest = torch.log1p(-logps.double().exp().sum(1).clamp(max=1 - 1e-9)).float()
        return TopK(torch.tensor(ids), logps, rest), torch.tensor(own)
