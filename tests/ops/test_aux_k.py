import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_inputs import BACKENDS
from tolerances import AUX_K

from fastsae_kernels import aux_k, reference
from fastsae_kernels.aux_k import _aux_k_gradients, aux_k_gradients, torch_impl, triton_impl
from fastsae_kernels.dispatch import use
from fastsae_kernels.reference import Gradients

TOKENS, LATENTS, WIDTH, K_AUX = 3, 24, 8, 4
DEAD = (0, 1, K_AUX - 1, K_AUX, 11, LATENTS)
NORMALIZATIONS = ("residual_variance", "total_variance", "none")


# A CPU that gathers instead of multiplying; blocks and strips that leave a rest.
GATHERED = pytest.param(("cpu", "torch", "gathered"), id="torch gathered")


@pytest.fixture(params=[*BACKENDS, GATHERED])
def device(request, monkeypatch):
    where, implementation, *gathered = request.param
    if gathered:
        monkeypatch.setattr(aux_k, "SPARSE_FROM", 1)
        for name, size in {"STRIP": 3, "BLOCK_LATENTS": 2, "TOKENS_PER_SELECTION": 2}.items():
            monkeypatch.setattr(torch_impl, name, size)
    if where == "cpu":
        # Two tiles of the longest row, with a rest, or more.
        tiles = {"BLOCK_COLUMNS": 32, "BLOCK_GATHERED": 16, "BLOCK_WIDTH": 4, "TILE": (2, 16)}
        for name, size in {**tiles, "MAX_PROGRAMS": 2, "BLOCK_LATENTS": 16}.items():
            monkeypatch.setattr(triton_impl, name, size)
    with use(implementation):
        yield torch.device(where)


def inputs(n_dead, dtype=torch.float64, device="cpu", seed=0):
    """``(params, x, residual, tokens_since_active)`` with ``n_dead`` counters at 50 or more."""
    torch.manual_seed(seed)
    new = lambda *shape: torch.randn(shape, dtype=torch.float64).to(device, dtype)
    params = Gradients(new(WIDTH, LATENTS), new(LATENTS), new(LATENTS, WIDTH), new(WIDTH))
    params.b_enc.add_(4)  # pre-activations of 4 ± 4: every latent is positive somewhere
    since = torch.randint(0, 50, (LATENTS,))
    since[torch.randperm(LATENTS)[:n_dead]] += 50
    return params, new(TOKENS, WIDTH), new(TOKENS, WIDTH), since.to(device)


def compact(params, x, residual, since, max_dead=LATENTS, **options):
    options = {"dead_after": 50, "k_aux": K_AUX, "coefficient": 0.5} | options
    W_enc, b_enc, W_dec, b_dec = params
    W_enc = W_enc.T.contiguous()
    return aux_k_gradients(
        x, residual, W_enc, b_enc, W_dec, b_dec, since, max_dead=max_dead, **options
    )


def expected(params, x, residual, dead, normalization, k_aux=K_AUX, coefficient=0.5):
    """The loss, and its gradients in ``W_enc``, ``b_enc`` and ``W_dec`` by autograd."""
    *leaves, b_dec = (p.double().cpu().requires_grad_() for p in params)
    x, residual, dead = x.double().cpu(), residual.double().cpu(), dead.cpu()
    W_enc, b_enc, W_dec = leaves
    pre = reference.pre_activations(x, W_enc, b_enc, b_dec.detach())
    loss = reference.aux_k_loss(pre, residual, W_dec, dead, k_aux, normalization, x)
    gradients = torch.autograd.grad(
        coefficient * loss, leaves, allow_unused=True, materialize_grads=True
    )
    return loss.detach(), gradients


def scatter(gradient):
    """Compact buffers back in place, as :func:`fused_update_` reads them."""
    slots = gradient.slots.cpu()
    have = slots >= 0
    dense = lambda rows: torch.zeros(LATENTS, *rows.shape[1:], dtype=torch.float64).index_put(
        (have.nonzero().flatten(),), rows.double().cpu()[slots[have].long()]
    )
    return dense(gradient.W_enc).T, dense(gradient.b_enc), dense(gradient.W_dec)


