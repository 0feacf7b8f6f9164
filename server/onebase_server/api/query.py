"""What holds for paths and queries of all routes, and query parameters that OpenAI's lists share and Litestar can't
declare: `metadata[key]=value`, `metadata=null`."""

from typing import Any

from litestar.connection import ASGIConnection
from litestar.datastructures import MultiDict
from litestar.handlers import BaseRouteHandler

from onebase.errors import InvalidInput
from onebase_server.records.pages import MetadataFilter

MAX_PAIRS = 16


def refuse_nul(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
    """Litestar's guard of the routers. No id, name or word holds a NUL character, and PostgreSQL takes none in a text.

    Raises InvalidInput."""
    wrong = ["id"] if "\x00" in str(connection.scope["path"]) else []
    wrong += [name for name, value in connection.query_params.multi_items() if "\x00" in f"{name}{value}"]
    if wrong:
        name = wrong[0].replace("\x00", "")
        raise InvalidInput(f"'{name}' may not hold a NUL character.", param=name, code="invalid_value")


def metadata_filter(query: MultiDict[Any]) -> MetadataFilter | None:
    """None if no filter was given. Raises InvalidInput for one that can't be read."""
    if "metadata" in query:
        if query["metadata"] != "null":
            raise InvalidInput(
                "Invalid value for 'metadata': filter by metadata[key]=value, or metadata=null.",
                param="metadata",
                code="invalid_value",
            )
        return "null"
    pairs = {
        name.removeprefix("metadata[").removesuffix("]"): str(value)
        for name, value in query.multi_items()
        if name.startswith("metadata[") and name.endswith("]")
    }
    if len(pairs) > MAX_PAIRS or any("\x00" in text for pair in pairs.items() for text in pair):
        raise InvalidInput("Invalid value for 'metadata'.", param="metadata", code="invalid_value")
    return pairs or None
