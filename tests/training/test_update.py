"""The training step against the definition, and the counters it keeps."""

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Iterator

import pytest
import torch
from tolerances import FREE_STEPS

import fastsae
from fastsae.training.graphs import Graphs
from fastsae.training.schedule import k_at, lr_factor_at, quota_at
from fastsae.training.update import PARAMETERS, UPDATES, Update
from fastsae_kernels import reference as ref

F64 = torch.float64
CONFIG = fastsae.TrainConfig(
    d_sae=40, k=2.5, lr=0.01, k_aux=3, dead_after_tokens=50, normalize="none", device="cpu",
    lr_warmup_tokens=0, lr_decay_tokens=0, latent_quota=0.0,
)  # fmt: skip


LEVELS = (4, 15, 40)


@pytest.fixture(params=["fused", "autograd"])
def way(request: pytest.FixtureRequest) -> str:
    return request.param


def new_step(way: str, config: fastsae.TrainConfig = CONFIG, dtype: torch.dtype = F64) -> Update:
    g = torch.Generator().manual_seed(0)
    nested = {"training_architecture_details": {"matryoshka_widths": list(config.matryoshka)}}
    sae = fastsae.SAE(
        6, 40, config.k, normalize=config.normalize, metadata=nested, dtype=dtype, generator=g
    )
    with torch.no_grad():
        sae.b_dec.copy_(torch.randn(6, generator=g))
    return UPDATES[way](sae, config)


def batches(n: int, dtype: torch.dtype = F64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(16, 6, dtype=dtype, generator=g) * 2 + 1 for _ in range(n)]


