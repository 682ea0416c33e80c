"""What a launcher says of its processes, and the examples of docs/cluster, run as far as one machine can."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("flax", reason="processes are JAX's")

from parity_tests.support.processes import REPOSITORY, free_port, settings, started
from train import command_line
from train.run.options import Options

EXAMPLES = REPOSITORY / "docs/cluster"
PROGRAM = "python -m train.flax_main"


def slurm_command() -> str:
    (line,) = re.findall(rf"^srun .*?{PROGRAM} (.*)$", (EXAMPLES / "slurm.sh").read_text(), re.M)
    return line


def kubernetes_command() -> str:
    """The shell command of each pod: the folded text below `args`."""
    (text,) = re.findall(r"args:\n +- >-\n((?: {14}.*\n)+)", (EXAMPLES / "kubernetes.yaml").read_text())
    return " ".join(text.split())


def parsed(flags: str) -> Options:
    return command_line.parse(shlex.split(flags.replace("$JOB_COMPLETION_INDEX", "3").replace('"$@"', "")), PROGRAM)


def test_the_examples_are_settings_that_fit_together() -> None:
    for options in (parsed(slurm_command()), parsed(kubernetes_command().partition(PROGRAM)[2])):
        assert options.devices == 32 and options.batch_size == 256
    assert (options.processes, options.process_id) == (4, 3)
    text = (EXAMPLES / "kubernetes.yaml").read_text()
    name = re.search(r"kind: Job\nmetadata:\n  name: (\S+)", text)[1]
    subdomain = re.search(r"subdomain: (\S+)", text)[1]
    assert options.coordinator.startswith(f"{name}-0.{subdomain}:") and f"completions: {options.processes}\n" in text


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2"}
OPEN_MPI = {"OMPI_MCA_orte_hnp_uri": "28672.0;tcp://127.0.0.1:34911", "OMPI_COMM_WORLD_SIZE": "2"}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["SLURM", "Open MPI"])
def test_launchers_are_found(tmp_path: Path, launcher: str) -> None:
    def environment(number: int) -> dict[str, str]:
        if launcher == "SLURM":
            return SLURM | {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}
        return OPEN_MPI | {"OMPI_COMM_WORLD_RANK": str(number), "OMPI_COMM_WORLD_LOCAL_RANK": str(number)}

    config = settings(tmp_path, steps=2, extended_steps=0)
    with started(config, tmp_path / "run", 2, environment=environment) as run:
        assert run.codes() == [0, 0], run.said(0) + run.said(1)
        assert "2 processes" in run.said(0) and run.said(1) == ""


SRUN = """#!/bin/bash
[ "$1" = --kill-on-bad-exit=1 ] || exit 9
shift
for task in 0 1; do
    SLURM_STEP_NODELIST=127.0.0.1 SLURM_NTASKS=2 SLURM_PROCID=$task SLURM_LOCALID=$task "$@" > task_$task.out 2>&1 &
    tasks="$tasks $!"
done
echo $tasks > tasks
for task in $tasks; do wait $task || code=$?; done
exit $code
"""


@pytest.mark.slow
def test_the_slurm_script_goes_on_after_its_time(tmp_path: Path) -> None:
    """Its body, with an `srun` that starts two tasks here and an `scontrol` that takes a note."""
    config, tools = settings(tmp_path, steps=40), tmp_path / ".venv/bin"
    tools.mkdir(parents=True)
    (tools / "activate").write_text(f'export PATH="{tools}:$PATH"\n')
    scripts = {"srun": SRUN, "scontrol": "#!/bin/bash\necho $* >> asked\n"}
    scripts["python"] = f'#!/bin/bash\nexec {sys.executable} "$@"\n'
    for name, text in scripts.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    flags = f"--config {config} --run-dir run --mesh fsdp=2 --batch-size 8".split()
    environment = os.environ | {
        "SLURM_JOB_ID": str(free_port() % 4096),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
    }
    for code, asked in ((143, 1), (0, 1)):
        job = subprocess.Popen(["bash", EXAMPLES / "slurm.sh", *flags], cwd=tmp_path, env=environment)
        log = tmp_path / "run/training.logs"
        end = time.monotonic() + 200
        while code and not (log.exists() and "\nStep 5 |" in log.read_text()):
            assert time.monotonic() < end and job.poll() is None, (tmp_path / "task_0.out").read_text()
            time.sleep(0.02)
        if code:
            for task in (tmp_path / "tasks").read_text().split():  # as SLURM does five minutes before the end
                os.kill(int(task), signal.SIGTERM)
        assert job.wait(300) == code, (tmp_path / "task_0.out").read_text()
        assert (tmp_path / "asked").read_text() == f"requeue {environment['SLURM_JOB_ID']}\n" * asked
    assert "Resuming from" in (tmp_path / "task_0.out").read_text() and (tmp_path / "task_1.out").read_text() == ""


@pytest.mark.slow
def test_the_command_of_a_pod_runs(tmp_path: Path) -> None:
    """The shell command of the Job, of two pods: only where they find each other is another place."""
    config = settings(tmp_path, steps=2, extended_steps=0)
    command = kubernetes_command().replace("smol-0.smol:12345", f"127.0.0.1:{free_port()}").replace("/runs/smol", "run")
    command = command.replace("--processes 4", "--processes 2").replace("python", sys.executable)
    command += f" --config {config} --mesh fsdp=2 --batch-size 8"
    shared = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    pods = [
        subprocess.Popen(["bash", "-c", command], cwd=tmp_path, env=shared | {"JOB_COMPLETION_INDEX": str(index)})
        for index in range(2)
    ]
    assert [pod.wait(300) for pod in pods] == [0, 0]
    assert (tmp_path / "run/deepseek_final.safetensors").is_file()
