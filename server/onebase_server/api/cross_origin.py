"""Which pages of other origins may call, and OpenAI's body for a browser's first question that gets a no (Litestar
answers it in plain text)."""

from typing import Any

from litestar import Request
from litestar.config.cors import CORSConfig
from litestar.datastructures import Headers
from litestar.types import ASGIApp, Receive, Scope, Send

from onebase.errors import InvalidInput
from onebase_server.api.errors import handle_any_error
from onebase_server.api.limits import LIMIT_HEADERS
from onebase_server.settings import Settings


def cors(settings: Settings) -> CORSConfig | None:
    if not settings.cors_origins:
        return None
    exposed: list[Any] = ["x-request-id", "retry-after", *LIMIT_HEADERS]
    return CORSConfig(allow_origins=list(settings.cors_origins), expose_headers=exposed)


def refuse_preflight(app: ASGIApp, config: CORSConfig) -> ASGIApp:
    """`app`, but for the first questions of pages that may not call. Methods and headers are all allowed."""

    async def handle(scope: Scope, receive: Receive, send: Send) -> None:
        is_asked = scope.get("method") == "OPTIONS"
        origin = Headers.from_scope(scope).get("origin") if is_asked else None
        if origin is None or config.is_origin_allowed(origin):
            await app(scope, receive, send)
            return
        error = InvalidInput(
            f"Pages of the origin '{origin[:200]}' may not call: the server's ONEBASE_CORS_ORIGINS does not name it.",
            param="Origin",
        )
        request: Request[Any, Any, Any] = Request(scope, receive, send)
        await handle_any_error(request, error).to_asgi_response(None, request)(scope, receive, send)

    return handle
