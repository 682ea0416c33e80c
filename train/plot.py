"""Curves of runs in one picture: `python -m train.plot RUN [RUN ...] [--output FILE.png]`.

Several runs lie over each other (torch over Flax, one seed over another); each has a heat map of its expert load.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from torch_ref.spec.interface import UserError
from torch_ref.spec.storage import make_folder, user_path, write_errors
from train.run.runlog import METRICS, best_loss, read_metrics, validation_curves
from train.shell import COMPLETE, shell

if TYPE_CHECKING:  # half of the time a command takes to start: imported where something is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

COLORS = ("#1f5fa8", "#d1495b", "#2e8b57", "#8e5aa8", "#c77c11", "#3d8f9c")
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8e8e8",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
}
MARKERS = "osD^vPX"
"""Of the validation datasets of a run."""
DRAWN = {"phase", "loss", "learning_rate", "tokens_per_second", "grad_norm", "applied", "expert_counts"}
"""Of a step."""
HEAT_MAP_COLUMNS = 300
"""Steps are averaged so that a heat map has at most so many columns."""


@dataclass(frozen=True)
class Curves:
    """What is drawn of one run."""

    name: str
    steps: list[dict[str, Any]]
    validations: dict[str | None, list[dict[str, Any]]]
    """By dataset, None for the held-out rows."""

    @classmethod
    def read(cls, run_dir: Path, name: str = "") -> Curves:
        records = read_metrics(run_dir)
        steps = [record for record in records if record["kind"] == "step"]
        if not steps:
            raise UserError(f"{run_dir}: no step has been logged yet")
        # A damaged line may lack a field, or have counts of another shape.
        shape = np.shape(steps[-1].get("expert_counts", []))
        steps = [step for step in steps if DRAWN <= step.keys() and np.shape(step["expert_counts"]) == shape]
        if not steps:
            raise UserError(f"{run_dir}: no step in {METRICS} is whole")
        return cls(as_label(name), steps, validation_curves(records))

    def column(self, name: str) -> Float[np.ndarray, " steps"]:
        """One value of every step; null becomes NaN."""
        return np.array([step[name] for step in self.steps], dtype=float)


def values_of(validations: list[dict[str, Any]]) -> Float[np.ndarray, " validations"]:
    """The losses of a validation curve; null becomes NaN."""
    return np.array([record.get("loss") for record in validations], dtype=float)


def names_of(run_dirs: Sequence[Path]) -> list[str]:
    """The folders' names, with as much of the paths before them as tells them apart."""
    paths = [Path(run_dir).resolve() for run_dir in run_dirs]
    names = []
    for path in paths:
        parts = 1
        while any(other != path and other.parts[-parts:] == path.parts[-parts:] for other in paths):
            parts += 1
        names.append("/".join(path.parts[-parts:]))
    return names


def as_label(name: str) -> str:
    """A name in a picture, in which matplotlib takes what stands between two dollars for mathematics."""
    return name.replace("$", r"\$")


