"""The report: what it says of passes and failures, its page, and the tables it writes into README.md and docs."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the report compares with torch")
pytest.importorskip("flax", reason="the report compares with Flax")

from parity_tests import report
from parity_tests.harness import page
from parity_tests.harness.measure import Measurement, failures, relative_error
from parity_tests.harness.mutations import Mutation
from parity_tests.harness.training import Divergence
from parity_tests.report import RUNGS, Report
from torch_ref.spec.interface import UserError

REPOSITORY = Path(__file__).parents[2]
FAULT = Mutation("scale <forgotten>", "trace", "layers.0.attention.attend", lambda: None)


def made_up(error: float = 1e-15) -> Report:
    """A small report; `error` is that of one hidden state."""
    measurements = [Measurement("round trip", "all", "float64", "norm.weight", 0.0, 0.0)]
    for dtype, size, bound in (("float64", 1e-15, 1e-12), ("float32", 1e-7, 1e-5)):
        measurements += [
            Measurement("trace", "trace", dtype, "layers.0.attention", size, bound),
            Measurement("hidden", "scan", dtype, "layer 0", error if dtype == "float64" else size, bound),
            Measurement("gradient", "scan", dtype, "layers.0.input_norm.weight", 2 * size, 100 * bound),
        ]
    curve = np.linspace(5, 3, 200)
    floor = np.full((5, 200), 3e-4)
    caught = Measurement("trace", "trace", "float64", "layers.0.attention.attend", 0.2, 1e-12)
    return Report(
        {"torch": "CPU, torch 2", "JAX": "CPU, jax 0"},
        measurements,
        {
            "float64": Divergence("float64", curve, curve + 1e-14, None),
            "float32": Divergence("float32", curve, curve + 1e-5, floor),
        },
        [(FAULT, caught)],
    )


@pytest.mark.parametrize(
    "error, passes", [(1e-12, True), (1.1e-12, False), (float("nan"), False), (float("inf"), False)]
)
def test_verdict_follows_the_bounds(error, passes):
    made = made_up(error)
    assert made.passed == passes
    assert ("FAILED" in page.markdown(made)) != passes
    assert ('<p class="verdict fail">' in page.html(made)) != passes
    assert bool(failures(made.measurements)) != passes


@pytest.mark.parametrize(
    "caught",
    [
        None,
        Measurement("hidden", "trace", "float64", "layers.0.attention.attend", 0.2, 1e-12),
        Measurement("trace", "trace", "float64", "layers.0.attention.attended", 0.2, 1e-12),
    ],
)
def test_a_fault_unseen_or_shown_elsewhere_fails_the_report(caught):
    made = made_up()
    made.faults = [(FAULT, caught)]
    assert not made.passed


def test_exit_codes(monkeypatch, tmp_path, capsys):
    for error, code in ((1e-15, 0), (1e-3, 1)):
        monkeypatch.setattr(report, "measure", lambda *_, error=error, **__: made_up(error))
        assert report.main(["--out", str(tmp_path)]) == code
        assert {"index.html", "report.md"} <= {file.name for file in tmp_path.iterdir()}
    assert report.main(["--readme", "--quick"]) == 2


@pytest.mark.parametrize("device", ["cuda:97", "tpu"])
def test_absent_device_is_refused_in_one_line(tmp_path, capsys, device):
    assert report.main(["--torch-device", device, "--out", str(tmp_path)]) == 2
    assert re.fullmatch(rf"error: --device {device}: .*\n", capsys.readouterr().err)


class _Checker(HTMLParser):
    """Tags that are opened and not closed, and anything a page would load."""

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_whole_and_loads_nothing():
    text = page.html(made_up())
    checker = _Checker()
    checker.feed(text)
    assert checker.open == [] and checker.loads == [] and "url(" not in text and "@import" not in text
    assert checker.tags.count("svg") == 5 and "script" not in checker.tags
    assert "scale &lt;forgotten&gt;" in text
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert not re.search(r'="(nan|-?inf)|,nan|nan,', text)


@pytest.mark.parametrize(
    "losses", [[4.0, 3.0, np.nan, np.inf], [np.nan] * 4, [4.0] * 4], ids=["diverging", "no number", "level"]
)
def test_losses_that_are_no_numbers_or_all_the_same_are_drawn(losses):
    made = made_up(float("nan"))
    made.divergences = {"float64": Divergence("float64", np.array(losses), np.array(losses[::-1]), None)}
    made.measurements[1] = Measurement("trace", "trace", "float64", "layers.0.attention", float("nan"), 1e-12)
    text = page.html(made)
    assert text.count('<polyline class="line') == 3 and not re.search(r'(points|[xy][12]?|c[xy])="[^"]*(nan|inf)', text)


def test_markdown_names_the_failed_place():
    text = page.markdown(made_up(1e-3))
    assert "layer 0 off by 1.00e-03, bound 1e-12" in text
    assert "**FAILED** 1e-03 (bound 1e-12)" in text


def test_readme_table_is_replaced_between_its_markers(tmp_path):
    (tmp_path / "README.md").write_text(f"above\n{page.BEGIN}\nold\n{page.END}\nbelow\n")
    page.renew(made_up(), tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("above\n") and text.endswith("\nbelow\n") and "old" not in text
    assert "| hidden |" in text and "1e-15 (bound 1e-12)" in text
    assert "`layers.0.attention.attend`" in (tmp_path / "docs/mutations.md").read_text()
    with pytest.raises(UserError, match="README.md"):
        page.replace_between_markers("no markers", "table")


def test_published_tables_are_those_of_this_ladder():
    """What README and docs show has the rungs and faults that are measured now, all passed."""
    from parity_tests.harness import devices, faults_attention, faults_experts, faults_training, mutations  # noqa: F401

    readme = (REPOSITORY / "README.md").read_text()
    table = readme.partition(page.BEGIN)[2].partition(page.END)[0]
    rungs = re.findall(r"^\| ([^|]+?) \|", table, re.M)[1:]
    assert rungs == list(RUNGS)
    assert "FAILED" not in table
    published = re.findall(r"^\| ([^|]+?) \|", (REPOSITORY / "docs/mutations.md").read_text(), re.M)[1:]
    assert published == [planted.name for planted in mutations.MUTATIONS + devices.FAULTS]
    assert "not caught" not in (REPOSITORY / "docs/mutations.md").read_text()


def test_errors_are_relative_to_the_largest_value():
    assert relative_error([1.0, 2.0], [1.0, 4.0]) == 0.5
    assert relative_error([1, 2], [1, 3]) == 1  # integers: how many differ
    assert relative_error([1.0], [1.0, 2.0]) == np.inf
    assert np.isnan(relative_error([np.nan], [1.0]))
    assert relative_error(np.float32([0.1]), np.float64([0.1])) < 1e-7
    assert relative_error([0.0], [0.0]) == 0 and relative_error([1e-3], [0.0]) == 1e-3
    assert relative_error([1 + 2j], [1 - 2j]) == pytest.approx(4 / 5**0.5)  # not of the real parts alone
    with pytest.raises(AssertionError, match="nothing was measured"):
        failures([])


@pytest.mark.skipif(sys.platform != "linux", reason="the script is for Linux")
@pytest.mark.parametrize(
    ("summary", "said", "named", "unnamed"),
    [
        ("1 passed, 8 deselected", "passed", 0, 0),
        ("1 skipped, 8 deselected", "skipped", 1, 0),
        ("1 passed, 1 skipped", "passed", 0, 0),
        ("1 failed", "failed", 1, 1),
    ],
)
def test_a_row_of_the_reliability_runs_that_is_skipped_has_not_passed(summary, said, named, unnamed, tmp_path):
    """And fails where it was asked for. The commands of the rows stand in for themselves."""
    for command in ("pytest", "taskset", "git"):
        printed = f"==== {summary} in 0.10s ====" if command == "pytest" else ""
        (tmp_path / command).write_text(f"#!/bin/sh\necho '{printed}'\nexit {int('failed' in printed)}\n")
        (tmp_path / command).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for names, code in ((["quota"], named), ([], unnamed)):
        command = [REPOSITORY / ".ci/reliability", tmp_path / "reports", *names]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert ran.returncode == code and f"quota: {said} after" in ran.stdout, ran
