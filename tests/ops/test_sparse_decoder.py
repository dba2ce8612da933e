import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_inputs import BACKENDS, LENGTHS, ragged_mask, selection
from tolerances import GRADIENT_OF_ROUNDED_INPUT, HALF_UNIT, summation_bound

from fastsae_kernels import reference, segments
from fastsae_kernels.dispatch import use
from fastsae_kernels.segments import CHUNK, chunk_capacity, long_segments
from fastsae_kernels.sparse import CSR
from fastsae_kernels.sparse_decoder import (
    _nested_decode_loss,
    _sparse_decode,
    _sparse_decode_loss,
    _weighted_row_sums,
    decode_part,
    nested_decode_loss,
    sparse_decode,
    sparse_decode_loss,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TOKENS, LATENTS, WIDTH = 7, 150, 24


@pytest.fixture(params=BACKENDS)
def device(request):
    where, implementation = request.param
    with use(implementation):
        yield torch.device(where)


def inputs(dtype=torch.float32, device="cpu", mask=None, width=WIDTH):
    """``(csr, W_dec, b_dec, x, z)``: z dense, and everything else as the operations take it."""
    torch.manual_seed(0)
    mask = ragged_mask(TOKENS, LATENTS) if mask is None else mask
    z = (torch.rand(mask.shape) * mask).to(dtype)
    W_dec, b_dec = torch.randn(mask.shape[1], width).to(dtype), torch.randn(width).to(dtype)
    x = torch.randn(mask.shape[0], width).to(dtype)
    csr, _ = selection(mask, z)
    csr = CSR(*(t.to(device) for t in csr))
    return csr, W_dec.to(device), b_dec.to(device), x.to(device), z.to(device)


def assert_sums(got, exact, magnitudes, lengths):
    """``got`` within the bound of float32 sums of ``lengths`` products, plus its own rounding."""
    bounds = torch.tensor([summation_bound(int(n)) for n in lengths], device=got.device)
    allowed = bounds.double().view(-1, *[1] * (got.dim() - 1)) * magnitudes
    allowed = allowed + HALF_UNIT[got.dtype] * exact.abs()
    error = (got.double() - exact).abs()
    assert torch.all(error <= allowed), (error / allowed.clamp_min(1e-300)).max()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.usefixtures("poison")
def test_decode_is_the_dense_product(device, dtype):
    csr, W_dec, b_dec, _, z = inputs(dtype, device)
    x_hat = sparse_decode(csr, W_dec, b_dec)
    assert x_hat.dtype == dtype
    z, W, b = z.double(), W_dec.double(), b_dec.double()
    magnitudes = z.abs() @ W.abs() + b.abs()
    assert_sums(x_hat, reference.decode(z, W, b), magnitudes, csr.offsets.diff() + 2)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_part_of_a_reconstruction_is_not_rounded(device, dtype):
    csr, W_dec, _, _, _ = inputs(dtype, device)
    part = decode_part(csr, W_dec)
    assert part.dtype == torch.float32
    assert part.equal(decode_part(csr, W_dec.float()))
    assert part.to(dtype).equal(sparse_decode(csr, W_dec, torch.zeros_like(W_dec[0])))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.usefixtures("poison")
def test_loss_is_the_squared_residual(device, dtype):
    csr, W_dec, b_dec, x, z = inputs(dtype, device)
    residual, squared_error = sparse_decode_loss(csr, W_dec, b_dec, x)
    assert residual.dtype == dtype and squared_error.dtype == torch.float32
    z, W, b, x = z.double(), W_dec.double(), b_dec.double(), x.double()
    exact = x - reference.decode(z, W, b)
    magnitudes = z.abs() @ W.abs() + b.abs() + x.abs()
    lengths = csr.offsets.diff() + 3
    assert_sums(residual, exact, magnitudes, lengths)
    bound = 2 * (exact.abs() * magnitudes).sum(1) + exact.square().sum(1)
    assert_sums(squared_error, exact.square().sum(1), bound, lengths + WIDTH)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.usefixtures("poison")
def test_every_level_reconstructs_by_its_own_latents(device, dtype):
    csr, W_dec, b_dec, x, z = inputs(dtype, device)
    levels = (1, 8, LATENTS)  # the last has more than a chunk of one token's entries
    residual, squared_error = nested_decode_loss(
        csr, W_dec, b_dec, x, torch.tensor(levels, dtype=torch.int32, device=device)
    )
    assert residual.dtype == dtype and squared_error.dtype == torch.float32
    z, W, b, x = z.double(), W_dec.double(), b_dec.double(), x.double()
    exact = x - reference.decode_levels(z, W, b, levels)
    for level, m in enumerate(levels):
        magnitudes = z[:, :m].abs() @ W[:m].abs() + b.abs() + x.abs()
        lengths = csr.offsets.diff() + 3
        assert_sums(residual[level], exact[level], magnitudes, lengths)
        bound = 2 * (exact[level].abs() * magnitudes).sum(1) + exact[level].square().sum(1)
        assert_sums(squared_error[level], exact[level].square().sum(1), bound, lengths + WIDTH)


def test_one_level_is_the_plain_decoder_bit_for_bit(device):
    csr, W_dec, b_dec, x, _ = inputs(device=device)
    one = torch.tensor([LATENTS], dtype=torch.int32, device=device)
    for got, expected in zip(
        nested_decode_loss(csr, W_dec, b_dec, x, one),
        sparse_decode_loss(csr, W_dec, b_dec, x),
        strict=True,
    ):
        assert torch.equal(got[0], expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("orientation", ["long rows", "long columns"])
@pytest.mark.usefixtures("poison")
@pytest.mark.slow_interpreted
def test_gradients_are_those_of_the_dense_loss(device, dtype, orientation):
    mask = ragged_mask(TOKENS, LATENTS)
    mask = mask if orientation == "long rows" else mask.T.contiguous()
    csr, W_dec, b_dec, x, z = inputs(dtype, device, mask)
    leaves = [t.detach().requires_grad_() for t in (csr.values, W_dec, b_dec, x)]
    residual, squared_error = sparse_decode_loss(csr._replace(values=leaves[0]), *leaves[1:])
    got = torch.autograd.grad((squared_error.sum() + residual.sum()) / x.numel(), leaves)

    dense = [t.double().requires_grad_() for t in (z, W_dec, b_dec, x)]
    error = dense[3] - reference.decode(*dense[:3])
    loss = (error.square().sum() + error.sum()) / x.numel()
    exact = list(torch.autograd.grad(loss, dense))
    assert not got[0][int(csr.offsets[-1]) :].any()
    token, nnz = csr.tokens(), int(csr.offsets[-1])
    exact[0] = exact[0][token[:nnz], csr.indices[:nnz].long()]
    for ours, theirs in zip((got[0][:nnz], *got[1:]), exact, strict=True):
        assert ours.dtype == dtype
        scale = theirs.abs().max()
        assert (ours.double() - theirs).abs().max() <= GRADIENT_OF_ROUNDED_INPUT[dtype] * scale


@pytest.mark.parametrize("needed", range(3))
@pytest.mark.slow_interpreted
def test_only_the_needed_gradient(device, needed):
    csr, W_dec, b_dec, _, _ = inputs(device=device)
    leaves = [csr.values, W_dec, b_dec]
    leaves[needed].requires_grad_()
    sparse_decode(csr, W_dec, b_dec).sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [i == needed for i in range(3)]


def test_gradcheck_in_float64():
    mask = torch.rand(5, 9, generator=torch.Generator().manual_seed(0)) < 0.4
    csr, W_dec, b_dec, x, _ = inputs(torch.float64, mask=mask, width=4)
    leaves = [t.detach().requires_grad_() for t in (csr.values, W_dec, b_dec, x)]
    decode = lambda v, W, b, x: sparse_decode(csr._replace(values=v), W, b)
    loss = lambda v, W, b, x: sparse_decode_loss(csr._replace(values=v), W, b, x)
    # The spare slots' gradient is zero by either way.
    assert torch.autograd.gradcheck(decode, leaves)
    assert torch.autograd.gradcheck(loss, leaves)


def test_second_derivative_says_that_there_is_none():
    csr, W_dec, b_dec, _, _ = inputs()
    W_dec.requires_grad_()
    x_hat = sparse_decode(csr, W_dec, b_dec)
    (dW_dec,) = torch.autograd.grad(x_hat.square().sum(), W_dec, create_graph=True)
    with pytest.raises(RuntimeError):
        dW_dec.sum().backward()


@pytest.mark.slow_interpreted
def test_operations_are_well_registered(device):
    csr, W_dec, b_dec, x, _ = inputs(device=device)
    leaves = [csr.values.requires_grad_(), W_dec.requires_grad_(), b_dec.requires_grad_()]
    values, W_dec, b_dec = leaves
    torch.library.opcheck(_sparse_decode, (values, *csr[1:], W_dec, b_dec))
    torch.library.opcheck(_sparse_decode_loss, (values, *csr[1:], W_dec, b_dec, x.requires_grad_()))
    plain = [t.detach() for t in (values, *csr[1:], W_dec, b_dec, x)]
    torch.library.opcheck(_nested_decode_loss, (*plain, 1))
    torch.library.opcheck(_weighted_row_sums, (*plain[:3], plain[3].bfloat16(), None, True))


def test_compiles_whole_with_dynamic_tokens():
    compiled = torch.compile(sparse_decode_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (6, 8):
        csr, W_dec, b_dec, x, _ = inputs(mask=ragged_mask(tokens, LATENTS))
        W_dec.requires_grad_()
        for got, expected in zip(
            compiled(csr, W_dec, b_dec, x), sparse_decode_loss(csr, W_dec, b_dec, x), strict=True
        ):
            assert torch.equal(got, expected)


@pytest.mark.slow_interpreted
def test_strides_do_not_matter(device):
    csr, W_dec, b_dec, x, _ = inputs(device=device)
    expected = sparse_decode_loss(csr, W_dec, b_dec, x)
    offset = torch.cat([W_dec.new_zeros(1), W_dec.flatten()])[1:].view_as(W_dec)
    strided = csr._replace(values=csr.values[:, None].expand(-1, 2)[:, 0])
    for got in (
        sparse_decode_loss(csr, W_dec.T.contiguous().T, b_dec, x.T.contiguous().T),
        sparse_decode_loss(strided, offset, b_dec[:, None].expand(-1, 3)[:, 1], x),
    ):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    W_dec.requires_grad_()
    sparse_decode(csr, W_dec, b_dec).sum().backward()  # its gradient arrives expanded
    assert W_dec.grad.isfinite().all()


@pytest.mark.parametrize("tokens", [0, 4])
def test_nothing_selected(device, tokens):
    mask = torch.zeros(tokens, LATENTS, dtype=torch.bool)
    csr, W_dec, b_dec, x, _ = inputs(device=device, mask=mask)
    W_dec.requires_grad_()
    assert torch.equal(sparse_decode(csr, W_dec, b_dec), b_dec.expand(tokens, -1))
    sparse_decode_loss(csr, W_dec, b_dec, x).squared_error.sum().backward()
    assert not W_dec.grad.any()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**31))
def test_permuting_tokens_permutes_reconstructions_exactly(tokens, latents, density, seed):
    torch.manual_seed(seed)
    z = torch.rand(tokens, latents)
    mask = torch.rand(tokens, latents) < density
    W_dec, b_dec, order = torch.randn(latents, 5), torch.randn(5), torch.randperm(tokens)
    plain = sparse_decode(selection(mask, z)[0], W_dec, b_dec)
    permuted = sparse_decode(selection(mask[order], z[order])[0], W_dec, b_dec)
    assert torch.equal(permuted, plain[order])


def test_runs_are_bitwise_equal(device):
    csr, W_dec, b_dec, x, _ = inputs(device=device)
    runs = 2 if device.type == "cpu" else 100
    levels = torch.tensor([8, LATENTS], dtype=torch.int32, device=device)
    first = nested_decode_loss(csr, W_dec, b_dec, x, levels)
    for _ in range(runs):
        again = nested_decode_loss(csr, W_dec, b_dec, x, levels)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_long_segments_are_listed_in_order(seed, monkeypatch):
    torch.manual_seed(seed)
    # Several programs, the last of which count those before them in several rounds.
    monkeypatch.setattr(segments, "BLOCK", 128)
    monkeypatch.setattr(segments, "BLOCK_BEFORE", 256)
    lengths = torch.randint(0, 3 * CHUNK, (1500,)) * (torch.rand(1500) < 0.1)
    lengths[: len(LENGTHS)] = torch.tensor(LENGTHS)
    lengths[-1] = 5 * CHUNK
    offsets = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    with use("triton"):
        starts, owners = long_segments(offsets, int(offsets[-1]))
    chunks = torch.where(lengths > CHUNK, (lengths + CHUNK - 1) // CHUNK, 0)
    assert torch.equal(starts.diff(), chunks.int())
    assert torch.equal(owners[: starts[-1]].long(), torch.arange(1500).repeat_interleave(chunks))
    assert starts[-1] <= chunk_capacity(int(offsets[-1]))


def test_chunk_capacity_holds_the_worst_case():
    for length in range(CHUNK + 1, 4 * CHUNK + 2):
        for count in (1, 3):
            assert chunk_capacity(count * length) >= count * -(-length // CHUNK)


def test_refusals():
    csr, W_dec, b_dec, x, _ = inputs()
    with pytest.raises(ValueError, match=r"W_dec and b_dec: expected \[F, D\] and \[D\], got"):
        sparse_decode(csr, W_dec, b_dec[:-1])
    with pytest.raises(ValueError, match=r"expected int32, got torch.int64"):
        sparse_decode(csr._replace(indices=csr.indices.long()), W_dec, b_dec)
    with pytest.raises(ValueError, match=r"vectors of one length"):
        sparse_decode(csr._replace(values=csr.values[1:]), W_dec, b_dec)
    with pytest.raises(ValueError, match=r"x: expected \[B, D\] = \[7, 24\]"):
        sparse_decode_loss(csr, W_dec, b_dec, x[:-1])
    with pytest.raises(ValueError, match=r"expected contiguous"):
        sparse_decode(csr._replace(offsets=csr.offsets.repeat_interleave(2)[::2]), W_dec, b_dec)
