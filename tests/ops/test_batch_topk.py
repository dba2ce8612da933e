import pytest
import torch
import torch._dynamo.testing
from selection_cases import assert_batch_topk, cases

from fastsae_kernels import CSR, batch_topk, csr_to_csc, group_max, reference, transpose
from fastsae_kernels.dispatch import use
from fastsae_kernels.selection import _batch_topk, _group_max, triton_impl
from fastsae_kernels.selection.triton_impl import GROUP
from fastsae_kernels.transpose import _csr_to_csc

CASES = cases()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow_interpreted
def test_exact_on_hard_inputs(name, device, impl, poison):
    pre = CASES[name]
    positives = int((pre > 0).sum())
    # 5 is less than the 12 groups there are, so groups are selected too.
    sizes = {5, positives + 1}
    if impl == "torch" or device.type == "cuda":
        sizes |= {
            -1,
            0,
            1,
            pre.numel() // 8,
            positives - 1,
            positives,
            pre.numel() - 1,
            pre.numel(),
            10**6,
        }
    for num_selected in sizes:
        assert_batch_topk(pre.to(device), num_selected)


@pytest.mark.parametrize("name", CASES)
def test_exact_on_hard_inputs_with_a_quota(name, device, impl, poison):
    pre = CASES[name]
    # 75 latents: fewer peaks than there are, about as many, and room for more than the peaks.
    sizes = [(20, 0.5), (200, 0.9)]
    if impl == "torch" or device.type == "cuda":
        sizes += [(n, q) for n in (0, 1, 74, 75, 76, 150, 300, 10**6) for q in (0.01, 0.3, 0.5, 1)]
    for num_selected, quota in sizes:
        assert_batch_topk(pre.to(device), num_selected, quota)


