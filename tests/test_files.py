"""Files are whole or absent, JSON is strict, and a folder belongs to one process at a time."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import Timeout
from safetensors.torch import load_file

from fastsae import files
from fastsae.errors import ConfigError

# --- writing ---


@pytest.mark.parametrize(
    "write",
    [
        lambda path: files.write_text(path, "new"),
        lambda path: files.write_json(path, {"new": 1}),
        lambda path: files.write_tensors(path, {"new": torch.zeros(2)}),
    ],
)
def test_an_interruption_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            write(path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    write(path)
    assert path.read_bytes() != b"old" and os.listdir(tmp_path) == ["file"]


def test_a_new_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.write_tensors(tmp_path / "t", {"x": torch.arange(3)})
        files.write_json(tmp_path / "j", [1])
    finally:
        os.umask(before)
    assert torch.equal(load_file(tmp_path / "t")["x"], torch.arange(3))
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in "tj"} == {0o640}


# --- JSON ---


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    value = {
        "a": math.nan,
        2: [math.inf, (-math.inf, 1.5)],
        "b": {"c": "NaN", "d": True, "e": None},
    }
    expected = {"a": None, "2": [None, [None, 1.5]], "b": {"c": "NaN", "d": True, "e": None}}
    files.write_json(tmp_path / "x.json", value)
    assert files.read_json(tmp_path / "x.json") == expected == files.plain(value)
    assert json.loads(files.to_json(value)) == expected
    with pytest.raises(TypeError):
        files.to_json({"a": torch.zeros(1)})


@pytest.mark.parametrize("text", ['{"a": NaN}', "[Infinity]", "-Infinity", "{", ""])
def test_what_is_not_strict_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError):
        files.read_json(tmp_path / "x.json")


# --- checksums ---


def test_a_checksum_is_sha256_of_the_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.checksum(path) == known
    assert files.checksum(torch.tensor([97, 98, 99], dtype=torch.uint8)) == known
    # A view has the checksum of its values, whatever lies between them; an empty tensor has one too.
    assert files.checksum(torch.tensor([97, 0, 98, 0, 99, 0], dtype=torch.uint8)[::2]) == known
    assert files.checksum(torch.zeros(0)) == files.checksum(torch.zeros(0, 4, dtype=torch.bfloat16))


# --- folders ---


def test_a_folder_that_can_be_written(tmp_path: Path) -> None:
    files.require_writable(tmp_path / "a" / "b")
    assert os.listdir(tmp_path) == []
    assert files.existing_ancestor(tmp_path / "a" / "b") == tmp_path
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"is a file\. Choose another folder with --cache-dir"):
        files.require_writable(tmp_path / "file" / "b", "--cache-dir")


@pytest.mark.slow
def test_a_folder_is_held_by_one_process(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    assert not files.is_held(folder) and not folder.exists()
    program = f"""
from pathlib import Path
from fastsae import files
print(files.is_held(Path({str(folder)!r})))
with files.hold(Path({str(folder)!r})): print("entered")
"""
    other = lambda: subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    with files.hold(folder):
        assert files.is_held(folder)
        with pytest.raises(Timeout):
            files.hold(folder)
        done = other()
        assert done.stdout == "True\n" and "Timeout" in done.stderr
    assert not files.is_held(folder)
    assert other().stdout == "False\nentered\n"


def test_an_error_inside_a_held_folder_is_not_one_of_the_lock(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match="of the body"), files.hold(tmp_path):
        raise TimeoutError("of the body")
    assert not files.is_held(tmp_path)
