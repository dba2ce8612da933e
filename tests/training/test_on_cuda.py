"""The training loop on a CUDA device that is not there: what it launches, and that it never waits.

Two devices, and the second is used, so that what forgets to say which shows.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from cuda_stand_in import Device, Log
from torch import Tensor

import fastsae
from fastsae.data.buffer import ActivationBuffer
from fastsae.data.harvest import Chunk, ChunkSource, Harvest, harvest
from fastsae.data.stream import Stream
from fastsae.errors import StreamError
from fastsae.training import trainer
from fastsae.training.graphs import Graphs, LaggedCounts
from fastsae.training.initialize import new_sae
from fastsae.training.update import FusedUpdate

pytest.importorskip("triton")

D, F, B, CONTEXT = 16, 128, 32, 8
CONFIG = fastsae.TrainConfig(
    d_sae=F, k=4, lr=1e-3, batch_size=B, tokens=B * 18, device="cuda:1", precision="bf16",
    dead_after_tokens=B * 400, log_every_tokens=B * 100, checkpoint_every_tokens=B * 100,
    latent_quota=0.0, wandb="disabled", cuda_graph=False,
)  # fmt: skip


@pytest.fixture(autouse=True)
def captures_may_be_close(monkeypatch):
    monkeypatch.setattr(Graphs, "CALLS_APART", 2)  # runs are short


class Model:
    """A language model of two layers: what follows a token is a row of a table."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.special_ids = device, torch.tensor([0])
        generator = torch.Generator().manual_seed(0)
        tables = torch.randn(2, 40, D, generator=generator)
        # The last of what is done to weights need not have happened when the model is first asked.
        self.tables = [table.to(device) + 0.5 for table in tables]

    def residuals(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return tuple(table[tokens] for table in self.tables)


class Chunks(ChunkSource):
    """Random tokens, read by :class:`Model`."""

    chunk_tokens, widths = 4 * CONTEXT, (D, D)

    def __init__(self, model: Model) -> None:
        self.model, self.device, self.drawn = model, model.device, 0

    @property
    def metadata(self) -> tuple[dict[str, Any], ...]:
        return ({}, {})

    def lane(self, lane: int, lanes: int) -> ChunkSource:
        raise AssertionError("there is one lane")

    def draw(self) -> Chunk:
        self.drawn += 1
        generator = torch.Generator().manual_seed(self.drawn)
        tokens = torch.randint(0, 40, (4, CONTEXT), generator=generator, dtype=torch.int32)
        return Chunk(tokens, torch.full((4,), CONTEXT, dtype=torch.int32))

    def harvest(self, chunk: Chunk) -> Harvest:
        return harvest(self.model, chunk, outlier_norm=10.0)  # pyright: ignore[reportArgumentType]

    def explain(self, verdict: Tensor) -> StreamError:
        return StreamError("not finite")

    def held_out(self) -> tuple[Tensor, ...]:
        return self.harvest(self.draw()).kept()

    def pack(self, chunks: Any) -> dict[str, Tensor]:
        none = torch.empty(0, CONTEXT, dtype=torch.int32)
        return {"tokens": torch.cat([none, *(chunk.tokens for chunk in chunks)])}

    def unpack(self, tensors: dict[str, Tensor]) -> list[Chunk]:
        full = torch.full((4,), CONTEXT, dtype=torch.int32)
        return [Chunk(tokens, full) for tokens in tensors["tokens"].split(4)]

    def state_dict(self) -> dict[str, Any]:
        return {"tensors": {}, "meta": {"drawn": self.drawn}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = state["meta"]["drawn"]


def stream(config: fastsae.TrainConfig) -> Stream:
    source = Chunks(Model(torch.device(config.device)))
    buffer = ActivationBuffer(source, batch_size=B, pool_tokens=8 * source.chunk_tokens, seed=0)
    return Stream(source, buffer)


def require_no_waits(log: Log) -> None:
    """Steps and batches wait for nothing, but for a generation that has been harvested and a capture."""
    loop = {"Run.train_on", "Stream.next_batch"}
    allowed = {("Stream.synchronize", "ActivationBuffer._settle"), ("capture", "Graphs._capture")}
    waits = {(w.what, *w.where[:3]) for w in log.waits if loop & set(w.where)}
    assert not {each for each in waits if each[:2] not in allowed}
    assert not log.faults, log.faults


def trained(stand_in: Device, grid: Any = None, **changes: Any) -> tuple[list[Tensor], Log]:
    """The decoders of a whole training on the stream, in host memory; no step of it waits."""
    config = dataclasses.replace(CONFIG, **changes)
    sweep = fastsae.Sweep(config, **grid) if grid else config
    with stand_in.installed() as log:
        saes = fastsae.Trainer(sweep, stream(config)).fit()
        decoders = [sae.W_dec.detach().cpu() for sae in saes]
    require_no_waits(log)
    return decoders, log


DYING = {"dead_after_tokens": B * 3, "k": 1}
"""Settings with which aux-k appears in the tenth step or so, and has more latents later."""
LEVELS = (16, 48, F)
SETTINGS = {
    "plain": {},
    "objective and scaling": {"objective": "plain", "normalize": "layer_norm"},
    "quota": {"latent_quota": 0.4},
    "clipped": {"clip_norm": 0.5},
    "8-bit": {"moments": "8bit"},
    "aux-k": DYING,
    "matryoshka": {"matryoshka": LEVELS},
    "transcoder": {**DYING, "hook": "mlp_in", "target": "mlp_out", "skip": True, "clip_norm": 0.5},
    "all of it": {
        **DYING,
        "clip_norm": 0.5,
        "moments": "8bit",
        "latent_quota": 0.4,
        "matryoshka": LEVELS,
    },
}


FAST = {("eager", "plain"), ("graph", "transcoder"), ("graph", "all of it")}


@pytest.mark.parametrize(
    ("graph", "settings"),
    [
        pytest.param(
            way == "graph",
            settings,
            id=f"{way}, {name}",
            marks=[] if (way, name) in FAST else [pytest.mark.slow],
        )
        for way in ("eager", "graph")
        for name, settings in SETTINGS.items()
    ],
)
def test_training_never_waits_and_leaves_the_bits_of_a_cpu(graph, settings, monkeypatch):
    monkeypatch.setattr(FusedUpdate, "AUX_LAG_STEPS", {"cuda": 4, "cpu": 4})
    monkeypatch.setattr(trainer, "check_precision", lambda *_: None)  # bf16 on a CPU
    config = dataclasses.replace(CONFIG, device="cpu", **settings)
    (on_a_cpu,) = fastsae.Trainer(config, stream(config)).fit()
    (found,), log = trained(Device(), cuda_graph=graph, **settings)
    torch.testing.assert_close(found, on_a_cpu.W_dec.detach(), rtol=0, atol=0)
    assert ("graph" in log.launches) == graph
    assert ("keep_largest_kernel" in log.launches) == ("k" in settings)


def test_room_for_the_dead_is_near_their_number():
    lag, numbers = 3, [*range(0, 24_576, 50), *range(24_576, 0, -50)]
    counts, rooms = LaggedCounts(lag), []
    for i, n in enumerate(numbers):
        if i == 400:
            state, counts = counts.state(), LaggedCounts(lag)
            counts.restore(state)
        rooms += counts.update(torch.tensor(n))
    assert rooms[:lag] == [0] * lag
    for n, room in zip(numbers, rooms[lag:], strict=False):
        assert n <= room <= max(1.15 * n, 1280) and room % 64 == 0 and bool(room) == bool(n)
    assert len(set(rooms) - {0}) <= 25
    counts.fill(torch.tensor(9339))
    near = [counts.update(torch.tensor(9339 + n))[0] for n in (0, 300, -200, 0, 200, -200, 0, 0, 0)]
    assert set(near) == {10_432}


@pytest.mark.slow
def test_capacities_grow_with_the_dead_and_each_is_captured_once(monkeypatch):
    monkeypatch.setattr(LaggedCounts, "LEAST", 16)
    monkeypatch.setattr(LaggedCounts, "TILE", 16)
    _, log = trained(Device(), cuda_graph=True, **DYING, tokens=B * 60)
    captures = sum(wait.what == "capture" for wait in log.waits)
    replays = log.launches.count("graph")
    assert 2 <= captures <= 6 and replays > 20


def test_graphs_are_the_default():
    found, _ = trained(Device())
    replayed, log = trained(Device(), cuda_graph=fastsae.TrainConfig.cuda_graph)
    assert "graph" in log.launches and replayed[0].equal(found[0])


@pytest.mark.parametrize("where", ["in the step", "at the end"])
def test_where_a_capture_fails_steps_stay_eager(where, monkeypatch, caplog):
    expected, _ = trained(Device())
    device, real = Device(failing=where == "at the end"), FusedUpdate._on_device

    def on_device(*arguments):
        result = real(*arguments)
        if device.log.capturing is not None and where == "in the step":
            raise RuntimeError("operation not permitted")
        return result

    monkeypatch.setattr(FusedUpdate, "_on_device", on_device)
    found, log = trained(device, cuda_graph=True)
    assert found[0].equal(expected[0]) and "graph" not in log.launches
    (told,) = (r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    assert "could not be captured" in told and told.endswith("operation not permitted")
    assert sum(wait.what == "capture" for wait in log.waits) == 1


@pytest.mark.slow
def test_several_runs_share_the_device():
    grid = {"layers": (0, 1), "ks": (2, 4)}
    found, log = trained(Device(), grid, cuda_graph=True)
    for decoder, (layer, k) in zip(found, [(0, 2), (0, 4), (1, 2), (1, 4)], strict=True):
        alone, _ = trained(Device(), {"layers": (0, 1), "ks": (k,)}, cuda_graph=True)
        assert decoder.equal(alone[layer])
    assert log.launches.count("graph") > 40


@pytest.mark.slow
def test_a_run_resumes_on_the_device(tmp_path: Path):
    options = {**DYING, "cuda_graph": True, "checkpoint_every_tokens": B * 8}
    (expected,), _ = trained(Device(), **options)
    short = {"out": str(tmp_path), "name": "run"}

    class Stopped(Exception):
        pass

    config = dataclasses.replace(CONFIG, **options | short)
    with Device().installed() as log:
        source = stream(config)
        served, real = [], source.next_batch

        def next_batch():
            if len(served) == 14:
                raise Stopped
            served.append(None)
            return real()

        source.next_batch = next_batch
        with pytest.raises(Stopped):
            fastsae.Trainer(config, source).fit()
        require_no_waits(log)
    (found,), _ = trained(Device(), **options | short)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# --- what a step launches ---


def update(config: fastsae.TrainConfig) -> FusedUpdate:
    return FusedUpdate(new_sae(config, D, F), config)


def launches_of_a_step(**changes: Any) -> Counter[str]:
    """Kernels of one step after some others; the input is there."""
    config = dataclasses.replace(CONFIG, **changes)
    with Device().installed() as log:
        step, x = update(config), torch.randn(B, D).to(config.device)
        step.mark_dead(
            torch.arange(F, device=config.device) < (F // 2 if "k_aux" in changes else 0)
        )
        for _ in range(6):
            log.clear()
            step(x)
        assert not log.waits and not log.faults
        return Counter(log.launches)


BUDGETS = {
    "plain": ({}, 34),
    "quota": ({"latent_quota": 1.0}, 38),
    "quota of few": ({"latent_quota": 0.4}, 42),
    "clipped": ({"clip_norm": 1.0}, 48),
    "8-bit": ({"moments": "8bit"}, 34),
    "aux-k": ({"k_aux": 8}, 50),
    "matryoshka": ({"matryoshka": LEVELS}, 45),
    "replayed": ({"cuda_graph": True}, 6),
}
"""Settings, and how many kernels a step of them launches, Triton's and torch's: whoever needs fewer lowers
the number."""


@pytest.mark.parametrize(("settings", "budget"), BUDGETS.values(), ids=BUDGETS)
def test_a_step_launches_no_more_than_its_budget(settings, budget):
    found = launches_of_a_step(**settings)
    assert found.total() == budget, found


def test_no_gradient_of_aux_k_is_copied():
    """Where buffers have as many rows as take part, nothing is padded."""
    found = launches_of_a_step(k_aux=8)
    assert not {"aten.constant_pad_nd", "aten.clone"} & set(found)


def test_what_is_captured_has_run_before():
    """On memory of the same alignment: another one is another kernel, and none is loaded in a capture."""
    config = dataclasses.replace(CONFIG, cuda_graph=True, normalize="none", precision="fp32")
    with Device().installed() as log:
        sae = fastsae.SAE(D, F, config.k, device=config.device)
        step = FusedUpdate(sae, config)
        unaligned = torch.randn(B * D + 1).to(config.device)[1:].view(B, D)
        for _ in range(6):
            step(unaligned)
        assert "graph" in log.launches and not log.faults


# --- the stand-in finds what it is there for ---


def test_a_wait_in_a_step_is_found(monkeypatch):
    real = FusedUpdate._on_device
    monkeypatch.setattr(FusedUpdate, "_on_device", lambda *a: (real(*a), a[0].updates.item())[0])
    with pytest.raises(AssertionError):
        trained(Device(), tokens=B * 2)
    with Device().installed() as log, pytest.raises(AssertionError):
        config = dataclasses.replace(CONFIG, cuda_graph=True, tokens=B * 6)
        fastsae.Trainer(config, stream(config)).fit()
        assert not log.faults


def test_a_launch_on_the_current_device_is_found():
    with Device().installed() as log:
        step, x = update(CONFIG), torch.randn(B, D).to("cuda:1")
        with mock.patch.object(torch.cuda, "_exchange_device", lambda index: 0):
            step(x)
    assert any("launched on cuda:0" in fault for fault in log.faults)


def test_streams_that_do_not_wait_are_found():
    with Device().installed() as log:
        x = torch.ones(4, device="cuda:1")
        beside = torch.cuda.Stream()
        with torch.cuda.stream(beside):
            y = x + 1
        assert len(log.faults) == 1 and "does not wait" in log.faults.pop()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            y = x + 1
        assert not log.faults
        x.zero_()
        assert "another stream may still read" in log.faults.pop()
        y.cpu()
        assert "does not wait" in log.faults.pop()
        torch.cuda.current_stream().wait_stream(beside)
        y.cpu()
        assert not log.faults


@pytest.mark.parametrize("fork", [0, 1], ids=["transposition", "counters"])
@pytest.mark.parametrize("end", ["_beside", "_join"])
def test_what_runs_beside_a_step_begins_and_ends_with_it(fork, end, monkeypatch):
    """By leaving out one of its waits: what it waits for is found to be on another stream."""
    calls, real = [], getattr(FusedUpdate, end)

    @contextmanager
    def beside_without_waiting(step):
        with torch.cuda.stream(step._stream):
            yield

    def leave_out(step):
        calls.append(step)
        if (len(calls) - 1) % 2 != fork:
            return real(step)
        return beside_without_waiting(step) if end == "_beside" else None

    with Device().installed() as log:
        step = update(dataclasses.replace(CONFIG, k_aux=8))
        step.mark_dead(torch.arange(F, device="cuda:1") < F // 2)
        x = torch.randn(B, D).to("cuda:1")
        for _ in range(6):
            step(x)
        assert not log.faults
        monkeypatch.setattr(FusedUpdate, end, leave_out)
        for _ in range(3):
            step(x).counts.sum()
        assert len(calls) == 6 and log.faults


def test_copies_that_wait_are_told_from_those_that_do_not():
    with Device().installed() as log:
        x = torch.ones(4, device="cuda:1")
        host = torch.empty(4, pin_memory=True)
        host.copy_(x, non_blocking=True)
        torch.ones(4).pin_memory().to("cuda:1", non_blocking=True)
        assert not log.waits
        host.sum()
        assert "has not arrived" in log.faults.pop()
        torch.empty(4).copy_(x, non_blocking=True)
        torch.ones(4).to("cuda:1", non_blocking=True)
        assert [wait.what for wait in log.waits] == ["copy from the device", "copy to the device"]


def test_a_replay_sees_what_changed_on_the_device_and_nothing_else():
    with Device().installed():
        scale, power = torch.ones((), device="cuda:1"), 2.0
        graph, x = torch.cuda.CUDAGraph(), torch.ones(3, device="cuda:1")
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            y = x[1:] * scale * power
            scale += 1
        assert float(scale) == 1
        power = 5.0
        for expected in (2.0, 4.0):
            graph.replay()
            assert y.tolist() == [expected] * 2
