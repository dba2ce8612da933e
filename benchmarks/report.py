"""From results to tables and plots, and what moved between two commits.

    pytest benchmarks --out FILE.json
    python benchmarks/report.py FILE.json        publish: into results/, the README and docs/
    python benchmarks/report.py                  README, docs and plots again, from the committed results
    python benchmarks/report.py --compare A B    what moved by more than 5 % between two commits

A row measured again replaces the older one. What a gate refused has no time, hence stands in no table.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median, mode

import results
from matplotlib.figure import Figure
from measure import git
from results import HISTORY, ROOT, Row, Run, machine, rows_of

from fastsae.cli.plan import Rates, stage_seconds

DOCS = ROOT / "docs"
BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"
OURS = "fastsae"
STAGES = ("encode", "selection", "decode", "update")
HEADLINE = ("llamascopium", "SAELens", "dictionary_learning", "sparsify", "torch, eager")
"""Beside whom the first chart shows our step: the first four that there are times of."""


# --- tables ---


def summary(runs: list[Run]) -> str:
    """The README's: the chart, and its numbers with what they were measured on."""
    if not (rows := headline(runs)):
        return "No results are published yet."
    chart = "![Time of a training step beside other trainers](docs/step_time.png)"
    more = f"{_measured_on(rows[0])} More: [docs/performance.md](docs/performance.md)."
    columns = ("trainer", "a step", "time / ours")
    parts = [chart, more, _table(rows, *columns)]
    on_gpus = [run for run in runs if run["about"].get("device") == "cuda"]
    for name in dict.fromkeys(machine(run["about"]) for run in on_gpus):
        mine = rows_of([run for run in on_gpus if machine(run["about"]) == name], "step")
        for steps in _groups([row for row in mine if not row["dead"]]):
            parts += [f"On a GPU: {_measured_on(steps[0])}", _table(steps, *columns)]
    return "\n\n".join(parts)


def headline(runs: list[Run]) -> list[Row]:
    """The published step without dead latents that has the most rounds: ours and four others, the fastest
    first."""
    steps = [row for row in rows_of(runs, "step") if not row["dead"]]
    measured = lambda row: (row["group"], machine(row["about"]))
    most = max(steps, key=lambda row: len(row["seconds"]), default=None)
    mine = {row["trainer"]: row for row in steps if measured(row) == measured(most)}
    others = [name for name in HEADLINE if name in mine][:4]
    return sorted((mine[name] for name in (OURS, *others)), key=_median) if OURS in mine else []


def section(runs: list[Run]) -> str:
    """All there is: the tables of docs/performance.md."""
    machines: dict[str, list[Run]] = {}
    for run in runs:
        machines.setdefault(machine(run["about"]), []).append(run)
    parts = [_about(runs) if runs else "No results are published yet."]
    for name, mine in machines.items():
        parts += [f"## {name}"] if len(machines) > 1 else []
        parts += [_step_table(rows) for rows in _groups(rows_of(mine, "step"))]
        parts += _end_to_end_table(rows_of(mine, "end to end"))
        parts += _stream_table(rows_of(mine, "stream"))
        parts += _kernel_table(rows_of(mine, "profile"))
        parts += _op_table(rows_of(mine, "op"))
        parts += _scaling_table(rows_of(mine, "scaling"))
    return "\n\n".join(parts)


def _about(runs: list[Run]) -> str:
    machines = "; ".join(sorted({machine(run["about"]) for run in runs}))
    dates = sorted({run["about"]["date"] for run in runs})
    versions: dict[str, set[str]] = {}
    for run in runs:
        for name, version in run["about"]["versions"].items():
            versions.setdefault(name, set()).add(version)
    listed = ", ".join(f"{name} {'/'.join(sorted(v))}" for name, v in versions.items())
    return (
        f"Measured on: {machines}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}. {listed}. Made by "
        f"`python benchmarks/report.py` from [`benchmarks/results/performance.json`]"
        f"(../benchmarks/results/performance.json); rows where fastsae loses are shown like the others."
    )


