"""From pytest-benchmark's JSON to the README's table and plots.

    pytest benchmarks --benchmark-json=a.json
    python benchmarks/report.py a.json b.json      condense into results/, write the README and the plots
    python benchmarks/report.py                    the README and plots again, from the committed results

A row measured again replaces the older one; each keeps the hardware, versions and date it was measured
with. What was refused by a gate is in no JSON, hence in no table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "performance.json"
README = ROOT / "README.md"
PLOTS = ROOT / "docs"
BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"
OURS = "fastsae"
STAGES = ("encode", "selection", "decode", "update")


# --- results ---


def condense(data: dict[str, Any]) -> dict[str, Any]:
    """One run of pytest-benchmark: what it was measured on, and one row a benchmark."""
    about = {**data["machine_info"], "commit": (data.get("commit_info") or {}).get("id", "")[:7]}
    rows = []
    for bench in data["benchmarks"]:
        seconds = [float(f"{s:.4g}") for s in bench["stats"]["data"]]
        rows.append({"group": bench["group"], "seconds": seconds, **bench["extra_info"]})
    return {"about": about, "rows": rows}


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return (row["group"], row["trainer"], str(row.get("axis")), str([row.get(n) for n in "BDFk"]))


def merge(runs: list[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """``runs`` and ``new``, without the rows that ``new`` measured again."""
    again = {_key(row) for row in new["rows"]}
    kept = [{**run, "rows": [row for row in run["rows"] if _key(row) not in again]} for run in runs]
    return [run for run in [*kept, new] if run["rows"]]


def read_results(path: Path = RESULTS) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []


def write_results(runs: list[dict[str, Any]], path: Path = RESULTS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")


def rows_of(runs: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """All rows of a kind, each with the ``about`` of its run."""
    return [
        {**row, "about": run["about"]} for run in runs for row in run["rows"] if row["kind"] == kind
    ]


# --- README ---


def section(runs: list[dict[str, Any]]) -> str:
    """The README's section, from results alone."""
    if not runs:
        return "No results are published yet."
    return "\n\n".join(
        part
        for part in (
            _about(runs),
            *_step_tables(rows_of(runs, "step")),
            _end_to_end_table(rows_of(runs, "end to end")),
            _op_table(rows_of(runs, "op")),
            _scaling_table(rows_of(runs, "scaling")),
        )
        if part
    )


def _about(runs: list[dict[str, Any]]) -> str:
    machines = sorted(
        {
            f"{r['about']['hardware']}, {r['about']['threads']} thread{'s' * (r['about']['threads'] > 1)}"
            for r in runs
        }
    )
    dates = sorted({run["about"]["date"] for run in runs})
    versions: dict[str, set[str]] = {}
    for run in runs:
        for name, version in run["about"]["versions"].items():
            versions.setdefault(name, set()).add(version)
    listed = ", ".join(f"{name} {'/'.join(sorted(v))}" for name, v in versions.items())
    return (
        f"Measured on: {'; '.join(machines)}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}. {listed}. "
        f"Made by `python benchmarks/report.py` from "
        f"[`benchmarks/results/performance.json`](benchmarks/results/performance.json); rows where fastsae "
        f"loses are shown like the others."
    )


def _seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if value * scale >= 1:
            return f"{value * scale:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _step_tables(rows: list[dict[str, Any]]) -> list[str]:
    found = []
    for group in dict.fromkeys(row["group"] for row in rows):
        mine = sorted((r for r in rows if r["group"] == group), key=lambda r: median(r["seconds"]))
        ours = next((r for r in mine if r["trainer"] == OURS), None)
        body = [
            [
                f"**{r['trainer']}**" if r is ours else r["trainer"],
                _seconds(median(r["seconds"])),
                f"{r['ratio']:.2f}x" if r.get("ratio") else "",
                f"{r['peak_mib']:,.0f} MiB",
                f"{r['peak_mib'] / ours['peak_mib']:.2f}x" if ours else "",
            ]
            for r in mine
        ]
        name = group.replace(" | ", ", ", 1)
        rounds = len(mine[0]["seconds"])
        gate = "same F and k, few tokens" if mine[0].get("gate_shape") == "narrow" else "this size"
        found.append(
            f"**{name[0].upper() + name[1:]}** (median of {rounds} paired rounds; checked at {gate})\n\n"
            + _table(["trainer", "a step", "time / ours", "peak memory", "memory / ours"], body)
        )
    return found


def _end_to_end_table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    body = [
        [
            f"**{r['trainer']}**" if r["trainer"] == OURS else r["trainer"],
            f"{1 / median(r['seconds']):,.0f}",
            r["setting"],
        ]
        for r in sorted(rows, key=lambda r: median(r["seconds"]))
    ]
    return "**With the language model in the loop**\n\n" + _table(
        ["trainer", "tokens/s", "setting"], body
    )


def _op_table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    body = []
    for group in dict.fromkeys(row["group"] for row in rows):
        mine = {r["trainer"]: r for r in rows if r["group"] == group}
        ours = mine.get(OURS)
        for name, r in sorted(mine.items(), key=lambda item: median(item[1]["seconds"])):
            time = median(r["seconds"])
            body.append(
                [
                    group.replace(" | ", ", ", 1),
                    f"**{name}**" if r is ours else name,
                    _seconds(time),
                    f"{time / median(ours['seconds']):.2f}x" if ours else "",
                    f"{r['peak_mib']:,.0f} MiB",
                    f"{r['roofline_seconds'] / time:.0%}" if r is ours else "",
                ]
            )
    head = ["operation", "by", "time", "time / ours", "peak memory", "of the roofline"]
    return (
        "<details><summary>Operation by operation</summary>\n\n"
        + _table(head, body)
        + "\n\n</details>\n\n![Stages against the roofline](docs/stages.png)"
    )


