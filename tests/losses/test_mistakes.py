"""The classic mistakes, as a student types them: each error names what was passed and the call that mends it."""

import inspect
import math
import re
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rlhf import losses
from rlhf.losses.catalogue import entries

G = torch.Generator().manual_seed(0)
LOGITS, LABELS = torch.randn(8, 3, generator=G), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
SCORES, YES_NO = torch.randn(8, generator=G), torch.tensor([0, 1, 1, 0, 0, 1, 0, 1])
ONE_HOT = F.one_hot(LABELS, 3)

# What is typed: (the call, what the error says); all of it is found without checks().
ERRORS = {
    # Cross-entropy: what its targets are.
    "float labels": (lambda: losses.cross_entropy_loss(LOGITS, LABELS.float()), "targets must hold class indices (integers), got torch.float32 of shape (8,): pass targets.long()"),
    "labels that are no classes": (lambda: losses.cross_entropy_loss(LOGITS, SCORES), "targets must hold class indices (integers), and targets[0] is 0.3704"),
    "labels that are no classes: the way out": (lambda: losses.cross_entropy_loss(LOGITS, SCORES), "for continuous targets use mse_loss"),
    "integer one-hot": (lambda: losses.cross_entropy_loss(LOGITS, ONE_HOT), "targets of shape (8, 3) are torch.int64, and look like one-hot rows: pass targets.argmax(-1) as class indices, or targets.float() as probabilities"),
    "one-hot into focal": (lambda: losses.multiclass_focal_loss(LOGITS, ONE_HOT), "pass targets.argmax(-1)"),
    "float one-hot into focal": (lambda: losses.multiclass_focal_loss(LOGITS, ONE_HOT.float()), "pass targets.argmax(-1)"),
    "float one-hot into nll": (lambda: losses.nll_loss(LOGITS.log_softmax(-1), ONE_HOT.float()), "pass targets.argmax(-1)"),
    "float one-hot into poly": (lambda: losses.poly1_loss(LOGITS, ONE_HOT.float()), "pass targets.argmax(-1)"),
    "a column of labels": (lambda: losses.cross_entropy_loss(LOGITS, LABELS[:, None]), "pass targets.squeeze(-1)"),
    "classes from 1 on": (lambda: losses.cross_entropy_loss(LOGITS, LABELS + 1), "targets[2] is 3, outside the classes [0, 3): classes are counted from 0, so pass targets - 1"),
    "yes or no as classes": (lambda: losses.cross_entropy_loss(LOGITS[:, :2], YES_NO.bool()), "got torch.bool of shape (8,): pass targets.long()"),
    "one logit": (lambda: losses.cross_entropy_loss(SCORES[:, None], YES_NO), "logits of shape (8, 1) have one class, so that the loss is always 0: for two classes and one logit use bce_with_logits_loss"),
    "no class dimension": (lambda: losses.cross_entropy_loss(SCORES, YES_NO), "use bce_with_logits_loss"),
    "the classes of torch": (lambda: losses.cross_entropy_loss(torch.zeros(2, 3, 5), torch.zeros(2, 5).long()), "the classes must be the last dimension: pass logits.movedim(1, -1)"),
    "swapped arguments": (lambda: losses.cross_entropy_loss(LABELS, LOGITS), "logits must be floating point, got torch.int64 of shape (8,), the first 0: pass the output of the model first, without argmax or rounding; the targets come second"),
    "class weights as weight": (lambda: losses.cross_entropy_loss(LOGITS, LABELS, weight=torch.ones(3)), "for the weight of each class pass class_weights="),
    "class weights of focal": (lambda: losses.multiclass_focal_loss(LOGITS, LABELS, weight=torch.ones(3)), "for the weight of each class pass class_weights="),
    "class weights of poly": (lambda: losses.poly1_loss(LOGITS, LABELS, weight=torch.ones(3)), "for the weight of each class pass weight=weight[targets]"),
    "labels in the place of counts": (lambda: losses.class_weights(LABELS), "for labels pass labels.bincount()"),
    "too few class weights": (lambda: losses.cross_entropy_loss(LOGITS, LABELS, class_weights=torch.ones(2)), "class_weights must have a value for each of 3 classes, got shape (2,)"),
    # Integer labels where floats belong.
    "integers into BCE": (lambda: losses.bce_with_logits_loss(SCORES, YES_NO), "targets must be floating point, got torch.int64 of shape (8,), the first 0: pass targets.float()"),
    "truth values into BCE": (lambda: losses.bce_with_logits_loss(SCORES, YES_NO.bool()), "got torch.bool of shape (8,), the first False: pass targets.float()"),
    "integers into focal": (lambda: losses.focal_loss(SCORES, YES_NO), "pass targets.float()"),
    "integers into MSE": (lambda: losses.mse_loss(SCORES, YES_NO), "targets must be floating point, got torch.int64 of shape (8,), the first 0: pass targets.float()"),
    "integers into hinge": (lambda: losses.hinge_loss(SCORES, YES_NO * 2 - 1), "pass targets.float()"),
    "predicted classes": (lambda: losses.mse_loss(LOGITS.argmax(-1), SCORES), "predictions must be floating point, got torch.int64"),
    # Continuous targets, and labels of another kind.
    "continuous into BCE": (lambda: losses.bce_with_logits_loss(SCORES, SCORES.abs() * 9), "for continuous targets use a regression loss such as mse_loss"),
    "classes into BCE": (lambda: losses.bce_with_logits_loss(SCORES, LABELS.float()), "for 3 classes use cross_entropy_loss, with 3 logits for each row"),
    "signs into BCE": (lambda: losses.bce_with_logits_loss(SCORES, YES_NO * 2.0 - 1), "for labels of -1 and 1 pass (targets + 1) / 2"),
    "logits into BCE without logits": (lambda: losses.bce_loss(SCORES, YES_NO.float()), "for logits use bce_with_logits_loss"),
    # A softmax in front.
    "a softmax before nll": (lambda: losses.nll_loss(LOGITS.softmax(-1), LABELS), "log_probs[0, 0] is 0.2287, and the row looks like probabilities: pass logits.log_softmax(-1), or the logits to cross_entropy_loss"),
    "logits into nll": (lambda: losses.nll_loss(LOGITS + 5, LABELS), "a log-probability is at most 0: pass logits.log_softmax(-1), or the logits to cross_entropy_loss"),
    # Shapes.
    "a column of predictions": (lambda: losses.mse_loss(SCORES[:, None], SCORES), "shapes must be equal, got predictions (8, 1), targets (8,): pass predictions.squeeze(-1)"),
    "another batch": (lambda: losses.mse_loss(SCORES, SCORES[:7]), "got predictions (8,), targets (7,)"),
    # Not tensors.
    "NumPy targets": (lambda: losses.mse_loss(SCORES, SCORES.numpy()), "targets must be a torch.Tensor, got a numpy.ndarray of shape (8,): pass torch.as_tensor(targets)"),
    "a list of labels": (lambda: losses.cross_entropy_loss(LOGITS, LABELS.tolist()), "targets must be a torch.Tensor, got a list of 8: pass torch.as_tensor(targets)"),
    "NumPy logits": (lambda: losses.cross_entropy_loss(LOGITS.numpy(), LABELS), "logits must be a torch.Tensor, got a numpy.ndarray of shape (8, 3): pass torch.as_tensor(logits)"),
    "a list of class weights": (lambda: losses.cross_entropy_loss(LOGITS, LABELS, class_weights=[1.0, 2.0, 3.0]), "class_weights must be a torch.Tensor, got a list of 3: pass torch.as_tensor(class_weights)"),
    "counts as a list": (lambda: losses.class_weights([90, 10]), "counts must be a torch.Tensor, got a list of 2: pass torch.as_tensor(counts)"),
    "a mask of NumPy": (lambda: losses.mse_loss(SCORES, SCORES, mask=np.ones(8, dtype=bool)), "mask must be a torch.Tensor"),
    "a list of weights": (lambda: losses.mse_loss(SCORES, SCORES, weight=[1.0] * 8), "weight must be a torch.Tensor"),
    "a number": (lambda: losses.mse_loss(SCORES, 1.0), "targets must be a torch.Tensor, got a float: pass torch.as_tensor(targets)"),
    "None": (lambda: losses.mse_loss(SCORES, None), "targets is None"),
    "lists of rewards": (lambda: losses.reward_loss([1.0], [0.0]), "chosen_rewards must be a torch.Tensor"),
    "lists of log-probs": (lambda: losses.dpo_loss([1.0], [0.0], [1.0], [0.0]), "must be a torch.Tensor, got a list of 1"),
    "NumPy rewards of groups": (lambda: losses.group_advantages(np.ones(4), torch.zeros(4)), "rewards must be a torch.Tensor"),
    "a list of token labels": (lambda: losses.causal_lm_loss(torch.zeros(1, 3, 4), [[0, 1, 2]]), "labels must be a torch.Tensor"),
}  # fmt: skip


