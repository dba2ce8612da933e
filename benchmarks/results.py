"""Results: rows of one measurement each, on disk as soon as they are known, and their history.

A row says what was measured (``kind``, ``group``, ``trainer``) and what was found (``seconds``, one a
round or sample, and what stands beside them). ``benchmarks/results/history.csv`` has every result in long
format, one value a line, with the commit, versions and hardware that it was measured with; the
published ones are in ``performance.json`` too, from which the documents are made.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from measure import ROOT, environment

RESULTS = ROOT / "benchmarks" / "results"
PUBLISHED = RESULTS / "performance.json"
HISTORY = RESULTS / "history.csv"
COLUMNS = (
    "date", "commit", "versions", "hardware", "benchmark", "case", "trainer", "metric", "value",
    "unit", "rounds",
)  # fmt: skip

Row = dict[str, Any]
Run = dict[str, Any]  # {"about": what it was measured on, "rows": [...]}


class Report:
    """The rows of one command or session.

    Args:
        name: of its files, ``FOLDER/NAME.json`` and, in long format, ``FOLDER/NAME.csv``.
        folder: where they go; None writes none.
        device: what is measured on.
        history: the file that measurements are added to; None leaves it alone.
        about: what else is to be known of the session.
    """

    def __init__(
        self,
        name: str,
        folder: Path | None,
        *,
        device: str = "cpu",
        history: Path | None = None,
        **about: Any,
    ) -> None:
        self.name, self.folder, self.history = name, folder, history
        self.about = environment(device) | {"device": device} | about
        self.rows: list[Row] = []
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._flush()

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        self._flush()
        if self.history is not None:
            append(self.history, long_rows(self.about, [row]))

    def _flush(self) -> None:
        if self.folder is None:
            return
        path = self.folder / self.name
        run = {"about": self.about, "rows": self.rows}
        path.with_suffix(".json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".csv").unlink(missing_ok=True)
        append(path.with_suffix(".csv"), long_rows(self.about, self.rows))


# --- what is published ---


def key(about: Row, row: Row) -> tuple[str, ...]:
    """What a measurement is of; measured again, it replaces the older one."""
    sizes = [row.get("axis"), *(row.get(name) for name in "BDFk")]
    return (row["group"], row["trainer"], about["hardware"], str(about["threads"]), str(sizes))


def merge(runs: list[Run], new: Run) -> list[Run]:
    """``runs`` and what ``new`` measured, without the rows that it measured again."""
    new = {**new, "rows": [row for row in new["rows"] if "kind" in row and row.get("seconds")]}
    again = {key(new["about"], row) for row in new["rows"]}
    kept = [
        {**run, "rows": [row for row in run["rows"] if key(run["about"], row) not in again]}
        for run in runs
    ]
    return [run for run in [*kept, new] if run["rows"]]


def read_results(path: Path = PUBLISHED) -> list[Run]:
    return json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []


def write_results(runs: list[Run], path: Path = PUBLISHED) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")


def rows_of(runs: list[Run], kind: str) -> list[Row]:
    """All rows of a kind, each with the ``about`` of its run."""
    return [
        {**row, "about": run["about"]} for run in runs for row in run["rows"] if row["kind"] == kind
    ]


# --- history ---

UNITS = {"step": "s/step", "scaling": "s/step", "end to end": "s/token", "stream": "s/token"}
"""Of ``seconds``, by kind; otherwise of one call."""


def long_rows(about: Row, rows: Iterable[Row]) -> Iterator[dict[str, str]]:
    """Every value of ``rows`` as a line of the history; rows that measured nothing have none."""
    threads = about["threads"]
    shared = {
        "date": about["date"],
        "commit": about["commit"],
        "versions": "; ".join(f"{name} {version}" for name, version in about["versions"].items()),
        "hardware": f"{about['hardware']}, {threads} thread{'s' * (threads != 1)}",
    }
    for row in rows:
        for metric, value, unit, rounds in _values(row):
            case = row["group"] + (f", {row['axis']}={row[row['axis']]:g}" if "axis" in row else "")
            yield shared | {
                "benchmark": row["kind"],
                "case": case,
                "trainer": row["trainer"],
                "metric": metric,
                "value": f"{value:.6g}",
                "unit": unit,
                "rounds": str(rounds),
            }


def _values(row: Row) -> Iterator[tuple[str, float, str, int]]:
    seconds = row.get("seconds") or []
    if "kind" not in row or not (seconds or row.get("values")):
        return
    if seconds:
        yield "time", median(seconds), UNITS.get(row["kind"], "s"), len(seconds)
    rounds = len(seconds) or 1
    if row.get("ratio") is not None:
        yield "time / ours", row["ratio"], "x", rounds
    if row.get("peak_mib") is not None:
        yield "peak memory", row["peak_mib"], "MiB", rounds
    for metric, (value, unit) in row.get("values", {}).items():
        yield metric, value, unit, row.get("rounds", rounds)
    variance = (row.get("gate") or row).get("explained_variance")
    if variance is not None:
        yield "explained variance", variance, "", 1


def append(path: Path, lines: Iterable[dict[str, str]]) -> None:
    """Add those of ``lines`` that it does not have to the history at ``path``."""
    known = read_history(path) if path.exists() else None
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if known is None:
            writer.writeheader()
        writer.writerows(line for line in lines if line not in (known or ()))


def read_history(path: Path = HISTORY) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


HIGHER_IS_BETTER = (
    "threshold explained variance",
    "explained variance",
    "alive fraction",
    "tokens per second",
    "time / ours",
    "rate",
)


def changes(
    history: list[dict[str, str]], before: str, after: str, threshold: float = 0.05
) -> tuple[list[str], bool]:
    """What moved by more than ``threshold`` between two commits' newest results, a line each; and whether
    fastsae became worse, by itself or beside another trainer. Only values of the same hardware are compared.

    ``before`` and ``after`` are commits as the history has them. Raises ValueError where one has no results,
    or they have none in common.
    """
    found = []
    for commit in (before, after):
        lines = [line for line in history if line["commit"] == commit]
        if not lines:
            known = ", ".join(dict.fromkeys(line["commit"] for line in history))
            raise ValueError(f"no results of commit {commit!r}; there are results of {known}")
        names = ("hardware", "benchmark", "case", "trainer", "metric", "unit")
        found.append({tuple(line[name] for name in names): line for line in lines})
    old, new = found
    common = [key for key in old if key in new]
    if not common:
        raise ValueError(f"{before} and {after} have no result in common, on the same hardware")
    moved, worse = [], False
    for key in common:
        was, now = float(old[key]["value"]), float(new[key]["value"])
        change = now / was - 1 if was else 0.0 if now == was else float("inf")
        if abs(change) <= threshold:
            continue
        _, _, case, trainer, metric, unit = key
        better = (change > 0) == (metric in HIGHER_IS_BETTER)
        worse |= not better and (trainer.startswith("fastsae") or metric == "time / ours")
        moved.append(
            f"{'better' if better else 'WORSE':6} {change:+7.1%}  {metric} of {trainer}, {case}: "
            f"{was:g} -> {now:g} {unit}".rstrip()
        )
    moved.append(f"{len(common)} results compared, {len(moved)} moved by more than {threshold:.0%}")
    return moved, worse
