import pytest
import torch
import torch._dynamo.testing
from selection_cases import assert_topk, cases

from fastsae_kernels import group_max, reference, topk
from fastsae_kernels.selection import _topk

CASES = cases()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow_interpreted
def test_exact_on_hard_inputs(name, device, impl, poison):
    # 2 is less than the 3 groups there are, so groups are selected too.
    sizes = (2,) if impl == "triton" and device.type == "cpu" else (-1, 0, 1, 2, 9, 74, 75, 200)
    for k in sizes:
        assert_topk(CASES[name].to(device), k)


@pytest.mark.parametrize("k", [0, 1, 31, 32, 33, 75, 80])
@pytest.mark.slow_interpreted
def test_exact_for_any_k(k, device, impl, poison):
    assert_topk(CASES["nan_and_ties"].to(device), k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["random", "few_values", "denormal"])
@pytest.mark.slow_interpreted
def test_exact_in_every_dtype(name, dtype, device, impl, poison):
    if dtype == torch.float64 and impl == "triton":
        pytest.skip("the kernels compute in float32")
    assert_topk(CASES[name].to(dtype).to(device), 12)


@pytest.mark.parametrize("shape", [(1, 1), (2, 31), (2, 96), (1, 33_000)], ids=str)
def test_exact_at_odd_shapes(shape, device, impl, poison):
    pre = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert_topk(pre.to(device), min(shape[1], 70))


@pytest.mark.parametrize("shape", [(0, 40), (5, 0)])
def test_nothing_to_select_from(shape, device, impl):
    csr = topk(torch.zeros(shape, device=device), 3)
    assert len(csr.values) == 0 and csr.offsets.tolist() == [0] * (shape[0] + 1)


def test_gradient_reaches_the_selected_entries_alone(device, impl, poison):
    pre = CASES["few_values"].to(device, copy=True).requires_grad_()
    topk(pre, 10).dense(pre.shape[1]).square().sum().backward()
    detached = pre.detach().cpu()
    assert torch.equal(pre.grad.cpu(), 2 * detached * reference.topk_mask(detached, 10))


def test_gradcheck():
    pre = torch.randn(4, 37, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda pre: topk(pre, 6).dense(37), (pre,))


@pytest.mark.slow_interpreted
def test_opcheck(device, impl):
    pre = CASES["random"].to(device, copy=True).requires_grad_()
    torch.library.opcheck(_topk, (pre, group_max(pre).values, 5))


@pytest.mark.slow_interpreted
def test_compiles_whole_for_any_number_of_tokens(device, impl):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(
        lambda pre: topk(pre, 5).dense(pre.shape[1]), fullgraph=True, dynamic=True, backend=counter
    )
    for B in (3, 5, 8):
        pre = torch.randn(B, 75, device=device, requires_grad=True)
        mask = reference.topk_mask(pre.detach().cpu(), 5)
        z = run(pre)
        assert torch.equal(z.cpu(), pre.detach().cpu() * mask)
        z.sum().backward()
        assert torch.equal(pre.grad.cpu(), mask.float())
    assert counter.frame_count == 1


@pytest.mark.slow_interpreted
def test_runs_are_bitwise_equal(device, impl):
    pre = torch.randn(4, 640, generator=torch.Generator().manual_seed(1)).bfloat16().to(device)
    runs = [topk(pre, 20) for _ in range(3 if device.type == "cpu" else 100)]
    assert all(torch.equal(a, b) for run in runs for a, b in zip(runs[0], run, strict=True))


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match=r"\[tokens, latents\]"):
        topk(torch.zeros(2, 3, 4), 1)


@pytest.mark.gpu
def test_exact_at_the_recipe_size():
    for k in (1, 64, 1000):
        assert_topk(torch.randn(1024, 24576, device="cuda"), k)
