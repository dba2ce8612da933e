import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsae_kernels.update.state import (
    MatrixState,
    decode_moment,
    encode_moment_,
    join_master,
    split_master,
)


def bits(values):
    return torch.tensor(values, dtype=torch.int64).to(torch.int32).view(torch.float32)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
def test_split_master_is_exact_for_every_number(patterns):
    master = bits(patterns)
    weight, remainder = split_master(master)
    joined = join_master(weight, remainder)
    finite = ~master.isnan()
    assert torch.equal(joined[finite].view(torch.int32), master[finite].view(torch.int32))
    assert torch.equal(joined.isnan(), master.isnan())
    assert torch.equal(weight.isnan(), master.isnan())


def test_split_rounds_to_the_nearest_with_ties_away_from_zero():
    halves = torch.arange(0x3F80, 0x4080) << 16  # 1 to 4, in steps of a bfloat16
    masters = torch.stack([halves + d for d in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]).int()
    weight, _ = split_master(masters.view(torch.float32))
    up = torch.tensor([0, 0, 0, 1, 1, 1])[:, None]
    assert torch.equal(weight.view(torch.int16).int(), (halves >> 16).int() + up.int())
    negative, _ = split_master(-masters.view(torch.float32))
    assert torch.equal(negative, -weight)


def test_split_of_special_values():
    inf, largest, smallest = float("inf"), 3.4028235e38, 1e-45
    master = torch.tensor([0.0, -0.0, inf, -inf, largest, -largest, smallest, -smallest])
    weight, remainder = split_master(master)
    assert torch.equal(join_master(weight, remainder).view(torch.int32), master.view(torch.int32))
    # The largest numbers round to infinity, as in any conversion to bfloat16.
    assert weight.tolist() == [0.0, 0.0, inf, -inf, inf, -inf, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_moments_round_without_bias_to_a_neighbouring_code(dtype):
    torch.manual_seed(0)
    # Magnitudes over ten binades, within the range of both codes.
    row = torch.exp2(-10 * torch.rand(64)) * (torch.randn(64).sign() if dtype == torch.int8 else 1)
    rows = row.expand(4000, -1)
    code, scale = torch.zeros(rows.shape, dtype=dtype), torch.zeros(len(rows))
    encode_moment_(code, scale, rows, 0, torch.tensor(7))
    decoded = decode_moment(code, scale)
    ratio = decoded / rows
    assert ratio.min() > 2 ** (-1 / 8) - 1e-5 and ratio.max() < 2 ** (1 / 8) + 1e-5
    # 4000 draws of a two-point distribution at most 9 % wide: its mean is known to 0.1 %.
    assert (ratio.mean(0) - 1).abs().max() < 4 * 0.09 / 2 / 4000**0.5


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_every_code_is_what_its_number_is_stored_as(dtype):
    codes = torch.arange(-127 if dtype == torch.int8 else 0, torch.iinfo(dtype).max + 1)[None]
    row = decode_moment(codes.to(dtype), torch.tensor([3e-7]))
    assert row.double().abs().log2().diff()[:, 1:120].abs().sub(1 / 8).abs().max() < 1e-5
    for step in range(100):
        code, scale = torch.zeros_like(row, dtype=dtype), torch.zeros(1)
        encode_moment_(code, scale, row, 5, torch.tensor(step))
        assert 0 <= scale / 3e-7 - 1 < 2**-19
        # The scale is a millionth above the largest, and so each a little below its code.
        assert (code != codes).sum() <= 1 and (code.int() - codes).abs().max() <= 1


def test_tiny_second_moments_are_never_zero_and_zeros_stay():
    v = torch.tensor([[1.0, 1e-30, 0.0]])
    code, scale = torch.zeros(1, 3, dtype=torch.uint8), torch.zeros(1)
    encode_moment_(code, scale, v, 0, torch.tensor(1))
    assert code.tolist() == [[255, 1, 0]]
    encode_moment_(code, scale, torch.zeros(1, 3), 0, torch.tensor(1))
    assert not code.any() and not decode_moment(code, scale).any()


def test_random_bits_change_with_step_row_and_moment():
    x = torch.rand(2, 4096) + 0.5

    def codes(step, first_row=0, dtype=torch.uint8):
        code, scale = torch.zeros(x.shape, dtype=dtype), torch.zeros(2)
        encode_moment_(code, scale, x, first_row, torch.tensor(step))
        return code.int() - torch.iinfo(dtype).max

    base = codes(1)
    assert torch.equal(base, codes(1))
    for other in (codes(2), codes(1, first_row=1), codes(1, dtype=torch.int8)):
        assert 0.05 < (base != other).float().mean() < 0.6


def test_start_takes_the_master_in_place_or_splits_it():
    master = torch.randn(3, 5)
    plain = MatrixState.start(master)
    assert plain.weight is master and plain.master() is master
    split = MatrixState.start(master, split=True, quantized_moments=True)
    assert torch.equal(split.master(), master) and split.weight.dtype == torch.bfloat16
    assert all(not moment.any() for moment in split.moments())
    with pytest.raises(ValueError, match=r"expected float32, got torch.float64"):
        MatrixState.start(master.double(), split=True)
