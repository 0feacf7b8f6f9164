"""Replies that are given before the app is asked: to what is no HTTP, and to more connections than are allowed.

They look as all others do: OpenAI's error body, and a request id.
"""

import logging
from typing import Any

from onebase_server.api.request_id import new_request_id
from onebase_server.api.schemas_common import ErrorBody, ErrorDetail

logger = logging.getLogger(__name__)

Headers = list[tuple[bytes, bytes]]
NO_HTTP = "This is not HTTP as this server reads it: {why}"
TOO_MANY = "The server has as many connections as it may have (ONEBASE_MAX_CONNECTIONS)."


def early_reply(message: str, kind: str) -> tuple[Headers, bytes]:
    """Headers and body; the connection ends with it."""
    body = ErrorBody(error=ErrorDetail(message=message, type=kind, param=None, code=None)).model_dump_json().encode()
    request_id = new_request_id()
    logger.warning("%s: %s", request_id, message)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"x-request-id", request_id.encode()),
        (b"connection", b"close"),
    ]
    return headers, body


async def too_many_connections(scope: Any, receive: Any, send: Any) -> None:
    """An ASGI app in place of the real one."""
    headers, body = early_reply(TOO_MANY, "server_error")
    await send({"type": "http.response.start", "status": 503, "headers": [*headers, (b"retry-after", b"1")]})
    await send({"type": "http.response.body", "body": body})
