"""API keys: how one is made, and the ring that tells whose a presented one is. Decides nothing about routes.

A key is 256 random bits, so one round of SHA-256 is the right hash: there is nothing to guess that a slow hash could
make slower, and a check costs microseconds. Passwords would need argon2; these are none. The table holds hashes only.
"""

import asyncio
import hashlib
import hmac
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from onebase.errors import NotReady, Unauthenticated
from onebase_server.api.caller import LOCAL, SCOPES, Caller, KeyLimits, Scope
from onebase_server.api.fresh_keys import FreshKeys
from onebase_server.records.keys import KeyRecords
from onebase_server.records.tables import KeyRow
from onebase_server.settings import Settings

logger = logging.getLogger(__name__)

PREFIX = "sk-ob-"
T = TypeVar("T")
FRESH_S = 0.5
"""A revoked key is refused after at most this long."""
STALE_S = 60.0
"""While the database is away, keys that it vouched for so recently go on working."""
MAX_CACHED = 4096
NOTE_USE_S = 60.0

NO_KEY = (
    "You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer auth "
    "(i.e. Authorization: Bearer YOUR_KEY)."
)


@dataclass(frozen=True, slots=True)
class KeyOrder:
    """What a new key may do. `models` None: every model that nobody else trained."""

    name: str
    scopes: tuple[Scope, ...] = ("inference",)
    owner: str | None = None
    models: tuple[str, ...] | None = None
    limits: KeyLimits = field(default_factory=KeyLimits)
    expires_in: int | None = None
    """Seconds."""


def new_key(order: KeyOrder, now: int) -> tuple[KeyRow, str]:
    """A row to keep, and the key itself: it is shown once and stored nowhere."""
    key = PREFIX + secrets.token_urlsafe(32)
    key_id = f"key_{secrets.token_hex(8)}"
    row = KeyRow(
        id=key_id,
        owner=order.owner or key_id,
        name=order.name,
        hash=digest_of(key),
        scopes=[scope for scope in SCOPES if scope in order.scopes],
        models=None if order.models is None else list(dict.fromkeys(order.models)),
        rpm=order.limits.rpm,
        tpm=order.limits.tpm,
        parallel=order.limits.parallel,
        created_at=now,
        expires_at=None if order.expires_in is None else now + order.expires_in,
    )
    return row, key


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


