"""The shell around commands: mistakes in one line, bytes that are no text, terminals, pipes; one process a folder."""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from torch_ref.spec.interface import UserError
from torch_ref.spec.leaving import leave, no_room
from torch_ref.spec.memory import host_memory_available
from torch_ref.spec.processes import Processes
from train.run.guard import HOLDER, LOCK, exclusive
from train.shell import shell, write_any_character

REPOSITORY = Path(__file__).parents[2]


def raising(error: BaseException):
    def command(argv):
        raise error

    return shell(command)


OF_XLA = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 6442450944 bytes."
OF_TORCH = "CUDA out of memory"
OF_def test_training_that_does_not_fit_says_which_option_makes_it_smaller(tmp_path, monkeypatch, capsys):
    backend = pytest.importorskip("torch_ref.backend")
    from torch_ref.train import main

    def full(*_):
        raise RuntimeError(f"{OF_MPS}. Use PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0")

    monkeypatch.setattr(backend, "objective", full)
    (tmp_path / "text.txt").write_text("A word and another one. " * 400)
    flags = f"--preset tiny --dataset {tmp_path}/text.txt --seq-len 16 --steps 2 --validation-rows 0 --eval-interval 0"
    assert main([*flags.split(), "--run-dir", str(tmp_path / "run"), "--no-tensorboard"]) == 2
    said = capsys.readouterr().err
    assert f"error: {TOO_MUCH} ({OF_MPS})\n" in said and "Traceback" not in said
