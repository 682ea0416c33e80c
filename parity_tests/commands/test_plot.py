"""Pictures of runs: what is drawn, from what."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread

from torch_ref.spec.interface import UserError
from train.plot import Curves, expert_load, main, plot_runs, running_mean


def write_run(folder: Path, steps: int = 40, scale: float = 1.0, experts: int = 4) -> Path:
    folder.mkdir()
    random = np.random.default_rng(1)
    records: list[dict] = []
    for step in range(1, steps + 1):
        counts = random.integers(1, 50, (3, experts)).tolist() if experts else []
        loss = None if step == 7 else scale * (9 - 6 * step / steps) + float(random.normal(0, 0.1))
        records.append(
            {
                "kind": "step",
                "step": step,
                "phase": "main" if step <= steps - 5 else "extended",
                "loss": loss,
                "grad_norm": loss,
                "learning_rate": 0.01,
                "tokens_per_second": 1000 + step,
                "applied": step != 7,
                "expert_counts": counts,
            }
        )
        if step % 10 == 0:
            records.append({"kind": "validation", "step": step, "loss": loss})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def inked(picture: Path) -> float:
    """The part of a picture that is not white."""
    return float((imread(picture)[..., :3] < 0.99).any(axis=2).mean())


def test_one_run_and_several(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first, second = write_run(tmp_path / "first"), write_run(tmp_path / "second", scale=0.9)
    assert main([str(first)]) == 0
    assert main([str(first), str(second)]) == 0
    one, two = imread(first / "plot.png"), imread(first / "comparison.png")
    assert capsys.readouterr().out.split() == [str(first / "plot.png"), str(first / "comparison.png")]
    assert one.shape[0] > 900 and one.shape[1] > 1500
    # The second run adds a heat map below, and its own curves.
    assert two.shape[0] > one.shape[0] + 300 and two.shape[1] == one.shape[1]
    assert inked(first / "plot.png") > 0.2


def test_runs_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [tmp_path / "a" / "seed" / "run", tmp_path / "b" / "seed" / "run", tmp_path / "b" / "other"]
    for folder in folders:
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_run(folder)
    monkeypatch.chdir(folders[0])
    labels: list[str] = []
    monkeypatch.setattr(Axes, "legend", lambda axes, **_: labels.extend(axes.get_legend_handles_labels()[1]))
    plot_runs([Path(), *folders[1:]], tmp_path / "plot.png")
    names = [label.removesuffix(": training") for label in labels if label.endswith(": training")]
    assert names == ["a/seed/run", "b/seed/run", "other"]


def test_the_whole_of_each_loss_curve_is_within_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of validation on other text, which may be far from the training's, and of a run that began with a higher loss;
    but not of a spike."""
    late, early = write_run(tmp_path / "late", scale=0.5), write_run(tmp_path / "early")
    others = [("hard", 4, 14.0), ("hard", 8, 12.0), ("easy", 4, 0.5), ("easy", 8, 0.25), ("hard", 12, 1e6)]
    with open(late / "metrics.jsonl", "a") as file:
        for name, step, loss in others:
            file.write(json.dumps({"kind": "validation", "dataset": name, "step": step, "loss": loss}) + "\n")
    limits: list[tuple[float, float]] = []
    keep = Axes.set
    monkeypatch.setattr(Axes, "set", lambda axes, **to: (limits.append(to.get("ylim")), keep(axes, **to)))
    plot_runs([late, early], tmp_path / "plot.png")
    low, high = limits[0]
    assert low < 0.25 and 14 < high < 20


def test_each_validation_dataset_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run")
    records = [{"kind": "validation", "dataset": "news", "step": step, "loss": 0.1 * step} for step in (10, 20)]
    with open(run / "metrics.jsonl", "a") as metrics:
        metrics.writelines(json.dumps(record) + "\n" for record in records)
    drawn: dict[str, list] = {}
    plot = Axes.plot

    def note(self, x, y, *arguments, label=None, **look):
        drawn[label] = [list(x), list(y)]
        return plot(self, x, y, *arguments, label=label, **look)

    monkeypatch.setattr(Axes, "plot", note)
    plot_runs([run], tmp_path / "plot.png")
    assert drawn["run: validation news, best 1.000"] == [[10, 20], [1.0, 2.0]]
    assert len(next(at for label, (at, _) in drawn.items() if (label or "").startswith("run: validation, best"))) == 4


def test_runs_that_are_short_dense_or_broken_can_be_drawn(tmp_path: Path) -> None:
    one_step = write_run(tmp_path / "one-step", steps=1)
    dense = write_run(tmp_path / "dense", experts=0)
    broken = tmp_path / "broken"
    broken.mkdir()
    record = json.loads((one_step / "metrics.jsonl").read_text().splitlines()[0])
    record |= {"loss": None, "grad_norm": None, "applied": False}
    (broken / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    dollars = write_run(tmp_path / "a$x_{$", steps=1)  # is no mathematics
    assert inked(plot_runs([one_step, dense, broken, dollars], tmp_path / "all.png")) > 0.05


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        plot_runs([tmp_path], tmp_path / "plot.png")
    (tmp_path / "metrics.jsonl").write_text("")
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: no step has been logged yet\n"


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("curves", "--output {}: must end in .png"),
        ("curves.foo", "--output {}: must end in .png"),
        ("a folder.png", "{}: could not be written: Is a directory"),
        ("a file/curves.png", "{.parent}: cannot be made"),
    ],
)
def test_a_picture_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, output: str, said: str
) -> None:
    run = write_run(tmp_path / "run", steps=1)
    (tmp_path / "a folder.png").mkdir()
    (tmp_path / "a file").touch()
    assert main([str(run), "--output", str(tmp_path / output)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: " + said.format(tmp_path / output)) and error.count("\n") == 1


def test_the_picture_is_written_where_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run, output = write_run(tmp_path / "run", steps=1), tmp_path / "a folder" / "curves.png"
    assert main([str(run), "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}\n" and inked(output) > 0.02
    assert not (run / "plot.png").exists()


def test_running_mean() -> None:
    values = np.arange(300.0)
    assert np.allclose(running_mean(values), values)  # centred, also at both ends
    noisy = np.where(np.arange(300) % 2, 1.0, 3.0)
    assert np.abs(running_mean(noisy)[10:-10] - 2).max() < 0.2
    noisy[100] = np.nan
    assert np.isfinite(running_mean(noisy)).all()


def test_expert_load(tmp_path: Path) -> None:
    run = Curves.read(write_run(tmp_path / "run", steps=700))
    counts = np.array([step["expert_counts"] for step in run.steps], dtype=float)
    load = expert_load(run)
    assert load.shape == (3 * 4, 300)
    assert np.allclose(load.reshape(3, 4, 300).mean(axis=1), 1)
    # 700 steps in 300 columns: the first column holds three steps.
    assert np.allclose(load[:4, 0], counts[:3, 0].sum(axis=0) / counts[:3, 0].sum(axis=0).mean())
