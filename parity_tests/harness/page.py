"""The report as a self-contained HTML page, as Markdown, and as the tables of README.md and docs/mutations.md."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

import numpy as np

from parity_tests.harness import charts
from parity_tests.harness.charts import Level, Line
from parity_tests.harness.measure import Measurement
from parity_tests.report import Report, worst
from torch_ref.spec.interface import UserError

BEGIN, END = "<!-- parity:begin -->", "<!-- parity:end -->"


def number(value: float) -> str:
    """An error or bound in words of a table."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return "not finite" if math.isnan(value) else "missing or misshapen"
    return f"{value:.0f}" if value >= 1 and value == int(value) else f"{value:.1e}".replace(".0e", "e")


def shown(measurements: list[Measurement]) -> Measurement:
    """The measurement that stands for a rung: the one farthest beyond its bound, else the largest bounded error."""
    failed = [each for each in measurements if not each.passed]
    return worst(failed or [each for each in measurements if each.bound] or measurements)


def ladder_rows(report: Report) -> list[tuple[str, str, list[list[Measurement]]]]:
    """(rung, what it is, its measurements per dtype) for every rung that was measured."""
    rows = [(rung, what, [report.of(rung, dtype) for dtype in report.dtypes]) for rung, what in report.rungs.items()]
    return [row for row in rows if any(row[2])]


def ladder_table(report: Report) -> str:
    """The ladder in Markdown: per rung and dtype the worst measured error, with its bound."""
    lines = [
        "| rung | what is compared | " + " | ".join(report.dtypes) + " |",
        "|---|---|" + "---|" * len(report.dtypes),
    ]
    for rung, what, columns in ladder_rows(report):
        cells = []
        for measurements in columns:
            if not measurements:
                cells.append("")
                continue
            each = shown(measurements)
            mark = "" if each.passed else "**FAILED** "
            bound = f" (bound {number(each.bound)})" if each.bound else ""
            cells.append(f"{mark}{number(each.error)}{bound}")
        lines.append(f"| {rung} | {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def faults_table(report: Report) -> str:
    """The planted faults in Markdown."""
    lines = ["| planted fault | rung that catches it | where it shows first | error there |", "|---|---|---|---|"]
    for fault, caught in report.faults:
        seen = f"{caught.rung} | {_code(caught.where)} | {number(caught.error)}" if caught else "**not caught** | | "
        lines.append(f"| {fault.name} | {seen} |")
    return "\n".join(lines)


def _code(where: str) -> str:
    return f"`{where}`" if "." in where else where


def summary(report: Report) -> str:
    within = sum(each.passed for each in report.measurements)
    text = f"{within:,} of {len(report.measurements):,} measurements within their bounds"
    if report.faults:
        caught = sum(fault.shows_at(measurement) for fault, measurement in report.faults)
        text += f"; {caught} of {len(report.faults)} planted faults caught where they were planted"
    return text


def markdown(report: Report) -> str:
    """The whole report in Markdown."""
    parts = [
        f"# {report.heading}",
        f"**{'Passed' if report.passed else 'FAILED'}**: {summary(report)}.",
        "\n".join(f"- {name}: {value}" for name, value in report.environment.items()),
        "## The ladder\n\nErrors are the largest absolute difference over the largest value of the tensor; those of "
        "training runs are absolute, in nats.\n\n" + ladder_table(report),
    ]
    failed = [str(each) for each in report.measurements if not each.passed]
    if failed:
        parts.append(
            "## Beyond their bounds, in the order of the computation\n\n" + "\n".join(f"- {f}" for f in failed)
        )
    if report.divergences:
        lines = ["| dtype | largest loss difference | chaos floor | bound |", "|---|---|---|---|"]
        for dtype, run in report.divergences.items():
            floor = "" if run.floor is None else number(run.floor_level)
            lines.append(f"| {dtype} | {number(float(run.difference.max()))} | {floor} | {number(run.bound)} |")
        parts.append(f"## {_steps(report)}\n\n{FLOOR_TEXT}\n\n" + "\n".join(lines))
    if report.faults:
        parts.append("## Planted faults\n\n" + faults_table(report))
    return "\n\n".join(parts) + "\n"


FLOOR_TEXT = (
    "The chaos floor is how far two runs of one framework part when every start weight is moved by one unit in the "
    "last place: the median over five pairs of runs of their largest loss difference."
)


def write(report: Report, folder: Path) -> None:
    """`index.html` and `report.md` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.html").write_text(html(report))
    (folder / "report.md").write_text(markdown(report))


def renew(report: Report, repository: Path) -> None:
    """The tables of README.md, between its markers, and of docs/mutations.md."""
    readme = repository / "README.md"
    devices = f"{report.environment['torch']}; {report.environment['JAX']}"
    table = f"{ladder_table(report)}\n\n{summary(report)}. Measured on {devices}."
    readme.write_text(replace_between_markers(readme.read_text(), table))
    (repository / "docs").mkdir(exist_ok=True)
    (repository / "docs" / "mutations.md").write_text(
        "# Planted faults\n\nA check that cannot fail proves nothing. Each fault below is planted in the torch side "
        "(those of the rung `devices` in Flax), one at a time, and the ladder is climbed until a measurement is beyond "
        "its bound; the table says which one that is. `parity_tests/parity/test_mutations.py` and "
        "`test_parity_devices.py` require that it is the one where the fault was planted.\n\n"
        "This file is written by `python -m parity_tests.report --readme`.\n\n"
        f"{faults_table(report)}\n"
    )


def check_markers(repository: Path) -> None:
    """Raises `UserError` if README.md has no place for the table, before anything is measured."""
    replace_between_markers((repository / "README.md").read_text(), "")


def replace_between_markers(text: str, table: str) -> str:
    """`text` with what is between the two markers replaced. Raises `UserError` where they are not there."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"README.md: has no {BEGIN} ... {END} to write the table between; put these two lines in")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


SERIES = {"float64": "a", "float32": "b", "bfloat16": "c"}


def html(report: Report) -> str:
    """The page. Its style follows light and dark; nothing is loaded from elsewhere."""
    verdict = "pass" if report.passed else "fail"
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in report.environment.items())
    sections = [_ladder(report), _failures(report), _layers(report), _training(report), _faults(report)]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>Parity: Flax and torch</title><style>{STYLE}</style></head><body><main>'
        f"<h1>{escape(report.heading)}</h1>"
        f'<p class="verdict {verdict}"><b>'
        f"{'Yes, to rounding.' if report.passed else 'No.'}</b> {escape(summary(report))}.</p>"
        f"{''.join(sections)}<section><h2>Measured with</h2><dl>{facts}</dl></section></main></body></html>\n"
    )