@pytest.mark.parametrize("quota", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["random", "few_values", "nan", "denormal"])
@pytest.mark.slow_interpreted
def test_exact_in_every_dtype(name, dtype, quota, device, impl, poison):
    if dtype == torch.float64 and impl == "triton":
        pytest.skip("the kernels compute in float32")
    pre = CASES[name].to(dtype)
    assert_batch_topk(pre.to(device), pre.numel() // 6, quota)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.slow_interpreted
def test_exact_over_many_blocks(ties, device, impl, poison, monkeypatch):
    """Of tokens, of keys and of a token's entries, where a program reads more than one of each."""
    for name, size in {"BLOCK_KEYS": 32, "BLOCK_ROW": 32, "MAX_COUNTING_PROGRAMS": 2}.items():
        monkeypatch.setattr(triton_impl, name, size)
    pre = torch.randn(40, 75, generator=torch.Generator().manual_seed(7))
    pre[20] += 3
    if ties:
        pre = pre.round()
    for quota in (0, 0.4, 1):
        assert_batch_topk(pre.to(device), 200, quota)


def test_massive_ties_of_low_precision(device, impl, poison):
    pre = (
        torch.randn(6, 320, generator=torch.Generator().manual_seed(1)).mul(0.01).add(1).bfloat16()
    )
    assert pre.unique().numel() < 40
    for quota in (0, 0.5):
        assert_batch_topk(pre.to(device), 40, quota)


@pytest.mark.parametrize(
    "shape",
    [(1, 1), (1, 31), (1, 33), (3, 32), (1, 2100), (9, 64)],
    ids=lambda s: f"{s[0]}x{s[1]}",
)
@pytest.mark.slow_interpreted
def test_exact_at_odd_shapes(shape, device, impl, poison):
    pre = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    for num_selected in (pre.numel() // 3, pre.numel()):
        assert_batch_topk(pre.to(device), num_selected)
    assert_batch_topk(pre.to(device), pre.numel() // 3, 0.7)


@pytest.mark.parametrize("shape", [(0, 40), (5, 0), (0, 0)])
def test_nothing_to_select_from(shape, device, impl):
    for quota in (0, 0.5):
        selection = batch_topk(torch.zeros(shape, device=device), 10, quota=quota)
        assert len(selection.csr.values) == 0
        assert selection.csr.offsets.tolist() == [0] * (shape[0] + 1)
        assert selection.threshold == torch.inf
    csc = csr_to_csc(selection.csr, shape[1])
    assert csc.offsets.tolist() == [0] * (shape[1] + 1)


@pytest.mark.slow_interpreted
def test_any_memory_layout(device, impl, poison):
    base = torch.randn(6, 50, generator=torch.Generator().manual_seed(3)).to(device)
    flat = torch.randn(1 + 3 * 40, device=device)
    for pre in (
        base[:, :4].T,
        base[::2, 3:],
        base[:1].expand(4, 50),
        flat[1:].view(3, 40),
    ):
        assert_batch_topk(pre, pre.numel() // 5)
        assert_batch_topk(pre, pre.numel() // 5, 0.8)


def test_group_maxima_and_peaks(device, impl, poison):
    for name, pre in CASES.items():
        result = group_max(pre.to(device), with_peaks=True)
        clean = torch.where(pre > 0, pre, 0)
        padded = torch.nn.functional.pad(clean, (0, -pre.shape[1] % GROUP))
        expected = padded.unflatten(1, (-1, GROUP)).amax(-1)
        assert torch.equal(result.values.cpu(), expected), name
        assert bool(result.nonfinite) == (not pre.isfinite().all()), name
        peaks = reference.peaks(pre, pre.numel())
        expected = torch.where(peaks.any(0), peaks.int().argmax(0), -1).int()
        assert torch.equal(result.peaks.cpu(), expected), name
        plain = group_max(pre.to(device))
        assert len(plain.peaks) == 0 and torch.equal(plain.values, result.values), name


def test_peaks_of_many_tokens(device, impl, poison):
    """Over the blocks of tokens of either implementation, and a rest; ties go to the first token."""
    pre = torch.randint(-2, 3, (75, 33), generator=torch.Generator().manual_seed(6)).float()
    pre[:, 5], pre[40:, 6], pre[:40, 6] = -1, 2, 1
    peaks = reference.peaks(pre, pre.numel())
    expected = torch.where(peaks.any(0), peaks.int().argmax(0), -1).int()
    assert expected[5] == -1 and expected[6] == 40
    assert torch.equal(group_max(pre.to(device), with_peaks=True).peaks.cpu(), expected)


@pytest.mark.parametrize("quota", [0.0, 0.5])
def test_given_maxima_change_nothing(quota, device, impl):
    pre = CASES["random"].to(device)
    expected = batch_topk(pre, 50, quota=quota)
    for with_peaks in (False, True):
        selection = batch_topk(pre, 50, group_max(pre, with_peaks), quota)
        assert torch.equal(selection.threshold, expected.threshold)
        assert all(map(torch.equal, selection.csr, expected.csr))


def assert_csc(mask, device, empty=19):
    """The entries of ``mask [B, F]``, with ``empty`` slots to spare, against the oracle."""
    expected = reference.to_csc(mask)
    values, indices, offsets = reference.to_csr(mask.float(), mask)
    csr = CSR(
        *(torch.cat([t, t.new_zeros(empty)]).to(device) for t in (values, indices)),
        offsets.to(device),
    )
    csc = csr_to_csc(csr, mask.shape[1])
    nnz = len(values)
    assert torch.equal(csc.offsets.cpu(), expected.offsets)
    assert torch.equal(csc.rows.cpu()[:nnz], expected.rows)
    assert torch.equal(csc.positions.cpu()[:nnz], expected.positions)
    assert not csc.rows[nnz:].any() and not csc.positions[nnz:].any()


@pytest.mark.parametrize("latents", [6, 300, 70_000])
@pytest.mark.slow_interpreted
def test_csc_segments_of_every_length(latents, device, impl, poison):
    B = 260
    lengths = (0, 1, 127, 128, 129, B)
    generator = torch.Generator().manual_seed(4)
    mask = torch.zeros(B, latents, dtype=torch.bool)
    chosen = torch.randperm(latents, generator=generator)[: len(lengths)]
    for latent, length in zip(chosen, lengths, strict=True):
        mask[torch.randperm(B, generator=generator)[:length], latent] = True
    assert_csc(mask, device)


@pytest.mark.parametrize("density", [0.0, 0.03, 1.0])
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 70), (31, 40), (256, 3), (257, 3), (800, 2)], ids=str
)
def test_csc_of_any_shape(shape, density, device, impl, poison):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(7)) < density
    mask[:, -1] = True  # one latent has every token
    mask[len(mask) // 3] = True  # and one token every latent
    for empty in (0, 19):
        assert_csc(mask, device, empty)


def test_csc_of_many_cells(device, impl, poison, monkeypatch):
    """So many that a program takes several rounds to count the entries before its own cells."""
    monkeypatch.setattr(transpose, "BLOCK_CELLS", 128)
    assert_csc(torch.rand(3, 130 * 128, generator=torch.Generator().manual_seed(8)) < 0.1, device)


@pytest.mark.parametrize("quota", [0.0, 0.5])
def test_gradient_reaches_the_selected_entries_alone(quota, device, impl, poison):
    pre = CASES["nan_and_ties"].to(device, copy=True).requires_grad_()
    csr = batch_topk(pre, 60, quota=quota).csr
    weight = torch.arange(1.0, 61.0, device=device)
    (csr.values * weight).sum().backward()
    mask = reference.batch_topk_mask(pre.detach().cpu(), 60, quota)
    expected = torch.zeros(mask.shape)
    expected[mask] = weight.cpu()[: int(mask.sum())]
    assert torch.equal(pre.grad.cpu(), expected)


@pytest.mark.parametrize("quota", [0.0, 0.5])
def test_gradcheck(quota):
    pre = torch.randn(4, 37, dtype=torch.float64, requires_grad=True)

    def dense(pre):
        return batch_topk(pre, 30, quota=quota).csr.dense(37)

    assert torch.autograd.gradcheck(dense, (pre,))
    assert torch.autograd.gradgradcheck(lambda pre: dense(pre).square(), (pre,))


def test_no_gradient_for_threshold_and_places(device, impl):
    pre = CASES["random"].to(device, copy=True).requires_grad_()
    selection = batch_topk(pre, 20, quota=0.5)
    assert selection.csr.values.requires_grad
    assert not selection.threshold.requires_grad and not selection.csr.indices.requires_grad


@pytest.mark.slow_interpreted
def test_opcheck(device, impl):
    pre = CASES["random"].to(device, copy=True).requires_grad_()
    maxima, _, peaks = group_max(pre, with_peaks=True)
    csr = batch_topk(pre, 40).csr
    for with_peaks in (False, True):
        torch.library.opcheck(_group_max, (pre.detach(), with_peaks))
    for num_selected, quota in ((40, 0.5), (75, 1.0), (0, 0.5)):
        torch.library.opcheck(_batch_topk, (pre, maxima, peaks, num_selected, quota))
    torch.library.opcheck(_batch_topk, (pre, maxima, peaks[:0], 40, 0.0))
    torch.library.opcheck(_csr_to_csc, (csr.indices, csr.offsets, pre.shape[1]))


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("with_quota", [False, True])
@pytest.mark.slow
def test_compiles_whole_for_any_number_of_tokens(with_quota, device, impl):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def run(pre):
        # A number from outside would be taken for one that changes.
        selection = batch_topk(pre, 4 * pre.shape[0], **({"quota": 0.5} if with_quota else {}))
        csc = csr_to_csc(selection.csr, pre.shape[1])
        return selection.csr.dense(pre.shape[1]), selection.threshold, csc.counts()

    quota = 0.5 if with_quota else 0.0
    for B in (3, 5, 9):
        pre = torch.randn(B, 75, device=device, requires_grad=True)
        z, threshold, counts = run(pre)
        plain = pre.detach().cpu()
        mask = reference.batch_topk_mask(plain, 4 * B, quota)
        assert torch.equal(z.cpu(), plain * mask)
        assert threshold == plain[mask & ~reference.peaks(plain, int(4 * B * quota))].min()
        assert torch.equal(counts.cpu(), mask.sum(0).int())
        z.sum().backward()
        assert torch.equal(pre.grad.cpu(), mask.float())
    assert counter.frame_count == 1


def test_shapes_on_the_meta_device():
    pre = torch.empty(3, 75, device="meta")
    csr = batch_topk(pre, 1000).csr
    assert csr.values.shape == csr.indices.shape == (225,) and csr.offsets.shape == (4,)
    assert csr_to_csc(csr, 75).offsets.shape == (76,)


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("quota", [0.0, 0.5])
def test_runs_are_bitwise_equal(quota, device, impl):
    pre = torch.randn(8, 640, generator=torch.Generator().manual_seed(5)).bfloat16().to(device)
    runs = 3 if impl == "triton" and device.type == "cpu" else 100
    results = []
    for _ in range(runs):
        selection = batch_topk(pre, 8 * 16, quota=quota)
        csc = csr_to_csc(selection.csr, 640)
        results.append([*selection.csr, selection.threshold, *csc])
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], result, strict=True))