def plot_runs(run_dirs: Sequence[Path], output: Path) -> Path:
    """Draw the runs into one PNG and return its path. Raises `UserError` for a folder that is not a run's, and for a
    picture that cannot be written."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    runs = [Curves.read(*run) for run in zip(run_dirs, names_of(run_dirs), strict=True)]
    heat_maps = [run for run in runs if run.steps[0]["expert_counts"]]
    heights = [7.2, *(2.2 + 0.12 * len(run.steps[0]["expert_counts"]) for run in heat_maps)]
    with rc_context(STYLE):
        figure = Figure(figsize=(12, sum(heights)), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12))
        curves, *maps = np.atleast_1d(figure.subfigures(len(heights), 1, height_ratios=heights, hspace=0.02))
        _draw_curves(curves, runs)
        for place, run in zip(maps, heat_maps, strict=True):
            _draw_expert_load(place, run)
        make_folder(output.parent)
        with write_errors(output):
            figure.savefig(output, dpi=130)
    return output


def require_png(option: str, path: Path) -> None:
    """Raises `UserError` for a picture of another name: matplotlib chooses a format by it, or appends one."""
    if path.suffix.lower() != ".png":
        raise UserError(f"{option} {path}: must end in .png")


def _draw_curves(figure: SubFigure, runs: list[Curves]) -> None:
    from matplotlib.ticker import FuncFormatter

    grid = figure.add_gridspec(2, 3, height_ratios=[2, 1])
    loss = figure.add_subplot(grid[0, :])
    rate, speed, norm = (figure.add_subplot(grid[1, column]) for column in range(3))
    for number, run in enumerate(runs):
        # Runs may coincide: the later ones are dashed, so that each shows.
        look = {"color": COLORS[number % len(COLORS)], "linestyle": "--" if number else "-"}
        step = run.column("step")
        _draw_loss(loss, run, look)
        rate.plot(step, run.column("learning_rate"), **look, linewidth=1.8)
        _draw_noisy(speed, step, run.column("tokens_per_second"), look)
        _draw_noisy(norm, step, run.column("grad_norm"), look)
    _shade_extended_phase([loss, rate, speed, norm], runs)
    loss.set(title="Loss, nats per token", xlabel="step", ylim=_loss_limits(runs))
    loss.legend(ncols=max(1, len(runs) // 3 + 1), loc="upper right")
    rate.set(title="Learning rate", xlabel="step", ylim=(0, None))
    speed.set(title="Tokens per second", xlabel="step", ylim=(0, None))
    norm.set(title="Gradient norm, before clipping", xlabel="step", yscale="log")
    for axis_format in (norm.yaxis.set_major_formatter, norm.yaxis.set_minor_formatter):
        axis_format(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "125" else ""))


def _draw_loss(axes: Axes, run: Curves, look: dict[str, str]) -> None:
    step, loss, color = run.column("step"), run.column("loss"), look["color"]
    _draw_noisy(axes, step, loss, look, label=f"{run.name}: training")
    for marker, (dataset, records) in zip(itertools.cycle(MARKERS), run.validations.items(), strict=False):
        at = [record["step"] for record in records]
        values = values_of(records)
        kept = best_loss(records)
        best = "" if kept is None else f", best {kept:.3f}"
        axes.plot(
            at,
            values,
            color=color,
            marker=marker,
            markersize=5,
            markeredgecolor="white",
            linestyle=":",
            linewidth=1.2,
            label=f"{run.name}: validation{f' {dataset}' if dataset else ''}{best}",
        )
    skipped = step[run.column("applied") == 0]
    if len(skipped):
        axes.plot(
            skipped,
            np.full(len(skipped), 0.03),
            transform=axes.get_xaxis_transform(),
            color=color,
            marker="x",
            linestyle="none",
            label=f"{run.name}: skipped steps",
        )


def _draw_noisy(
    axes: Axes, step: np.ndarray, values: np.ndarray, look: dict[str, str], label: str | None = None
) -> None:
    """The values themselves, faint, under their running mean."""
    axes.plot(step, values, color=look["color"], linewidth=0.8, alpha=0.3)
    axes.plot(step, running_mean(values), **look, linewidth=1.8, label=label)


def running_mean(values: Float[np.ndarray, " steps"]) -> Float[np.ndarray, " steps"]:
    """Centred mean over about a fiftieth of the run, narrower at both ends; NaN is left out."""
    half = len(values) // 100
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    index = np.arange(len(values))
    reach = np.minimum(half, np.minimum(index, len(values) - 1 - index))
    low, high = index - reach, index + reach + 1
    with np.errstate(invalid="ignore", divide="ignore"):
        return (sums[high] - sums[low]) / (counts[high] - counts[low])


def _loss_limits(runs: list[Curves]) -> tuple[float, float]:
    """All of the curves, those of validation too, but the spikes: what is a tenth above the highest first value."""
    curves = [run.column("loss") for run in runs]
    curves += [values_of(records) for run in runs for records in run.validations.values()]
    curves = [finite for curve in curves if len(finite := curve[np.isfinite(curve)])]
    if not curves:
        return 0.0, 1.0
    losses = np.concatenate(curves)
    low, high = losses.min(), min(losses.max(), 1.1 * max(curve[0] for curve in curves))
    margin = 0.05 * (high - low) or 0.1
    return low - margin, high + margin


def _shade_extended_phase(all_axes: list[Axes], runs: list[Curves]) -> None:
    extended = [step["step"] for run in runs for step in run.steps if step["phase"] == "extended"]
    for axes in all_axes:
        if extended:
            axes.axvspan(min(extended) - 1, max(extended), color="#f3efe4", zorder=0)
        axes.margins(x=0.01)
    if extended:
        all_axes[0].annotate(
            "extended phase",
            (max(extended), 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            color="#8a7f66",
            fontsize=8,
        )


def _draw_expert_load(figure: SubFigure, run: Curves) -> None:
    """A band of rows per layer, a row per expert: its share of the tokens, relative to an equal share."""
    axes = figure.add_subplot()
    load = expert_load(run)
    layers, experts = len(run.steps[0]["expert_counts"]), len(run.steps[0]["expert_counts"][0])
    image = axes.imshow(
        np.log2(load.clip(2**-4)),
        aspect="auto",
        cmap="RdBu_r",
        vmin=-2,
        vmax=2,
        interpolation="nearest",
        extent=(run.steps[0]["step"] - 0.5, run.steps[-1]["step"] + 0.5, layers * experts, 0),
    )
    for boundary in range(1, layers):
        axes.axhline(boundary * experts, color="white", linewidth=1.5 if layers <= 12 else 0.6)
    labelled = range(0, layers, 1 if layers <= 12 else 5)
    axes.set_yticks([(layer + 0.5) * experts for layer in labelled], [str(layer) for layer in labelled])
    axes.set(title=f"Expert load, {run.name}", xlabel="step", ylabel=f"layer, {experts} experts each")
    axes.grid(False)
    bar = figure.colorbar(image, ax=axes, ticks=[-2, -1, 0, 1, 2], pad=0.01, aspect=14)
    bar.ax.set_yticklabels(["¼", "½", "equal", "2x", "4x"])
    bar.outline.set_visible(False)


def expert_load(run: Curves) -> Float[np.ndarray, "rows columns"]:
    """Each expert's tokens over the layer's mean, layers and experts down, steps across."""
    counts = np.array([step["expert_counts"] for step in run.steps], dtype=float)
    columns = np.array_split(np.arange(len(counts)), min(len(counts), HEAT_MAP_COLUMNS))
    summed = np.stack([counts[column].sum(axis=0) for column in columns])
    load = summed / summed.mean(axis=2, keepdims=True).clip(1e-9)
    return load.reshape(len(columns), -1).T


@shell
def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m train.plot", description="Draw runs into one picture.")
    parser.add_argument("runs", nargs="+", type=user_path, metavar="RUN", help="One or more folders of runs.")
    parser.add_argument(
        "--output",
        type=user_path,
        help="The PNG file to write; by default plot.png, of several runs comparison.png, in the first run's folder.",
    )
    arguments = parser.parse_args(argv)
    default = "plot.png" if len(arguments.runs) == 1 else "comparison.png"
    output = arguments.output or arguments.runs[0] / default
    require_png("--output", output)
    print(plot_runs(arguments.runs, output))
    return COMPLETE


if __name__ == "__main__":
    sys.exit(main())
