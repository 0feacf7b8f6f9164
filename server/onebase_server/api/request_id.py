"""The id of a request: made once, sent back as `x-request-id` on every reply, written into every log line about it."""

import secrets

from litestar.types import Message, Scope

STATE_KEY = "onebase_request_id"


def request_id_of(scope: Scope) -> str:
    """The request's id; made at the first call."""
    state = scope.setdefault("state", {})
    if STATE_KEY not in state:
        state[STATE_KEY] = f"req_{secrets.token_hex(12)}"
    return str(state[STATE_KEY])


async def send_request_id(message: Message, scope: Scope) -> None:
    """Litestar's before-send hook: unlike a middleware it also sees the replies to unknown paths."""
    if message["type"] == "http.response.start":
        headers = message.setdefault("headers", [])
        message["headers"] = [*headers, (b"x-request-id", request_id_of(scope).encode())]