def _scaling_table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    rows = sorted(rows, key=lambda r: ("FkB".index(r["axis"]), r[r["axis"]]))
    body = []
    for r in rows:
        time = median(r["seconds"])
        body.append(
            [
                f"{r['axis']} = {r[r['axis']]:g}",
                _seconds(time),
                f"{r['B'] / time:,.0f}",
                f"{r['peak_mib']:,.0f} MiB",
            ]
        )
    base = rows[0]
    fixed = " ".join(f"{n}={_usual(rows, n):g}" for n in "BDFk")
    return (
        f"<details><summary>Cost over F, k and B (otherwise {fixed}, {base['precision']})</summary>\n\n"
        + _table(["size", "a step", "tokens/s", "peak memory"], body)
        + "\n\n</details>\n\n![Tokens per second against F and k](docs/scaling.png)"
    )


def _usual(rows: list[dict[str, Any]], name: str) -> float:
    values = [row[name] for row in rows]
    return max(set(values), key=values.count)


def write_readme(text: str, path: Path = README) -> None:
    """Replace what stands between the markers. Raises ValueError where there are none."""
    whole = path.read_text(encoding="utf-8")
    if whole.count(BEGIN) != 1 or whole.count(END) != 1:
        raise ValueError(f"{path}: expected one line {BEGIN!r} and one {END!r}")
    before, rest = whole.split(BEGIN)
    _, after = rest.split(END)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


# --- plots ---


def plot_stages(rows: list[dict[str, Any]], path: Path) -> None:
    """Time of each stage, ours and eager torch's, beside the least that the machine's rates allow."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = [r for r in rows if r["stage"] in STAGES and r["group"].endswith("fp32")]
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    width = 0.27
    bars = {
        "roofline": lambda r: r["roofline_seconds"],
        OURS: lambda r: median(r["seconds"]),
        "torch, eager": lambda r: median(r["seconds"]),
    }
    for number, (name, value) in enumerate(bars.items()):
        chosen = {
            r["stage"]: value(r)
            for r in rows
            if r["trainer"] == (OURS if name == "roofline" else name)
        }
        places = [STAGES.index(s) + (number - 1) * width for s in chosen]
        axes.bar(places, [1e3 * v for v in chosen.values()], width, label=name)
    axes.set(xticks=range(len(STAGES)), xticklabels=STAGES, yscale="log", ylabel="ms")
    shape = rows[0]["group"].split(" | ")[1]
    axes.set_title(f"{shape}, {rows[0]['about']['hardware']}", fontsize=9)
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_scaling(rows: list[dict[str, Any]], ceilings: dict[str, float], path: Path) -> None:
    """Tokens per second over F, k and B, and what ``fastsae plan`` predicts from the machine's measured rates."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    from fastsae.cli.plan import Rates, step_seconds

    rates = Rates(ceilings["flops_fp32"], ceilings["bytes"]) if ceilings else None
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained", sharey=True)
    for axes, axis in zip(panels, ("F", "k", "B"), strict=True):
        mine = sorted((r for r in rows if r["axis"] == axis), key=lambda r: r[axis])
        at = [r[axis] for r in mine]
        axes.plot(at, [r["B"] / median(r["seconds"]) for r in mine], "o-", label="fastsae")
        if rates:
            low = 4 if rows[0]["precision"] == "fp32" else 2
            roof = [
                r["B"] / step_seconds(r["B"], r["D"], r["F"], r["k"], rates, low=low) for r in mine
            ]
            axes.plot(at, roof, "--", color="gray", label="fastsae plan")
        axes.set(xscale="log", yscale="log", xlabel=axis)
        axes.set_xticks(at, [f"{v:g}" for v in at], fontsize=7)
        axes.minorticks_off()
    panels[0].set_ylabel("tokens/s")
    low, high = panels[0].get_ylim()
    shown = [v for e in range(7) for v in (10**e, 2 * 10**e, 5 * 10**e) if low <= v <= high]
    panels[0].set_yticks(shown, [f"{v:,}" for v in shown], fontsize=8)
    panels[0].legend(fontsize=8)
    figure.suptitle(f"{rows[0]['about']['hardware']}, {rows[0]['precision']}", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_plots(runs: list[dict[str, Any]], folder: Path = PLOTS) -> None:
    ops, scaling = rows_of(runs, "op"), rows_of(runs, "scaling")
    ceilings = {n: median(r[n] for r in ops) for n in ("flops_fp32", "bytes")} if ops else {}
    if ops:
        plot_stages(ops, folder / "stages.png")
    if scaling:
        plot_scaling(scaling, ceilings, folder / "scaling.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("json", nargs="*", type=Path, help="what pytest-benchmark wrote")
    options = parser.parse_args()
    runs = read_results()
    for path in options.json:
        runs = merge(runs, condense(json.loads(path.read_text(encoding="utf-8"))))
    if options.json:
        write_results(runs)
    write_readme(section(runs))
    write_plots(runs)
    print(section(runs))


if __name__ == "__main__":
    main()
