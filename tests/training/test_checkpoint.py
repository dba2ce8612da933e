"""Checkpoints are whole or absent, and say what is wrong with them."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import fastsae
from fastsae.files import require_writable
from fastsae.training import checkpoint


def small_sae(seed: int = 0) -> fastsae.SAE:
    return fastsae.SAE(4, 10, 2, normalize="scalar", generator=torch.Generator().manual_seed(seed))


def save(directory: Path, step: int, keep: int = 3) -> Path:
    sae = small_sae(step)
    sae.scale.fill_(0.5)
    tensors = {f"sae.{name}": tensor for name, tensor in sae.state_dict().items()}
    tensors["stream.tokens"] = torch.arange(step)
    path = checkpoint.save(directory, step, sae, {"state": tensors}, {"steps": step, "note": "x"})
    checkpoint.prune(directory, keep)
    return path


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    assert path == checkpoint.newest(tmp_path) == tmp_path / "step_7"
    saved = checkpoint.load(path)
    sae = small_sae(7)
    sae.scale.fill_(0.5)
    for name, tensor in sae.state_dict().items():
        assert saved.tensors[f"sae.{name}"].equal(tensor), name
    assert saved.tensors["stream.tokens"].equal(torch.arange(7))
    assert saved.meta["steps"] == 7 and saved.meta["note"] == "x"
    # The folder is also an SAE that anything reads, scaling folded in.
    x = torch.randn(5, 4)
    torch.testing.assert_close(fastsae.load(path)(x), sae.eval()(x))


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (2, 10, 9, 100):
        save(tmp_path, step)
    assert checkpoint.steps(tmp_path) == [9, 10, 100]
    assert checkpoint.newest(tmp_path) == tmp_path / "step_100"
    assert {path.name for path in tmp_path.iterdir()} == {"step_9", "step_10", "step_100"}
    assert checkpoint.newest(tmp_path / "absent") is None


@pytest.mark.parametrize("point", range(8))
def test_a_full_disk_leaves_the_last_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: int
) -> None:
    """The disk fills at every moment in turn."""
    save(tmp_path, 1)
    calls = 0
    real = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > point:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    try:
        save(tmp_path, 2)
    except fastsae.CheckpointError as error:
        assert "No space left on device" in str(error) and "step_" in str(error)
        assert "is whole" in str(error)
    else:
        assert calls <= point, "a failing disk was not noticed"
    monkeypatch.undo()
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert checkpoint.load(newest).meta["steps"] == (1 if newest.name == "step_1" else 2)
    save(tmp_path, 3)  # and the run can go on where it is
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_a_real_write_limit_is_an_error_message(tmp_path: Path) -> None:
    """The operating system refuses the bytes, inside the safetensors library."""
    program = textwrap.dedent(f"""
        import resource, signal, sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import test_checkpoint as t
        t.save(Path({str(tmp_path)!r}), 1)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))
        try:
            t.save(Path({str(tmp_path)!r}), 2)
        except t.fastsae.CheckpointError as error:
            print("refused:", error)
    """)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "refused: cannot write to" in result.stdout, result.stderr
    assert checkpoint.steps(tmp_path) == [1]
    checkpoint.load(tmp_path / "step_1")


@pytest.mark.slow
def test_kill_at_any_moment_of_a_write(tmp_path: Path) -> None:
    """SIGKILL at many moments, most of them inside a write: what is there is whole."""
    program = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import test_checkpoint as t
        first = int(sys.argv[1])
        print("ready", flush=True)
        for step in range(first, first + 10_000):
            t.save(Path({str(tmp_path)!r}), step)
    """)
    step, partial_seen = 1, 0
    for attempt in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(step)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        try:
            process.wait(0.15 + 0.037 * attempt)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()
        partial_seen += bool(list(tmp_path.glob(".step_*")))
        for kept in checkpoint.steps(tmp_path):
            saved = checkpoint.load(tmp_path / f"step_{kept}")
            assert saved.meta["steps"] == kept and len(saved.tensors["stream.tokens"]) == kept
        steps = checkpoint.steps(tmp_path)
        assert steps, "no checkpoint survived"
        step = steps[-1] + 1
    assert partial_seen, "no kill fell inside a write"
    save(tmp_path, step)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["sae_weights.safetensors", "state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "one bit", "missing", "empty"])
def test_damage_is_noticed(tmp_path: Path, name: str, damage: str) -> None:
    path = save(tmp_path, 5)
    checkpoint.load(path)
    file = path / name
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "one bit":
        if name == "state.json":  # readable all the same, but no longer what was written
            content = bytearray(content.replace(b'"checksums"', b'"checksumz"'))
        else:
            content[-3] ^= 1
        file.write_bytes(content)
    elif damage == "missing":
        file.unlink()
    else:
        file.write_bytes(b"")
    with pytest.raises(fastsae.CheckpointError, match="is damaged") as error:
        checkpoint.load(path)
    assert str(path) in str(error.value) and "Delete that folder" in str(error.value)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(fastsae.ConfigError, match="is a file"):
        require_writable(tmp_path / "file" / "run")
    require_writable(tmp_path / "a" / "b")
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_state_is_readable_json(tmp_path: Path) -> None:
    content = json.loads((save(tmp_path, 1) / "state.json").read_text())
    assert set(content["checksums"]) == {"sae_weights.safetensors", "state.safetensors"}
