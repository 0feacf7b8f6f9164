"""What a reader of the store gets: versions and entries. Small enough to remember thousands.

The settings that a version was trained with take up most of its manifest and nobody serves by them: they stay on the
disk until somebody asks for the whole.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onebase.adapter import MANIFEST, content_digest
from onebase.errors import AdapterInvalid, InvalidInput
from onebase.manifest import Manifest
from onebase.prompt_types import PromptFormat


@dataclass(frozen=True, slots=True)
class Version:
    """One immutable version. `digest` names its content: caches are keyed by it, never by the name."""

    name: str
    version: int
    folder: Path
    """The adapter's own, above all its versions."""
    digest: str
    prompt_format: PromptFormat
    created_at: int
    """Unix seconds."""
    metrics: Mapping[str, float | int | str | None]
    aliases: tuple[str, ...]
    """Those that it was published with."""

    @classmethod
    def read(cls, folder: Path, name: str, number: int) -> "Version":
        """Raises AdapterInvalid if its manifest can't be read."""
        manifest = _read_manifest(version_path(folder, number))
        return cls(
            name,
            number,
            folder,
            content_digest(manifest.weights_sha256, manifest.config_sha256),
            manifest.prompt_format,
            manifest.created_at,
            manifest.metrics,
            tuple(manifest.aliases),
        )

    @property
    def id(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def path(self) -> Path:
        return version_path(self.folder, self.version)

    @property
    def manifest(self) -> Manifest:
        """All that it says about itself, read anew. Raises AdapterInvalid, say if it was removed meanwhile."""
        return _read_manifest(self.path)


@dataclass(frozen=True, slots=True)
class Entry:
    """One adapter as `list` shows it. `weights`: served version -> share of the traffic."""

    name: str
    versions: tuple[Version, ...]
    weights: Mapping[int, float]
    aliases: Mapping[str, int]

    @property
    def current(self) -> Version | None:
        """The version with the largest share, the newer of equals; None if nothing is served."""
        served = [v for v in self.versions if v.version in self.weights]
        return max(served, key=lambda v: (self.weights[v.version], v.version), default=None)


def version_path(folder: Path, number: int) -> Path:
    return folder / "versions" / str(number)


def _read_manifest(path: Path) -> Manifest:
    try:
        return Manifest.read(path / MANIFEST)
    except (OSError, InvalidInput) as error:
        raise AdapterInvalid(str(path), [f"its manifest can't be read: {error}"]) from error
