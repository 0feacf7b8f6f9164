"""`create_app`: the Litestar app from its parts. Nothing is global, nothing is read at import, no torch is loaded."""

from functools import partial
from typing import Any

from litestar import Litestar, Router
from litestar.di import Provide
from litestar.openapi import OpenAPIConfig
from litestar.plugins.pydantic import PydanticSchemaPlugin

from onebase_server.api import (
    admin_adapters,
    admin_keys,
    admin_retrain,
    admin_schedules,
    chat,
    completions,
    feedback,
    files,
    fine_tuning,
    health,
    models,
    responses,
    stored_chats,
)
from onebase_server.api.allowed_methods import send_allow
from onebase_server.api.auth import require, require_for_metrics
from onebase_server.api.cross_origin import cors, refuse_preflight
from onebase_server.api.decode import WirePlugin, WireRequest
from onebase_server.api.deps import AppDeps
from onebase_server.api.errors import handle_any_error
from onebase_server.api.keys import KeyRing
from onebase_server.api.limits import send_limits
from onebase_server.api.preload import bring_near
from onebase_server.api.query import refuse_nul
from onebase_server.api.removal import let_go_of_removed
from onebase_server.api.replies import at_start
from onebase_server.api.request_id import send_request_id
from onebase_server.api.response_store import ResponseStore

__all__ = ["AppDeps", "create_app"]


class App(Litestar):
    """Takes HEAD wherever it takes GET, as HTTP wants; whoever holds the connection leaves the answer's body out."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope.get("method") == "HEAD":
            scope = {**scope, "method": "GET"}
        await super().__call__(scope, receive, send)


def create_app(deps: AppDeps, openapi: OpenAPIConfig | None = None) -> Litestar:
    """The app. Its base may still be loading: `deps.backend` is filled later, and answers 503 until then.

    `openapi` is for the command that writes openapi.yaml; a server needs none.
    """
    kept = ResponseStore(max_bytes=deps.settings.response_memory_mb * 1_000_000)
    deps.durable.scheduler.order_of = partial(admin_schedules.scheduled_order, deps=deps)
    deps.durable.supervisor.bring_near = lambda version: bring_near([version], deps)
    deps.durable.supervisor.let_go = partial(let_go_of_removed, deps)
    keys = KeyRing(deps.settings, deps.keys)
    guard = require(keys, deps.limiter, deps.settings)
    inference = Router(
        "/v1",
        guards=[guard, refuse_nul],
        opt={"scope": "inference"},
        route_handlers=[
            chat.create_chat_completion,
            completions.create_completion,
            responses.create_response,
            responses.get_response,
            responses.delete_response,
            responses.list_input_items,
            models.list_models,
            models.retrieve_model,
            models.delete_model,
            stored_chats.list_chats,
            stored_chats.retrieve_chat,
            stored_chats.update_chat,
            stored_chats.delete_chat,
            stored_chats.list_chat_messages,
            feedback.create_feedback,
        ],
    )
    training = Router(
        "/v1",
        guards=[guard, refuse_nul],
        opt={"scope": "training"},
        route_handlers=[
            files.create_file,
            files.list_files,
            files.retrieve_file,
            files.download_file,
            files.delete_file,
            fine_tuning.create_job,
            fine_tuning.list_jobs,
            fine_tuning.retrieve_job,
            fine_tuning.cancel_job,
            fine_tuning.pause_job,
            fine_tuning.resume_job,
            fine_tuning.list_events,
            fine_tuning.list_checkpoints,
        ],
    )
    admin = Router(
        "/admin",
        guards=[guard, refuse_nul],
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
            admin_schedules.create_schedule,
            admin_schedules.list_schedules,
            admin_schedules.delete_schedule,
            admin_keys.create_key,
            admin_keys.list_keys,
            admin_keys.revoke_key,
        ],
    )
    metrics = Router("/", guards=[require_for_metrics(guard, deps.settings)], route_handlers=[health.metrics])
    app = App(
        route_handlers=[inference, training, admin, metrics, health.healthz, health.readyz],
        dependencies={
            "deps": Provide(lambda: deps, sync_to_thread=False),
            "kept": Provide(lambda: kept, sync_to_thread=False),
        },
        request_class=WireRequest,
        plugins=[WirePlugin(exclude_unset=True, prefer_alias=True), PydanticSchemaPlugin()],
        exception_handlers={Exception: handle_any_error},
        before_send=[
            at_start(send_request_id, send_allow, deps.metrics.count, send_limits(deps.limiter), deps.audit.note)
        ],
        request_max_body_size=deps.settings.max_body_mb * 1_000_000,
        cors_config=cors(deps.settings),
        openapi_config=openapi,
        on_startup=[deps.durable.start, keys.open],
        on_shutdown=[keys.close, deps.durable.stop],
        logging_config=None,
    )
    if app.cors_config is not None:
        app.asgi_handler = refuse_preflight(app.asgi_handler, app.cors_config)
    return app
