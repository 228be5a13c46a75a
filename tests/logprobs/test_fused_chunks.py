"""The whole head by kernels, in Triton's interpreter: every mode as by torch's own operators."""

import importlib

import pytest
import torch
from conftest import close

from rlhf.logprobs import (
    Divergence,
    Head,
    Predictions,
    Targets,
    TokenLoss,
    chunks,
    compare,
    plan_chunks,
    score,
    score_predictions,
)

pytest.importorskip("triton")
scoring = importlib.import_module("rlhf.logprobs.score")  # the name in the package is the function's

ROWS, HIDDEN, VOCABULARY = 7, 6, 21
MODES = ["loss of tokens", "recompute", "save", "frozen head", "no gradient"]


@pytest.fixture
def fused(monkeypatch):
    """A switch between the kernels and torch's operators; counts the chunks by kernels."""
    made, own = [], chunks.FusedChunk
    monkeypatch.setattr(chunks, "FusedChunk", lambda *args: made.append(1) or own(*args))

    def switch(on):
        monkeypatch.setattr(chunks, "use_fused_kernels", lambda device, dtype: on)
        return made

    return switch


def problem():
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=g)
    weight, bias = torch.randn(VOCABULARY, HIDDEN, generator=g), torch.randn(VOCABULARY, generator=g)
    targets = Targets(torch.tensor([0, 1, 1, 4, 6]), torch.tensor([3, 4, 0, 20, 2]), torch.zeros(5, dtype=torch.int64))
    return hidden, weight, bias, targets, torch.randn(5, generator=g)


def outcome(mode, softcap, entropy):
    """Everything that a caller sees: scores and gradients."""
    hidden, weight, bias, targets, factor = problem()
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    head = Head(weight, bias, 1.7, softcap, 0.6)
    if mode == "frozen head":
        head = Head(weight.detach(), bias.detach(), 1.7, softcap, 0.6)
    options = {"chunk_size": 2, "entropy": entropy}
    if mode in ("recompute", "save"):
        options["mode"] = mode
    elif mode == "loss of tokens":

        def loss_of_token(scores, factor):
            return factor * scores.logps + (0.3 * scores.entropy**2 if entropy else 0.0)

        options["objective"] = TokenLoss(loss_of_token, (factor,))
    with torch.set_grad_enabled(mode != "no gradient"):
        scores = score(hidden, head, targets, **options)
    seen = [scores.logps] + ([scores.entropy] if entropy else [])
    if mode == "no gradient":
        return seen
    loss = scores.loss
    if loss is None:
        loss = (factor * scores.logps).sum() + (0.3 * scores.entropy**2).sum() if entropy else factor @ scores.logps
    (0.7 * loss).backward()
    return [*(tensor.detach() for tensor in seen), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize("softcap", [None, 5.0], ids=["", "capped"])
@pytest.mark.parametrize("mode", MODES)
def test_kernels_change_nothing(mode, softcap, entropy, fused):
    fused(False)
    wanted = outcome(mode, softcap, entropy)
    made = fused(True)
    got = outcome(mode, softcap, entropy)
    assert made  # or torch's operators were compared with themselves
    for ours, theirs in zip(got, wanted, strict=True):
        close(ours, theirs)


def test_logits_without_a_head(fused):
    """They belong to the caller: whatever is computed from them leaves them whole."""
    *_, targets, factor = problem()
    results = []
    for on in (False, True):
        fused(on)
        logits = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(2)).requires_grad_()
        before = logits.detach().clone()
        scores = score_predictions(Predictions(logits), targets.token, entropy=True, chunk_size=2)
        (factor @ scores.logps + scores.entropy.sum()).backward()
        assert torch.equal(logits, before)
        results.append((scores.logps.detach(), scores.entropy.detach(), logits.grad))
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs)


def test_logits_and_tokens_of_any_strides(fused):
    logits = torch.randn(VOCABULARY, 5, generator=torch.Generator().manual_seed(2)).T
    token = torch.tensor([[3, 0], [4, 0], [0, 0], [20, 0], [2, 0]])[:, 0]
    results = []
    for on in (False, True):
        fused(on)
        student = logits.clone().requires_grad_()
        assert student.stride() == logits.stride() != (VOCABULARY, 1)
        scores = score_predictions(Predictions(student), token, chunk_size=2)
        scores.logps.square().sum().backward()
        results.append((scores.logps.detach(), student.grad))
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs)


