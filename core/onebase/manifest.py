"""`onebase.json`: what a version says about itself. Written once at publishing, never changed.

Strict both ways: an unknown key or a newer format is refused, so that no reader guesses.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onebase.errors import InvalidInput
from onebase.prompt_types import PromptFormat

FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 1 << 20


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class BaseIdentity(_Strict):
    """Who a base is. `config_hash` covers shapes and vocabulary; "" where it is not known (a foreign adapter)."""

    id: str
    revision: str | None = None
    config_hash: str = ""
    quantization: str = "nf4"


class Manifest(_Strict):
    """One version's own record. `training` holds the resolved settings, `training_hash` their sha256."""

    format_version: Literal[1] = 1
    name: str
    version: int = Field(ge=1)
    base: BaseIdentity
    prompt_format: PromptFormat = "human_response"
    training: dict[str, Any] = Field(default_factory=dict)
    training_hash: str = ""
    metrics: dict[str, float | int | str | None] = Field(default_factory=dict)
    created_at: int = Field(ge=0)
    """Unix seconds."""
    weights_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    config_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    aliases: list[str] = Field(default_factory=list)
    """Further model names that mean exactly this version, such as a job's `ft:...`."""

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Raises InvalidInput with every wrong field; FileNotFoundError if there is none."""
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise InvalidInput(f"{path.name} is larger than {MAX_MANIFEST_BYTES} bytes", param="adapter")
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            found = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
            raise InvalidInput(f"{path.name}: {found}", param="adapter") from error


def training_hash(training: dict[str, Any]) -> str:
    """sha256 of the settings in canonical JSON: equal settings, equal hash."""
    return hashlib.sha256(json.dumps(training, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
