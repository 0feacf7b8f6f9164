"""The `Allow` header: which methods a path takes. HTTP wants it on every 405, and Litestar leaves it out there.

Litestar's own OPTIONS names one handler's methods only, where a path has several. Knows routes, and no handler.
"""

import re
from functools import lru_cache

from litestar import Litestar
from litestar.routes import HTTPRoute
from litestar.types import Message, Scope

PARAMETER = re.compile(r"(\{[^}]*\})")


async def send_allow(message: Message, scope: Scope) -> None:
    """Litestar's before-send hook."""
    if message["type"] != "http.response.start" or not (message["status"] == 405 or scope.get("method") == "OPTIONS"):
        return
    methods = methods_of(scope["litestar_app"], scope["path"])
    if methods:
        kept = [(name, value) for name, value in message.get("headers", []) if name.lower() != b"allow"]
        message["headers"] = [*kept, (b"allow", ", ".join(methods).encode())]


def methods_of(app: Litestar, path: str) -> tuple[str, ...]:
    """In the alphabet's order; () for a path that the app has not."""
    routes = ((route.path, route.methods) for route in app.routes if isinstance(route, HTTPRoute))
    # the router takes /v1//models/ for /v1/models
    path = re.sub("/+", "/", path).rstrip("/") or "/"
    found = {str(each) for template, methods in routes if pattern_of(template).fullmatch(path) for each in methods}
    return tuple(sorted(found | {"HEAD"} if "GET" in found else found))


@lru_cache(maxsize=256)
def pattern_of(template: str) -> re.Pattern[str]:
    """`/v1/files/{file_id:str}` -> what it matches: a segment a parameter, and the rest of the path for `:path`."""
    pieces = PARAMETER.split(template)
    texts = [re.escape(text) for text in pieces[::2]]
    values = ["/?.+" if name.endswith(":path}") else "[^/]+" for name in pieces[1::2]]
    return re.compile("".join(text + value for text, value in zip(texts, [*values, ""], strict=True)))
