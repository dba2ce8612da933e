"""What `.github/` holds: workflows and forms that parse, and call what is here."""

import importlib.util
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"


def read(name: str) -> dict[Any, Any]:
    return yaml.safe_load((GITHUB / name).read_text(encoding="utf-8"))


def commands(job: dict[str, Any]) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("path", sorted(GITHUB.rglob("*.yml")), ids=lambda path: path.name)
def test_every_file_is_yaml(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


def test_ci_runs_the_command_that_everyone_runs() -> None:
    job = read("workflows/ci.yml")["jobs"]["test"]
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.13"]
    assert commands(job) == [".ci/run"] and os.access(ROOT / ".ci/run", os.X_OK)


def test_a_release_is_built_and_checked_and_not_uploaded() -> None:
    given = "\n".join(commands(read("workflows/release.yml")["jobs"]["build"]))
    assert "python -m build" in given and "twine check --strict" in given
    assert "check_wheel.py dist/*.whl" in given and "upload" not in given
    assert "-c constraints.txt" in given and (ROOT / "constraints.txt").is_file()


@pytest.mark.parametrize("workflow", ["ci.yml", "release.yml"])
def test_a_workflow_may_read_alone_and_has_a_limit(workflow: str) -> None:
    read_file = read(f"workflows/{workflow}")
    assert read_file["permissions"] == {"contents": "read"}
    assert all("timeout-minutes" in job for job in read_file["jobs"].values())


def wheel(path: Path, *without: str, extra: tuple[str, ...] = ()) -> str:
    names = [
        *(f"{package}/{file}" for package in ("fastsae", "fastsae_kernels")
          for file in ("__init__.py", "py.typed")),
        "fastsae_triton-0.1.0.dist-info/entry_points.txt",
        *extra,
    ]  # fmt: skip
    with zipfile.ZipFile(path / "some.whl", "w") as file:
        for name in names:
            if name not in without:
                file.writestr(name, "")
    return str(path / "some.whl")


def test_a_wheel_with_anything_else_is_refused(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("check_wheel", GITHUB / "check_wheel.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.problems(wheel(tmp_path)) == []
    for extra in ("kernels/aot/cases.py", "tests/conftest.py"):
        (problem,) = module.problems(wheel(tmp_path, extra=(extra,)))
        assert problem == f"{extra.split('/')[0]} does not belong in the wheel"
    (problem,) = module.problems(wheel(tmp_path, "fastsae_kernels/py.typed"))
    assert problem == "fastsae_kernels/py.typed is missing"
    (problem,) = module.problems(wheel(tmp_path, "fastsae_triton-0.1.0.dist-info/entry_points.txt"))
    assert "console script" in problem


def test_the_bug_form_asks_for_what_is_needed() -> None:
    form = read("ISSUE_TEMPLATE/bug.yml")
    assert {"name", "description", "body"} <= set(form)
    required = {
        field["id"] for field in form["body"] if field.get("validations", {}).get("required")
    }
    assert required == {"command", "happened", "expected", "versions"}


def test_a_pull_request_is_asked_for_numbers_tests_and_the_changelog() -> None:
    text = (GITHUB / "pull_request_template.md").read_text(encoding="utf-8")
    assert "before" in text and "after" in text and "paired rounds" in text
    assert "A test fails without this change" in text and "CHANGELOG.md" in text
