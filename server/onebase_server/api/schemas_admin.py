"""`/admin/*` and the health checks on the wire: this server's own, not OpenAI's."""

from typing import Annotated, Any, Literal

from pydantic import Field

from onebase_server.api.schemas_common import ListPage, RequestBody, Wire

AdapterName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


class Health(Wire):
    status: Literal["ok", "ready"]


class ServedVersion(Wire):
    version: int
    share: float
    """Of the name's traffic."""


class VersionCard(Wire):
    """One version, and where it is now."""

    id: str
    version: int
    created_at: int
    prompt_format: str
    digest: str
    place: str
    """disk, loading, host, copying, slot: how near the device it is."""
    leases: int
    """Sequences on it, waiting ones included."""
    running: int
    pinned: bool
    host_bytes: int
    hits: int
    misses: int
    loads: int
    load_s: float | None
    last_used: float | None
    error: str | None
    metrics: dict[str, Any]


class AdapterCard(Wire):
    name: str
    object: Literal["adapter"]
    current: str | None
    """The version with the largest share."""
    serving: list[ServedVersion]
    versions: list[VersionCard]
    aliases: dict[str, int]


class AdapterList(ListPage):
    data: list[AdapterCard]


class VersionChoice(RequestBody):
    """Which version. Empty body: the one before (rollback), or the current one (unload, pin, preload)."""

    version: Annotated[int, Field(ge=1)] | None = None


class PublishRequest(RequestBody):
    """Serve one version, or split the traffic: `{"weights": {"3": 0.9, "4": 0.1}}`."""

    version: Annotated[int, Field(ge=1)] | None = None
    weights: dict[str, Annotated[float, Field(gt=0)]] | None = None
