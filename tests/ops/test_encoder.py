import pytest
import torch
import torch._dynamo.testing
from tolerances import ENCODER_GRADIENT, summation_bound

from fastsae_kernels import batch_topk, encode_with_group_max, encoder, group_max, reference
from fastsae_kernels.encoder import _encode

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["descriptors", "pointers"])
def variant(request, device, impl, monkeypatch):
    """Each way the kernel reads its operands; the torch code has only one."""
    if request.param == "pointers" and impl == "torch":
        pytest.skip("torch has one way to read its operands")
    if device.type == "cpu" or request.param == "pointers":
        chosen = request.param == "descriptors"
        monkeypatch.setattr(encoder, "_descriptors_serve", lambda *_: chosen)
    return request.param


def problem(B, D, F, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, D, generator=generator).add(0.3).to(device)
    weight = torch.randn(F, D, generator=generator).div(D**0.5).to(dtype).to(device)
    b_enc = torch.randn(F, generator=generator).mul(0.1).to(device)
    b_dec = torch.randn(D, generator=generator).to(device)
    return x, weight.T, b_enc, b_dec


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 32, 70), (1, 48, 1), (131, 40, 300)], ids=str)
@pytest.mark.slow_interpreted
def test_pre_activations_and_maxima(shape, dtype, device, impl, variant, poison):
    B, D, F = shape
    x, W_enc, b_enc, b_dec = problem(B, D, F, dtype, device)
    pre, maxima = encode_with_group_max(x, W_enc, b_enc, b_dec)
    centred = (x - b_dec).to(dtype).double()
    expected = reference.pre_activations(
        centred, W_enc.double(), b_enc.double(), torch.zeros(D, dtype=torch.float64, device=device)
    )
    magnitude = centred.abs() @ W_enc.double().abs() + b_enc.double().abs()
    assert pre.dtype == torch.float32
    assert ((pre - expected).abs() <= summation_bound(D + 1) * magnitude).all()
    assert torch.equal(maxima.values, group_max(pre).values)
    assert not maxima.nonfinite


def test_centred_input_needs_no_b_dec(device, impl, variant):
    x, W_enc, b_enc, b_dec = problem(3, 32, 40, torch.float32, device)
    one = encode_with_group_max(x, W_enc, b_enc, b_dec)
    other = encode_with_group_max(x - b_dec, W_enc, b_enc)
    assert torch.equal(one.pre, other.pre)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nonfinite_is_flagged(value, device, impl, variant, poison):
    x, W_enc, b_enc, b_dec = problem(3, 32, 40, torch.float32, device)
    b_enc[39] = value
    pre, maxima = encode_with_group_max(x, W_enc, b_enc, b_dec)
    assert maxima.nonfinite
    assert torch.equal(maxima.values, group_max(pre).values)


def test_selection_takes_the_maxima(device, impl, variant, poison):
    x, W_enc, b_enc, b_dec = problem(6, 32, 70, torch.bfloat16, device)
    pre, maxima = encode_with_group_max(x, W_enc, b_enc, b_dec)
    z = batch_topk(pre, 60, maxima).csr.dense(70)
    assert torch.equal(z.cpu(), pre.cpu() * reference.batch_topk_mask(pre.cpu(), 60))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(dtype, device, impl):
    x, W_enc, b_enc, b_dec = problem(9, 32, 40, dtype, device)
    weight = W_enc.T.detach()
    inputs = [t.detach().requires_grad_() for t in (x, weight, b_enc, b_dec)]
    output = encode_with_group_max(inputs[0], inputs[1].T, *inputs[2:])
    upstream = torch.randn(output.pre.shape, generator=torch.Generator().manual_seed(1)).to(device)
    gradients = torch.autograd.grad(output.pre, inputs, upstream)
    centred = (x - b_dec).double()
    upstream = upstream.double()
    dx = upstream @ weight.double()
    expected = (dx, upstream.T @ centred, upstream.sum(0), -dx.sum(0))
    for got, want in zip(gradients, expected, strict=True):
        assert (got - want).norm() <= ENCODER_GRADIENT[dtype] * want.norm()
    assert not output.maxima.values.requires_grad


