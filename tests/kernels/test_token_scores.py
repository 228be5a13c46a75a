"""The two kernels of the head against float64: in Triton's interpreter on a CPU, compiled on a GPU."""

import pytest
import torch
from conftest import close

from rlhf.kernels import token_scores
from rlhf.kernels.token_scores import LogitTransform, score_tokens, write_gradient

pytest.importorskip("triton")

CAPPED = (1.7, 4.0, 0.6)  # scale, soft-cap, temperature
# A block holds at most 16 here: vocabularies below, equal to and beyond it, with and without a rest.
SIZES = [(1, 1), (1, 5), (3, 16), (2, 37), (5, 64)]
# Of gradients in half precision; the interpreter drops the last bits where a GPU rounds them.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(token_scores, "BLOCK_SIZE", 16)


def inputs(rows, vocabulary, device="cpu", settings=(1.0, None, 1.0), bias=False):
    g = torch.Generator().manual_seed(0)
    product = torch.randn(rows, vocabulary, generator=g) * 3
    token = torch.randint(vocabulary, (rows,), generator=g)
    bias = torch.randn(vocabulary, generator=g).to(device) if bias else None
    return product.to(device), token.to(device), LogitTransform(bias, *settings)


def exact(product, token, transform, grads):
    """Log-probs, entropies and the gradient over scale / temperature, by autograd in float64."""
    product = product.detach().cpu().double().requires_grad_()
    logits = product * transform.scale
    if transform.bias is not None:
        logits = logits + transform.bias.cpu().double()
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    logps = (logits / transform.temperature).log_softmax(1)
    entropy = -(logps.exp() * logps.masked_fill(logps == -torch.inf, 0.0)).sum(1)
    logps = logps.gather(1, token.cpu()[:, None]).squeeze(1)
    grad_logps, grad_entropy = (grad.cpu().double() for grad in grads)
    (gradient,) = torch.autograd.grad((logps * grad_logps + entropy * grad_entropy).sum(), product)
    return logps.detach(), entropy.detach(), gradient * transform.temperature / transform.scale