def test_one_loss_reads_the_log_probs_and_another_the_entropies(fused):
    results = []
    for on in (False, True):
        fused(on)
        for name in ("logps", "entropy"):
            hidden, weight, bias, targets, factor = problem()
            scores = score(hidden.requires_grad_(), Head(weight, bias), targets, entropy=True, chunk_size=2)
            (getattr(scores, name) @ factor).backward()
            results.append(hidden.grad)
    close(results[2], results[0])
    close(results[3], results[1])


def test_an_output_may_be_changed_in_place(fused):
    fused(True)
    hidden, weight, bias, targets, _ = problem()
    scores = score(hidden.requires_grad_(), Head(weight.requires_grad_(), bias), targets, mode="recompute")
    scores.logps.mul_(2.0).sum().backward()
    twice = hidden.grad.clone()
    hidden.grad = None
    score(hidden, Head(weight, bias), targets, mode="recompute").logps.sum().backward()
    close(twice, 2 * hidden.grad)


DIVERGENCES = {
    "forward KL": Divergence("kl_divergence", crossentropy_weight=0.5),
    "reverse KL": Divergence("kl_divergence", options={"reverse": True}, crossentropy_weight=0.5),
    "forward KL at a temperature": Divergence("kl_divergence", 2.5, {"scale_by_temperature": True}, 0.7, 0.3),
    "JSD": Divergence("generalized_jsd", options={"beta": 0.3}),
    "JSD at a temperature": Divergence("generalized_jsd", 0.6, {"beta": 0.9}, 0.7, 0.3),
    "JSD of the first tokens": Divergence("generalized_jsd", 1.5, vocab_size=17, crossentropy_weight=0.1),
    "total variation": Divergence("total_variation", crossentropy_weight=0.5),  # has no kernel
}


def compared(divergence, with_grad=True):
    hidden, weight, bias, targets, _ = problem()
    hidden.requires_grad_()
    student = Predictions(hidden[:5], Head(weight.requires_grad_(), bias.requires_grad_(), 1.7, 5.0, 0.6))
    teacher = Predictions(hidden[2:].detach(), Head(3 * weight.detach().flip(0), None, 1.0, 8.0))
    token = targets.token.clamp(max=16)
    with torch.set_grad_enabled(with_grad):
        scores = compare(student, teacher, token, divergence, chunk_size=2)
    numbers = [scores.logps, scores.loss.detach(), *scores.teacher[:4]]
    if with_grad:
        (0.3 * scores.loss).backward()
        numbers += [hidden.grad, weight.grad, bias.grad]
    return numbers


@pytest.mark.parametrize("name, with_grad", [*((name, True) for name in DIVERGENCES), ("JSD at a temperature", False)])
def test_a_teacher(name, with_grad, fused):
    fused(False)
    wanted = compared(DIVERGENCES[name], with_grad)
    fused(True)
    got = compared(DIVERGENCES[name], with_grad)
    for ours, theirs in zip(got, wanted, strict=True):
        close(ours, theirs)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter computes with NumPy
def test_a_teacher_with_other_zeros(fused):
    """Tokens that one side or both exclude; a student that is its teacher has neither loss nor gradient."""
    fused(True)
    g = torch.Generator().manual_seed(3)
    logits, other = torch.randn(4, VOCABULARY, generator=g), torch.randn(4, VOCABULARY, generator=g)
    token = torch.zeros(4, dtype=torch.int64)
    logits[:, 5], other[:, 5] = -torch.inf, -torch.inf
    for beta in (0.0, 0.5, 1.0):
        for student in (logits, other):
            student = student.clone().requires_grad_()
            divergence = Divergence("generalized_jsd", options={"beta": beta})
            scores = compare(Predictions(student), Predictions(logits), token, divergence)
            scores.loss.backward()
            assert student.grad.isfinite().all() and scores.teacher.kl.isfinite().all()
            assert not student.grad[:, 5].any()
            is_teacher = torch.equal(student.detach(), logits)
            close(scores.loss.detach(), 0.0) if is_teacher else close(student.grad.sum(1), torch.zeros(4))
            assert bool(scores.teacher.agrees.all()) == is_teacher
            if is_teacher:
                assert student.grad.abs().max() < 1e-7


