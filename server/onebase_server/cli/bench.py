"""`onebase bench`: load any OpenAI-compatible server and report latency and throughput."""

import asyncio
import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from onebase_server.loadtest.drive import Target, drive
from onebase_server.loadtest.report import plot, summarize, table
from onebase_server.loadtest.workload import Workload

console = Console()


def bench(
    models: Annotated[list[str], typer.Argument(help="Models to ask, e.g. adapters' names.")],
    url: Annotated[str, typer.Option(help="The server's API root.")] = "http://127.0.0.1:8000/v1",
    api_key: Annotated[str, typer.Option(envvar="OPENAI_API_KEY", show_envvar=True)] = "none",
    requests: Annotated[int, typer.Option(min=1)] = 64,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Closed loop: requests under way.")] = None,
    rate: Annotated[float | None, typer.Option(min=0.001, help="Open loop: Poisson arrivals a second.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 128,
    output_tokens: Annotated[int, typer.Option(min=1)] = 128,
    output_spread: Annotated[
        float, typer.Option(min=0, max=0.99, help="Answers differ in length by up to this share; 0: streams in step.")
    ] = 0.0,
    shared_prefix_tokens: Annotated[int, typer.Option(min=0, help="Same first tokens in all prompts.")] = 0,
    zipf: Annotated[float, typer.Option(min=0, help="Popularity of the models; 0: in turn.")] = 0.0,
    extra: Annotated[str, typer.Option(help="JSON fields added to each request.")] = '{"ignore_eos": true}',
    note: Annotated[str, typer.Option(help="What was measured, for the record.")] = "",
    json_to: Annotated[Path | None, typer.Option("--json", help="Append the record to this file.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write a plot here.")] = None,
) -> None:
    """Load a server and report time to first token, inter-token latency and tokens a second."""
    if concurrency is None and rate is None:
        concurrency = 8
    workload = Workload(
        models=tuple(models),
        requests=requests,
        concurrency=concurrency,
        rate=rate,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        output_spread=output_spread,
        shared_prefix_tokens=shared_prefix_tokens,
        zipf=zipf,
    )
    target = Target(url, api_key, parse_extra(extra))
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("requests", total=requests)
        results, wall_s = asyncio.run(drive(target, workload, lambda _: progress.advance(bar)))
    record = {"note": note, "url": url, "at": int(time.time()), **summarize(results, wall_s, workload)}
    console.print(table(record))
    console.print(
        f"{record['completed']} of {requests} requests in {record['wall_s']} s, "
        f"{record['output_tokens_per_s']} output tokens/s; errors: {record['errors']} {record['first_error'] or ''}",
        highlight=False,
    )
    if json_to is not None:
        with json_to.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    if png is not None:
        plot(results, png, f"{record['output_tokens_per_s']} tokens/s, {len(models)} models")
    raise typer.Exit(1 if record["errors"] else 0)


def parse_extra(text: str) -> dict[str, object]:
    try:
        extra = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"it is not JSON: {error}", param_hint="'--extra'") from error
    if not isinstance(extra, dict):
        raise typer.BadParameter("it must be a JSON object", param_hint="'--extra'")
    return extra
