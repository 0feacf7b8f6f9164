"""Is it alive, can it serve, how much does it do: for load balancers, which need no key, and operators."""

from litestar import get
from litestar.response import Response

from onebase.errors import NotReady
from onebase_server.api.deps import Deps
from onebase_server.api.metrics_sources import collect_metrics
from onebase_server.api.schemas_admin import Health


@get("/healthz", operation_id="getHealth", tags=["Operations"])
async def healthz() -> Health:
    """200 as long as the process lives."""
    return Health(status="ok")


@get("/readyz", operation_id="getReadiness", tags=["Operations"])
async def readyz(deps: Deps) -> Health:
    """200 once the base is loaded, until shutdown begins; 503 with the reason otherwise."""
    if not deps.backend.get().engine.is_healthy:
        raise NotReady("The engine has stopped: the process must be restarted.", retry_after_s=10)
    return Health(status="ready")


@get("/metrics", operation_id="getMetrics", tags=["Operations"], media_type="text/plain")
async def metrics(deps: Deps) -> Response[bytes]:
    """Counters, gauges and histograms in Prometheus's text form. No prompt and no key is in them.

    Needs the metrics key (ONEBASE_METRICS_KEY) or an admin key, unless the server listens on loopback and has none."""
    text = deps.metrics.render(await collect_metrics(deps))
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