def _step_table(rows: list[Row]) -> str:
    name, rounds = _group(rows[0]), len(rows[0]["seconds"])
    name = name[0].upper() + name[1:]
    gate = "same F and k, few tokens" if rows[0].get("gate_shape") == "narrow" else "this size"
    title = f"**{name}** (median of {rounds} paired rounds; checked at {gate})"
    columns = ("trainer", "a step", "time / ours", "peak memory", "memory / ours")
    return f"{title}\n\n{_table(rows, *columns)}"


def _end_to_end_table(rows: list[Row]) -> list[str]:
    table = _table(sorted(rows, key=_median), "trainer", "tokens/s", "setting")
    return ["**With the language model in the loop**", table] if rows else []


def _stream_table(rows: list[Row]) -> list[str]:
    table = _table(rows, "stage", "tokens/s", "peak memory")
    return ["**The language model and the training together**", table] if rows else []


def _kernel_table(rows: list[Row]) -> list[str]:
    """Microseconds of a step's kernels, those that take ten in some form of the step, a column a form."""
    if not rows:
        return []
    forms: dict[str, Counter[str]] = {row["form"]: Counter() for row in rows}
    for row in rows:
        for kernel in row["kernels"]:
            forms[row["form"]][_kernel(kernel["name"])] += kernel["us"] / row["steps"]
    total = {form: f"{spent.total():,.0f}" for form, spent in forms.items()}
    most = Counter[str]()
    for spent in forms.values():
        most |= spent
    table = [["kernel, µs", *forms], ["---", *["---:"] * len(forms)]]
    for name in (name for name, us in most.most_common() if us >= 10):
        table.append([name, *(f"{s.pop(name):.1f}" if name in s else "" for s in forms.values())])
    table.append(["the others", *(f"{spent.total():.1f}" for spent in forms.values())])
    table.append(["**all**", *total.values()])
    lines = "\n".join("| " + " | ".join(line) + " |" for line in table)
    title = f"Kernel by kernel: {_group(rows[0]).removesuffix(', ' + rows[0]['form'])}"
    return _folded(
        title, "One after another, as a profiler sees them; a graph runs some side by side.", lines
    )


def _kernel(name: str) -> str:
    """What the table calls a kernel: torch's have long names."""
    if name.endswith("_kernel") and "::" not in name:
        return name
    return "products of the library" if name.startswith(("nvjet", "cutlass")) else "of torch"


def _op_table(rows: list[Row]) -> list[str]:
    ordered = [row for group in _groups(rows) for row in group]
    columns = ("operation", "by", "time", "time / ours", "peak memory", "of the roofline")
    picture = "![Stages against the roofline](stages.png)"
    return [*_folded("Operation by operation", _table(ordered, *columns)), picture] if rows else []


