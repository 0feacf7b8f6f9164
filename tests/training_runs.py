"""Runs on the tiny base as tests of their ends need them: in this process, as a command, as two processes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.numpy import load_file

from onebase.adapter import WEIGHTS
from onebase.home import Home
from onebase_training.config import make_recipe
from onebase_training.status import StatusWriter
from onebase_training.train import Run, RunOptions, RunResult, carry_out
from onebase_training.trainer import StepDataset
from ports import held_port


def train(
    home: Home, content: dict[str, Any], folder: Path, *, resume: bool = False, again: str = ""
) -> tuple[RunResult, str]:
    """In this process. The result and what was said."""
    said = Console(file=StringIO(), width=200)
    status = StatusWriter(folder / "status.json")
    result = carry_out(
        Run(make_recipe(content), home, folder, status, said, RunOptions(resume=resume, resume_command=again))
    )
    assert isinstance(said.file, StringIO)
    return result, said.file.getvalue()


KILLED_AT = """
import os, signal
from onebase_training.trainer import StepDataset
original = StepDataset.__getitem__
def killed(self, index):
    if index + 1 == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, index)
StepDataset.__getitem__ = killed
from onebase_training.__main__ import main
main()
"""


def start(
    home: Home, recipe_file: Path, folder: Path, *words: str, killed_at: int | None = None, **env: str
) -> subprocess.Popen[str]:
    """As a process of its own, by the command line. `killed_at`: the step in which it is ended by SIGKILL."""
    program = ["-m", "onebase_training"] if killed_at is None else ["-c", KILLED_AT.format(step=killed_at)]
    return subprocess.Popen(
        [
            sys.executable,
            *program,
            str(recipe_file),
            "--home",
            str(home.root),
            "--run-dir",
            str(folder),
            "--status",
            str(folder / "status.json"),
            *words,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@contextmanager
def started_two(home: Home, recipe_file: Path, folder: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """As `accelerate launch` starts them. The port where they meet is theirs until both have ended."""
    with held_port() as held:
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(held.getsockname()[1])}
        alike = {"WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true", **meet}
        yield [start(home, recipe_file, folder, RANK=r, LOCAL_RANK=r, **alike) for r in ("0", "1")]


def weights(folder: Path) -> dict[str, Any]:
    return dict(load_file(folder / "adapter" / WEIGHTS))


def status(folder: Path) -> dict[str, Any]:
    try:
        told: dict[str, Any] = json.loads((folder / "status.json").read_text())
    except FileNotFoundError:
        return {}
    return told


def signal_at_step(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """The signal comes while that step is under way."""
    original = StepDataset.__getitem__

    def spied(self: StepDataset, index: int) -> Any:
        if index + 1 == step:
            os.kill(os.getpid(), number)
        return original(self, index)

    monkeypatch.setattr(StepDataset, "__getitem__", spied)


def assert_equal_bits(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert set(one) == set(other)
    assert all((one[name] == other[name]).all() for name in one)
