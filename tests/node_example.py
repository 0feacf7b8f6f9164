"""The examples of clients/node, run as their user would: the locked packages, Node and npm from `.venv-clients`."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN = ROOT / ".venv-clients" / "bin"


def run_example(folder: Path, script: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Installs into `folder` what package-lock.json names, and runs `script` there with `env` beside our own."""
    for name in ("package.json", "package-lock.json", script):
        shutil.copy(ROOT / "clients" / "node" / name, folder / name)
    environment = {**os.environ, **env, "PATH": os.pathsep.join((str(BIN), os.environ["PATH"]))}
    install = ["npm", "ci", "--silent", "--no-audit", "--no-fund"]
    subprocess.run(install, cwd=folder, env=environment, check=True, capture_output=True)
    command = ["node", script, *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