def assert_close(got, exact, tolerance):
    for ours, theirs in zip(got, exact, strict=True):
        error = (ours.double().cpu() - theirs).abs().max()
        assert error <= tolerance * max(float(theirs.abs().max()), 1e-6)


@pytest.mark.parametrize("n_dead", DEAD)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.usefixtures("poison")
@pytest.mark.slow_interpreted
def test_compact_gradients_are_those_of_the_definition(device, normalization, n_dead):
    params, x, residual, since = inputs(n_dead, torch.float32, device)
    loss, gradient = compact(params, x, residual, since, normalization=normalization)
    exact_loss, exact = expected(params, x, residual, since >= 50, normalization)
    assert_close((loss, *scatter(gradient)), (exact_loss, *exact), AUX_K[torch.float32])
    assert (gradient.slots >= 0).sum() == n_dead
    assert gradient.W_enc.shape == gradient.W_dec.shape == (LATENTS, WIDTH)
    if n_dead:
        assert exact[0].any()  # the encoder learns from aux-k


def test_gradients_of_the_loss_and_of_the_whole_step_agree():
    """With ``reference.gradients``, which writes them out a second way."""
    params, x, _, since = inputs(11)
    mask = torch.rand(TOKENS, LATENTS) < 0.3
    pre = reference.pre_activations(x, params.W_enc, params.b_enc, params.b_dec)
    residual = x - reference.decode(pre * mask, params.W_dec, params.b_dec)
    options = {
        "aux_coefficient": 0.5, "normalization": "residual_variance", "objective": "plain",
    }  # fmt: skip
    both = reference.gradients(x, params, mask, since >= 50, k_aux=K_AUX, **options)
    alone = reference.gradients(x, params, mask, since >= 50, k_aux=0, **options)
    *difference, db_dec = (a - b for a, b in zip(both, alone, strict=True))
    got = scatter(compact(params, x, residual, since).gradients)
    assert_close(got, difference, AUX_K[torch.float64])
    assert not db_dec.any()


@pytest.mark.parametrize("max_dead", [0, 3, 11, 12])
def test_overflow_takes_the_longest_dead(device, max_dead):
    params, x, residual, since = inputs(11, torch.float32, device)
    dead = (since >= 50).nonzero().flatten().tolist()
    for i, f in enumerate(dead):
        since[f] = 50 + i // 2  # pairs of equals, of which the lower latent comes first
    longest = sorted(dead, key=lambda f: (-int(since[f]), f))[:max_dead]
    loss, gradient = compact(params, x, residual, since, max_dead=max_dead)
    chosen = torch.zeros(LATENTS, dtype=torch.bool)
    chosen[longest] = True
    assert torch.equal(gradient.slots.cpu() >= 0, chosen)
    slots = gradient.slots[gradient.slots >= 0]
    assert torch.equal(slots.cpu(), torch.arange(len(slots), dtype=torch.int32))
    exact_loss, exact = expected(params, x, residual, chosen, "residual_variance")
    assert_close((loss, *scatter(gradient)), (exact_loss, *exact), AUX_K[torch.float32])


@pytest.mark.parametrize("normalization", NORMALIZATIONS[:2])
def test_a_vanishing_denominator_gives_zero(device, normalization):
    params, x, residual, since = inputs(11, torch.float32, device)
    # Powers of two: their mean is exact, and so is the zero variance.
    x, residual = torch.ones_like(x), torch.ones_like(residual)
    loss, gradient = compact(params, x, residual, since, normalization=normalization)
    assert loss == 0 and not any(t.any() for t in gradient[:3])


