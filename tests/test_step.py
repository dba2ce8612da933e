"""The training step against the definition, and the counters it keeps."""

import dataclasses

import pytest
import torch

import fastsae
from fastsae.step import STEPS, TrainStep
from fastsae_kernels import reference as ref

F64 = torch.float64
CONFIG = fastsae.TrainConfig(
    d_sae=40, k=2.5, lr=0.01, k_aux=3, dead_after_tokens=50, normalize="none", device="cpu"
)


@pytest.fixture(params=["fused", "autograd"])
def way(request: pytest.FixtureRequest) -> str:
    return request.param


def new_step(way: str, config: fastsae.TrainConfig = CONFIG, dtype: torch.dtype = F64) -> TrainStep:
    g = torch.Generator().manual_seed(0)
    sae = fastsae.SAE(6, 40, config.k, normalize=config.normalize, dtype=dtype, generator=g)
    with torch.no_grad():
        sae.b_dec.copy_(torch.randn(6, generator=g))
    return STEPS[way](sae, config)


def batches(n: int, dtype: torch.dtype = F64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(16, 6, dtype=dtype, generator=g) * 2 + 1 for _ in range(n)]


@pytest.mark.parametrize("normalization", ["residual_variance", "total_variance", "none"])
def test_many_steps_are_the_definition(way: str, normalization: str) -> None:
    config = dataclasses.replace(CONFIG, aux_normalization=normalization)
    step = new_step(way, config)
    state = ref.initial_state(step.sae.W_dec.detach().clone(), step.sae.b_dec.detach().clone())
    settings = ref.Settings(
        k=2.5, k_aux=3, lr=0.01, dead_after_tokens=50, aux_normalization=normalization
    )
    aux_seen = 0
    for x in batches(1000):
        loss = step(x)
        expected = ref.train_step(state, x, settings)
        state = expected.state
        torch.testing.assert_close(loss.loss, expected.loss, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(loss.aux, expected.aux, rtol=1e-8, atol=1e-12)
        aux_seen += bool(loss.aux > 0)
        assert loss.counts.equal(expected.mask.sum(0))
        for name, value in state.params._asdict().items():
            torch.testing.assert_close(
                getattr(step.sae, name).detach(), value, rtol=1e-9, atol=1e-9, msg=name
            )
        assert step.tokens_since_active.equal(state.tokens_since_active)
        torch.testing.assert_close(
            step.sae.activation.threshold.double(), state.threshold, rtol=1e-5, atol=0
        )
    assert aux_seen > 50


def test_decoder_rows_stay_on_the_sphere_in_fp32(way: str) -> None:
    step = new_step(way, dtype=torch.float32)
    for x in batches(60, torch.float32):
        step(x)
        assert (step.sae.W_dec.norm(dim=1) - 1).abs().max() < 2e-7  # two fp32 roundings of 1


def test_dead_is_as_it_stood_before_the_step(way: str) -> None:
    step = new_step(way)
    x = batches(1)[0]
    step.tokens_since_active[:] = 49
    assert not step.dead.any()
    assert step(x).aux == 0  # the counters pass 50 during this step; aux-k sees that in the next
    assert step.dead.any()
    assert step(x).aux > 0


def test_metrics_are_in_raw_units_and_touch_nothing(way: str) -> None:
    config = dataclasses.replace(CONFIG, normalize="scalar", aux_coefficient=0)
    step = new_step(way, config)
    step.sae.scale.fill_(0.25)
    x = batches(1)[0]
    loss = step(x)
    before = {name: tensor.clone() for name, tensor in step.state_dict().items()}
    metrics = step.metrics(x, loss)
    assert metrics["mse"] == pytest.approx(loss.mse.item() / 0.25**2, rel=1e-5)
    assert metrics["loss"] == pytest.approx(loss.mse.item(), rel=1e-6)
    assert metrics["l0"] == 2.5
    assert metrics["threshold"] == pytest.approx(
        float(step.sae.activation.threshold) / 0.25, rel=1e-6
    )
    variance = (x - x.mean(0)).square().sum()
    assert metrics["explained_variance"] == pytest.approx(
        1 - metrics["mse"] * x.numel() / float(variance), rel=1e-5
    )
    assert metrics["alive_fraction"] == (loss.counts > 0).double().mean().item()
    assert metrics["dead"] == 0
    assert all(tensor.equal(before[name]) for name, tensor in step.state_dict().items())


def test_latents_never_active_are_not_alive(way: str) -> None:
    step = new_step(way)
    for x in batches(3):
        last = step(x)
    metrics = step.metrics(x, last)
    assert 0 < metrics["alive_fraction"] < 1
    assert metrics["alive_fraction"] == (step.tokens_since_active < 48).double().mean().item()


def test_restored_state_continues_bit_for_bit(way: str) -> None:
    data = batches(30, torch.float32)
    whole = new_step(way, dtype=torch.float32)
    for x in data[:20]:
        whole(x)
    saved = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    resumed = new_step(way, dtype=torch.float32)
    resumed.load_state_dict(saved)
    for x in data[20:]:
        a, b = whole(x), resumed(x)
        assert a.loss.equal(b.loss)
    for name, tensor in whole.state_dict().items():
        assert tensor.equal(resumed.state_dict()[name]), name


def test_state_of_another_size_is_refused(way: str) -> None:
    step = new_step(way)
    state = dict(step.state_dict())
    state["sae.b_enc"] = torch.zeros(41)
    with pytest.raises(RuntimeError, match="b_enc"):
        step.load_state_dict(state)
