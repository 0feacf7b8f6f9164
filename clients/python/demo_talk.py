"""Talking to many models at once through the official `openai` client, and showing the answers side by side."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from openai import AsyncOpenAI
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text


@dataclass
class Stream:
    """One streamed answer as it grows. Times are seconds on the monotonic clock."""

    model: str
    question: str
    text: str = ""
    finish_reason: str | None = None
    sent: float = 0.0
    arrivals: list[float] = field(default_factory=list)

    @property
    def first_token_s(self) -> float:
        return self.arrivals[0] - self.sent if self.arrivals else float("nan")

    @property
    def longest_pause_s(self) -> float:
        return max((b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)), default=0.0)


async def ask(client: AsyncOpenAI, stream: Stream, max_tokens: int = 120) -> Stream:
    """Fill `stream` with the model's greedy answer."""
    stream.sent = time.monotonic()
    chunks = await client.chat.completions.create(
        model=stream.model,
        messages=[{"role": "user", "content": stream.question}],
        temperature=0,
        max_tokens=max_tokens,
        stream=True,
    )
    async for chunk in chunks:
        for choice in chunk.choices:
            if choice.delta.content:
                stream.text += choice.delta.content
                stream.arrivals.append(time.monotonic())
            stream.finish_reason = choice.finish_reason or stream.finish_reason
    return stream


def client_for(url: str) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{url}/v1", api_key="none-needed-on-loopback", max_retries=0, timeout=300)


async def ask_all(url: str, models: Sequence[str], questions: Sequence[str], console: Console) -> list[Stream]:
    """Every question to every model, all in flight together; the answers grow side by side while they arrive."""
    streams = [Stream(model, question) for question in questions for model in models]
    async with client_for(url) as client:
        answering = asyncio.gather(*(ask(client, stream) for stream in streams))
        if console.is_terminal:
            with Live(side_by_side(streams, models), console=console, refresh_per_second=8) as live:
                while not answering.done():
                    await asyncio.wait([answering], timeout=0.12)
                    live.update(side_by_side(streams, models))
        await answering
    if not console.is_terminal:
        console.print(side_by_side(streams, models))
    return streams


def overlapping(streams: Sequence[Stream]) -> bool:
    """True if there was a moment at which all of the streams were running."""
    return max(s.arrivals[0] for s in streams if s.arrivals) < min(s.arrivals[-1] for s in streams if s.arrivals)


def side_by_side(streams: Sequence[Stream], models: Sequence[str]) -> Group:
    """One table for each question, one column for each model."""
    tables = []
    for start in range(0, len(streams), len(models)):
        row = streams[start : start + len(models)]
        table = Table(title=f"[bold]{escape(row[0].question)}[/]", title_justify="left", expand=True)
        for stream in row:
            table.add_column(escape(stream.model), ratio=1)
        table.add_row(*(Text(stream.text or "...") for stream in row))
        table.add_section()
        table.add_row(*(_finish(stream) for stream in row))
        tables.append(table)
    return Group(*tables)


def _finish(stream: Stream) -> str:
    if stream.finish_reason is None:
        return "[dim]streaming[/]"
    colour = "green" if stream.finish_reason == "stop" else "yellow"
    return f"[{colour}]{stream.finish_reason}[/] [dim]first token after {stream.first_token_s:.1f} s[/]"


async def keep_asking(url: str, model: str, questions: Sequence[str], until: Callable[[], bool]) -> list[Stream]:
    """One stream after the other to `model`, without a break, until `until()` holds."""
    streams: list[Stream] = []
    async with client_for(url) as client:
        while not until():
            streams.append(await ask(client, Stream(model, questions[len(streams) % len(questions)])))
    return streams
