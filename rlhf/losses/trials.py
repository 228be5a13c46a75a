"""A function of the user's own, tried on a few made-up numbers before training begins.

Functions of this package have tests and are not tried.
"""

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.losses._advantages import AdvantageEstimator
from rlhf.losses._policy_loss import Tokens

# Log-probabilities of three completions, in nats: of a size that real ones have, and different from each other.
TRIAL_SUMS = ((-21.0, -34.5, -12.25), (-25.0, -30.0, -16.5), (-22.0, -33.0, -13.0), (-24.0, -31.5, -15.0))
_PACKAGE = Path(__file__).parents[1]
TRIAL_PAIRS = len(TRIAL_SUMS[0])
NO_GRADIENT = "compute it from the tensors that it gets, without .item(), .detach(), .numpy() or torch.no_grad()"


def is_own(function: Callable[..., Any]) -> bool:
    """Whether a function is the user's own.

    Args:
        function: as a registry holds it.
    Returns:
        False for a function of this package.
    """
    return not str(getattr(function, "__module__", "")).startswith("rlhf.")


def trial_sums() -> list[Tensor]:
    """Sums of log-probs of three pairs, [3] each; those of the policy carry gradient.

    Returns:
        Chosen and rejected under the policy, then under the reference.
    """
    sums = [torch.tensor(values) for values in TRIAL_SUMS]
    return [values.requires_grad_(position < 2) for position, values in enumerate(sums)]


def tried(what: str, call: Callable[[], Any]) -> Any:
    """The result of a call of a user's function.

    Args:
        what: begins the error, such as ``loss_type mine.py:loss``.
        call: calls the function with made-up numbers.
    Returns:
        What it returned.
    Raises:
        ValueError: the function raised an exception; the line where it did is named.
    """
    try:
        return call()
    # The function may raise anything.
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        message = " ".join(str(error).split())
        # A check of this package, or arguments that do not fit the signature: the message is enough.
        if Path(frame.filename).is_relative_to(_PACKAGE):
            raise ValueError(f"{what}: {message}") from error
        raise ValueError(
            f"{what}: a call with made-up numbers fails at {frame.filename}:{frame.lineno} "
            f"({type(error).__name__}: {message})"
        ) from error


def check_numbers(what: str, value: Any, shapes: Sequence[tuple[int, ...]], meaning: str) -> None:
    """Refuse a result that is no finite tensor of a shape.

    Args:
        what: begins the error.
        value: the result of a function.
        shapes: those that it may have.
        meaning: what the result should be, in words.
    Raises:
        ValueError: another type, shape or dtype, or NaN or infinity.
    """
    if not torch.is_tensor(value):
        raise ValueError(f"{what} returns a {type(value).__name__}; expected a tensor: {meaning}")
    if tuple(value.shape) not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{what} returns the shape {list(value.shape)}; expected {wanted}: {meaning}")
    if not value.is_floating_point():
        raise ValueError(f"{what} returns {value.dtype}; expected floating point: {meaning}")
    if not bool(value.isfinite().all()):
        numbers = ", ".join(f"{number:g}" for number in value.flatten().tolist()[:3])
        raise ValueError(f"{what} returns {numbers} for made-up numbers of a usual size; expected finite numbers")


def check_loss(what: str, value: Any, shape: tuple[int, ...], meaning: str, inputs: Sequence[Tensor]) -> None:
    """Refuse a loss that is not finite, has another shape, or has no gradient.

    Args:
        what: begins the error.
        value: the result of a loss.
        shape: that it must have.
        meaning: what the result should be, in words.
        inputs: tensors that carry gradient; the loss must depend on one of them.
    Raises:
        ValueError: as said.
    """
    check_numbers(what, value, [shape], meaning)
    gradients: Sequence[Tensor | None] = [None]
    if value.requires_grad:
        gradients = torch.autograd.grad(value.sum(), list(inputs), allow_unused=True)
    known_gradients = [gradient for gradient in gradients if gradient is not None]
    if not known_gradients:
        raise ValueError(f"{what} has no gradient: {NO_GRADIENT}")
    if not all(bool(gradient.isfinite().all()) for gradient in known_gradients):
        raise ValueError(f"{what} has a gradient of NaN or infinity for made-up numbers of a usual size")