@pytest.mark.parametrize(
    "pre", [torch.zeros(4), torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int32)], ids=str
)
def test_wrong_input_is_refused(pre):
    with pytest.raises(ValueError, match=r"\[tokens, latents\]"):
        batch_topk(pre, 1)


@pytest.mark.parametrize("quota", [-0.1, 1.1, float("nan")])
def test_a_quota_that_is_no_share_is_refused(quota):
    with pytest.raises(ValueError, match="batch_topk: quota is a share of num_selected, 0 to 1"):
        batch_topk(torch.zeros(2, 3), 1, quota=quota)


def test_csc_of_wrong_indices_is_refused():
    with pytest.raises(ValueError, match="int32 vector"):
        csr_to_csc(CSR(torch.zeros(2), torch.zeros(2, dtype=torch.int64), torch.zeros(2).int()), 4)


@pytest.mark.gpu
def test_exact_at_the_recipe_size():
    device = torch.device("cuda")
    for dtype in (torch.float32, torch.bfloat16):
        for quota in (0, 0.2, 0.5):
            assert_batch_topk(torch.randn(1024, 24576, device=device).to(dtype), 1024 * 64, quota)


@pytest.mark.gpu
def test_exact_beyond_32_bit_offsets():
    B, F = 87_500, 24_576
    assert B * F > 2**31
    pre = torch.full((B, F), -1.0, dtype=torch.bfloat16, device="cuda")
    expected = torch.tensor([[0, 5], [B // 2, 100], [B - 1, 0], [B - 1, F - 1]])
    pre[expected[:, 0], expected[:, 1]] = 1.0
    for quota in (0, 0.5):
        csr = batch_topk(pre, 1000, quota=quota).csr
        assert csr.offsets[-1] == 4
        assert csr.indices[:4].tolist() == expected[:, 1].tolist()
        assert csr.tokens()[:4].tolist() == expected[:, 0].tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("quota", [0.0, 0.4, 0.8])
def test_graph_replay_equals_eager(quota):
    def run(pre):
        selection = batch_topk(pre, 256 * 32, quota=quota)
        return [*selection.csr, selection.threshold, *csr_to_csc(selection.csr, 4096)]

    batches = [torch.randn(256, 4096, device="cuda") for _ in range(3)]
    with use("triton"):
        pre = batches[0].clone()
        run(pre)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(pre)
        for batch in batches:
            pre.copy_(batch)
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(captured, run(batch), strict=True))