def test_no_scored_token(fused):
    fused(True)
    hidden, weight, bias, _, _ = problem()
    nothing = Targets(*(torch.zeros(0, dtype=torch.int64) for _ in range(3)), 0)
    hidden.requires_grad_()
    for options in ({}, {"objective": TokenLoss(lambda scores: scores.logps)}, {"mode": "recompute", "entropy": True}):
        scores = score(hidden, Head(weight, bias), nothing, **options)
        loss = scores.logps.sum() if scores.loss is None else scores.loss
        loss.backward()
        assert not hidden.grad.any()


@pytest.mark.parametrize("mode", ["loss of tokens", "recompute", "save"])
@pytest.mark.parametrize("chunks_per_product, kernels", [(2, True), (3, True), (9, False)])
def test_gradients_that_wait_for_one_product(mode, chunks_per_product, kernels, fused, monkeypatch):
    """Five tokens in chunks of two: the last chunk is short, and the last group too or alone."""
    fused(kernels)
    wanted = outcome(mode, 5.0, True)
    plan_of = scoring.plan_chunks
    monkeypatch.setattr(
        scoring,
        "plan_chunks",
        lambda *args, **options: plan_of(*args, **options)._replace(chunks_per_product=chunks_per_product),
    )
    got = outcome(mode, 5.0, True)
    for ours, theirs in zip(got, wanted, strict=True):
        close(ours, theirs)


GIB = 2**30
LLAMA_3 = 128256  # tokens


@pytest.mark.parametrize(
    "free, total, rows, chunk, chunks_per_product",
    [
        (130 * GIB, 139 * GIB, 8192, 2048, 4),  # all gradients of 8,192 tokens wait: 2.0 GiB
        (70 * GIB, 80 * GIB, 8192, 1280, 7),  # the logits of a chunk take 0.6 GiB
        (4 * GIB, 80 * GIB, 8192, 512, 8),  # a card that is nearly full
        (20 * GIB, 24 * GIB, 8192, 512, 6),
        (130 * GIB, 139 * GIB, 300, 300, 1),
        (130 * GIB, 139 * GIB, 0, 1, 1),
    ],
)
def test_chunks_by_the_memory_of_the_card(free, total, rows, chunk, chunks_per_product, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    plan = plan_chunks(
        rows,
        LLAMA_3,
        torch.device("cuda"),
        needs_grad=True,
        head_needs_grad=True,
        has_objective=True,
        half_precision=True,
    )
    assert plan == ("local", chunk, 0, chunks_per_product)
    logits, gradients = chunk * LLAMA_3 * 4, chunk * chunks_per_product * LLAMA_3 * 2
    if chunk > 512:  # fewer rows would cost more time than memory
        assert logits + gradients <= min(1.25 * total / 32, free / 4) * 1.1


def test_a_frozen_head_or_full_precision_waits_for_nothing():
    settings = dict(needs_grad=True, has_objective=True, chunk_size=512)
    cpu = torch.device("cpu")
    frozen = plan_chunks(8192, LLAMA_3, cpu, head_needs_grad=False, half_precision=True, **settings)
    float32 = plan_chunks(8192, LLAMA_3, cpu, head_needs_grad=True, **settings)
    assert frozen.chunks_per_product == float32.chunks_per_product == 1


def test_float32_products_are_all_by_the_faster_library(monkeypatch):
    """Also where one chunk has all rows, whose gradient of the weight needs no sum."""
    shapes, own = [], chunks.product

    def counted(left, right, out=None):
        shapes.append((*left.shape, right.size(1)))
        return own(left, right, out)

    monkeypatch.setattr(chunks, "product", counted)
    hidden, weight, bias, targets, _ = problem()
    objective = TokenLoss(lambda scores: scores.logps)
    score(hidden.requires_grad_(), Head(weight.requires_grad_(), bias), targets, objective=objective).loss.backward()
    tokens = len(targets.token)
    of_logits, of_rows = (tokens, HIDDEN, VOCABULARY), (tokens, VOCABULARY, HIDDEN)
    assert shapes == [of_logits, of_rows, (VOCABULARY, tokens, HIDDEN)]
