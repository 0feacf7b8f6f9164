"""Query parameters that OpenAI's lists share and Litestar can't declare: `metadata[key]=value`, `metadata=null`."""

from typing import Any

from litestar.datastructures import MultiDict

from onebase.errors import InvalidInput
from onebase_server.records.pages import MetadataFilter

MAX_PAIRS = 16


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
