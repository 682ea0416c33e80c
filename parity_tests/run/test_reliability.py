"""The long runs behind docs/reliability.md: processes killed a hundred times, disks that fill up. `-m slow`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from parity_tests.harness.kills import INTERVAL
from parity_tests.harness.write_faults import FAULTS, MAINS, QUOTA

REPOSITORY = Path(__file__).parents[2]
NAMESPACE = ["unshare", "--map-root-user", "--mount"]

pytestmark = pytest.mark.slow


@pytest.fixture(params=list(MAINS))
def framework(request: pytest.FixtureRequest) -> str:
    pytest.importorskip({"flax": "jax"}.get(request.param, request.param))
    return request.param


def run(command: list[str], capsys: pytest.CaptureFixture) -> dict:
    """The report that a command of the harness prints."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.stdout, done.stderr
    with capsys.disabled():
        print(f"\n{done.stdout}")
    return json.loads(done.stdout)


def test_killed_a_hundred_times(framework: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = [sys.executable, "-m", "parity_tests.harness.kills", framework, str(tmp_path), "--kills", "100"]
    report = run(command, capsys)
    assert sum(report["kills"].values()) == 100
    assert report["joined log equals the unbroken one"] is True
    assert report["half-written checkpoints chosen"] == 0
    # A save that goes on in the background may not have landed when the next one is due.
    assert report["most steps done again"] <= (INTERVAL if framework == "torch" else 2 * INTERVAL)


def test_writes_that_fail(framework: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    if (
        not shutil.which("unshare")
        or subprocess.run([*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", tmp_path]).returncode
    ):
        pytest.skip("no mount namespaces here")
    command = [*NAMESPACE, sys.executable, "-m", "parity_tests.harness.write_faults", framework, str(tmp_path / "runs")]
    check_faults(run(command, capsys), FAULTS)


def test_a_quota_that_is_used_up(framework: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    if os.geteuid() or not shutil.which("mkfs.btrfs") or not Path("/dev/loop-control").exists():
        pytest.skip("takes root, a loop device and btrfs-progs")
    command = ["unshare", "--mount", sys.executable, "-m", "parity_tests.harness.write_faults", framework]
    check_faults(run([*command, str(tmp_path / "runs"), "--quota"], capsys), QUOTA)


def check_faults(report: dict, faults: dict) -> None:
    assert report.keys() == faults.keys()
    for fault, found in report.items():
        last = found["said"].splitlines()[-1]
        assert found["exit code"] == 2 and last.startswith("error: ") and faults[fault][1] in last, (fault, found)
        assert found["steps after the fault"] <= 5, (fault, found)
        assert found["equals the unbroken run"] is True, (fault, found)
