import pytest
import torch
from sparse_inputs import BACKENDS
from tolerances import HALF_UNIT, summation_bound

from fastsae_kernels import reference
from fastsae_kernels.decoder_norm import (
    _normalize_rows,
    _normalize_rows_,
    _project_gradient,
    _project_gradient_,
    normalize_rows,
    normalize_rows_,
    project_gradient,
    project_gradient_,
)
from fastsae_kernels.dispatch import use

LATENTS, WIDTH = 6, 40


@pytest.fixture(params=BACKENDS)
def device(request):
    where, implementation = request.param
    with use(implementation):
        yield torch.device(where)


def rows(dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    W_dec, gradient = torch.randn(2, LATENTS, WIDTH)
    W_dec[1] = 0
    W_dec[2] *= 100
    gradient[3] = W_dec[3] * 5  # nothing may remain of it
    return W_dec.to(device, dtype), gradient.to(device, dtype)


@pytest.mark.parametrize("dtype", list(HALF_UNIT))
@pytest.mark.usefixtures("poison")
def test_both_are_their_definitions(device, dtype):
    W_dec, gradient = rows(dtype, device)
    projected, normal = project_gradient(W_dec, gradient), normalize_rows(W_dec)
    assert projected.dtype == normal.dtype == dtype
    W, G = W_dec.double(), gradient.double()
    exact = reference.project_gradient(W, G)
    # g less its component: the rounding errors of a sum of D products, each at most |g|.
    allowed = 3 * summation_bound(WIDTH) * G.norm(dim=1, keepdim=True)
    assert torch.all((projected.double() - exact).abs() <= allowed + HALF_UNIT[dtype] * exact.abs())
    exact = reference.normalize_rows(W)
    allowed = (2 * summation_bound(WIDTH) + HALF_UNIT[dtype]) * exact.abs()
    assert torch.all((normal.double() - exact).abs() <= allowed)
    assert not normal[1].any() and torch.equal(projected[1], gradient[1])


@pytest.mark.parametrize("dtype", list(HALF_UNIT))
def test_in_place_is_the_same(device, dtype):
    W_dec, gradient = rows(dtype, device)
    projected, normal = project_gradient(W_dec, gradient), normalize_rows(W_dec)
    assert project_gradient_(W_dec, gradient) is gradient and torch.equal(gradient, projected)
    assert normalize_rows_(W_dec) is W_dec and torch.equal(W_dec, normal)


def test_float64_is_exact_to_its_own_precision():
    W_dec, gradient = rows(torch.float64)
    expected = reference.project_gradient(W_dec, gradient)
    torch.testing.assert_close(project_gradient(W_dec, gradient), expected, rtol=0, atol=1e-14)
    expected = reference.normalize_rows(W_dec)
    torch.testing.assert_close(normalize_rows(W_dec), expected, rtol=1e-15, atol=0)


def test_gradcheck_in_float64():
    W_dec, gradient = (t[2:].detach().requires_grad_() for t in rows(torch.float64))
    assert torch.autograd.gradcheck(project_gradient, (W_dec, gradient))
    assert torch.autograd.gradcheck(normalize_rows, (W_dec,))


def test_operations_are_well_registered(device):
    W_dec, gradient = (t[2:].requires_grad_() for t in rows(device=device))
    torch.library.opcheck(_project_gradient, (W_dec, gradient))
    torch.library.opcheck(_normalize_rows, (W_dec,))
    W_dec, gradient = (t.detach().clone() for t in (W_dec, gradient))
    torch.library.opcheck(_project_gradient_, (W_dec, gradient))
    torch.library.opcheck(_normalize_rows_, (W_dec,))


def test_compiles_whole_and_updates_in_place():
    def step(W_dec, gradient):
        return normalize_rows_(W_dec - 0.1 * project_gradient(W_dec, gradient))

    W_dec, gradient = rows()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(W_dec, gradient), step(W_dec, gradient))


def test_strides_do_not_matter(device):
    W_dec, gradient = rows(device=device)
    expected = project_gradient(W_dec, gradient), normalize_rows(W_dec)
    W_dec, gradient = W_dec.T.contiguous().T, gradient.repeat(1, 2)[:, :WIDTH]
    got = project_gradient(W_dec, gradient), normalize_rows(W_dec)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_empty(device):
    W_dec = torch.zeros(0, WIDTH, device=device)
    assert project_gradient(W_dec, W_dec).shape == normalize_rows(W_dec).shape == (0, WIDTH)


def test_refusals():
    W_dec, gradient = rows()
    with pytest.raises(ValueError, match=r"expected the shape of W_dec"):
        project_gradient(W_dec, gradient[1:])
    with pytest.raises(ValueError, match=r"W_dec: expected \[F, D\], got \[40\]"):
        normalize_rows(W_dec[0])
    with pytest.raises(ValueError, match=r"expected a contiguous tensor to update in place"):
        normalize_rows_(W_dec.T)
    with pytest.raises(ValueError, match=r"expected a contiguous tensor to update in place"):
        project_gradient_(W_dec, gradient.T.contiguous().T)
