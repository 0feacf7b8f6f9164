"""`/v1/models` on the wire: OpenAI's four fields, then what this server adds."""

from typing import Annotated, Literal

from pydantic import Field

from onebase_server.api.schemas_common import ListPage, Wire

Residency = Literal["device", "host", "disk"]


class ModelCard(Wire):
    id: str
    object: Literal["model"]
    created: int
    """Unix seconds; does not change between calls."""
    owned_by: str
    root: str
    """The base's id."""
    parent: str | None
    """The base's id for an adapter, null for the base."""
    version: Annotated[int | None, Field(description="The version that this id is served by; null for the base.")]
    residency: Annotated[
        Residency | None, Field(description="Where that version is in memory just now; null for the base, which stays.")
    ]


class ModelList(ListPage):
    data: list[ModelCard]


class ModelDeleted(Wire):
    id: str
    object: Literal["model"]
    deleted: bool
