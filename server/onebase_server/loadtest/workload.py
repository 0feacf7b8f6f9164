"""What is sent: how many requests, to which models, how long, how they arrive. Pure data, reproducible by its seed."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from onebase.errors import InvalidInput

WORDS = (
    "river stone winter market copper garden letter harbor signal window mountain paper engine thread silver "
    "bridge kitchen ocean ladder forest candle mirror station village orange compass blanket factory season hammer"
).split()


@dataclass(frozen=True, slots=True)
class Workload:
    """One measured run. Lengths are in tokens; a prompt's length is approximate, the server's usage is reported."""

    models: tuple[str, ...]
    requests: int = 64
    concurrency: int | None = 8
    """Closed loop: this many requests under way at any time. None: open loop at `rate`."""
    rate: float | None = None
    """Open loop: Poisson arrivals a second."""
    prompt_tokens: int = 128
    output_tokens: int = 128
    output_spread: float = 0.0
    """Answers are evenly spread between (1 - this) and (1 + this) times `output_tokens`. At 0 the streams of a closed
    loop run in step: they all begin anew together, and no prompt is read while another stream speaks."""
    shared_prefix_tokens: int = 0
    """The first so many prompt tokens are the same in all requests (a prefix cache's case)."""
    zipf: float = 0.0
    """Popularity of the models: 0 in turn, else Zipf's exponent."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.models:
            raise InvalidInput("name at least one model", param="models")
        if (self.concurrency is None) == (self.rate is None):
            raise InvalidInput("give either a concurrency (closed loop) or a rate (open loop)", param="concurrency")
        if not 0 <= self.output_spread < 1:
            raise InvalidInput("the spread of answers is from 0 to below 1", param="output_spread")
        if self.shared_prefix_tokens > self.prompt_tokens:
            raise InvalidInput("the shared prefix is longer than the prompt", param="shared_prefix_tokens")


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    model: str
    prompt: str
    at_s: float
    """Seconds after the start (open loop); 0 in a closed loop."""
    output_tokens: int


def plan(workload: Workload) -> Iterator[PlannedRequest]:
    """The same requests in the same order for the same workload, whatever server answers them."""
    rng, lengths = random.Random(workload.seed), random.Random(workload.seed + 2)
    prefix = words(random.Random(workload.seed + 1), workload.shared_prefix_tokens)
    models = popularity(workload, rng)
    at = 0.0
    for _ in range(workload.requests):
        if workload.rate is not None:
            at += rng.expovariate(workload.rate)
        own = words(rng, workload.prompt_tokens - workload.shared_prefix_tokens)
        yield PlannedRequest(next(models), f"{prefix} {own}".strip(), at, output_tokens(workload, lengths))


def output_tokens(workload: Workload, rng: random.Random) -> int:
    spread = workload.output_spread
    return max(1, round(workload.output_tokens * rng.uniform(1 - spread, 1 + spread)))


def words(rng: random.Random, count: int) -> str:
    """`count` common words: near one token each in today's vocabularies."""
    return " ".join(rng.choice(WORDS) for _ in range(count))


def popularity(workload: Workload, rng: random.Random) -> Iterator[str]:
    """Models in turn, or drawn by Zipf's law: the i-th most popular with weight 1 / i ** exponent."""
    if workload.zipf == 0:
        while True:
            yield from workload.models
    borders = list(accumulate(1 / (i + 1) ** workload.zipf for i in range(len(workload.models))))
    while True:
        yield rng.choices(workload.models, cum_weights=borders)[0]
