"""Server and trainers are killed at random moments: no job is lost, doubled or left without an end.

Two hundred kills take minutes: `python -m job_killer ROOT --seed N --kills 200`, in tests/. What they gave is kept in
bench/results/kills.jsonl.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_kill_9_of_server_and_trainers_loses_and_doubles_nothing(tmp_path: Path, seed: int) -> None:
    command = [sys.executable, "-m", "job_killer", str(tmp_path), "--seed", str(seed), "--kills", "6"]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert sum(report["kills"].values()) >= 6
    assert sum(report["states"].values()) == report["jobs"] > 0
    assert (report["lost"], report["duplicated"], report["half_served"]) == (0, 0, 0)
