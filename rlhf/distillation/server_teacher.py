"""A teacher on a completion server, which reports log-probs of the tokens it is sent."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data import Batch
from rlhf.data.batch import IGNORE, Row
from rlhf.distillation.teachers import TopKTeacher
from rlhf.logprobs import TopK
from rlhf.models import Policy
from rlhf.rollouts import ServerEngine


@dataclass
class ServerTeacher(TopKTeacher):
    """A teacher behind vLLM's completion endpoint; the student is compared with its most likely tokens.

    Args:
        engine: connected to a server, see :func:`connect`.
        k: most likely tokens to ask for at each position (vLLM allows 20 unless started with --max-logprobs).
    """

    engine: ServerEngine
    k: int

    # The student's own answers are known at their step only, and evaluation must not wait for the server.
    collates_late: ClassVar[bool] = True

    def complete(self, batch: Batch, rows: Sequence[Row]) -> Batch:
        # A packed row is a list of examples, and the server is asked about each by itself.
        examples = [example for row in rows for example in row.get("examples", [row])]
        top_k, token_logps = self.read(examples)
        return replace(
            batch,
            per_token={**batch.per_token, "teacher_logps": token_logps},
            extras={**batch.extras, "teacher": top_k},
        )

    def token_logps(self, student: Policy, batch: Batch) -> Tensor:
        return batch.per_token["teacher_logps"]

    def read(self, rows: Sequence[Row]) -> tuple[TopK, Tensor]:
        """Ask the server about the scored tokens of rows.

        Args:
            rows: tokenised, with ``input_ids`` and ``labels``.
        Returns:
            The k most likely tokens at each scored position, [N, k], with the mass of the rest; and log-probs of the
            scored tokens themselves, [N], row after row.
        Raises:
            ServerError: the server does not report log-probs of a prompt.
        """
        top_ids: list[list[int]] = []
        top_logps: list[list[float]] = []
        token_logps: list[float] = []
        reports = self.engine.read([row["input_ids"] for row in rows], self.k)
        for row, report in zip(rows, reports, strict=True):
            # Nothing predicts the first token of a row, so it is never scored.
            for token, label, logp_of in zip(row["input_ids"][1:], row["labels"][1:], report[1:], strict=True):
                if label == IGNORE:
                    continue
                # The server adds the token at hand to the k most likely, which makes k or k + 1 entries.
                most_likely = sorted(logp_of, key=logp_of.__getitem__, reverse=True)[: self.k]
                top_ids.append(most_likely)
                top_logps.append([logp_of[candidate] for candidate in most_likely])
                token_logps.append(logp_of[token])
        logps = torch.tensor(top_logps)
        # In float64: for a confident teacher the rest is a small difference of numbers near 1.
        top_mass = logps.double().exp().sum(1).clamp(max=1 - 1e-9)
        rest_logp = torch.log1p(-top_mass).float()
        return TopK(torch.tensor(top_ids), logps, rest_logp), torch.tensor(token_logps)


def connect(url: str, model: str, tokenizer: PreTrainedTokenizerBase, startup_timeout: float = 240.0) -> ServerEngine:
    """Connect to the server of a teacher.

    Args:
        url: of the server.
        model: the name that the teacher is served under.
        tokenizer: the student's, which the teacher must have too.
        startup_timeout: seconds to wait for a server that is still loading.
    Returns:
        The engine that asks the server.
    Raises:
        ConnectionError: no server answers.
        ValueError: it does not serve ``model``, or its tokenizer is another.
    """
    engine = ServerEngine(url, model, startup_timeout=startup_timeout)
    difference = engine.tokenizer_difference(tokenizer)
    if difference is not None:
        raise ValueError(f"the teacher on {engine.url} has another tokenizer than the student: {difference}")
    return engine
