"""The step on a dictionary in shards: that of the whole one, and the same bits on any number of processes."""

import dataclasses
import hashlib
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tolerances import SHARDS, SHARDS_FLOAT32

import fastsae
from fastsae.team import ALONE, Team
from fastsae.training.schedule import quota_at
from fastsae.training.sharded import ShardedUpdate
from fastsae.training.traffic import received_bytes
from fastsae.training.update import FusedUpdate, Update
from fastsae_kernels import use
from tests.processes import run_together

D, F, B = 12, 50, 36
CONFIG = fastsae.TrainConfig(
    d_sae=F, k=3, lr=3e-3, k_aux=5, dead_after_tokens=100, normalize="none", device="cpu", batch_size=B,
    lr_warmup_tokens=0,
)  # fmt: skip


def replaced(config: fastsae.TrainConfig, **changes: Any) -> fastsae.TrainConfig:
    return dataclasses.replace(config, **changes)


def new_sae(
    config: fastsae.TrainConfig, part: range | None, dtype: torch.dtype, width: int = D
) -> fastsae.SAE:
    assert config.d_sae is not None
    sae = fastsae.SAE(
        width, config.d_sae, config.k, part=part, normalize=config.normalize, dtype=dtype,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    sae.precision = "bf16" if config.precision == "bf16" else "fp32"
    with torch.no_grad():
        sae.b_dec.copy_(torch.linspace(-1, 1, width))
        if config.normalize == "scalar":
            sae.scale.fill_(0.3)
    return sae


def whole(config: fastsae.TrainConfig, dtype: torch.dtype) -> FusedUpdate:
    return FusedUpdate(new_sae(config, None, dtype), config)


def sharded(
    config: fastsae.TrainConfig, dtype: torch.dtype, team: Team = ALONE, width: int = D
) -> ShardedUpdate:
    assert config.d_sae is not None and config.latent_shards is not None
    hosted, count = team.hosted(config.latent_shards), config.latent_shards
    part = range(hosted.start * config.d_sae // count, hosted.stop * config.d_sae // count)
    return ShardedUpdate(new_sae(config, part, dtype, width), config, team, config.d_sae)


def batches(
    n: int, dtype: torch.dtype, rows: int = B, width: int = D, ties: bool = False
) -> list[torch.Tensor]:
    """Sparse sums of directions, so that latents live and die; with ``ties``, repeated tokens of few bits."""
    basis = torch.randn(3 * width, width, generator=torch.Generator().manual_seed(5))
    g = torch.Generator().manual_seed(1)
    found = []
    for _ in range(n):
        z = torch.rand(rows, 3 * width, generator=g)
        x = torch.where(z > 0.9, z, 0) @ basis + 0.5
        if ties:
            x = x.bfloat16().float()
            x[::3] = x[0]
        found.append(x.to(dtype))
    return found


def by_latent(update: Update) -> dict[str, torch.Tensor]:
    """Weights, moments and counters, those of the matrices by latent, whichever update it is."""
    state = dict(update.state_dict())
    if isinstance(update, ShardedUpdate):
        names = update.shard_state(next(iter(update.shards)))
        rows = {n: [state.pop(f"shard_{s:02}.{n}") for s in update.shards] for n in names}
        return {name: torch.cat(parts) for name, parts in rows.items()} | state
    for name in ("W_enc", "W_dec", "b_enc"):
        state[name] = state.pop(f"sae.{name}")
    for name in ("W_enc", *(f"adam.W_enc.{m}" for m in "mv")):
        state[name] = state[name].T if state[name].shape[0] == D else state[name]
    return state


def assert_close(sharded: ShardedUpdate, whole: FusedUpdate, tolerance: float) -> None:
    found, expected = by_latent(sharded), by_latent(whole)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if not value.is_floating_point():
            assert found[name].equal(value), name
        else:
            largest = value.abs().max().clamp_min(1e-300)
            assert (found[name] - value).abs().max() <= tolerance * largest, name


@pytest.mark.parametrize("steps", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_steps_are_those_of_the_whole_dictionary(steps: int) -> None:
    """With quota and decay, whose ends are within them; and with latents dead in many steps."""
    config = replaced(CONFIG, tokens=steps * B)
    all_ = whole(config, torch.float64)
    own = [sharded(replaced(config, latent_shards=s), torch.float64) for s in (2, 3, 5)]
    aux_seen = 0
    for x in batches(steps, torch.float64):
        expected = all_(x)
        found = [each(x) for each in own]
        for result in found:
            assert result.counts.equal(expected.counts)
            for a, b in zip(result[:4], expected[:4], strict=True):
                torch.testing.assert_close(a, b, rtol=SHARDS, atol=SHARDS)
        aux_seen += bool(expected.aux > 0)
    assert aux_seen > steps / 5
    for each, result in zip(own, found, strict=True):
        assert_close(each, all_, SHARDS)
        assert each.metrics(x, result) == pytest.approx(all_.metrics(x, expected), rel=SHARDS)
        fired = torch.arange(F)
        assert each.density_histogram(fired, 99) == all_.density_histogram(fired, 99)
        assert each.decoder_norm_error() < 1e-15


@pytest.mark.parametrize(
    "changes",
    [
        {"normalize": "scalar"},
        {"normalize": "layer_norm", "objective": "plain"},
        {"objective": "plain", "aux_normalization": "total_variance"},
        {"k_initial": 9.5, "k_anneal_tokens": 30 * B, "aux_normalization": "none"},
        {"latent_quota": 1.0, "latent_quota_until": 0.5, "tokens": 40 * B},
        {"aux_coefficient": 0.0, "latent_quota": 0.0},
        {"k_aux": 40, "d_sae": 49},
    ],
)
def test_every_setting_is_that_of_the_whole_dictionary(changes: dict[str, Any]) -> None:
    config = replaced(CONFIG, latent_shards=3, dead_after_tokens=100, **changes)
    own, all_ = sharded(config, torch.float64), whole(config, torch.float64)
    for update in (own, all_):
        update.mark_dead(torch.arange(len(all_.dead)) % 4 == 1)
    aux_seen = 0
    for x in batches(60, torch.float64):
        found = own(x)
        assert found.counts.equal(all_(x).counts)
        aux_seen += bool(found.aux > 0)
    assert aux_seen or config.aux_weight == 0
    assert_close(own, all_, SHARDS)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("moments", ["fp32", "8bit"])
def test_a_step_in_every_precision_is_that_of_the_whole_dictionary(
    precision: str, moments: str
) -> None:
    """With dead latents. Codes round at random, with the whole dictionary's random bits: few differ, by one."""
    config = replaced(CONFIG, latent_shards=3, precision=precision, moments=moments)
    own, all_ = sharded(config, torch.float32), whole(config, torch.float32)
    for update in (own, all_):
        update.mark_dead(torch.arange(F) % 4 == 1)
    (x,) = batches(1, torch.float32)
    found, expected = own(x), all_(x)
    assert found.aux > 0
    for a, b in zip(found[:4], expected[:4], strict=True):
        torch.testing.assert_close(a, b, rtol=SHARDS_FLOAT32, atol=SHARDS_FLOAT32)
    found, expected = by_latent(own), by_latent(all_)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value.dtype in (torch.int8, torch.uint8):
            assert (found[name].int() - value.int()).abs().max() <= 1, name
            assert (found[name] != value).float().mean() < 0.002, name
        else:
            torch.testing.assert_close(
                found[name], value, rtol=SHARDS_FLOAT32, atol=SHARDS_FLOAT32, msg=name
            )


@pytest.mark.parametrize("quota", [0.0, 0.2, 0.4])
def test_ties_fall_as_in_the_whole_dictionary(quota: float) -> None:
    """Twins in several shards, dead ones too, and repeated tokens, in numbers whose sums are exact."""
    config = replaced(CONFIG, latent_shards=4, latent_quota=quota, objective="plain")
    g = torch.Generator().manual_seed(2)
    kinds = torch.randint(0, 2, (9, 16), generator=g) / 2 - 0.25  # unit vectors
    rows = kinds[torch.randint(0, 9, (F,), generator=g)]
    x = torch.randint(-2, 3, (B, 16), generator=g).float()
    x[::3] = x[0]

    def start() -> fastsae.SAE:
        sae = fastsae.SAE(16, F, config.k)
        with torch.no_grad():
            sae.W_dec.copy_(rows)
            sae.W_enc.copy_(rows.T)
        return sae

    own = ShardedUpdate(start(), config, ALONE, F)
    all_ = FusedUpdate(start(), config)
    for update in (own, all_):
        update.mark_dead(torch.arange(F) % 2 == 1)
    found, expected = own(x), all_(x)
    assert found.aux > 0 and (expected.counts > 1).any()
    for a, b in zip(found, expected, strict=True):
        assert a.equal(b)
    moved = by_latent(own)["adam.b_enc.m"] != 0
    assert moved.equal(by_latent(all_)["adam.b_enc.m"] != 0)
    assert (moved & (found.counts == 0)).any(), "aux-k moves some that are not selected"


def test_the_kernels_take_the_step() -> None:
    config = replaced(CONFIG, latent_shards=2, d_sae=13, k=2, precision="bf16", k_aux=2)
    own, all_ = sharded(config, torch.float32), whole(config, torch.float32)
    for update in (own, all_):
        update.mark_dead(torch.arange(13) % 3 == 1)
    (x,) = batches(1, torch.float32, rows=8)
    with use("triton"):
        found = own(x)
    expected = all_(x)
    assert found.aux > 0 and found.counts.equal(expected.counts)
    for a, b in zip(found[:4], expected[:4], strict=True):
        torch.testing.assert_close(a, b, rtol=SHARDS_FLOAT32, atol=SHARDS_FLOAT32)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_shards_on_a_gpu(precision: Any) -> None:
    """The first step is the whole dictionary's; some steps, with latents dead, have the same bits again."""
    config = replaced(
        CONFIG, d_sae=1001, k=4, batch_size=256, k_aux=32, dead_after_tokens=512, latent_quota=0.0,
        precision=precision,
    )  # fmt: skip
    parts = replaced(config, latent_shards=4)
    xs = [x.cuda() for x in batches(12, torch.float32, rows=256, width=64)]
    all_ = FusedUpdate(new_sae(config, None, torch.float32, 64).cuda(), config)
    own, again = (
        ShardedUpdate(new_sae(parts, range(1001), torch.float32, 64).cuda(), parts, ALONE, 1001)
        for _ in range(2)
    )
    found, expected = own(xs[0]), all_(xs[0])
    assert found.counts.equal(expected.counts)
    for a, b in zip(found[:4], expected[:4], strict=True):
        torch.testing.assert_close(a, b, rtol=SHARDS_FLOAT32, atol=SHARDS_FLOAT32)
    again(xs[0])
    for x in xs[1:]:
        own(x)
        again(x)
    assert own.dead.any()
    assert all(t.equal(again.state_dict()[name]) for name, t in own.state_dict().items())


# --- state ---


@pytest.mark.parametrize("lag", [0, 3])
@pytest.mark.parametrize(
    "changes", [{}, {"precision": "bf16", "moments": "8bit"}], ids=["plain", "small"]
)
def test_saved_shards_go_on_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], lag: int
) -> None:
    monkeypatch.setattr(FusedUpdate, "AUX_LAG_STEPS", {"cpu": lag})
    config = replaced(CONFIG, latent_shards=3, tokens=30 * B, **changes)
    data, aux_seen = batches(30, torch.float32), 0
    run = sharded(config, torch.float32)
    run.mark_dead(torch.arange(F) % 3 == 0)
    for x in data[:20]:
        run(x)
    clone = lambda state: {name: t.clone() for name, t in state.items()}
    shared = clone(run.shared_state())
    shards = {s: clone(run.shard_state(s)) for s in run.shards}
    assert shards[1]["W_enc"].shape == (17, D) and run.shards[1] == range(16, 33)
    assert len(shared["dead_counts"]) == (1 + lag if lag else 0)
    whole_state = clone(run.state_dict())
    resumed, again = sharded(config, torch.float32), sharded(config, torch.float32)
    resumed.load_shared_state(shared)
    for shard, state in shards.items():
        resumed.load_shard_state(shard, state)
    again.load_state_dict(whole_state)
    for x in data[20:]:
        results = [each(x) for each in (run, resumed, again)]
        assert all(a.objective.equal(results[0].objective) for a in results)
        aux_seen += bool(results[0].aux > 0)
    assert aux_seen
    for other in (resumed, again):
        state = other.state_dict()
        assert all(tensor.equal(state[name]) for name, tensor in run.state_dict().items())


def test_shards_of_another_size_are_refused() -> None:
    update = sharded(replaced(CONFIG, latent_shards=3), torch.float32)
    with pytest.raises(RuntimeError, match=r"saved \(16,.*expected \(17,"):
        update.load_shard_state(1, update.shard_state(0))
    with pytest.raises(KeyError, match="b_enc"):
        update.load_shard_state(
            0, {n: t for n, t in update.shard_state(0).items() if "b_enc" not in n}
        )


# --- several processes ---


class Setup(NamedTuple):
    """A run of so many steps on ``batches(...)``."""

    config: fastsae.TrainConfig
    steps: int
    dtype: torch.dtype = torch.float32
    rows: int = B
    width: int = D
    ties: bool = False


LANES = 5
SETUPS = [
    Setup(replaced(CONFIG, latent_shards=4, tokens=12 * B), 12, ties=True),
    Setup(replaced(CONFIG, latent_shards=3, normalize="scalar", objective="plain"), 4, torch.float64),
    Setup(replaced(CONFIG, latent_shards=4, precision="bf16", moments="8bit", latent_quota=0.1), 5),
    # Products so large that a CPU gives them to another library.
    Setup(replaced(CONFIG, latent_shards=4, d_sae=2051, k=8, latent_quota=0), 3, rows=512, width=128),
]  # fmt: skip


def digest(state: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(state):
        found.update(name.encode() + state[name].numpy().tobytes())
    return found.hexdigest()


def train(team: Team, setup: Setup) -> dict[str, Any]:
    """What becomes of each hosted shard and of what is shared, and all that is told on the way."""
    config = setup.config
    assert config.latent_shards and config.d_sae
    torch.set_num_threads(1)
    update = sharded(config, setup.dtype, team, setup.width)
    latents = [i for own in update.shards.values() for i in own]
    update.mark_dead(torch.tensor(latents, dtype=torch.int64) % 5 == 0)
    by_lane = [setup.rows // LANES + (lane < setup.rows % LANES) for lane in range(LANES)]
    counts = [sum(by_lane[lane] for lane in team.hosted(LANES, r)) for r in range(team.size)]
    told, sizes, k_aux = [], [], config.k_aux
    for whole_batch in batches(setup.steps, torch.float32, setup.rows, setup.width, setup.ties):
        dead_before, before = told[-1]["dead"] if told else 1, Counter(team.received)
        quota = quota_at(config, update.tokens_seen)
        mine = whole_batch.split(counts)[team.rank]
        team.agree(*[0] * max(team.counts(LANES)))
        team.agree(0)
        x = team.gather(mine.bfloat16(), counts, "activations").to(setup.dtype)
        result = update(x)
        received = team.received - before
        assert bool(result.aux > 0) == bool(dead_before)
        sizes.append((dict(received), received_bytes(
            rank=team.rank, size=team.size, d_in=setup.width, d_sae=config.d_sae,
            shards=config.latent_shards, lanes=LANES, tokens=setup.rows, budget=int(config.k * setup.rows),
            quota=quota, k_aux=k_aux, aux_runs=dead_before > 0, bytes_each=setup.dtype.itemsize,
        )))  # fmt: skip
        told.append(update.metrics(x, result))
    told.append(update.density_histogram(torch.tensor(latents), config.d_sae))
    told.append([update.decoder_norm_error(), update.alive_fraction()])
    shards = {shard: digest(update.shard_state(shard)) for shard in update.shards}
    return {"shards": shards, "shared": digest(update.shared_state()), "told": told, "sizes": sizes}


def train_all(team: Team) -> list[dict[str, Any]]:
    return [train(team, setup) for setup in SETUPS]


@pytest.fixture(scope="module")
def alone() -> list[dict[str, Any]]:
    return train_all(ALONE)


def test_runs_worth_comparing(alone: list[dict[str, Any]]) -> None:
    for setup, run in zip(SETUPS, alone, strict=True):
        metrics = run["told"][: setup.steps]
        assert sum(each["aux"] > 0 for each in metrics) > 1
        assert run["told"][-1][0] < 1e-6
        assert all(received == {} == promised for received, promised in run["sizes"])


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow), 4])
def test_any_number_of_processes_gives_the_same_bits(
    size: int, alone: list[dict[str, Any]], tmp_path: Path
) -> None:
    together = run_together(size, train_all, folder=tmp_path)
    for i, expected in enumerate(alone):
        found = [runs[i] for runs in together]
        assert {s: sha for run in found for s, sha in run["shards"].items()} == expected["shards"]
        for run in found:
            assert run["shared"] == expected["shared"]
            assert run["told"] == expected["told"]
            for received, promised in run["sizes"]:
                assert received == {name: n for name, n in promised.items() if n}
