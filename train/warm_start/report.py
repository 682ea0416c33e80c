"""Tables and plot of a warm start's report."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from torch_ref.spec.storage import write_errors
from train.plot import as_label


def print_tables(report: dict, console: Console) -> None:
    """Losses after each stage and, of the layers, the least, median and largest error."""
    losses = report["losses"]
    texts = [(text, length) for text, by_length in losses["original"].items() for length in by_length]
    table = Table(title="next-token loss on held-out text, nats")
    table.add_column("stage")
    for text, length in texts:  # as a string, brackets in a name would be taken for markup
        table.add_column(Text(f"{Path(text).name}\n{length} tokens"), justify="right")
    for stage, measured in losses.items():
        table.add_row(stage, *(f"{measured[text][length]:.4f}" for text, length in texts))
    console.print(table)
    table = Table(title="relative error of the attention's output")
    for name in ("stage", "best layer", "median", "worst layer"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage in ("converted", "fitted"):
        errors = sorted(layer[stage] for layer in report["layers"] if stage in layer)
        if errors:
            table.add_row(stage, *(f"{errors[at]:.3f}" for at in (0, len(errors) // 2, -1)))
    console.print(table)


def draw(report: dict, file: Path) -> None:
    """Losses by stage, errors by layer, and the distillation's curve, side by side in one PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    curve = report.get("distillation")
    by_stage, by_layer, *rest = figure.subplots(1, 3 if curve else 2)
    losses = report["losses"]
    for text, lengths in losses["original"].items():
        for length in lengths:
            values = [losses[stage][text][length] for stage in losses]
            by_stage.plot(list(losses), values, marker="o", label=f"{as_label(Path(text).name)}, {length} tokens")
    by_stage.set(title="Loss on held-out text", ylabel="nats per token")
    by_stage.tick_params(axis="x", rotation=20)
    for stage in ("converted", "fitted"):
        errors = [layer[stage] for layer in report["layers"] if stage in layer]
        by_layer.plot(range(len(errors)), errors, marker=".", label=stage)
    by_layer.set(title="Error of each attention layer's output", xlabel="layer", ylabel="relative to its norm")
    by_layer.set_ylim(bottom=0)
    for axes in rest:
        axes.plot(range(1, len(curve) + 1), curve)
        axes.set(title="Distillation", xlabel="step", ylabel="KL from the targets, nats per token")
    for axes in (by_stage, by_layer, *rest):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    by_stage.legend(frameon=False)
    by_layer.legend(frameon=False)
    with write_errors(file):
        figure.savefig(file, dpi=120)
