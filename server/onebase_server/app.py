"""`create_app`: the Litestar app from its parts. Nothing is global, nothing is read at import, no torch is loaded."""

from typing import Any

from litestar import Litestar, Router
from litestar.config.cors import CORSConfig
from litestar.di import Provide
from litestar.openapi import OpenAPIConfig
from litestar.plugins.pydantic import PydanticSchemaPlugin

from onebase import __version__
from onebase_server.api import admin_adapters, admin_retrain, chat, completions, health, models
from onebase_server.api.auth import KeyRing, require
from onebase_server.api.decode import WirePlugin, WireRequest
from onebase_server.api.deps import AppDeps
from onebase_server.api.errors import handle_any_error
from onebase_server.api.request_id import send_request_id
from onebase_server.settings import Settings

__all__ = ["AppDeps", "create_app"]


def create_app(deps: AppDeps) -> Litestar:
    """The app. Its base may still be loading: `deps.backend` is filled later, and answers 503 until then."""
    guard = require(KeyRing(deps.settings.api_keys, deps.settings.admin_key))
    openai = Router(
        "/v1",
        guards=[guard],
        route_handlers=[
            chat.create_chat_completion,
            completions.create_completion,
            models.list_models,
            models.retrieve_model,
            models.delete_model,
        ],
    )
    admin = Router(
        "/admin",
        guards=[guard],
        opt={"scope": "admin"},
        route_handlers=[
            admin_adapters.list_adapters,
            admin_adapters.get_adapter,
            admin_adapters.rollback,
            admin_adapters.publish,
            admin_adapters.preload,
            admin_adapters.pin,
            admin_adapters.unpin,
            admin_adapters.unload,
            admin_retrain.create_retrain_run,
            admin_retrain.list_retrain_runs,
            admin_retrain.get_retrain_run,
            admin_retrain.cancel_retrain_run,
        ],
    )
    return Litestar(
        route_handlers=[openai, admin, health.healthz, health.readyz, health.metrics],
        dependencies={"deps": Provide(lambda: deps, sync_to_thread=False)},
        request_class=WireRequest,
        plugins=[WirePlugin(exclude_unset=True), PydanticSchemaPlugin()],
        exception_handlers={Exception: handle_any_error},
        before_send=[send_request_id, deps.metrics.count],
        request_max_body_size=deps.settings.max_body_mb * 1_000_000,
        cors_config=cors(deps.settings),
        openapi_config=OpenAPIConfig(title="onebase", version=__version__, use_handler_docstrings=True),
        logging_config=None,
    )


def cors(settings: Settings) -> CORSConfig | None:
    if not settings.cors_origins:
        return None
    exposed: list[Any] = ["x-request-id"]
    return CORSConfig(allow_origins=list(settings.cors_origins), expose_headers=exposed)