class KeyRing:
    """The keys of the environment and of the table. Lives on one event loop."""

    def __init__(
        self,
        settings: Settings,
        records: KeyRecords,
        *,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._defaults = KeyLimits(settings.key_rpm, settings.key_tpm, settings.key_parallel)
        self._api = [(digest_of(key), self._from_settings(key, ("inference", "training"))) for key in settings.api_keys]
        if settings.admin_key is not None:
            self._api.append((digest_of(settings.admin_key), self._from_settings(settings.admin_key, SCOPES)))
        self._records = records
        self._now = now
        self._clock = clock
        self._cache: OrderedDict[str, tuple[KeyRow | None, float]] = OrderedDict()
        """By hash, with when it was asked for, the longest ago first; what is stale is dropped at the next answer."""
        self._locked = bool(self._api)
        self._looked_at = float("-inf")
        self._noted: OrderedDict[str, float] = OrderedDict()
        self._asking: dict[str, asyncio.Future[Any]] = {}
        """What the table is being asked just now: a key's hash, or "" for whether there is any."""
        self._fresh = FreshKeys(self._renew)

    async def identify(self, header: str | None) -> Caller:
        """Whose key it is. Raises Unauthenticated, or NotReady while the table can't be asked."""
        key = bearer(header)
        if not await self._is_locked():
            self._fresh.note("")
            return LOCAL
        if key is None:
            raise Unauthenticated(NO_KEY)
        digest = digest_of(key)
        # every one is compared, so that the time taken says nothing about which one fits
        fits = [caller for known, caller in self._api if hmac.compare_digest(known, digest)]
        if fits:
            return fits[0]
        row = await self._find(digest)
        if row is None or not hmac.compare_digest(row.hash, digest) or row.revoked_at is not None:
            raise Unauthenticated(f"Incorrect API key provided: {masked(key)}.")
        if row.expires_at is not None and row.expires_at <= self._now():
            raise Unauthenticated(f"The API key '{row.name}' has expired.")
        self._note_use(row)
        self._fresh.note(digest)
        return self._from_row(row)

    async def open(self) -> None:
        """Ask the table ahead of need, until `close`."""
        self._fresh.open()

    async def close(self) -> None:
        """Ask the table nothing more on its own account."""
        await self._fresh.close()

    async def _renew(self, name: str) -> None:
        """Bring an answer of the table up to date. Raises NotReady while the table can't be asked."""
        if not name:
            if not self._locked:
                await self._look()
            return
        try:
            await self._fetch(name)
        except (SQLAlchemyError, OSError) as error:
            raise unreachable() from error

    async def _is_locked(self) -> bool:
        """Whether a key is needed. Once a key was made it always is: revoking the last one opens nothing."""
        if not self._locked and self._clock() - self._looked_at >= FRESH_S:
            await self._once("", self._look)
        return self._locked

    async def _look(self) -> None:
        asked_at = self._clock()
        try:
            found = await self._records.any()
        except (SQLAlchemyError, OSError) as error:
            raise unreachable() from error
        self._locked = self._locked or found  # of two that ask at once, the earlier may be answered later
        self._looked_at = max(self._looked_at, asked_at)

    async def _find(self, digest: str) -> KeyRow | None:
        cached = self._cache.get(digest)
        if cached is not None and self._clock() - cached[1] < FRESH_S:
            return cached[0]
        return await self._once(digest, lambda: self._ask(digest))

    async def _once(self, name: str, ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Of a burst with one key, one request asks the table and all get its answer."""
        task = self._asking.get(name)
        if task is None:
            task = self._asking[name] = asyncio.ensure_future(ask())
            task.add_done_callback(lambda _: self._asking.pop(name, None))
        answer: T = await asyncio.shield(task)
        return answer

    async def _ask(self, digest: str) -> KeyRow | None:
        cached = self._cache.get(digest)
        asked_at = self._clock()
        try:
            return await self._fetch(digest)
        except (SQLAlchemyError, OSError) as error:
            if cached is not None and cached[0] is not None and asked_at - cached[1] < STALE_S:
                logger.warning("the key table can't be read; a key it knew %.0f s ago is let in", asked_at - cached[1])
                return cached[0]
            raise unreachable() from error

    async def _fetch(self, digest: str) -> KeyRow | None:
        """Ask the table and keep the answer, unless a later question has been answered meanwhile."""
        asked_at = self._clock()
        row = await self._records.by_hash(digest)
        known = self._cache.get(digest)
        if known is not None and known[1] > asked_at:
            return known[0]
        self._cache[digest] = (row, asked_at)
        self._cache.move_to_end(digest)
        while len(self._cache) > MAX_CACHED or next(iter(self._cache.values()))[1] <= asked_at - STALE_S:
            self._cache.popitem(last=False)
        return row

    def _note_use(self, row: KeyRow) -> None:
        """Write the last use down, once a minute at most, without making the request wait."""
        now = self._clock()
        if now - self._noted.get(row.id, float("-inf")) < NOTE_USE_S:
            return
        self._noted[row.id] = now
        self._noted.move_to_end(row.id)
        # one dropped for want of room is only written down more often than it need be
        while len(self._noted) > MAX_CACHED or next(iter(self._noted.values())) <= now - NOTE_USE_S:
            self._noted.popitem(last=False)
        self._records.note_use(row.id, int(self._now()))

    def _from_settings(self, key: str, scopes: Sequence[Scope]) -> Caller:
        owner = f"key-{digest_of(key)[:16]}"
        is_admin = "admin" in scopes
        limits = KeyLimits() if is_admin else self._defaults
        return Caller(owner, None if is_admin else owner, owner, frozenset(scopes), None, limits)

    def _from_row(self, row: KeyRow) -> Caller:
        scopes: frozenset[Scope] = frozenset(scope for scope in SCOPES if scope in row.scopes)
        limits = KeyLimits(
            self._defaults.rpm if row.rpm is None else row.rpm,
            self._defaults.tpm if row.tpm is None else row.tpm,
            self._defaults.parallel if row.parallel is None else row.parallel,
        )
        models = None if row.models is None else frozenset(row.models)
        return Caller(row.owner, None if "admin" in scopes else row.owner, row.id, scopes, models, limits)


def bearer(header: str | None) -> str | None:
    kind, _, key = (header or "").partition(" ")
    return key.strip() or None if kind.lower() == "bearer" else None


def masked(key: str) -> str:
    return f"{key[:3]}***{key[-4:]}" if len(key) >= 16 else "***"


def unreachable() -> NotReady:
    return NotReady("API keys can't be checked right now: the database does not answer.", retry_after_s=2)
