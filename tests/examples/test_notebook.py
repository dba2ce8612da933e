"""The notebook, executed cell by cell; its outputs are those of Jupyter:

jupyter nbconvert --to notebook --execute --inplace examples/tour.ipynb
"""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "tour.ipynb"


@pytest.fixture(scope="module")
def cells() -> list[dict]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_outputs_are_there_and_small(cells: list[dict]) -> None:
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        (output,) = cell["outputs"]
        assert output["output_type"] == "stream" and "".join(output["text"]).strip()
    assert NOTEBOOK.stat().st_size < 50_000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The 'utils' module has been deprecated:DeprecationWarning")
def test_every_cell_runs_and_prints_as_much_as_it_shows(
    cells: list[dict], capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, object] = {}
    for cell in cells:
        exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), names)
        printed, shown = capsys.readouterr().out, "".join(cell["outputs"][0]["text"])
        assert len(printed.splitlines()) == len(shown.splitlines())
        assert printed.split()[0] == shown.split()[0]
    assert names["ev"] > names["result"].pca_explained_variance  # type: ignore[operator, attr-defined]
    assert float(names["difference"]) < 1e-5  # type: ignore[arg-type]
