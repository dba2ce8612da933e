"""What stands between the sparse operations of a step, against its definition."""

import pytest
import torch
from tolerances import HALF_UNIT, THRESHOLD_AVERAGE, summation_bound

from fastsae_kernels import reference
from fastsae_kernels.sparse_decoder import nested_gradient
from fastsae_kernels.step import (
    centred_input,
    output_gradient,
    step_objective,
    track_selection_,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [None, 0.37])
def test_input_is_scaled_centred_and_rounded(scale, given, dtype, device, impl, poison):
    x, b_dec = randn(3, 21).to(given).to(device), randn(21, seed=1).to(device)
    constant = None if scale is None else torch.tensor(scale, device=device)
    scaled, centred, operand = centred_input(x, constant, b_dec, dtype)
    expected = x.float() if scale is None else x.float() * constant
    assert scaled.equal(expected)
    assert centred.equal((expected - b_dec).to(dtype))
    assert operand.equal(expected.to(dtype))
    # No copy of what is there.
    assert (scaled is x) == (scale is None and given == torch.float32)
    assert (operand is scaled) == (dtype == torch.float32)
    assert (operand is x) == (scale is None and given == dtype)


def test_any_rows_are_read_and_others_refused(device, impl):
    x, b_dec = randn(20, 6).to(device), randn(20, seed=1).to(device)
    assert centred_input(x.T, None, b_dec, torch.float32).centred.equal(x.T - b_dec)
    assert centred_input(x.T[:0], None, b_dec, torch.bfloat16).operand.shape == (0, 20)
    with pytest.raises(ValueError, match=r"expected x \[B, 20\]"):
        centred_input(x, None, b_dec, torch.float32)


@pytest.mark.parametrize("kind", ["log", "plain"])
@pytest.mark.parametrize("tokens", [1, 37, 5000])
def test_objective_is_the_definition(tokens, kind, device, impl, poison):
    squares, aux = randn(2, tokens).square().to(device), torch.tensor(0.25, device=device)
    found = step_objective(squares, aux, 3.0, kind)
    error = squares.double().mean()
    bound = summation_bound(2 * tokens)
    assert abs(found.error - error) <= bound * error
    value = reference.objective(found.error.double(), aux.double(), 3.0, kind)
    torch.testing.assert_close(found.value.double(), value, rtol=1e-6, atol=1e-6)
    weight = reference.error_weight(found.error.double()) if kind == "log" else 1.0
    assert abs(found.weight - weight) <= 2 * HALF_UNIT[torch.float32] * weight


@pytest.mark.parametrize("kind", ["log", "plain"])
def test_an_error_of_zero_has_no_gradient(kind, device, impl):
    found = step_objective(torch.zeros(4, device=device), torch.zeros((), device=device), 1.0, kind)
    assert torch.stack(found).tolist() == [0, 0, 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("levels", [1, 3])
def test_gradient_of_the_output(levels, dtype, device, impl, poison):
    residual, weight = randn(levels, 3, 21).to(device), torch.tensor(0.7, device=device)
    found = output_gradient(residual, weight, dtype)
    assert found.equal((nested_gradient(residual) * weight).to(dtype))


def test_the_threshold_is_averaged_and_the_unused_are_counted(device, impl, poison):
    latents, tokens = 1030, 3
    threshold, updates = torch.zeros((), device=device), torch.zeros((), device=device).long()
    since = torch.arange(latents, device=device)
    expected, n, unused = torch.zeros((), dtype=torch.float64), 0, since.cpu()
    for i, smallest in enumerate([0.5, 0.25, torch.inf, 2.0]):
        counts = (randn(latents, seed=i) > 0).int() * 2
        offsets = torch.cat([torch.zeros(1), counts.cumsum(0)]).int().to(device)
        selected = torch.tensor([smallest] if smallest < torch.inf else [])
        expected, n = reference.update_threshold(expected, n, selected)
        unused = torch.where(counts > 0, 0, unused + tokens)
        smallest = torch.tensor(smallest, device=device)
        found = track_selection_(threshold, updates, since, smallest, offsets, tokens, 0.01)
        assert found.equal(counts.to(device)) and since.equal(unused.to(device))
        assert int(updates) == n
        assert abs(float(threshold) - expected) <= THRESHOLD_AVERAGE * expected


def test_a_rate_of_one_keeps_the_newest(device, impl):
    threshold, updates = torch.zeros((), device=device), torch.zeros((), device=device).long()
    nothing = torch.zeros(0, device=device).long(), torch.zeros(1, device=device).int()
    for value in (3.0, 5.0):
        smallest = torch.tensor(value, device=device)
        track_selection_(threshold, updates, nothing[0], smallest, nothing[1], 1, 1.0)
        assert threshold == value


def test_opcheck(device, impl):
    x, b_dec, one = randn(3, 16).to(device), randn(16).to(device), torch.ones((), device=device)
    operations = torch.ops.fastsae
    for scale, dtype in ((None, torch.float32), (one, torch.bfloat16)):
        torch.library.opcheck(operations.centred_input.default, (x, scale, b_dec, dtype))
    torch.library.opcheck(operations.step_objective.default, (x[:, 0].square(), one, 2.0, True))
    torch.library.opcheck(operations.output_gradient.default, (x[None], one, torch.bfloat16))
    since = torch.zeros(4, dtype=torch.int64, device=device)
    arguments = (
        one,
        since[0].clone(),
        since,
        one / 2,
        torch.arange(5, device=device).int(),
        3,
        0.01,
    )
    torch.library.opcheck(operations.track_selection_.default, arguments)