@pytest.mark.parametrize("k", [0, 1, 5, 39, 40, 50])
@pytest.mark.usefixtures("poison")
@pytest.mark.slow_interpreted
def test_selection_is_exact(device, k):
    torch.manual_seed(0)
    z = torch.randn(7, 40)
    z[0], z[1], z[2] = 1.0, z[1].round(), -z[2].abs()
    z[3, 5], z[3, 7], z[3, 9] = torch.inf, torch.nan, -torch.inf
    z[4, ::2], z[5] = 0.0, z[5] * 1e-40
    bias = torch.randint(-1, 2, (40,)).float()
    for n_dead, dtype in ((40, torch.float32), (33, torch.float16)):
        pre = torch.where(torch.arange(40) < n_dead, z + bias, 0)
        kept = torch.where(reference.topk_mask(pre, k), pre, 0)
        on_device = [t.to(device) for t in (z.clone(), bias, torch.tensor(n_dead))]
        found = aux_k._run(on_device[0], 1).keep_largest(on_device[0], k, *on_device[1:], dtype)
        assert torch.equal(found.to(dtype).cpu(), kept.to(dtype))


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 12),
    st.lists(st.sampled_from([-1.0, 0.0, 0.5, 0.5, 2.0]), min_size=1, max_size=12),
)
def test_selection_keeps_the_first_of_equals(k, row):
    z = torch.tensor([row])
    n = torch.tensor(len(row))
    found = torch_impl.keep_largest(z.clone(), k, torch.zeros(len(row)), n, z.dtype)
    assert torch.equal(found, torch.where(reference.topk_mask(z, k), z, 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights(device, dtype):
    params, x, residual, since = inputs(K_AUX, torch.float32, device)
    low = Gradients(params.W_enc.to(dtype), params.b_enc, params.W_dec.to(dtype), params.b_dec)
    loss, gradient = compact(low, x, residual, since)
    assert loss.dtype == gradient.W_enc.dtype == torch.float32
    exact_loss, exact = expected(low, x, residual, since >= 50, "residual_variance")
    assert_close((loss, *scatter(gradient)), (exact_loss, *exact), AUX_K[dtype])


def arguments(tokens=TOKENS, device="cpu"):
    """Those of the registered operation."""
    params, x, residual, since = inputs(11, torch.float32, device)
    W_enc, b_enc, W_dec, b_dec = params
    sizes = 50, 12, K_AUX, "total_variance", 0.5
    W_enc = W_enc.T.contiguous()
    return x[:tokens], residual[:tokens], W_enc, b_enc, W_dec, b_dec, since, *sizes


@pytest.mark.slow_interpreted
def test_the_operation_is_well_registered(device):
    torch.library.opcheck(_aux_k_gradients, arguments(device=device))


def test_compiles_whole_with_dynamic_tokens():
    compiled = torch.compile(_aux_k_gradients, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 2):
        both = compiled(*arguments(tokens)), _aux_k_gradients(*arguments(tokens))
        assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def test_runs_are_bitwise_equal(device):
    arguments = inputs(11, torch.float32, device)
    loss, gradient = compact(*arguments)
    for _ in range(2 if device.type == "cpu" else 100):
        again, repeated = compact(*arguments)
        assert torch.equal(loss, again)
        assert all(torch.equal(a, b) for a, b in zip(gradient, repeated, strict=True))


def test_refusals():
    params, x, residual, since = inputs(3)
    with pytest.raises(ValueError, match=r"normalization: expected one of .* got 'fvu'"):
        compact(params, x, residual, since, normalization="fvu")
    with pytest.raises(ValueError, match=r"k_aux: expected 0 or more, got -1"):
        compact(params, x, residual, since, k_aux=-1)
    with pytest.raises(ValueError, match=r"max_dead: expected 0 or more"):
        compact(params, x, residual, since, max_dead=-1)
    with pytest.raises(ValueError, match=r"W_enc and W_dec: expected two \[F, D\] tensors"):
        compact(params._replace(W_dec=params.W_dec.float()), x, residual, since)
    with pytest.raises(ValueError, match=r"tokens_since_active: expected \[24\]"):
        compact(params, x, residual, since[1:])
    with pytest.raises(ValueError, match=r"x and residual: expected \[B, 8\]"):
        compact(params, x[1:], residual, since)
