"""The id of a request: made once, sent back as `x-request-id` on every reply, written into every log line about it."""

import secrets

from litestar.datastructures import Headers
from litestar.types import Message, Scope

from onebase.errors import InvalidInput

MAX_CLIENT_ID = 512
STATE_KEY = "onebase_request_id"


def new_request_id() -> str:
    return f"req_{secrets.token_hex(12)}"


def client_request_id(headers: Headers) -> str | None:
    """The client's own name for its request (`X-Client-Request-Id`), for the log. Raises InvalidInput, as OpenAI has
    it, for one that is no plain text of at most 512 characters."""
    given = headers.get("x-client-request-id")
    if given is not None and (len(given) > MAX_CLIENT_ID or not (given.isascii() and given.isprintable())):
        raise InvalidInput(
            f"Invalid header 'X-Client-Request-Id': expected at most {MAX_CLIENT_ID} visible ASCII characters.",
            param="X-Client-Request-Id",
            code="invalid_value",
        )
    return given


def request_id_of(scope: Scope) -> str:
    """The request's id; made at the first call."""
    state = scope.setdefault("state", {})
    if STATE_KEY not in state:
        state[STATE_KEY] = new_request_id()
    return str(state[STATE_KEY])


async def send_request_id(message: Message, scope: Scope) -> None:
    """Litestar's before-send hook: unlike a middleware it also sees the replies to unknown paths."""
    if message["type"] == "http.response.start":
        headers = message.setdefault("headers", [])
        message["headers"] = [*headers, (b"x-request-id", request_id_of(scope).encode())]
