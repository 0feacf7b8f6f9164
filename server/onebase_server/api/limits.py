"""Each key's own limits: requests and tokens a minute, sequences at a time. In memory, by a clock that never steps.

A bucket holds a minute's worth and fills evenly, so that a key that was quiet may burst and a busy one gets its rate.
Tokens: a request's prompts must fit in what is left and are taken at once, and given back if they are never computed;
generated tokens are taken at the end and may leave a debt, which the next request waits for. Headers and words are
OpenAI's.
"""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from litestar.types import Message, Scope

from onebase.errors import RateLimited
from onebase_server.api.caller import STATE_KEY, Caller

MINUTE = 60.0
MANY_BUCKETS = 128
"""Past so many, full ones are dropped: a bucket that is made anew is full."""
LIMIT_HEADERS = tuple(
    f"x-ratelimit-{what}-{word}" for word in ("requests", "tokens") for what in ("limit", "remaining", "reset")
)


@dataclass(slots=True)
class Bucket:
    """`level` of `capacity`; fills in a minute."""

    capacity: int
    level: float
    at: float

    def fill(self, capacity: int, now: float) -> None:
        """Bring up to date; the key's limit may have changed meanwhile."""
        if capacity != self.capacity:
            self.level += capacity - self.capacity
            self.capacity = capacity
        self.level = min(float(capacity), self.level + (now - self.at) * capacity / MINUTE)
        self.at = now

    def wait_for(self, amount: float) -> float:
        """Seconds until so much is there."""
        return max(0.0, (amount - self.level) * MINUTE / self.capacity)


class Limiter:
    """All keys' buckets. Lives on one event loop, so it needs no lock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._requests: dict[str, Bucket] = {}
        self._tokens: dict[str, Bucket] = {}
        self._running: dict[str, int] = {}
        self._look_at = MANY_BUCKETS

    def take_request(self, caller: Caller) -> None:
        """Raises RateLimited."""
        limit = caller.limits.rpm
        if limit is None:
            return
        bucket = self._bucket(self._requests, caller, limit)
        if bucket.level < 1:
            wait = bucket.wait_for(1)
            raise RateLimited(
                f"Rate limit reached for requests per min (RPM) by this key: Limit {limit}. "
                f"Please try again in {spoken(wait)}.",
                retry_after_s=wait,
            )
        bucket.level -= 1

    def begin(self, caller: Caller, sequences: int, prompt_tokens: int) -> None:
        """A request wants to start, all of it or nothing. Raises RateLimited; else `end` must follow for every
        sequence. Whether so many may ever run is not asked here."""
        parallel, limit = caller.limits.parallel, caller.limits.tpm
        running = self._running.get(caller.id, 0)
        if parallel is not None and running + sequences > parallel:
            raise RateLimited(
                f"This key has {running} sequences running, this request asks for {sequences}, and it may have "
                f"{parallel} at a time."
            )
        if limit is not None:
            self._take_prompt(self._bucket(self._tokens, caller, limit), prompt_tokens)
        self._running[caller.id] = running + sequences

    @staticmethod
    def _take_prompt(bucket: Bucket, tokens: int) -> None:
        # A prompt larger than the whole limit runs when the bucket is full: refusing it for ever helps nobody.
        needed = max(1, min(tokens, bucket.capacity))
        if bucket.level < needed:
            wait = bucket.wait_for(needed)
            raise RateLimited(
                f"Rate limit reached for tokens per min (TPM) by this key: Limit {bucket.capacity}, "
                f"Requested {tokens}. Please try again in {spoken(wait)}.",
                retry_after_s=wait,
                kind="tokens",
            )
        bucket.level -= tokens

    def end(self, caller: Caller, sequences: int, *, generated: int = 0, unused: int = 0) -> None:
        """So many sequences are over. Tokens: `generated` by them, and `unused` of the prompts that `begin` took."""
        left = self._running.get(caller.id, 0) - sequences
        if left > 0:
            self._running[caller.id] = left
        else:
            self._running.pop(caller.id, None)
        if caller.limits.tpm is not None:
            self._bucket(self._tokens, caller, caller.limits.tpm).level += unused - generated

    def running(self, caller: Caller) -> int:
        return self._running.get(caller.id, 0)

    def headers(self, caller: Caller) -> dict[str, str]:
        """OpenAI's `x-ratelimit-*`, for the limits that the key has."""
        found: dict[str, str] = {}
        for word, limit, buckets in (
            ("requests", caller.limits.rpm, self._requests),
            ("tokens", caller.limits.tpm, self._tokens),
        ):
            if limit is not None:
                bucket = self._bucket(buckets, caller, limit)
                found[f"x-ratelimit-limit-{word}"] = str(limit)
                found[f"x-ratelimit-remaining-{word}"] = str(max(0, int(bucket.level)))
                found[f"x-ratelimit-reset-{word}"] = spoken(bucket.wait_for(limit))
        return found

    def _bucket(self, buckets: dict[str, Bucket], caller: Caller, limit: int) -> Bucket:
        now = self._clock()
        bucket = buckets.get(caller.id)
        if bucket is None:
            self._drop_full(now)
            bucket = buckets[caller.id] = Bucket(limit, float(limit), now)
        bucket.fill(limit, now)
        return bucket

    def _drop_full(self, now: float) -> None:
        """Keys come and go: those that have been quiet leave nothing behind."""
        if len(self._requests) + len(self._tokens) < self._look_at:
            return
        for buckets in (self._requests, self._tokens):
            for key, bucket in list(buckets.items()):
                bucket.fill(bucket.capacity, now)
                if bucket.level >= bucket.capacity:
                    del buckets[key]
        self._look_at = max(MANY_BUCKETS, 2 * (len(self._requests) + len(self._tokens)))


def send_limits(limiter: Limiter) -> Callable[[Message, Scope], Awaitable[None]]:
    """Litestar's before-send hook that tells each key what it has left, in replies of every status."""

    async def send(message: Message, scope: Scope) -> None:
        caller = scope.get("state", {}).get(STATE_KEY)
        if message["type"] == "http.response.start" and isinstance(caller, Caller):
            told = [(name.encode(), value.encode()) for name, value in limiter.headers(caller).items()]
            message["headers"] = [*message.get("headers", []), *told]

    return send


def spoken(seconds: float) -> str:
    """As OpenAI writes spans: `120ms`, `6.5s`, `1m30s`."""
    if seconds < 1:
        return f"{max(0, round(seconds * 1000))}ms"
    if seconds < MINUTE:
        return f"{seconds:.3f}".rstrip("0").rstrip(".") + "s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest}s"
