"""Results: rows of one measurement each, on disk as soon as they are known, and their history.

A row says what was measured (``kind``, ``group``, ``trainer``) and what was found (``seconds``, one a
round or sample, and what stands beside them). The history has every result, one value a line; the
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
    """The rows of one session and what they were measured on: after every row in the JSON file ``path``, in
    long format beside it (``.csv``), and in ``history``; where those are given."""

    def __init__(
        self, path: Path | None, device: str = "cpu", history: Path | None = None, **about: Any
    ) -> None:
        self.path, self.history = path, history
        self.about = environment(device) | {"device": device} | about
        self.rows: list[Row] = []
        self._write()

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        self._write()
        if self.history is not None:
            append(self.history, long_rows(self.about, [row]))

    def _write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"about": self.about, "rows": self.rows}, indent=1)
        self.path.write_text(text + "\n", encoding="utf-8")
        table = self.path.with_suffix(".csv")
        table.unlink(missing_ok=True)
        append(table, long_rows(self.about, self.rows))


# --- what is published ---


def key(about: Row, row: Row) -> tuple[Any, ...]:
    """What a measurement is of; measured again, it replaces the older one."""
    sizes = (row.get(name) for name in ("axis", *"BDFk"))
    return (machine(about), row["group"], row["trainer"], *sizes)


def merge(runs: list[Run], new: Run) -> list[Run]:
    """``runs`` and what ``new`` measured, without the rows that it measured again."""
    new = {**new, "rows": [row for row in new["rows"] if "kind" in row and row.get("seconds")]}
    again = {key(new["about"], row) for row in new["rows"]}
    rest = lambda run: [row for row in run["rows"] if key(run["about"], row) not in again]
    kept = [{**run, "rows": rest(run)} for run in runs]
    return [run for run in [*kept, new] if run["rows"]]


def read_results(path: Path = PUBLISHED) -> list[Run]:
    return json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []


def write_results(runs: list[Run], path: Path = PUBLISHED) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")


def machine(about: Row) -> str:
    return f"{about['hardware']}, {about['threads']} thread{'s' * (about['threads'] != 1)}"


def rows_of(runs: list[Run], kind: str) -> list[Row]:
    """All rows of a kind, each with the ``about`` of its run."""
    rows = ({**row, "about": run["about"]} for run in runs for row in run["rows"])
    return [row for row in rows if row["kind"] == kind]


# --- history ---

UNITS = {"step": "s/step", "scaling": "s/step", "end to end": "s/token", "stream": "s/token"}
"""Of ``seconds``, by kind; otherwise of one call."""


def long_rows(about: Row, rows: Iterable[Row]) -> Iterator[dict[str, str]]:
    """Every value of ``rows`` as a line of the history; rows that measured nothing have none."""
    versions = "; ".join(f"{name} {version}" for name, version in about["versions"].items())
    shared = (about["date"], about["commit"], versions, machine(about))
    for row in rows:
        for metric, value, unit, rounds in _values(row):
            case = row["group"] + (f", {row['axis']}={row[row['axis']]:g}" if "axis" in row else "")
            found = (row["kind"], case, row["trainer"], metric, f"{value:.6g}", unit, str(rounds))
            yield dict(zip(COLUMNS, (*shared, *found), strict=True))


def _values(row: Row) -> Iterator[tuple[str, float, str, int]]:
    seconds, others = row.get("seconds"), row.get("values", {})
    if "kind" not in row or not (seconds or others):
        return
    rounds = row.get("rounds") or len(seconds or [0])
    if seconds:
        yield "time", median(seconds), UNITS.get(row["kind"], "s"), rounds
    if row.get("ratio") is not None:
        yield "time / ours", row["ratio"], "x", rounds
    if row.get("peak_mib") is not None:
        yield "peak memory", row["peak_mib"], "MiB", rounds
    for metric, (value, unit) in others.items():
        yield metric, value, unit, rounds
    variance = (row.get("gate") or row).get("explained_variance")
    if variance is not None:
        yield "explained variance", variance, "", 1


def append(path: Path, lines: Iterable[dict[str, str]]) -> None:
    """Add those of ``lines`` that it does not have to the history at ``path``."""
    known = read_csv(path) if path.exists() else None
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if known is None:
            writer.writeheader()
        writer.writerows(line for line in lines if line not in (known or ()))


def read_csv(path: Path = HISTORY) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


HIGHER_IS_BETTER = (
    "explained variance", "threshold explained variance", "alive fraction", "tokens per second",
    "time / ours", "rate",
)  # fmt: skip


def changes(
    history: list[dict[str, str]], before: str, after: str, threshold: float = 0.05
) -> tuple[list[str], bool]:
    """What moved by more than ``threshold`` between two commits' newest results, a line each; and whether
    fastsae became worse, by itself or beside another trainer. Only values of the same hardware are compared.

    Raises ValueError where one commit has no results in the history, or they have none in common.
    """
    found = []
    for commit in (before, after):
        lines = [line for line in history if line["commit"] == commit]
        if not lines:
            known = ", ".join(dict.fromkeys(line["commit"] for line in history))
            raise ValueError(f"no results of commit {commit!r}; there are results of {known}")
        names = ("hardware", "benchmark", "case", "trainer", "metric", "unit")
        found.append({tuple(line[name] for name in names): float(line["value"]) for line in lines})
    old, new = found
    common = [key for key in old if key in new]
    if not common:
        raise ValueError(f"{before} and {after} have no result in common, on the same hardware")
    moved, worse = [], False
    for key in common:
        was, now = old[key], new[key]
        change = (now - was) / abs(was) if was else 0.0 if now == was else float("inf")
        if abs(change) <= threshold:
            continue
        _, _, case, trainer, metric, unit = key
        better = (change > 0) == (metric in HIGHER_IS_BETTER)
        worse |= not better and (trainer.startswith("fastsae") or metric == "time / ours")
        line = f"{change:+7.1%}  {metric} of {trainer}, {case}: {was:g} -> {now:g} {unit}".rstrip()
        moved.append(f"{'better' if better else 'WORSE':6} {line}")
    moved.append(f"{len(common)} results compared, {len(moved)} moved by more than {threshold:.0%}")
    return moved, worse
