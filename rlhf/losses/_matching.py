"""Losses on the inside of a model: hidden states and attention of a student and its teacher."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.losses._checks import check_probabilities, check_same_shape
from rlhf.losses._reduction import reducible, upcast


@reducible("student_hidden", "teacher_hidden")
def hidden_state_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    *,
    projection: Tensor | None = None,
    distance: Literal["squared", "cosine"] = "squared",
) -> Tensor:
    r"""Matches hidden states of a student to those of its teacher; a learned projection joins different widths.

    .. math:: \tfrac{1}{D}\lVert W s - t\rVert^2, \text{ or } 1 - \cos(W s, t)

    Args:
        student_hidden: [..., C]; carries the gradient.
        teacher_hidden: [..., D]; constant.
        projection: W, [D, C] as ``nn.Linear(C, D).weight``; trained with the student and dropped afterwards. Without
            it, C and D are equal. ``HiddenStateLoss(projection=nn.Parameter(...))`` holds one.
        distance: ``"squared"``, the mean over D, or ``"cosine"``, which ignores lengths.
    Returns:
        Scalar, or [...] for ``"none"``; at least float32; 0 if nothing counts.
    Raises:
        ValueError: shapes do not fit, or an unknown distance.
    Example:
        >>> hidden_state_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]]))
        tensor(2.)

    Source: FitNets arXiv 1412.6550; TinyBERT arXiv 1909.10351 eq. 8; cosine DistilBERT arXiv 1910.01108.
    """
    if projection is not None:
        if projection.shape != (teacher_hidden.size(-1), student_hidden.size(-1)):
            raise ValueError(
                f"projection must be [{teacher_hidden.size(-1)}, {student_hidden.size(-1)}] (the teacher's width, the "
                f"student's), got {tuple(projection.shape)}"
            )
        # reducible took the hidden states to float32, and F.linear wants one dtype.
        student_hidden = F.linear(student_hidden, upcast(projection))
    # If only the widths differ, a projection is missing; any other difference is a wrong shape.
    elif student_hidden.shape[:-1] == teacher_hidden.shape[:-1] and student_hidden.shape != teacher_hidden.shape:
        raise ValueError(
            f"the student is {student_hidden.size(-1)} wide, the teacher {teacher_hidden.size(-1)}: pass a projection "
            "[teacher, student]"
        )
    check_same_shape(student_hidden=student_hidden, teacher_hidden=teacher_hidden)
    if distance == "squared":
        # A mean over the width, so that wide models do not have larger losses.
        return ((student_hidden - teacher_hidden) ** 2).mean(-1)
    if distance != "cosine":
        raise ValueError(f'distance must be "squared" or "cosine", got {distance!r}')
    return 1 - F.cosine_similarity(student_hidden, teacher_hidden, dim=-1)


@reducible("student_attention", "teacher_attention")
def attention_loss(
    student_attention: Tensor, teacher_attention: Tensor, *, distance: Literal["kl", "squared"] = "kl"
) -> Tensor:
    r"""Matches the attention of a student to that of its teacher.

    .. math:: \sum_k a_k\log\frac{a_k}{b_k}, \text{ or } \sum_k (a_k - b_k)^2, \text{ teacher } a, \text{ student } b

    Args:
        student_attention: [..., K], rows of probabilities over K keys, as ``output_attentions`` returns them; carries
            the gradient.
        teacher_attention: the same of the teacher; constant. If the numbers of heads differ, take the mean over heads
            of both.
        distance: ``"kl"`` or ``"squared"``. Both are sums over the row, which padding (zeros on both sides) does not
            change.
    Returns:
        Scalar, or [...] (one for each query) for ``"none"``; at least float32; 0 if nothing counts.
    Raises:
        ValueError: shapes differ, no probabilities, or an unknown distance.
    Example:
        >>> attention_loss(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]]))    # log 2
        tensor(0.6931)

    Source: MiniLM arXiv 2002.10957 eq. 7; squared, of logits there, TinyBERT arXiv 1909.10351 eq. 7.
    """
    check_same_shape(student_attention=student_attention, teacher_attention=teacher_attention)
    check_probabilities("student_attention", student_attention)
    check_probabilities("teacher_attention", teacher_attention)
    if distance == "squared":
        return ((student_attention - teacher_attention) ** 2).sum(-1)
    if distance != "kl":
        raise ValueError(f'distance must be "kl" or "squared", got {distance!r}')
    # Masked keys are 0 on both sides, and 0 * log 0 would be NaN.
    smallest = torch.finfo(student_attention.dtype).tiny
    attended = teacher_attention != 0  # a NaN stays one
    log_ratio = teacher_attention.clamp(min=smallest).log() - student_attention.clamp(min=smallest).log()
    return torch.where(attended, teacher_attention * log_ratio, 0.0).sum(-1)
