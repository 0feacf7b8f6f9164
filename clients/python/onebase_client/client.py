"""`Onebase`: `openai.OpenAI` pointed at a onebase server, with `.server`."""

import os
from functools import cached_property
from typing import Any

from openai import OpenAI

from onebase_client.admin import ServerAdmin

DEFAULT_URL = "http://127.0.0.1:8000/v1"


class Onebase(OpenAI):
    """As `OpenAI`. `base_url`: the server's `/v1`; not given, $ONEBASE_URL, else this machine.

    `api_key`: not given, $ONEBASE_API_KEY; a server without keys takes any.
    """

    def __init__(self, *, base_url: str | None = None, api_key: str | None = None, **options: Any) -> None:
        super().__init__(
            base_url=base_url or os.environ.get("ONEBASE_URL") or DEFAULT_URL,
            api_key=api_key or os.environ.get("ONEBASE_API_KEY") or "none",
            **options,
        )

    @cached_property
    def server(self) -> ServerAdmin:
        """This server's own calls; they need the admin key. (`admin` is OpenAI's name for calls of its own.)"""
        return ServerAdmin(self)