def test_class_weights_by_position():
    message = (
        "cross_entropy_loss(logits, targets): got 3 arguments by position; pass by name: class_weights, label_smoothing"
    )
    with pytest.raises(TypeError, match=re.escape(message)):
        losses.cross_entropy_loss(LOGITS, LABELS, torch.ones(3))


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_says_what_was_passed_and_what_to_pass(case):
    wrong, message = ERRORS[case]
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        wrong()
    assert "\n" not in str(raised.value)


# They take numbers, or the parts of a divergence that was called with tensors.
OTHERWISE = ("AdaptiveKLController", "top_k_outcomes")
PUBLIC = [entry for entry in entries() if entry.name not in OTHERWISE]


@pytest.mark.parametrize("entry", PUBLIC, ids=lambda entry: entry.name)
@pytest.mark.parametrize("given", [[0.5, 0.5], np.full(2, 0.5)], ids=["list", "NumPy"])
def test_every_loss_names_the_call_that_makes_a_tensor(entry, given):
    parameters = inspect.signature(entry.function).parameters.values()
    required = [parameter for parameter in parameters if parameter.default is parameter.empty]
    keywords = {parameter.name: given for parameter in required if parameter.kind is parameter.KEYWORD_ONLY}
    positional = [given for parameter in required if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    with pytest.raises(ValueError, match=r"must be a torch\.Tensor, got a .*: pass torch\.as_tensor\("):
        entry.function(*positional, **keywords)


SOFTMAX = (
    "logits are not negative and sum to 1: was a softmax applied before? this loss applies its own: pass the logits"
)
WARNINGS = {
    "a softmax before cross-entropy": (lambda: losses.cross_entropy_loss(LOGITS.softmax(-1), LABELS), SOFTMAX),
    "a softmax before focal": (lambda: losses.multiclass_focal_loss(LOGITS.softmax(-1), LABELS), SOFTMAX),
    "a softmax before poly": (lambda: losses.poly1_loss(LOGITS.softmax(-1), LABELS), SOFTMAX),
    "log(0)": (lambda: losses.bce_loss(torch.tensor([0.3, 0.0]), torch.tensor([0.0, 1.0])), "probabilities[1] is 0 and targets[1] is 1: the loss is cut at 100 and has no gradient through a sigmoid"),
    "a saturated sigmoid": (lambda: losses.bce_loss(torch.tensor([0.3, 20.0]).sigmoid(), torch.zeros(2)), "probabilities[1] is 1 and targets[1] is 0"),
    "log(0): the way out": (lambda: losses.bce_loss(torch.zeros(1), torch.ones(1)), "pass the logits to bce_with_logits_loss"),
    "log(0) of classes": (lambda: losses.categorical_cross_entropy(torch.eye(2), torch.eye(2).flip(0)), "probabilities[0, 1] is 0 and targets[0, 1] is 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", WARNINGS)
def test_a_sure_sign_is_a_warning_without_asking(case):
    wrong, message = WARNINGS[case]
    with pytest.warns(UserWarning, match=re.escape(message)) as caught:
        wrong()
    assert caught[0].filename == __file__
    with losses.checks(), pytest.raises(ValueError, match=re.escape(message)):
        wrong()


LOSSES = {
    "bce_with_logits_loss": (SCORES, YES_NO.float()),
    "focal_loss": (SCORES, YES_NO.float()),
    "bce_loss": (SCORES.sigmoid(), YES_NO.float()),
    "mse_loss": (SCORES, SCORES),
    "hinge_loss": (SCORES, SCORES.sign()),
    "cross_entropy_loss": (LOGITS, LABELS),
    "nll_loss": (LOGITS.log_softmax(-1), LABELS),
    "multiclass_focal_loss": (LOGITS, LABELS),
    "poly1_loss": (LOGITS, LABELS),
    "categorical_cross_entropy": (LOGITS.softmax(-1), ONE_HOT.float()),
}


@pytest.mark.parametrize("name", LOSSES)
def test_no_value_is_read_on_an_accelerator_without_asking(name):
    # A tensor of the meta device has no values: reading one is an error there, where a GPU would wait.
    inputs = [value.to("meta") for value in LOSSES[name]]
    loss = getattr(losses, name)
    assert loss(*inputs).device.type == "meta"
    with losses.checks(), pytest.raises((RuntimeError, NotImplementedError)):
        loss(*inputs)


def test_what_is_right_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses.cross_entropy_loss(LOGITS, LABELS.int())
        losses.cross_entropy_loss(LOGITS, ONE_HOT.float())
        losses.multiclass_focal_loss(LOGITS, LABELS)
        losses.poly1_loss(LOGITS.abs(), LABELS)
        losses.nll_loss(LOGITS.softmax(-1).log(), LABELS)
        # A certain prediction that is right.
        losses.bce_loss(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]))
        losses.bce_with_logits_loss(SCORES, YES_NO.float())
        losses.bce_with_logits_loss(SCORES, YES_NO.float(), pos_weight=torch.tensor(3.0))
        # What a mask hides is nobody's mistake.
        hidden = torch.tensor([0.5, 0.0])
        losses.bce_loss(hidden, torch.ones(2), mask=torch.tensor([True, False]))
        ignored = torch.where(torch.arange(8)[:, None] == 3, 5.0, LOGITS.log_softmax(-1))
        losses.nll_loss(ignored, torch.where(torch.arange(8) == 3, -100, LABELS))