def check(product, token, transform, gradient_dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    grad_logps, grad_entropy = (torch.randn(len(token), generator=g).to(product.device) for _ in range(2))
    scores = score_tokens(product, token, transform, entropy=True)
    gradient = torch.empty_like(product, dtype=gradient_dtype)
    write_gradient(product, token, transform, scores, grad_logps, grad_entropy, gradient)
    logps, entropy, wanted = exact(product, token, transform, (grad_logps, grad_entropy))
    close(scores.logps.cpu(), logps)
    close(scores.entropy.cpu(), entropy)
    error = (gradient.cpu().double() - wanted).norm()
    assert error <= TOLERANCES[gradient_dtype] * wanted.norm() + 1e-6
    # Without an entropy: another constant of the kernels.
    plain = score_tokens(product, token, transform, entropy=False)
    write_gradient(product, token, transform, plain, grad_logps, None, gradient)
    _, _, wanted = exact(product, token, transform, (grad_logps, torch.zeros_like(grad_logps)))
    assert plain.entropy is None
    assert torch.equal(plain.logps, scores.logps)
    assert (gradient.cpu().double() - wanted).norm() <= TOLERANCES[gradient_dtype] * wanted.norm() + 1e-6


@pytest.mark.parametrize("settings", [(1.0, None, 1.0), CAPPED], ids=["plain", "capped"])
@pytest.mark.parametrize("size", SIZES)
def test_sizes_that_no_block_divides(size, settings):
    check(*inputs(*size, settings=settings, bias=settings == CAPPED))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_in_half_precision(dtype):
    check(*inputs(4, 37), gradient_dtype=dtype)


def test_logits_of_half_precision_with_strides():
    """A model that brings its own logits, of which a first part is scored."""
    product, token, transform = inputs(3, 40)
    check(product.bfloat16()[:, :37], token.clamp(max=36), transform)


def test_padding_is_read_and_changes_nothing():
    """Rows that start at multiples of 16 numbers have room that a kernel may read: here it is nan."""
    product, token, transform = inputs(3, 37)
    padded = torch.full((3, 48), torch.nan)
    padded[:, :37] = product
    assert token_scores.readable_columns(padded[:, :37]) == 48
    check(padded[:, :37], token, transform)
    # The last row of another matrix's part may end with the memory.
    end_of_memory = torch.empty(3 * 48 - 11)[: 3 * 48 - 11].as_strided((3, 37), (48, 1))
    assert token_scores.readable_columns(end_of_memory) == 37


def test_numbers_that_are_apart_are_refused():
    """A kernel would read the memory between them without a word."""
    product, token, transform = inputs(4, 37)
    apart = torch.randn(37, 4).T
    with pytest.raises(ValueError, match="the numbers of a row must lie side by side, but its stride is 4"):
        score_tokens(apart, token, transform, entropy=False)
    scores = score_tokens(product, token, transform, entropy=False)
    with pytest.raises(ValueError, match="the numbers of a row must lie side by side"):
        write_gradient(product, token, transform, scores, scores.logps, None, apart)
    with pytest.raises(ValueError, match="the numbers of a bias must lie side by side, but its stride is 2"):
        score_tokens(product, token, LogitTransform(torch.randn(37, 2)[:, 0]), entropy=False)


def test_more_logits_than_int32_counts(tmp_path):
    """The third row starts at number 2^31. A file of zeros takes no room on the disk, and a view of it no memory."""
    apart = 2**30
    zeros = torch.from_file(str(tmp_path / "zeros"), shared=True, size=2 * apart + 37, dtype=torch.bfloat16)
    product = zeros.as_strided((3, 37), (apart, 1))
    own, token, transform = inputs(3, 37)
    product.copy_(own)
    scores = score_tokens(product, token, transform, entropy=True)
    logps, entropy, _ = exact(product, token, transform, (torch.ones(3), torch.zeros(3)))
    close(scores.logps, logps)
    close(scores.entropy, entropy)
    write_gradient(product, token, transform, scores, torch.zeros(3), None, product)
    assert not product.any()


def test_no_row():
    product, token, transform = inputs(0, 37)
    scores = score_tokens(product, token, transform, entropy=True)
    write_gradient(product, token, transform, scores, None, None, product)
    assert [len(numbers) for numbers in scores] == [0, 0, 0, 0]


@pytest.mark.parametrize("settings", [(1.0, None, 1.0), CAPPED], ids=["plain", "capped"])
def test_extreme_logits(settings):
    """Sums of exponentials neither overflow nor vanish, and a block of -inf before the others makes no nan."""
    product, token, transform = inputs(5, 37, settings=settings)
    product[0] = 1e4
    product[1] *= 1e4
    product[2] = -1e4
    product[2, 30] = 1e4
    product[3, :20] = -torch.inf
    product[4] = 0  # ties
    token[:] = torch.tensor([3, int(product[1].argmax()), 30, 25, 0])
    if settings == CAPPED:  # autograd's gradient of tanh at -inf times 0 is nan
        product.clamp_(min=-1e4)
    check(product, token, transform)


def test_rows_without_a_gradient_get_zeros():
    product, token, transform = inputs(3, 37)
    scores = score_tokens(product, token, transform, entropy=True)
    gradient = torch.full_like(product, 9.0)
    write_gradient(product, token, transform, scores, torch.tensor([0.0, 1.0, 0.0]), None, gradient)
    assert not gradient[[0, 2]].any()
    assert gradient[1].all()
    write_gradient(product, token, transform, scores, None, None, gradient)
    assert not gradient.any()


@pytest.mark.parametrize("wrong", [-1, 37, 10**9])
def test_a_token_outside_the_vocabulary_is_nan(wrong):
    product, token, transform = inputs(3, 37)
    token[1] = wrong
    scores = score_tokens(product, token, transform, entropy=False)
    assert scores.logps.isnan().tolist() == [False, True, False]


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter computes with NumPy
def test_nan_and_infinity_are_not_hidden():
    product, token, transform = inputs(3, 37)
    product[0, 30], product[1, 5] = torch.nan, torch.inf
    scores = score_tokens(product, token, transform, entropy=True)
    assert scores.logps.isnan().tolist() == [True, True, False]
    assert scores.entropy.isnan().tolist() == [True, True, False]


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [(1.0, None, 1.0), CAPPED], ids=["plain", "capped"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_compiled_kernels(dtype, settings, gpu, monkeypatch):
    monkeypatch.undo()  # blocks of a real size
    check(*inputs(5, 50257, gpu, settings, bias=settings == CAPPED), gradient_dtype=dtype)
    check(*inputs(3, 37, gpu, settings), gradient_dtype=dtype)