def test_gradcheck():
    x, W_enc, b_enc, b_dec = problem(3, 4, 35, torch.float64, torch.device("cpu"))
    inputs = [t.double().requires_grad_() for t in (x, W_enc.detach(), b_enc, b_dec)]
    assert torch.autograd.gradcheck(lambda *a: encode_with_group_max(*a).pre, inputs)


def test_some_gradients_alone(device, impl):
    x, W_enc, b_enc, b_dec = problem(3, 32, 40, torch.float32, device)
    b_enc.requires_grad_()
    encode_with_group_max(x, W_enc, b_enc, b_dec).pre.sum().backward()
    assert torch.equal(b_enc.grad, torch.full_like(b_enc, 3))


@pytest.mark.parametrize("shape", [(0, 8, 40), (3, 0, 40), (3, 8, 0)], ids=str)
def test_empty(shape, device, impl):
    B, D, F = shape
    x, b_dec = torch.zeros(B, D, device=device), torch.zeros(D, device=device)
    W_enc, b_enc = torch.zeros(D, F, device=device), torch.ones(F, device=device)
    pre, maxima = encode_with_group_max(x, W_enc, b_enc, b_dec)
    assert torch.equal(pre, torch.ones(B, F, device=device))
    assert maxima.values.shape == (B, -(-F // 32))


def test_opcheck(device, impl):
    x, W_enc, b_enc, _ = problem(3, 32, 40, torch.float32, device)
    arguments = (x.requires_grad_(), W_enc.T.detach().requires_grad_(), b_enc.requires_grad_())
    torch.library.opcheck(_encode, arguments)


@pytest.mark.slow_interpreted
def test_compiles_whole_for_any_number_of_tokens(device, impl):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def run(x, W_enc, b_enc, b_dec):
        pre, maxima = encode_with_group_max(x, W_enc, b_enc, b_dec)
        return pre, batch_topk(pre, 3 * x.shape[0], maxima).csr.dense(pre.shape[1])

    for B in (3, 5, 8):
        inputs = problem(B, 32, 40, torch.float32, device)
        pre, z = run(*inputs)
        assert torch.equal(pre, encode_with_group_max(*inputs).pre)
        assert torch.equal(z.cpu(), pre.cpu() * reference.batch_topk_mask(pre.cpu(), 3 * B))
    assert counter.frame_count == 1


def test_shapes_that_do_not_fit_are_refused():
    x, W_enc, b_enc, b_dec = problem(3, 32, 40, torch.float32, torch.device("cpu"))
    for wrong in (
        (x[:, :5], W_enc, b_enc, b_dec),
        (x, W_enc, b_enc[:5], b_dec),
        (x, W_enc, b_enc, b_dec[:5]),
        (x[None], W_enc, b_enc, b_dec),
    ):
        with pytest.raises(ValueError, match=r"expected x \[B, D\]"):
            encode_with_group_max(*wrong)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1024, 1536, 24576), (1000, 2304, 9001)], ids=str)
def test_recipe_size(shape, dtype, variant):
    B, D, F = shape
    x, W_enc, b_enc, b_dec = problem(B, D, F, dtype, torch.device("cuda"))
    pre, maxima = encode_with_group_max(x, W_enc, b_enc, b_dec)
    centred = (x - b_dec).to(dtype).double()
    magnitude = centred.abs() @ W_enc.double().abs() + b_enc.double().abs()
    expected = centred @ W_enc.double() + b_enc.double()
    assert ((pre - expected).abs() <= summation_bound(D + 1) * magnitude).all()
    assert torch.equal(maxima.values, group_max(pre).values)
