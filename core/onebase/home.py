"""The home folder: where everything that onebase keeps lies. Pure paths; knows nothing of what is in them.

The environment is read by its callers (settings, command line) and handed in, so that tests and embedders never
depend on process state.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onebase.home_version import upgrade


@dataclass(frozen=True, slots=True)
class Home:
    """The folders under one root. Nothing is created before `create`."""

    root: Path

    @property
    def adapters(self) -> Path:
        """Published versions (`AdapterStore`)."""
        return self.root / "adapters"

    @property
    def bases(self) -> Path:
        """Fetched base models."""
        return self.root / "bases"

    @property
    def runs(self) -> Path:
        """One folder a training run: recipe, status file, log, checkpoints."""
        return self.root / "runs"

    @property
    def files(self) -> Path:
        """Uploaded files."""
        return self.root / "files"

    @property
    def evaluations(self) -> Path:
        """What was measured of each version. Made by the first measurement."""
        return self.root / "evaluations"

    @property
    def cache(self) -> Path:
        """What can be thrown away at any time."""
        return self.root / "cache"

    @property
    def locks(self) -> Path:
        """Lock files between processes."""
        return self.root / "locks"

    @property
    def serving(self) -> Path:
        """What living servers tell training processes. Made by the first of them."""
        return self.root / "serving"

    def create(self) -> "Home":
        """Make the folders that are missing (owner-only root: it holds keys and users' data), and upgrade older ones.

        Raises InvalidInput for a folder that a newer onebase has upgraded.
        """
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (self.adapters, self.bases, self.runs, self.files, self.cache, self.locks):
            folder.mkdir(mode=0o700, exist_ok=True)
        upgrade(self.root)
        return self


def default_home(env: Mapping[str, str]) -> Path:
    """`$ONEBASE_HOME`, else `.onebase` in the user's home directory."""
    named = env.get("ONEBASE_HOME", "").strip()
    return Path(named).expanduser().absolute() if named else Path.home() / ".onebase"
