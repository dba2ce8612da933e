"""The planner: its memory is what a step really allocates, and its times are what the arithmetic says."""

import subprocess
import sys

import pytest
import torch

import fastsae
from fastsae import plan
from fastsae.step import STEPS
from fastsae_kernels import MatrixState

RECIPE = (1024, 1536, 24576, 64)


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
    step = STEPS["fused"](sae, fastsae.TrainConfig(d_sae=F, k=4, precision=precision, device="cpu"))
    step(torch.randn(16, D))
    assert held_bytes(step) == plan.state_bytes(D, F, copy=precision == "bf16")


def test_quantized_moments_are_counted():
    D, F = 48, 320
    rows = MatrixState.start(torch.randn(F, D), copy_dtype=torch.bfloat16, quantized_moments=True)
    one = sum(t.numel() * t.element_size() for t in rows if t is not None)
    assert plan.state_bytes(D, F, quantized=True) == 2 * one + 12 * (F + D) + 8 * F


def test_the_largest_dictionary_fits_and_the_next_does_not():
    B, D, _, k = RECIPE
    options = {"pool_tokens": 262_144, "dead_share": 0.38}
    largest = plan.largest_F(20, B, D, k, **options)
    assert largest % 1024 == 0
    assert plan.run_bytes(B, D, largest, k, **options) <= 20 * plan.GIB
    assert plan.run_bytes(B, D, largest + 1024, k, **options) > 20 * plan.GIB
    assert plan.largest_F(0.1, B, D, k, **options) == 0


def test_the_roofline_at_the_recipes_shape():
    """By hand: 77.3 GFLOP at 790 TFLOP/s; 75.5M weights of 26 bytes at 4.3 TB/s, 403 MB gathered at 5.5."""
    h200 = next(d for d in plan.DEVICES if d.name == "H200")
    stages = plan.stage_seconds(*RECIPE, h200)
    assert stages["encode"] == pytest.approx(98e-6, rel=0.01)
    assert stages["decode"] == pytest.approx(36.6e-6 + 4.4e-6, rel=0.01)
    assert stages["update"] == pytest.approx(456.5e-6 + 73.2e-6, rel=0.01)
    assert stages["selection"] == pytest.approx(39.6e-6, rel=0.02)
    assert plan.step_seconds(*RECIPE, h200) == pytest.approx(sum(stages.values()))
    assert plan.stage_seconds(*RECIPE, h200, quantized=True)["update"] < 0.7 * stages["update"]


def test_a_larger_size_never_takes_less():
    device = plan.DEVICES[0]
    for position in range(4):
        larger = list(RECIPE)
        larger[position] *= 2
        assert plan.step_seconds(*larger, device) > plan.step_seconds(*RECIPE, device)


def test_the_command_says_that_times_are_predicted(capsys):
    plan.main(["--d-sae", "131072", "--k", "128", "--gib", "22", "--price", "2"])
    printed = capsys.readouterr().out
    assert "F=131,072" in printed and "PREDICTED" in printed and "assumed" in printed
    assert "22 GiB: largest F" in printed
    assert all(device.name in printed for device in plan.DEVICES)
    with pytest.raises(SystemExit):
        plan.main(["--k", "0"])
    assert "--k must be positive" in capsys.readouterr().err


def test_the_planner_needs_the_standard_library_alone():
    code = (
        "import sys, fastsae.plan; print(sorted(m for m in ('torch', 'numpy') if m in sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr
