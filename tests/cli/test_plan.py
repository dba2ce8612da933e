"""The planner: its memory is what a step really allocates, and its times are what the arithmetic says."""

import pytest
import torch

import fastsae
from fastsae.cli import main, plan
from fastsae.training.update import UPDATES
from fastsae_kernels import MatrixState

RECIPE = (1024, 1536, 24576, 64)
RATES = plan.Rates(flops=790e12, bandwidth=4.3e12)


def step_seconds(*shape: float) -> float:
    return sum(plan.stage_seconds(*shape, RATES).values())


def held_bytes(step) -> int:
    """Bytes of the tensors that a fused step keeps, each storage once."""
    tensors = [t for t in step.state_dict().values() if t.ndim]
    tensors += [rows.copy for rows in step._rows.values() if rows.copy is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_state_is_what_a_step_allocates(precision):
    D, F = 48, 320
    sae = fastsae.SAE(D, F, 4)
    sae.precision = precision
    step = UPDATES["fused"](
        sae, fastsae.TrainConfig(d_sae=F, k=4, precision=precision, device="cpu")
    )
    step(torch.randn(16, D))
    assert held_bytes(step) == plan.state_bytes(D, F, copy=precision == "bf16")


def test_quantized_moments_are_counted():
    D, F = 48, 320
    rows = MatrixState.start(torch.randn(F, D), copy_dtype=torch.bfloat16, quantized_moments=True)
    one = sum(t.numel() * t.element_size() for t in rows if t is not None)
    assert plan.state_bytes(D, F, quantized=True) == 2 * one + 12 * (F + D) + 8 * F


def test_levels_are_counted(capsys):
    B, D, F, k = RECIPE
    more = plan.step_bytes(B, D, F, k, levels=3) - plan.step_bytes(B, D, F, k)
    assert more == 2 * 4 * 4 * B * D
    plain, nested = (
        printed(capsys, *flags) for flags in ((), ("--matryoshka", "2048", "8192", "24576"))
    )
    assert plain != nested and len(plain) == len(nested)
    assert main(["plan", "--matryoshka", "2048", "8192"]) == 2


def test_the_largest_dictionary_fits_and_the_next_does_not():
    B, D, _, k = RECIPE
    options = {"pool_tokens": 262_144, "dead_share": 0.38}
    largest = plan.largest_F(20, B, D, k, **options)
    assert largest % 1024 == 0
    assert plan.run_bytes(B, D, largest, k, **options) <= 20 * plan.GIB
    assert plan.run_bytes(B, D, largest + 1024, k, **options) > 20 * plan.GIB
    assert plan.largest_F(0.1, B, D, k, **options) == 0


def test_the_roofline_at_the_recipes_shape():
    """By hand: 77.3 GFLOP at 790 TFLOP/s; 75.5M weights of 26 bytes and 403 MB gathered at 4.3 TB/s."""
    stages = plan.stage_seconds(*RECIPE, RATES)
    assert stages["encode"] == pytest.approx(98e-6, rel=0.01)
    assert stages["decode"] == pytest.approx(46.8e-6 + 4.4e-6, rel=0.01)
    assert stages["update"] == pytest.approx(456.5e-6 + 93.6e-6, rel=0.01)
    assert stages["selection"] == pytest.approx(39.6e-6, rel=0.02)
    assert plan.stage_seconds(*RECIPE, RATES, quantized=True)["update"] < 0.7 * stages["update"]


def test_a_larger_size_never_takes_less():
    for position in range(4):
        larger = list(RECIPE)
        larger[position] *= 2
        assert step_seconds(*larger) > step_seconds(*RECIPE)


def test_the_defaults_are_the_recipes():
    options, recipe = plan.PlanOptions(), fastsae.TrainConfig()
    assert (options.batch_size, options.d_in, options.d_sae, options.k) == RECIPE
    assert options.tokens == recipe.tokens and options.pool_tokens == recipe.pool_tokens


def printed(capsys, *flags: str) -> str:
    assert main(["plan", *flags]) == 0
    return capsys.readouterr().out


def test_no_time_is_said_without_rates(capsys):
    said = printed(capsys, "--d-sae", "131072", "--k", "128", "--gib", "22")
    assert "131,072 latents" in said and "counted" in said
    assert "fits in 22 GiB" in said and "the largest dictionary there is" in said
    assert "predicted at" not in said and " ms" not in said and "USD" not in said
    assert "does not fit in 22 GiB" in printed(capsys, "--d-sae", "524288", "--gib", "22")


def test_times_follow_from_the_rates_given(capsys):
    rates = ("--tflops", "790", "--bandwidth", "4.3")
    alone = printed(capsys, *rates)
    assert "predicted at 790 TFLOP/s and 4.3 TB/s" in alone and "the SAE alone" in alone
    step = step_seconds(*RECIPE)
    assert f"{1e3 * step:.3f} ms" in alone and "USD" not in alone
    both = printed(capsys, *rates, "--harvest-tokens-per-second", "5e4", "--usd-per-hour", "2")
    hours = 97_657 * (step + 1024 / 5e4) / 3600  # steps of 1,024 tokens for 100M
    assert f"{hours:.2f} h" in both and f"{2 * hours:.2f} USD" in both
    assert "the SAE alone" not in both


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--k", "0"), "k must be"),
        (("--k", "inf"), "k must be"),
        (("--d-in", "0"), "d_in must be"),
        (("--gib", "-1"), "gib must be"),
        (("--dead-share", "2"), "dead_share"),
        (("--tflops", "100"), "both --tflops and --bandwidth"),
        (("--usd-per-hour", "2"), "give --tflops and --bandwidth too"),
        (("--precision", "fp8"), "fp8"),
    ],
)
def test_impossible_plans(capsys, flags, said):
    assert main(["plan", *flags]) == 2
    assert said in capsys.readouterr().err