def test_a_warning_names_the_line_of_the_caller():
    module = losses.CrossEntropyLoss()
    wrong = LOGITS.softmax(-1)
    with losses.checks.warn(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses.cross_entropy_loss(wrong, LABELS)
        losses.label_smoothing_loss(wrong, LABELS)
        module(wrong, LABELS)
    assert [warning.filename for warning in caught] == [__file__] * 3
    first = caught[0].lineno
    assert [warning.lineno - first for warning in caught] == [0, 1, 2]


def test_rare_positives_are_counted_over_small_batches():
    # 3 positives in 128, in batches of 16; none of them says anything alone.
    targets = (torch.arange(128) % 50 == 0).float().view(8, 16)
    with losses.checks(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in targets:
            losses.bce_with_logits_loss(torch.randn(16, generator=G), batch)
    # Advice, and therefore no error; said once.
    (warning,) = caught
    message = str(warning.message)
    assert "of 112 targets are positive" in message and "pos_weight" in message and "threshold" in message
    assert warning.filename == __file__


def test_rare_classes_are_counted_among_many():
    rare = torch.cat([torch.arange(10).repeat(24), torch.tensor([10])])
    said = "class 10 occurs once in 241 targets and class 0 24 times"
    with losses.checks.warn(), pytest.warns(UserWarning, match=said):
        for labels in rare.split(80):
            losses.cross_entropy_loss(torch.randn(len(labels), 11, generator=G), labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with losses.checks():
            losses.cross_entropy_loss(torch.randn(240, 11, generator=G), rare[:240])
            weights = torch.ones(11)
            losses.cross_entropy_loss(torch.randn(241, 11, generator=G), rare, class_weights=weights)


@pytest.mark.parametrize("function", ["mse_loss", "mae_loss", "huber_loss"])
def test_classes_in_a_regression(function):
    ratings = torch.arange(20).remainder(5).float()
    predictions = torch.randn(20, generator=G)
    loss = getattr(losses, function)
    message = "targets are the whole numbers 0 to 4: for classes use cross_entropy_loss, with 5 logits for each row"
    with losses.checks(), pytest.raises(ValueError, match=message):
        loss(predictions, ratings)
    with losses.checks():
        loss(predictions, ratings * 1.5)
        loss(predictions, ratings + 30)


def test_where_a_number_comes_from():
    cases = {math.nan: "0/0 or inf - inf", math.inf: "an overflow or a division by 0", -math.inf: "the logarithm of 0"}
    for value, cause in cases.items():
        with losses.checks(), pytest.raises(ValueError, match=cause):
            losses.mse_loss(torch.tensor([0.0, value]), torch.ones(2))


def test_rows_of_probabilities_that_do_not_sum_to_1():
    many_labels = torch.tensor([[1.0, 1.0, 0.0]] * 8)
    with (
        losses.checks(),
        pytest.raises(ValueError, match="sum to 2: for several labels in a row use bce_with_logits_loss"),
    ):
        losses.cross_entropy_loss(LOGITS, many_labels)
