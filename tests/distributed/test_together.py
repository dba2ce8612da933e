"""What several processes train together from Python, and what they leave on the disk."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastsae
from fastsae import Sweep, TrainConfig
from fastsae.files import checksum, write_json
from fastsae.team import Team
from fastsae.training import checkpoint
from fastsae.training.sharded import ShardedUpdate
from fastsae.training.trainer import Trainer
from tests.processes import run_together

D, F = 16, 61
SETTINGS: dict[str, Any] = {
    "d_sae": F, "k": 4, "tokens": 2560, "batch_size": 64, "dead_after_tokens": 500, "device": "cpu",
    "log_every_tokens": 640, "checkpoint_every_tokens": 640, "report": "none", "wandb": "disabled",
}  # fmt: skip


def batches(lane: int, steps: int = 40) -> list[Tensor]:
    generator = torch.Generator().manual_seed(lane)
    basis = torch.randn(3 * D, D, generator=torch.Generator().manual_seed(100))
    codes = torch.rand(steps, 32, 3 * D, generator=generator)
    return list(torch.where(codes > 0.9, codes, 0) @ basis + 0.5)


def joined(*lanes: list[Tensor]) -> list[Tensor]:
    return [torch.cat(rows) for rows in zip(*lanes, strict=False)]


def config(folder: Path, name: str, **settings: Any) -> TrainConfig:
    return TrainConfig(out=str(folder), name=name, **{**SETTINGS, **settings})


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{n: v for n, v in line.items() if "second" not in n} for line in lines]


def train_alone(folder: Path, name: str, *lanes: list[Tensor], **settings: Any) -> fastsae.SAE:
    return fastsae.train(joined(*lanes), config(folder, name, **settings))


CASES = (("whole", 1, 40), ("shards", 2, 40), ("short", 1, 35))


def train_own_once(team: Team, folder: Path) -> dict[str, Any]:
    found = {}
    for name, shards, steps in CASES:
        own = batches(team.rank, 40)[: steps if team.rank else 40]
        sae = fastsae.train(own, config(folder, name, latent_shards=shards))
        found[name] = {n: tensor.clone() for n, tensor in sae.state_dict().items()}
    return found


def test_iterables_of_two_processes(tmp_path: Path) -> None:
    """As one process that is given the rows of both; every process gets the SAE."""
    found = run_together(2, train_own_once, tmp_path / "two", folder=tmp_path / "results")
    for name, shards, steps in CASES:
        lanes = batches(0, 40), batches(1, 40)
        own = train_alone(
            tmp_path / "one", name, *(lane[:steps] for lane in lanes), latent_shards=shards
        )
        for each in found:
            for key, tensor in own.state_dict().items():
                assert each[name][key].equal(tensor), (name, key)
        assert metrics(tmp_path / "one" / name) == [
            {n: v for n, v in line.items() if n != "unmatched"}
            for line in metrics(tmp_path / "two" / name)
        ]
    summary = json.loads((tmp_path / "two/short/summary.json").read_text())
    assert summary["unmatched"] == 32 and summary["tokens_seen"] == 35 * 64


def sweep(team: Team, folder: Path) -> tuple[list[str], int]:
    base = config(folder, "sweep", lanes=2)
    trainer = Trainer(Sweep(base, ks=(2, 4, 8)), batches(team.rank))
    return [run.name for run in trainer.runs if run.is_here], len(trainer.fit())


def test_a_sweep_is_spread_over_processes(tmp_path: Path) -> None:
    """Whole SAEs in turn; each is the one that a process trains alone, and the first writes all."""
    found = run_together(2, sweep, tmp_path / "two", folder=tmp_path / "results")
    assert [len(names) for names, _ in found] == [2, 1]
    assert [count for _, count in found] == [3, 0]
    for k in (2, 4, 8):
        alone = train_alone(tmp_path / "one", f"k{k}", batches(0), batches(1), k=k, lanes=2)
        run = next((tmp_path / "two").glob(f"*-k{k}-*"))
        for key, tensor in fastsae.load(run).state_dict().items():
            assert tensor.equal(alone.state_dict()[key]), (k, key)
        assert metrics(run) == metrics(tmp_path / "one" / f"k{k}")


def nothing_to_write_to(team: Team) -> str:
    with pytest.raises(fastsae.ConfigError) as error:
        fastsae.train(batches(0), TrainConfig(**SETTINGS))
    return str(error.value)


def test_several_processes_need_a_folder(tmp_path: Path) -> None:
    for message in run_together(2, nothing_to_write_to, folder=tmp_path):
        assert "give out" in message


# --- one process: what a run in shards leaves ---


def test_shards_need_a_folder() -> None:
    with pytest.raises(
        fastsae.ConfigError, match="latent_shards = 2, and nothing is to be written"
    ):
        fastsae.train(batches(0), TrainConfig(**SETTINGS, latent_shards=2))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a dictionary in three shards, trained by one process."""
    out = tmp_path_factory.mktemp("sharded")
    train_alone(out, "run", batches(0), batches(1), latent_shards=3)
    return out / "run"


