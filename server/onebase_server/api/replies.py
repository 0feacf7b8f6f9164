"""A wire model -> the bytes of a 200, and what is done to every reply before it begins.

Fields that were not set are left out; null ones that were set are sent.
"""

from collections.abc import Awaitable, Callable

from litestar.response.base import ASGIResponse
from litestar.types import ASGIApp, Message, Scope
from pydantic import BaseModel

BeforeSend = Callable[[Message, Scope], Awaitable[None]]


def json_reply(model: BaseModel) -> ASGIApp:
    return ASGIResponse(body=model.model_dump_json(exclude_unset=True).encode(), media_type="application/json")


def at_start(*hooks: BeforeSend) -> BeforeSend:
    """Litestar's before-send hook that runs `hooks` in order on a reply's head. Litestar calls it for every piece of a
    body too: with many hooks that is a good part of what a streamed token costs."""

    async def before_send(message: Message, scope: Scope) -> None:
        if message["type"] == "http.response.start":
            for hook in hooks:
                await hook(message, scope)

    return before_send