def try_pair_loss(what: str, call: Callable[..., Any]) -> None:
    """Try a loss of pairs.

    Args:
        what: begins the errors.
        call: from the four sums of log-probs, [3] each, to the loss of each pair.
    Raises:
        ValueError: the loss fails, is no finite [3], or has no gradient.
    """
    sums = trial_sums()
    losses = tried(what, lambda: call(*sums))
    check_loss(what, losses, (TRIAL_PAIRS,), "the loss of each pair, not their mean", sums[:2])


def try_policy_loss(what: str, call: Callable[[Tokens], Any], coupled: bool) -> None:
    """Try a policy loss on the tokens of two sequences.

    Args:
        what: begins the errors.
        call: from tokens to the term of each.
        coupled: whether it reads whole sequences.
    Raises:
        ValueError: the loss fails, is no finite [N], or has no gradient.
    """
    logps = torch.tensor([-1.5, -0.25, -3.0, -0.75, -2.0], requires_grad=True)
    old_logps = torch.tensor([-1.75, -0.5, -2.5, -0.75, -2.25])
    advantages = torch.tensor([1.0, 1.0, 1.0, -0.5, -0.5])
    tokens = Tokens(logps, old_logps, advantages)
    # As in training: only a loss that is coupled sees which tokens belong together.
    if coupled:
        tokens = Tokens.of_sequences(logps, old_logps, advantages, torch.tensor([0, 0, 0, 1, 1]), 2)
    terms = tried(what, lambda: call(tokens))
    check_loss(what, terms, (len(logps),), "the term of each token, not their mean", [logps])


def try_advantage_estimator(what: str, estimator: AdvantageEstimator, group_size: int, **settings: Any) -> None:
    """Try an estimator on the completions of two prompts.

    Args:
        what: begins the errors.
        estimator: of :data:`ADVANTAGE_ESTIMATORS`.
        group_size: completions of each prompt.
        settings: ``gamma``, ``lam`` and ``scale`` of the trainer.
    Raises:
        ValueError: the estimator fails, or its advantages are no finite [S] or [S, T].
    """
    count, length = 2 * group_size, 3
    rewards = torch.arange(count) % 3 * 0.5
    penalties = torch.full((count, length), -0.01)
    mask = torch.ones(count, length, dtype=torch.bool)
    mask[1::2, -1] = False
    token_rewards = penalties.clone()
    token_rewards[:, -1] += rewards
    offered = {
        "rewards": rewards + penalties.sum(1),
        "task_rewards": rewards,
        "reward_components": {"reward": rewards},
        "reward_weights": {"reward": 1.0},
        "token_rewards": token_rewards,
        "penalties": penalties,
        "mask": mask,
        "values": torch.full((count, length), 0.25),
        "baselines": torch.full((count,), 0.5),
        "group": torch.arange(count) // group_size,
        # The other processes have their own trial.
        "gather": False,
    }
    estimates = tried(what, lambda: estimator(**offered, **settings))
    meaning = "an advantage for each completion, or for each token"
    if isinstance(estimates, tuple) and len(estimates) == 2:
        advantages, returns = estimates
        check_numbers(f"{what}, second result,", returns, [(count, length)], "what the critic learns, for each token")
    else:
        advantages = estimates
    check_numbers(what, advantages, [(count,), (count, length)], meaning)


def try_divergence(what: str, call: Callable[..., Any]) -> None:
    """Try a divergence on two tokens of a vocabulary of five.

    Args:
        what: begins the errors.
        call: from logits of student and teacher, [2, 5] each, to the divergence of each token.
    Raises:
        ValueError: the divergence fails, is no finite [2], or has no gradient.
    """
    student = torch.tensor([[0.5, -1.0, 2.0, 0.0, -3.0], [4.0, 0.0, -2.0, 1.0, 0.25]], requires_grad=True)
    teacher = torch.tensor([[1.5, -0.5, 1.0, 0.5, -2.0], [3.0, 1.0, -1.0, 2.0, 0.0]])
    values = tried(what, lambda: call(student, teacher))
    check_loss(what, values, (2,), "one number for each token", [student])


def try_token_loss(what: str, call: Callable[[Tensor], Any]) -> None:
    """Try a loss of tokens on the log-probs of four of them.

    Args:
        what: begins the errors.
        call: from log-probs [4], in nats, to the loss of each token.
    Raises:
        ValueError: the loss fails, is no finite [4], or has no gradient.
    """
    logps = torch.tensor([-0.01, -0.75, -3.0, -9.5], requires_grad=True)
    losses = tried(what, lambda: call(logps))
    check_loss(what, losses, (len(logps),), "the loss of each token, not their mean", [logps])