@pytest.mark.parametrize(
    ("objective", "normalization", "quota", "levels"),
    [
        ("log", "residual_variance", 0, ()),
        ("log", "total_variance", 0, ()),
        ("log", "none", 0, ()),
        ("plain", "residual_variance", 0, ()),
        ("log", "residual_variance", 0.6, ()),  # of 40 entries, for 40 latents
        ("log", "residual_variance", 0, LEVELS),
        ("plain", "total_variance", 0.3, LEVELS),
    ],
)
@pytest.mark.parametrize(
    ("way", "steps"),
    [("fused", 100), ("autograd", 100), pytest.param("fused", 1000, marks=pytest.mark.slow)],
)
def test_many_steps_are_the_definition(
    way: str, objective: str, normalization: str, quota: float, levels: tuple[int, ...], steps: int
) -> None:
    config = dataclasses.replace(
        CONFIG, objective=objective, aux_normalization=normalization, latent_quota=quota,
        matryoshka=levels,
    )  # fmt: skip
    step = new_step(way, config)
    state = ref.initial_state(step.sae.W_dec.detach().clone(), step.sae.b_dec.detach().clone())
    settings = ref.Settings(
        k=2.5, k_aux=3, lr=0.01, dead_after_tokens=50, aux_normalization=normalization,
        aux_coefficient=config.aux_weight, objective=objective, quota=quota, levels=levels,
        betas=config.adam_betas, decoder_lr_ratio=config.decoder_lr_ratio,
    )  # fmt: skip
    aux_seen = 0
    for x in batches(steps):
        loss = step(x)
        expected = ref.train_step(state, x, settings)
        state = expected.state
        torch.testing.assert_close(loss.objective, expected.objective, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(loss.error, expected.error, rtol=1e-9, atol=1e-12)
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
    assert aux_seen > steps / 20


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
@pytest.mark.parametrize("clip", [None, 0.8])
@pytest.mark.parametrize("levels", [(40,), (8, 40)], ids=["flat", "nested"])
def test_many_steps_of_a_transcoder_are_the_definition(
    way: str, skip: bool, clip: float | None, levels: tuple[int, ...]
) -> None:
    config = dataclasses.replace(CONFIG, hook="mlp_in", target="mlp_out", skip=skip, clip_norm=clip)
    g = torch.Generator().manual_seed(0)
    nested = {"training_architecture_details": {"matryoshka_widths": levels}}
    sae = fastsae.Transcoder(6, 5, 40, 2.5, skip=skip, dtype=F64, generator=g, metadata=nested)
    step = UPDATES[way](sae, config)
    own = (getattr(sae, name).detach().clone() for name in ("W_dec", "b_dec", "W_enc"))
    state = ref.initial_state(*own, W_skip=torch.zeros(5, 6, dtype=F64) if skip else None)
    settings = ref.Settings(
        k=2.5, k_aux=3, lr=0.01, dead_after_tokens=50, aux_coefficient=config.aux_weight,
        max_gradient_norm=clip, levels=levels,
        betas=config.adam_betas, decoder_lr_ratio=config.decoder_lr_ratio,
    )  # fmt: skip
    aux_seen = 0
    for x in batches(60):
        target = (x @ torch.arange(30, dtype=F64).view(6, 5).sin()).abs() + 0.3
        found, expected = step(x, target), ref.train_step(state, x, settings, target=target)
        state = expected.state
        torch.testing.assert_close(found.objective, expected.objective, rtol=1e-9, atol=1e-12)
        aux_seen += bool(found.aux > 0)
        assert found.counts.equal(expected.mask.sum(0))
        for name, value in state.params._asdict().items():
            torch.testing.assert_close(
                getattr(sae, name).detach(), value, rtol=1e-9, atol=1e-9, msg=name
            )
    assert aux_seen > 5
    assert skip == ("W_skip" in step._moments())


def test_decoder_rows_stay_on_the_sphere_in_fp32(way: str) -> None:
    step = new_step(way, dtype=torch.float32)
    for x in batches(60, torch.float32):
        step(x)
        assert (step.sae.W_dec.norm(dim=1) - 1).abs().max() < 2e-7  # two fp32 roundings of 1


def test_split_masters_are_whole_outside_of_a_step() -> None:
    """Of bf16, where the SAE that was given holds none of their rows: asked for, saved and resumed they have
    all their bits."""

    def new(way: str = "fused") -> Update:
        sae = fastsae.SAE(6, 40, 2.5, generator=torch.Generator().manual_seed(0))
        sae.precision = "bf16"
        return UPDATES[way](sae, CONFIG)

    step, other, again = new(), new("autograd"), new()
    assert step.sae.W_dec.equal(other.sae.W_dec) and step.sae.W_enc.equal(other.sae.W_enc)
    for x in batches(20, torch.float32):
        step(x)
    sae, state = step.sae, {name: t.clone() for name, t in step.state_dict().items()}
    assert sae.W_dec.dtype == torch.float32 and not sae.W_dec.bfloat16().float().equal(sae.W_dec)
    for update in (other, again):
        update.load_state_dict(state)
        for name in PARAMETERS:
            assert getattr(update.sae, name).equal(getattr(sae, name)), name
    for x in batches(5, torch.float32):
        step(x)
        again(x)
    assert sae.W_dec.equal(state["sae.W_dec"]) and not step.sae.W_dec.equal(sae.W_dec)
    for (name, found), expected in zip(
        again.state_dict().items(), step.state_dict().values(), strict=True
    ):
        assert found.equal(expected), name


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
    assert metrics["mse"] == pytest.approx(loss.error.item() / 6 / 0.25**2, rel=1e-5)
    assert metrics["error"] == pytest.approx(loss.error.item(), rel=1e-6)
    assert metrics["objective"] == pytest.approx(math.log(loss.error.item()), rel=1e-6)
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


@pytest.mark.parametrize("normalize", ["scalar", "layer_norm"])
def test_metrics_have_each_level_in_raw_units(way: str, normalize: str) -> None:
    config = dataclasses.replace(CONFIG, normalize=normalize, aux_coefficient=0, matryoshka=LEVELS)
    step = new_step(way, config)
    step.sae.scale.fill_(0.25 if normalize == "scalar" else 1)
    x, sae = batches(1)[0], step.sae
    z = sae.eval().encode(x, "batch")
    x_hats = [
        sae.decode(z * (torch.arange(40) < m), sae.token_statistics(x)).detach() for m in LEVELS
    ]
    sae.train()
    result = step(x)
    metrics = step.metrics(x, result)
    for m, x_hat in zip(LEVELS, x_hats, strict=True):
        explained = float(ref.explained_variance(x, x_hat))
        assert metrics[f"explained_variance_{m}"] == pytest.approx(explained, rel=1e-4)
        assert metrics[f"mse_{m}"] == pytest.approx(float((x - x_hat).square().mean()), rel=1e-5)
    assert metrics["explained_variance"] == metrics["explained_variance_40"]
    levels = result.residuals.square().sum(2).mean(1)
    assert metrics["objective"] == pytest.approx(float(levels.mean().log()), rel=1e-6)


def test_one_level_is_the_plain_step_bit_for_bit(way: str) -> None:
    plain = new_step(way, dtype=torch.float32)
    nested = new_step(way, dataclasses.replace(CONFIG, matryoshka=(40,)), torch.float32)
    for x in batches(30, torch.float32):
        assert plain(x).objective.equal(nested(x).objective)
    for name, tensor in plain.state_dict().items():
        assert tensor.equal(nested.state_dict()[name]), name


def test_latents_never_active_are_not_alive(way: str) -> None:
    step = new_step(way)
    for x in batches(3):
        last = step(x)
    metrics = step.metrics(x, last)
    assert 0 < metrics["alive_fraction"] < 1
    assert metrics["alive_window_tokens"] == 48
    assert metrics["alive_fraction"] == (step.tokens_since_active < 48).double().mean().item()


@pytest.mark.parametrize(("quota", "levels"), [(0, ()), (0.5, ()), (0.5, LEVELS)])
def test_restored_state_continues_bit_for_bit(
    way: str, quota: float, levels: tuple[int, ...]
) -> None:
    config = dataclasses.replace(
        CONFIG, latent_quota=quota, latent_quota_until=0.8, tokens=30 * 16, matryoshka=levels
    )  # it ends after the restart
    data = batches(30, torch.float32)
    whole = new_step(way, config, torch.float32)
    for x in data[:20]:
        whole(x)
    saved = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    resumed = new_step(way, config, torch.float32)
    resumed.load_state_dict(saved)
    for x in data[20:]:
        a, b = whole(x), resumed(x)
        assert a.objective.equal(b.objective)
    for name, tensor in whole.state_dict().items():
        assert tensor.equal(resumed.state_dict()[name]), name


def test_state_of_another_size_is_refused(way: str) -> None:
    step = new_step(way)
    state = dict(step.state_dict())
    state["sae.b_enc"] = torch.zeros(41)
    with pytest.raises(RuntimeError, match="b_enc"):
        step.load_state_dict(state)


@pytest.mark.parametrize("levels", [(), LEVELS])
def test_schedules_and_clipping_are_the_definition(way: str, levels: tuple[int, ...]) -> None:
    config = dataclasses.replace(
        CONFIG, tokens=200 * 16, lr_warmup_tokens=30 * 16, lr_decay_tokens=50 * 16,
        k_initial=9.5, k_anneal_tokens=100 * 16, clip_norm=2.4, latent_quota=0.3,
        latent_quota_until=0.75, matryoshka=levels,
    )  # fmt: skip
    step = new_step(way, config)
    state = ref.initial_state(step.sae.W_dec.detach().clone(), step.sae.b_dec.detach().clone())
    unclipped, quotas = 0, []
    for x in batches(200):
        quotas.append(quota_at(config, step.tokens_seen))
        settings = ref.Settings(
            k=k_at(config, step.tokens_seen), k_aux=3,
            lr=step.peak_lr * lr_factor_at(config, step.tokens_seen, 16),
            dead_after_tokens=50, max_gradient_norm=config.clip_norm, aux_coefficient=config.aux_weight,
            quota=quotas[-1], levels=levels,
            betas=config.adam_betas, decoder_lr_ratio=config.decoder_lr_ratio,
        )  # fmt: skip
        selected = step(x).counts.sum()
        expected = ref.train_step(state, x, settings)
        loose = ref.train_step(state, x, dataclasses.replace(settings, max_gradient_norm=None))
        unclipped += bool((loose.state.params.b_dec - expected.state.params.b_dec).abs().max() == 0)
        state = expected.state
        if quotas[-1] and not quota_at(config, step.tokens_seen):
            state = dataclasses.replace(
                state, threshold_updates=0
            )  # what was tracked beside peaks is not meant
        assert selected == expected.mask.sum()
        for name, value in state.params._asdict().items():
            torch.testing.assert_close(
                getattr(step.sae, name).detach(), value, rtol=1e-9, atol=1e-9, msg=name
            )
        torch.testing.assert_close(
            step.sae.activation.threshold.double(), state.threshold, rtol=1e-5, atol=0
        )
    assert 0 < unclipped < 200, "both sides of the clip were meant to be seen"
    assert quotas == [0.3] * 150 + [0] * 50
    assert step.metrics(x, step(x))["lr"] == 0  # the run is over
    assert step.activation.k == 2.5


def test_a_quota_uses_every_latent_until_its_share_of_the_run(way: str) -> None:
    config = dataclasses.replace(CONFIG, tokens=10 * 16, latent_quota=1.0, latent_quota_until=0.55)
    step = new_step(way, config)
    sae, all_used = step.sae, []
    for x in batches(10):
        pre = ref.pre_activations(x, sae.W_enc, sae.b_enc, sae.b_dec)
        all_used.append((step(x).counts > 0).equal((pre > 0).any(0)))
    assert all_used == [True] * 6 + [False] * 4


def test_eight_bit_moments_take_the_first_step_exactly_and_the_others_closely() -> None:
    # At a larger rate the two soon select otherwise, and what they come to has little to do with moments.
    config = dataclasses.replace(CONFIG, lr=1e-3)
    whole = new_step("fused", config, torch.float32)
    small = new_step("fused", dataclasses.replace(config, moments="8bit"), torch.float32)
    start = whole.sae.W_dec.detach().clone()
    data = batches(40, torch.float32)
    whole(data[0]), small(data[0])
    # The first update is that of exact moments, which are rounded when they are stored.
    assert small.sae.W_dec.equal(whole.sae.W_dec)
    for x in data[1:]:
        whole(x), small(x)
    moved = (whole.sae.W_dec - start).norm()
    apart = (whole.sae.W_dec - small.sae.W_dec).norm()
    assert 0 < apart < 0.1 * moved  # codes 9 % apart, rounded at random


def test_eight_bit_moments_are_saved_and_restored_bit_for_bit() -> None:
    config = dataclasses.replace(CONFIG, moments="8bit", matryoshka=LEVELS)
    data = batches(20, torch.float32)
    whole = new_step("fused", config, torch.float32)
    for x in data[:10]:
        whole(x)
    saved = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    assert saved["adam.W_dec.m"].dtype == torch.int8 and saved["adam.W_dec.v"].dtype == torch.uint8
    assert saved["adam.W_enc.v_scale"].shape == (40,)
    resumed = new_step("fused", config, torch.float32)
    resumed.load_state_dict(saved)
    for x in data[10:]:
        whole(x), resumed(x)
    for name, tensor in whole.state_dict().items():
        assert tensor.equal(resumed.state_dict()[name]), name


def test_the_two_ways_exchange_their_states() -> None:
    data = batches(12)
    for first, second in (("fused", "autograd"), ("autograd", "fused")):
        whole, change = new_step(first), new_step(second)
        for x in data[:6]:
            whole(x)
        change.load_state_dict(
            {name: tensor.clone() for name, tensor in whole.state_dict().items()}
        )
        for x in data[6:]:
            whole(x), change(x)
        for name in PARAMETERS:
            torch.testing.assert_close(
                getattr(whole.sae, name), getattr(change.sae, name), rtol=1e-10, atol=1e-12
            )


class Recorder:
    """Stands in for CUDA's graphs: capturing runs the function, replaying runs it again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        recorder = self
        self.captures = 0

        class Graph:
            def replay(self) -> None:
                recorder.replayed.append(self)

            def pool(self) -> str:
                return "the pool"

        class Capture:
            def __init__(self, graph: Graph, pool: str | None, capture_error_mode: str) -> None:
                recorder.pools.append(pool)

            def __enter__(self) -> None:
                recorder.captures += 1

            def __exit__(self, *_: object) -> None: ...

        self.replayed: list[Graph] = []
        self.pools: list[str | None] = []
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", Capture)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(Graphs, "CALLS_APART", 0)


def test_a_fused_step_calls_its_operations_directly(monkeypatch) -> None:
    """torch's library takes longer than a kernel's launch."""
    asked, real = [], torch.library.CustomOpDef.__call__
    monkeypatch.setattr(
        torch.library.CustomOpDef,
        "__call__",
        lambda op, *args: (asked.append(op), real(op, *args))[1],
    )
    for way in UPDATES:
        step = new_step(way)
        for x in batches(10):
            step(x)
        assert bool(asked) == (way == "autograd")


def test_graphs_are_captured_once_for_each_shape_and_argument(monkeypatch) -> None:
    recorder = Recorder(monkeypatch)
    calls: list[tuple[torch.Tensor, int]] = []
    graphs = Graphs(lambda x, n: calls.append((x, n)) or f"result {n}")
    x = torch.arange(3.0)
    for _ in range(graphs.EAGER_CALLS):
        assert graphs(x, 1) == "result 1"
    static = calls[0][0]
    assert recorder.captures == 0 and all(seen is static for seen, _ in calls)
    for i in range(4):
        assert graphs(x + i, 1) == "result 1"
    assert recorder.captures == 1 and len(recorder.replayed) == 4 and calls[-1][0] is static
    assert static is not x and static.equal(x + 3), "each batch is copied to where the graph reads"
    for _ in range(graphs.EAGER_CALLS + 1):
        graphs(x, 2)
    assert recorder.captures == 2 and recorder.pools == [None, "the pool"]
    graphs(x[:2], 1)
    assert recorder.captures == 2, "another shape begins eagerly"
    monkeypatch.setattr(Graphs, "CALLS_APART", 30)
    for n in (3, 4):
        for _ in range(15):
            graphs(x, n)
    assert recorder.captures == 3, "captures are not close to each other"
    for _ in range(10):
        graphs(x, 4)
    assert recorder.captures == 4


def test_no_graph_is_captured_while_k_is_annealed(monkeypatch) -> None:
    recorder = Recorder(monkeypatch)
    config = dataclasses.replace(
        CONFIG, k_initial=10, k_anneal_tokens=16 * 40, tokens=16 * 60, aux_coefficient=0
    )
    step = new_step("fused", config)
    step._graphs = Graphs(step._on_device)
    for i, x in enumerate(batches(60)):
        step(x)
        assert recorder.captures == (i >= 40 + Graphs.EAGER_CALLS)
    assert len(step._graphs._calls) == 1


CUDA_CONFIG = dataclasses.replace(
    CONFIG, k=4, d_sae=256, dead_after_tokens=200, k_aux=8, device="cuda", cuda_graph=False
)


def cuda_step(config: fastsae.TrainConfig) -> Update:
    g = torch.Generator().manual_seed(0)
    sae = fastsae.SAE(64, 256, config.k, normalize="none", device="cuda", generator=g)
    sae.precision = "bf16"
    return UPDATES["fused"](sae, config)


def cuda_batches(n: int) -> list[torch.Tensor]:
    g = torch.Generator(device="cuda").manual_seed(1)
    return [torch.randn(32, 64, device="cuda", generator=g) for _ in range(n)]


@contextlib.contextmanager
def waiting(mode: str) -> Iterator[None]:
    """With torch told what to do where the host waits for the device; torch warns that it may overlook some."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode(mode)
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize(("clip_norm", "quota"), [(None, 0), (1.0, 0), (None, 0.5)])
def test_a_step_never_waits_for_the_device(clip_norm: float | None, quota: float) -> None:
    # The quota of half of 128 entries is less than the 256 latents.
    config = dataclasses.replace(CUDA_CONFIG, clip_norm=clip_norm, latent_quota=quota)
    step = cuda_step(config)
    data = cuda_batches(60)
    for x in data[:30]:  # until kernels are compiled, for several numbers of dead latents
        step(x)
    assert step.dead.any() or quota
    with waiting("error"):
        for x in data[30:]:
            step(x)


@pytest.mark.gpu
@pytest.mark.parametrize("quota", [0, 0.5])
def test_graphs_replay_the_same_bits(quota: float) -> None:
    config = dataclasses.replace(
        CUDA_CONFIG, latent_quota=quota, latent_quota_until=0.6, tokens=80 * 32
    )
    eager = cuda_step(config)
    graphed = cuda_step(dataclasses.replace(config, cuda_graph=True))
    for x in cuda_batches(80):
        a, b = eager(x), graphed(x)
        assert a.objective.equal(b.objective) and a.counts.equal(b.counts)
    assert eager.dead.any() or quota
    for name, tensor in eager.state_dict().items():
        assert tensor.equal(graphed.state_dict()[name]), name


def test_the_end_of_the_quota_is_another_graph(monkeypatch) -> None:
    recorder = Recorder(monkeypatch)
    config = dataclasses.replace(
        CONFIG, latent_quota=0.5, latent_quota_until=0.5, tokens=20 * 16, aux_coefficient=0
    )
    step = new_step("fused", config)
    step._graphs = Graphs(step._on_device)
    captures = []
    for x in batches(20):
        step(x)
        captures.append(recorder.captures)
    assert captures == [0] * 3 + [1] * 7 + [1] * 3 + [2] * 7


@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_steps_on_equally_many_threads_are_bitwise_equal(threads: int) -> None:
    """Blocks of latents and tokens that leave a rest, aux-k gathered, on the CPU's own products."""
    config = dataclasses.replace(CONFIG, d_sae=1100, k=8, k_aux=8)
    x = torch.randn(300, 48, generator=torch.Generator().manual_seed(2))
    before, states = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    try:
        for _ in range(2):
            sae = fastsae.SAE(48, 1100, 8, generator=torch.Generator().manual_seed(0))
            step = UPDATES["fused"](sae, config)
            step.tokens_since_active[:400] = 50
            for _ in range(3):
                result = step(x)
                assert result.aux > 0
                step.tokens_since_active[:400] = 50
            states.append(step.state_dict())
    finally:
        torch.set_num_threads(before)
    assert all(tensor.equal(states[1][name]) for name, tensor in states[0].items())


# In bf16 at 1e-3, a millionth more in the first batch moves the EV of either way by .004; here by .001.
@pytest.mark.parametrize(("precision", "lr"), [("fp32", 3e-3), ("bf16", 5e-4)])
@pytest.mark.slow
def test_a_thousand_free_steps_explain_as_much(precision: str, lr: float) -> None:
    """Single weights part, as two orders of summation do; what was learnt does not."""
    g = torch.Generator().manual_seed(4)
    directions = ref.normalize_rows(torch.randn(96, 24, generator=g))

    def batch(tokens: int) -> torch.Tensor:
        active = torch.rand(tokens, 96, generator=g) < 0.03
        return (torch.rand(tokens, 96, generator=g) * active) @ directions

    data, held_out = [batch(128) for _ in range(1000)], batch(4096)
    config = dataclasses.replace(CONFIG, d_sae=96, k=3, lr=lr, dead_after_tokens=12_800)
    found = []
    for way in ("fused", "autograd"):
        start = torch.Generator().manual_seed(0)
        sae = fastsae.SAE(24, 96, 3, normalize="none", generator=start)
        sae.precision = precision
        step = UPDATES[way](sae, config)
        for x in data:
            step(x)
        x_hat = step.sae.eval()(held_out, "batch").detach()
        found.append(float(ref.explained_variance(held_out, x_hat)))
    assert found[0] > 0.7  # that of 3 principal components is below 0.3
    assert found[0] == pytest.approx(found[1], abs=FREE_STEPS)
