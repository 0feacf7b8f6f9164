"""`/admin/*` in typed calls. Errors are OpenAI's own classes, such as `openai.NotFoundError`."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from onebase_client.models import (
    Adapter,
    Adapters,
    Deleted,
    Key,
    Keys,
    ModelCard,
    ModelCards,
    NewKey,
    RetrainRun,
    RetrainRuns,
    Schedule,
    Schedules,
)

if TYPE_CHECKING:
    from onebase_client.client import Onebase

T = TypeVar("T")


class ServerAdmin:
    """Made by `Onebase.server`."""

    def __init__(self, client: "Onebase") -> None:
        self._client = client
        self._root = str(client.base_url).rstrip("/").removesuffix("/v1") + "/admin"

    # Models, adapters and versions

    def models(self, *, versions: bool = False) -> list[ModelCard]:
        """As `client.models.list()`, with where each is in memory, and `versions` too. Needs no admin key."""
        query = {"versions": "true"} if versions else {}
        return self._client.get("/models", cast_to=ModelCards, options={"params": query}).data

    def adapters(self) -> list[Adapter]:
        """Every adapter with its versions and where they are."""
        return self._get("/adapters", Adapters).data

    def adapter(self, name: str) -> Adapter:
        return self._get(f"/adapters/{quote(name)}", Adapter)

    def rollback(self, name: str, version: int | None = None) -> Adapter:
        """Serve what was served before, or `version`. Running requests finish on theirs."""
        return self._move(name, "rollback", version)

    def publish(self, name: str, version: int | Mapping[int, float]) -> Adapter:
        """Serve one version, or split the traffic: `{3: 0.9, 4: 0.1}`."""
        if isinstance(version, int):
            return self._move(name, "publish", version)
        weights = {str(number): share for number, share in version.items()}
        return self._post(f"/adapters/{quote(name)}/publish", Adapter, {"weights": weights})

    def preload(self, name: str, version: int | None = None) -> Adapter:
        """Bring a version to memory ahead of its first request."""
        return self._move(name, "preload", version)

    def pin(self, name: str, version: int | None = None) -> Adapter:
        return self._move(name, "pin", version)

    def unpin(self, name: str, version: int | None = None) -> Adapter:
        return self._move(name, "unpin", version)

    def unload(self, name: str, version: int | None = None) -> Adapter:
        """Free a version's memory once its running requests have ended."""
        return self._move(name, "unload", version)

    def delete(self, model: str) -> Deleted:
        """Delete a fine-tuned model (`ft:...`), an adapter with all its versions, or one version (`name@3`)."""
        deleted = self._client.models.delete(model)
        return Deleted.construct(id=deleted.id, deleted=deleted.deleted)

    # Retraining

    def retrain(self, *, adapter: str, **order: Any) -> RetrainRun:
        """Train the adapter's next version: `dataset=` (a path on the server), `training_file=` (an uploaded file) or
        `stored_chats=True`; further `preset`, `hyperparameters`, `from_`, `resume_from`, `gate`, `priority`."""
        if "from_" in order:
            order["from"] = order.pop("from_")
        return self._post("/retrain", RetrainRun, {"adapter": adapter, **order})

    def runs(self) -> list[RetrainRun]:
        """The newest first."""
        return self._get("/retrain", RetrainRuns).data

    def run(self, run_id: str) -> RetrainRun:
        return self._get(f"/retrain/{quote(run_id)}", RetrainRun)

    def cancel(self, run_id: str) -> RetrainRun:
        return self._post(f"/retrain/{quote(run_id)}/cancel", RetrainRun)

    def wait(
        self, run_id: str, *, poll_s: float = 1.0, on_progress: Callable[[RetrainRun], None] | None = None
    ) -> RetrainRun:
        """Until the run has ended, well or not: look at its `state`."""
        while True:
            run = self.run(run_id)
            if on_progress is not None:
                on_progress(run)
            if run.state in ("succeeded", "failed", "cancelled"):
                return run
            time.sleep(poll_s)

    # Schedules

    def create_schedule(
        self, adapter: str, *, cron: str | None = None, every: str | None = None, timezone: str = "UTC", **retrain: Any
    ) -> Schedule:
        """Retrain by a cron line (`"0 3 * * *"`) or every so often (`"6h"`); `retrain`: as for `retrain()`."""
        when = {"cron": cron} if every is None else {"every": every}
        if "from_" in retrain:
            retrain["from"] = retrain.pop("from_")
        body = {"adapter": adapter, "timezone": timezone, **when, "retrain": retrain}
        return self._post("/schedules", Schedule, body)

    def schedules(self) -> list[Schedule]:
        return self._get("/schedules", Schedules).data

    def delete_schedule(self, schedule_id: str) -> Deleted:
        return self._client.delete(f"{self._root}/schedules/{quote(schedule_id)}", cast_to=Deleted)

    # Keys

    def create_key(self, name: str, *, scopes: Sequence[str] = ("inference",), **limits: Any) -> NewKey:
        """`models`, `owner`, `rpm`, `tpm`, `parallel`, `expires_in` (seconds). The key itself is shown this once."""
        return self._post("/keys", NewKey, {"name": name, "scopes": list(scopes), **limits})

    def keys(self) -> list[Key]:
        return self._get("/keys", Keys).data

    def revoke_key(self, key_id: str) -> Key:
        return self._client.delete(f"{self._root}/keys/{quote(key_id)}", cast_to=Key)

    def _move(self, name: str, verb: str, version: int | None) -> Adapter:
        body = {} if version is None else {"version": version}
        return self._post(f"/adapters/{quote(name)}/{verb}", Adapter, body)

    def _get(self, path: str, cast_to: type[T]) -> T:
        return self._client.get(self._root + path, cast_to=cast_to)

    def _post(self, path: str, cast_to: type[T], body: dict[str, Any] | None = None) -> T:
        return self._client.post(self._root + path, cast_to=cast_to, body=body or {})