def test_a_run_in_shards_is_that_of_one_piece_but_for_rounding(
    sharded: Path, tmp_path: Path
) -> None:
    whole = train_alone(tmp_path, "whole", batches(0), batches(1))
    ours = fastsae.load(sharded)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=2e-4, atol=2e-5, msg=name)
    for name in ("l0", "alive_fraction", "dead", "density_histogram", "tokens_seen"):
        one, two = ([line[name] for line in metrics(run)] for run in (tmp_path / "whole", sharded))
        assert one == two, name


def test_every_checkpoint_is_an_sae(sharded: Path) -> None:
    for step in checkpoint.steps(sharded / "checkpoints"):
        sae = fastsae.load(sharded / f"checkpoints/step_{step}")
        assert (sae.d_in, sae.d_sae, sae.k) == (D, F, 4)
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(F))
    last = fastsae.load(sharded / "checkpoints/step_40").state_dict()
    for name, tensor in fastsae.load(sharded).state_dict().items():
        assert tensor.equal(last[name])


def test_saelens_loads_it(sharded: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    theirs, ours = sae_lens.SAE.load_from_disk(sharded), fastsae.load(sharded)
    x = batches(3)[0]
    torch.testing.assert_close(theirs(x), ours(x))


def test_a_damaged_shard_is_noticed(sharded: Path, tmp_path: Path) -> None:
    run = shutil.copytree(sharded, tmp_path / "run")
    shutil.rmtree(run / "checkpoints/step_40")
    for name in ("summary.json", "run.json"):
        (run / name).unlink()
    shard = run / "checkpoints/step_30/shard_01.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(fastsae.CheckpointError, match=r"shard_01.safetensors does not have"):
        train_alone(tmp_path, "run", batches(0), batches(1), latent_shards=3)


def test_shards_do_not_change_on_resume(sharded: Path, tmp_path: Path) -> None:
    shutil.copytree(sharded, tmp_path / "run")
    (tmp_path / "run/summary.json").unlink()
    with pytest.raises(fastsae.CheckpointError, match="latent_shards: 3 in the run, 2 now"):
        train_alone(tmp_path, "run", batches(0), batches(1), latent_shards=2)


def test_a_checkpoint_from_before_there_were_parts(tmp_path: Path) -> None:
    """The stream's state was in the file of the step's, and the settings knew no lanes: it goes on."""
    train_alone(tmp_path, "whole", batches(0), batches(1))
    train_alone(tmp_path, "run", batches(0, 20), batches(1, 20))
    folder = tmp_path / "run/checkpoints/step_20"
    saved = checkpoint.load(folder)
    meta = saved.meta
    state = saved.parts["state"] | saved.parts["stream"]
    fastsae.files.save_tensors(state, folder / "state.safetensors")
    (folder / "stream.safetensors").unlink()
    meta["checksums"].pop("stream.safetensors")
    meta["checksums"]["state.safetensors"] = checksum(folder / "state.safetensors")
    for name in ("lanes", "latent_shards"):
        meta["config"].pop(name)
    write_json(folder / "state.json", meta)
    for name in ("summary.json", "run.json"):
        (tmp_path / "run" / name).unlink()
    train_alone(tmp_path, "run", batches(0), batches(1))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    one, two = (fastsae.load(tmp_path / name).state_dict() for name in ("run", "whole"))
    assert all(one[name].equal(two[name]) for name in two)


# --- bytes ---


def loopback_bytes() -> int:
    """What this machine has received from itself so far."""
    line = next(
        l for l in Path("/proc/net/dev").read_text().splitlines() if l.strip().startswith("lo:")
    )
    return int(line.split(":")[1].split()[0])


def steps_and_bytes(team: Team) -> list[tuple[int, int]]:
    """Of three rounds of steps: bytes that the processes counted, and that the kernel saw meanwhile."""
    width, latents = 256, 2048
    settings = TrainConfig(d_sae=latents, k=8, latent_shards=2, normalize="none", device="cpu")
    hosted = team.hosted(2)
    part = range(hosted.start * latents // 2, hosted.stop * latents // 2)
    sae = fastsae.SAE(width, latents, 8, part=part, generator=torch.Generator().manual_seed(0))
    update = ShardedUpdate(sae, settings, team, latents)
    x = torch.randn(512, width, generator=torch.Generator().manual_seed(1))
    rounds = []
    for _ in range(3):
        team.wait()
        counted, seen = sum(team.received.values()), loopback_bytes()
        for _ in range(6):
            update(x)
        own = sum(team.received.values()) - counted
        total = sum(n for (n,) in team.agree(own))
        rounds.append((total, loopback_bytes() - seen))
    return rounds


@pytest.mark.skipif(not Path("/proc/net/dev").exists(), reason="the kernel's counter is Linux's")
def test_bytes_counted_are_bytes_that_the_kernel_sees(tmp_path: Path) -> None:
    """Other programs on this machine can only add to the kernel's, so the least of three rounds counts."""
    rounds = run_together(2, steps_and_bytes, folder=tmp_path)[0]
    ratios = [seen / counted for counted, seen in rounds]
    assert 1 <= min(ratios) < 1.05, rounds
