"""Runs on the tiny base as tests of their ends need them: in this process, as a command, as two processes."""

import json
import os
import socket
import subprocess
import sys
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


def start(home: Home, recipe_file: Path, folder: Path, *words: str, **env: str) -> subprocess.Popen[str]:
    """As a process of its own, by the command line."""
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "onebase_training",
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


def start_two(home: Home, recipe_file: Path, folder: Path) -> list[subprocess.Popen[str]]:
    """As `accelerate launch` starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meet = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    return [start(home, recipe_file, folder, RANK=r, LOCAL_RANK=r, **meet) for r in ("0", "1")]


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
