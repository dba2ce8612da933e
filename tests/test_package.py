"""The package as a thing to install: what it is made of, what importing it costs."""

import ast
import graphlib
import shutil
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Collection, Iterator
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

import fastsae

ROOT = Path(__file__).parents[1]


def test_the_repository_does_not_shadow_hugging_faces_kernels() -> None:
    spec = PathFinder.find_spec("kernels", [str(ROOT)])
    assert spec is None or spec.origin is None, (
        "kernels/__init__.py shadows Hugging Face's `kernels`"
    )


@pytest.mark.slow
def test_the_wheel_holds_two_packages(wheel: Path) -> None:
    assert wheel.name.startswith("fastsae_triton-")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert top == {"fastsae", "fastsae_kernels"}
    assert {
        "fastsae/py.typed",
        "fastsae_kernels/py.typed",
        "fastsae/data/stream.py",
        "fastsae/reporting/card.md",
    } <= set(names)


def test_every_public_name_is_there_and_unknown_ones_are_not() -> None:
    for name in fastsae.__all__:
        assert getattr(fastsae, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'BatchTopk'"):
        _ = fastsae.BatchTopk


@pytest.mark.slow
def test_import_adds_little_to_importing_torch() -> None:
    """Under 0.2 s beyond torch; the median of three fresh processes. Names are imported on first use."""

    def seconds() -> float:
        code = (
            "import torch, time; t = time.perf_counter(); import fastsae; from fastsae import TrainConfig;"
            "print(time.perf_counter() - t)"
        )
        return float(
            subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            ).stdout
        )

    assert statistics.median(seconds() for _ in range(3)) < 0.2


def test_the_configuration_needs_the_standard_library_alone() -> None:
    code = "import sys; import fastsae.config; print(sorted(m for m in ('torch', 'numpy', 'tyro') if m in sys.modules))"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == "[]"


# --- imports point down ---

FLOORS = (
    ("version", "errors"),
    ("config", "device", "files", "metrics", "progress", "team"),
    ("sae",),
    ("lm",),
    ("data", "evaluation"),
    ("reporting",),
    ("training",),
    ("cli",),
    ("__main__",),
)
"""The rooms of the package, from the ground up. A file may import from its own room and from floors below."""
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules(package: Path) -> dict[str, Path]:
    """Every module below ``package`` by its dotted name, an ``__init__`` by that of its folder."""
    names = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports(name: str, path: Path, known: Collection[str]) -> Iterator[tuple[str, str]]:
    """Every import statement of a module, wherever it stands in it, as ``(line, what it names)``."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        where = f"{name}, line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            yield from ((where, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            source = ".".join([*(base if node.level else []), *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield where, inner if inner in known else source


def upward(root: Path) -> list[str]:
    """The imports of the package below ``root`` that do not point down, and its cycles."""
    known = modules(root / "fastsae")
    wrong: list[str] = []
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        if name == "fastsae":  # the front door names what is in the rooms
            continue
        room = name.split(".")[1]
        graph[name] = set()
        for where, target in imports(name, path, known):
            top, _, rest = target.partition(".")
            if top == "fastsae":
                graph[name].add(target)
                there = rest.partition(".")[0]
                if there != room and FLOOR.get(there, len(FLOORS)) >= FLOOR[room]:
                    wrong.append(f"{where}: {room} imports {target}")
            elif top in ("train", "benchmarks", "tests", "examples"):
                wrong.append(f"{where}: {room} imports {target}")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        wrong.append(" <- ".join(error.args[1]))
    return wrong


def test_imports_point_down() -> None:
    assert upward(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("sae/module.py", "from ..lm.hooked import CutModel"),
        ("data/text.py", "def f():\n    from ..evaluation import scores"),
        ("reporting/compare.py", "import fastsae.training.run"),
        ("lm/loading.py", "from fastsae import SAE"),
        ("sae/activation.py", "from .module import SAE"),
    ],
)
def test_one_import_upwards_is_found(tmp_path: Path, file: str, line: str) -> None:
    shutil.copytree(ROOT / "fastsae", tmp_path / "fastsae")
    with (tmp_path / "fastsae" / file).open("a", encoding="utf-8") as source:
        source.write("\n" + line + "\n")
    assert len(upward(tmp_path)) == 1


def test_kernels_stand_below_everything() -> None:
    for name, path in modules(ROOT / "kernels" / "fastsae_kernels").items():
        for where, target in imports(name, path, ()):
            assert target.partition(".")[0] != "fastsae", where


def test_rooms_have_no_logic_in_their_front_door() -> None:
    """An ``__init__`` holds a docstring and, at most, names of what is in the room."""
    allowed = (ast.Expr, ast.Import, ast.ImportFrom, ast.Assign)
    for path in (ROOT / "fastsae").glob("*/**/__init__.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert all(isinstance(node, allowed) for node in body), path
