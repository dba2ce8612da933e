"""The folder for a machine without a registry: kernels that Triton finds there, and no more than fits."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def pack(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("pack")


# One kernel in the place of all.
LAUNCH = """
import sys
sys.path[:0] = ["benchmarks", "kernels", "kernels/aot"]
import gpu_model, cases, pack, torch
from triton import knobs
import fastsae_kernels as kernels

def one(recorded):
    with recorded.record(""):
        kernels.group_max(torch.zeros(32, 512))

hits = []
gpu_model.steps = lambda *_: []
cases._selection, cases._encoder, cases._decoder, cases._update = (one, *[lambda *_: None] * 3)
for name in [name for name in vars(cases) if name.startswith("_step")]:
    setattr(cases, name, lambda *_: None)
knobs.compilation.listener = lambda **seen: hits.append(seen["cache_hit"])
try:
    pack.compile_kernels()
except KeyError as missing:  # the emulator's driver asks for PTX, which a GPU's does not
    assert "ptx" in str(missing)
print(hits)
"""


def launch(cache: Path) -> str:
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", LAUNCH], cwd=ROOT, env=own | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


# A step that is one kernel over rows.
WAYS = """
import sys
sys.path[:0] = ["benchmarks", "kernels", "kernels/aot"]
import gpu_model, gpu_step, cases, pack, torch
from fastsae_kernels import decoder_norm

def steps(*_):
    yield decoder_norm.normalize_rows(torch.ones(16, 64))

decoder_norm.implementation = lambda _: "triton"

gpu_model.steps, cases.all_cases = steps, lambda: ()
gpu_step.WARPS, gpu_step.REGISTERS, gpu_step.STAGES = (1, 2), (64,), (1,)
pack.compile_kernels(ways=sys.argv[1] == "ways")
"""


@pytest.mark.slow
def test_a_steps_kernels_are_compiled_in_other_ways_if_asked(tmp_path):
    pytest.importorskip("triton")
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = {}
    for which in ("plain", "ways"):
        cache = tmp_path / which
        subprocess.run(
            [sys.executable, "-c", WAYS, which], cwd=ROOT, check=True,
            env=own | {"TRITON_CACHE_DIR": str(cache)},
        )  # fmt: skip
        paths = cache.glob("*/normalize_rows_kernel.json")
        kernels = [json.loads(path.read_text()) for path in paths]
        found[which] = {(k["num_warps"], k["maxnreg"], k["num_stages"]) for k in kernels}
    ((warps, registers, stages),) = found["plain"]
    others = {(n, None, stages) for n in (1, 2)} | {(n, 64, stages) for n in (1, 2)}
    assert registers is None
    assert found["ways"] == others | {
        (warps, 64, stages),
        (warps, None, 1),
        (warps, None, stages),
    }


@pytest.mark.slow
def test_what_was_compiled_is_found_where_it_is_brought(pack, tmp_path):
    pytest.importorskip("triton")
    pytest.importorskip("numpy", minversion="2.0")
    made, brought = tmp_path / "made", tmp_path / "brought"
    assert launch(made) == "[False]"
    assert pack.strip(made, brought) == 1
    kinds = {file.suffix for file in made.rglob("*") if file.is_file()}
    assert kinds == {".cubin", ".json"}
    shutil.move(made, brought)
    (group,) = brought.glob("*/__grp__*.json")
    paths = json.loads(group.read_text())["child_paths"].values()
    assert paths and all(Path(path).exists() for path in paths)
    assert launch(brought) == "[True]"


def test_the_largest_wheels_that_do_not_fit_are_left_out(pack, tmp_path):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "kernel").write_bytes(bytes(500))
    for name, size in {"a": 100, "b": 300, "c": 200}.items():
        (tmp_path / "wheels" / f"{name}.whl").write_bytes(bytes(size))
    assert pack.fit(tmp_path, 2000) == []
    assert pack.fit(tmp_path, 700) == ["b.whl", "c.whl"]
    assert [wheel.name for wheel in (tmp_path / "wheels").iterdir()] == ["a.whl"]
    with pytest.raises(ValueError, match="without any wheel"):
        pack.fit(tmp_path, 400)