def _scaling_table(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    rows = sorted(rows, key=lambda r: ("FkB".index(r["axis"]), r[r["axis"]]))
    usual = {name: mode(row[name] for row in rows) for name in "BDFk"}
    fixed = " ".join(f"{name}={value:g}" for name, value in usual.items())
    return [
        *_folded(
            f"Cost over F, k and B (otherwise {fixed}, {rows[0]['precision']})",
            "Measured by itself, at another time than the comparisons above: what both have may differ by "
            "what the machine was doing.",
            _table(rows, "size", "a step", "tokens/s", "peak memory"),
        ),
        "![Tokens per second against F and k](scaling.png)",
    ]


def _folded(title: str, *parts: str) -> list[str]:
    return [f"<details><summary>{title}</summary>", *parts, "</details>"]


def _table(rows: list[Row], *columns: str) -> str:
    lines = [columns, ("---", *["---:"] * (len(columns) - 1))]
    lines += [tuple(COLUMNS[name](row) for name in columns) for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _groups(rows: list[Row]) -> Iterator[list[Row]]:
    """The rows of each group, the fastest first; each knows which of them is ours."""
    for group in dict.fromkeys(row["group"] for row in rows):
        mine = sorted((row for row in rows if row["group"] == group), key=_median)
        ours = next((row for row in mine if row["trainer"] == OURS), None)
        yield [row | {"ours": ours} for row in mine]


def _group(row: Row) -> str:
    return row["group"].replace(" | ", ", ", 1)


def _median(row: Row) -> float:
    return median(row["seconds"])


def _time(row: Row) -> str:
    value = _median(row)
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if value * scale >= 1:
            return f"{value * scale:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def _ratio(row: Row) -> str:
    """As it was measured, in pairs; else that of the medians."""
    ratio = row.get("ratio") or (row.get("ours") and _median(row) / _median(row["ours"]))
    return f"{ratio:.2f}x" if ratio else ""


COLUMNS: dict[str, Callable[[Row], str]] = {
    "trainer": lambda row: f"**{OURS}**" if row["trainer"] == OURS else row["trainer"],
    "a step": _time,
    "time": _time,
    "time / ours": _ratio,
    "peak memory": lambda row: f"{row['peak_mib']:,.0f} MiB",
    "memory / ours": lambda row: (
        f"{row['peak_mib'] / row['ours']['peak_mib']:.2f}x" if row["ours"] else ""
    ),
    "tokens/s": lambda row: f"{row.get('B', 1) / _median(row):,.0f}",
    "setting": lambda row: row["setting"],
    "operation": _group,
    "stage": _group,
    "of the roofline": lambda row: (
        f"{row['roofline_seconds'] / _median(row):.0%}" if row["trainer"] == OURS else ""
    ),
    "size": lambda row: f"{row['axis']} = {row[row['axis']]:g}",
}
COLUMNS["by"] = COLUMNS["trainer"]


def _measured_on(row: Row) -> str:
    """What a row of steps was measured on: shape; machine; version; date; rounds."""
    shape, about = row["group"].split(" | ", 1)[1], row["about"]
    return (
        f"{shape}; {machine(about)}; torch {about['versions']['torch']}; {about['date']}; median of "
        f"{len(row['seconds'])} paired rounds."
    )


def write_between_markers(text: str, path: Path, begin: str = BEGIN, end: str = END) -> None:
    """Replace what stands between the markers. Raises ValueError where there are none."""
    whole = path.read_text(encoding="utf-8")
    if whole.count(begin) != 1 or whole.count(end) != 1:
        raise ValueError(f"{path}: expected one line {begin!r} and one {end!r}")
    before, rest = whole.split(begin)
    _, after = rest.split(end)
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


DOCUMENTS = {ROOT / "README.md": summary, DOCS / "performance.md": section}
"""What is made of the results, and where it stands."""


# --- plots ---


def plot_step_time(rows: list[Row], path: Path) -> None:
    """The first chart: a step of each trainer, with what it was measured on."""
    times, size = [_median(row) for row in rows], (8, 0.52 * len(rows) + 1.35)
    figure = Figure(size, layout="constrained")
    axes = figure.subplots()
    colours = ["#d1495b" if row["trainer"] == OURS else "#b8bfc6" for row in rows]
    axes.barh(range(len(rows)), times, color=colours, height=0.68)
    for place, (row, time) in enumerate(zip(rows, times, strict=True)):
        text, weight = f"{_time(row)}   {_ratio(row)}", "normal"
        if row["trainer"] == OURS:
            text, weight = _time(row), "bold"
        axes.text(time + 0.01 * max(times), place, text, va="center", fontsize=12, weight=weight)
    names = ["plain torch" if row["trainer"] == "torch, eager" else row["trainer"] for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=12)
    axes.set(xticks=[], xlim=(0, 1.2 * max(times)))
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("Time of one training step (less is better)", loc="left", fontsize=13)
    caption = _measured_on(rows[0]).replace("; ", "\n", 1)
    figure.supxlabel(caption, fontsize=9.5, x=0.01, ha="left", color="#444444")
    figure.savefig(path, dpi=200)


def plot_stages(rows: list[Row], path: Path) -> None:
    """Time of each stage, ours and eager torch's, beside the least that the machine's rates allow."""
    rows = [r for r in rows if r["stage"] in STAGES and r["group"].endswith("fp32")]
    figure = Figure((7, 3.2), layout="constrained")
    axes = figure.subplots()
    width = 0.27
    bars = {"roofline": lambda r: r["roofline_seconds"], OURS: _median, "torch, eager": _median}
    for number, (name, value) in enumerate(bars.items()):
        trainer = OURS if name == "roofline" else name
        chosen = {r["stage"]: value(r) for r in rows if r["trainer"] == trainer}
        places = [STAGES.index(stage) + (number - 1) * width for stage in chosen]
        axes.bar(places, [1e3 * v for v in chosen.values()], width, label=name)
    axes.set(xticks=range(len(STAGES)), xticklabels=STAGES, yscale="log", ylabel="ms")
    shape = rows[0]["group"].split(" | ")[1]
    axes.set_title(f"{shape}, {rows[0]['about']['hardware']}", fontsize=9)
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=120)


def plot_scaling(rows: list[Row], rates: Rates | None, path: Path) -> None:
    """Tokens per second over F, k and B, and what ``fastsae plan`` predicts from the machine's measured rates."""
    figure = Figure((10, 3.2), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    low = 4 if rows[0]["precision"] == "fp32" else 2
    for axes, axis in zip(panels, ("F", "k", "B"), strict=True):
        mine = sorted((r for r in rows if r["axis"] == axis), key=lambda r: r[axis])
        at = [r[axis] for r in mine]
        axes.plot(at, [r["B"] / _median(r) for r in mine], "o-", label="fastsae")
        if rates:
            stages = [stage_seconds(*(r[n] for n in "BDFk"), rates, low=low) for r in mine]
            speeds = [r["B"] / sum(s.values()) for r, s in zip(mine, stages, strict=True)]
            axes.plot(at, speeds, "--", color="gray", label="fastsae plan")
        axes.set(xscale="log", yscale="log", xlabel=axis)
        axes.set_xticks(at, [f"{v:g}" for v in at], fontsize=7)
        axes.minorticks_off()
    panels[0].set_ylabel("tokens/s")
    least, most = panels[0].get_ylim()
    shown = [v for e in range(7) for v in (10**e, 2 * 10**e, 5 * 10**e) if least <= v <= most]
    panels[0].set_yticks(shown, [f"{v:,}" for v in shown], fontsize=8)
    panels[0].legend(fontsize=8)
    figure.suptitle(f"{rows[0]['about']['hardware']}, {rows[0]['precision']}", fontsize=9)
    figure.savefig(path, dpi=120)


def write_plots(runs: list[Run], folder: Path = DOCS) -> None:
    """The headline, and all else of the machine that was published first."""
    if steps := headline(runs):
        plot_step_time(steps, folder / "step_time.png")
    runs = [run for run in runs if machine(run["about"]) == machine(runs[0]["about"])]
    ops, scaling = rows_of(runs, "op"), rows_of(runs, "scaling")
    if ops:
        plot_stages(ops, folder / "stages.png")
    if scaling:
        middle = lambda name: median(row[name] for row in ops)
        rates = Rates(flops=middle("flops_fp32"), bandwidth=middle("bytes")) if ops else None
        plot_scaling(scaling, rates, folder / "scaling.png")


def compare(before: str, after: str, threshold: float, path: Path = HISTORY) -> int:
    """Print what moved between two commits; 1 if fastsae became worse, 2 if they cannot be compared."""
    history = results.read_csv(path)
    known = {line["commit"] for line in history}
    # As the history has them: by their 7 digits, or by any name that git understands.
    digits = ("rev-parse", "--short=7", "--verify", "--quiet")
    names = [n if n in known else git(*digits, f"{n}^{{commit}}") or n for n in (before, after)]
    try:
        lines, worse = results.changes(history, *names, threshold)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(lines))
    return int(worse)


def main() -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("json", nargs="*", type=Path, help="results to publish")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two commits of the history")
    parser.add_argument("--threshold", type=float, default=0.05, help="what counts as moved [0.05]")
    options = parser.parse_args()
    if options.compare:
        return compare(*options.compare, options.threshold)
    runs = results.read_results()
    for path in options.json:
        run = json.loads(path.read_text(encoding="utf-8"))
        runs = results.merge(runs, run)
        results.append(HISTORY, results.long_rows(run["about"], run["rows"]))
    if options.json:
        results.write_results(runs)
    for path, text in DOCUMENTS.items():
        write_between_markers(text(runs), path)
    write_plots(runs)
    print(section(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