def _ladder(report: Report) -> str:
    head = "".join(f"<th>{dtype}</th>" for dtype in report.dtypes)
    rows = []
    for rung, what, columns in ladder_rows(report):
        cells = "".join(_cell(measurements) for measurements in columns)
        rows.append(f"<tr><th>{escape(rung)}<small>{escape(what)}</small></th>{cells}</tr>")
    return (
        "<section><h2>The ladder</h2><p>The worst error of each rung with its bound, and below it how many places were "
        "compared. Errors are the largest absolute difference over the largest value of the tensor; those of training "
        f'runs are absolute, in nats.</p><div class="scroll"><table class="ladder"><thead><tr><th>rung</th>{head}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _cell(measurements: list[Measurement]) -> str:
    if not measurements:
        return '<td class="none">–</td>'
    each = shown(measurements)
    bound = f"bound {number(each.bound)}" if each.bound else "must be 0"
    return (
        f'<td class="{"pass" if each.passed else "fail"}" title="{escape(f"{each.where} ({each.case})")}">'
        f"<b>{number(each.error)}</b> <small>{bound} · {len(measurements)}</small></td>"
    )


def _failures(report: Report) -> str:
    failed = [each for each in report.measurements if not each.passed]
    if not failed:
        return ""
    items = "".join(f"<li>{escape(str(each))}</li>" for each in failed[:40])
    more = f"<p>and {len(failed) - 40} more</p>" if len(failed) > 40 else ""
    return (
        f'<section class="fail"><h2>Beyond their bounds</h2><p>In the order of the computation: the first names the '
        f"place.</p><ol>{items}</ol>{more}</section>"
    )


def _layers(report: Report) -> str:
    """Errors layer by layer, and module by module."""
    from parity_tests.harness.ladder import FORWARD, GRADIENT

    dtypes = [dtype for dtype in report.dtypes if report.of("hidden", dtype)]
    figures = []
    layers = list(dict.fromkeys(each.where for each in report.measurements if each.rung == "hidden"))
    for rung, bounds, what in (
        ("hidden", FORWARD, "Hidden state after each layer, worst of all modes"),
        ("transformers hidden", FORWARD, "Hidden state after each layer, transformers against torch"),
        ("gradient", GRADIENT, "Gradients of each layer's parameters, worst of all modes"),
    ):
        measured = [dtype for dtype in dtypes if report.of(rung, dtype)]
        if not measured:
            continue
        series = [
            Line(dtype, SERIES[dtype], [_layer_error(report, rung, dtype, layer) for layer in range(len(layers))])
            for dtype in measured
        ]
        levels = [Level(f"bound {dtype} {bounds[dtype]:.0e}", SERIES[dtype], bounds[dtype]) for dtype in measured]
        figures.append(charts.log_bars(layers, series, levels, what, "largest error over largest value"))
    traced = {dtype: [each for each in report.of("trace", dtype) if each.bound] for dtype in dtypes}
    traced = {dtype: [each for each in traces if each.case == report.traced] for dtype, traces in traced.items()}
    if any(traced.values()):
        names = [each.where for each in next(iter(traced.values()))]
        series = [Line(dtype, SERIES[dtype], [each.error for each in traced[dtype][: len(names)]]) for dtype in dtypes]
        levels = [Level(f"bound {dtype} {FORWARD[dtype]:.0e}", SERIES[dtype], FORWARD[dtype]) for dtype in dtypes]
        what = "Every module's output, in the order of the forward pass (names on hover)"
        figures.append(charts.log_dots(names, series, levels, what, "from the first norm to the last"))
    return f'<section><h2>Along the model</h2><div class="figures">{"".join(figures)}</div></section>'


def _layer_error(report: Report, rung: str, dtype: str, layer: int) -> float:
    start = f"layer {layer}" if rung.endswith("hidden") else f"layers.{layer}."
    return max((each.error for each in report.of(rung, dtype) if each.where.startswith(start)), default=0.0)


def _training(report: Report) -> str:
    if not report.divergences:
        return ""
    series, levels = [], []
    for dtype, run in report.divergences.items():
        series.append(Line(dtype, SERIES[dtype], np.maximum.accumulate(run.difference)))
        levels.append(Level(f"bound {dtype} {number(run.bound)}", SERIES[dtype], run.bound))
        if run.floor is not None:
            series.append(
                Line("chaos floor, float32", "floor", np.median(np.maximum.accumulate(run.floor, axis=1), axis=0))
            )
    divergence = charts.log_lines(
        series, levels, "Largest loss difference of torch and Flax so far, nats", "optimizer step", floor=1e-16
    )
    dtype, run = next(iter(report.divergences.items()))
    curve = charts.lines(
        [Line(f"torch, {dtype}", "b wide", run.torch), Line(f"Flax, {dtype}", "a", run.flax)],
        "Both training losses: one line lies on the other",
        "optimizer step",
    )
    figures = f'<div class="figures">{divergence}{curve}</div>'
    return f"<section><h2>{_steps(report)}</h2><p>{FLOOR_TEXT}</p>{figures}</section>"


def _steps(report: Report) -> str:
    return f"{max(len(run.torch) for run in report.divergences.values())} training steps"


def _faults(report: Report) -> str:
    if not report.faults:
        return ""
    rows = []
    for fault, caught in report.faults:
        seen = "pass" if fault.shows_at(caught) else "fail"
        where = f"<code>{escape(caught.where)}</code>" if caught else "not caught"
        error = number(caught.error) if caught else ""
        rung = escape(caught.rung) if caught else ""
        rows.append(
            f'<tr class="{seen}"><th>{escape(fault.name)}</th><td>{rung}</td><td>{where}</td><td>{error}</td></tr>'
        )
    return (
        "<section><h2>Planted faults</h2><p>Each is planted in one side alone; the ladder must catch it, and "
        'name the place.</p><div class="scroll"><table class="faults"><thead><tr><th>fault</th><th>caught by</th>'
        f"<th>shows first at</th><th>error</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


STYLE = """
:root { --page: #fbfbf9; --ink: #1d1f21; --soft: #5f6670; --rule: #d9dbd6; --card: #fff;
  --a: #2563b8; --b: #c2571a; --c: #7a4fb5; --floor: #7d848c; --good: #17703c; --bad: #b3261e; --bad-soft: #fde8e6; }
@media (prefers-color-scheme: dark) { :root { --page: #15171a; --ink: #e6e7e4; --soft: #9aa1aa; --rule: #33373d;
  --card: #1c1f23; --a: #77aef5; --b: #f0975a; --c: #bb9bf0; --floor: #8a9199; --good: #6fcf97; --bad: #ff8a80;
  --bad-soft: #3a1f1d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 12px; } h2 { font-size: 1.2rem; margin: 40px 0 8px; }
p { margin: 0 0 12px; max-width: 70ch; } small { color: var(--soft); font-size: .8rem; font-weight: normal; }
.verdict { padding: 12px 16px; border-left: 4px solid var(--good); background: var(--card); max-width: none; }
.verdict.fail { border-color: var(--bad); background: var(--bad-soft); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: 6px 10px 6px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
thead th { color: var(--soft); font-weight: 600; } tbody th { font-weight: 600; min-width: 9.5rem; }
.ladder small { display: block; } td { font-variant-numeric: tabular-nums; } td.none { color: var(--soft); }
td.pass b { color: var(--good); } td.fail, tr.fail { background: var(--bad-soft); } td.fail b { color: var(--bad); }
.faults tbody th { font-weight: normal; } .faults td:last-child { white-space: nowrap; }
code { font: .85em ui-monospace, monospace; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 16px; }
figure { margin: 0; padding: 12px; background: var(--card); border: 1px solid var(--rule); border-radius: 6px; }
figcaption { font-size: .85rem; color: var(--soft); margin-top: 4px; }
svg { width: 100%; height: auto; display: block; }
.legend { font-size: .8rem; display: flex; flex-wrap: wrap; gap: 4px 14px; margin-bottom: 6px; }
.key i { display: inline-block; width: 14px; height: 4px; border-radius: 2px; margin-right: 5px; }
.key i { vertical-align: middle; }
.tick { font: 11px system-ui, sans-serif; fill: var(--soft); } .grid { stroke: var(--rule); stroke-width: 1; }
.halo { paint-order: stroke; stroke: var(--card); stroke-width: 4px; stroke-linejoin: round; }
.line { fill: none; stroke-width: 1.4; stroke-linejoin: round; } .line.wide { stroke-width: 4; opacity: .45; }
.bound { stroke-width: 1.2; stroke-dasharray: 5 4; }
.line.a, .bound.a { stroke: var(--a); } .line.b, .bound.b { stroke: var(--b); } .line.c, .bound.c { stroke: var(--c); }
.line.floor { stroke: var(--floor); stroke-dasharray: 2 3; }
.bar.a, .dot.a, .tick.a, i.a { fill: var(--a); background: var(--a); }
.bar.b, .dot.b, .tick.b, i.b { fill: var(--b); background: var(--b); }
.bar.c, .dot.c, .tick.c, i.c { fill: var(--c); background: var(--c); } i.floor { background: var(--floor); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px; font-size: .9rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; }
@media (max-width: 560px) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 8px; }
  tbody th { min-width: 7rem; } th, td { padding-right: 8px; } .ladder tbody th > small { display: none; } }
"""
