"""`onebase serve`: flags over environment, then the composition root."""

import os
from pathlib import Path
from typing import Annotated

import typer

from onebase_server.settings import load_settings


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Default 8000; 0 takes a free one.")] = None,
    base: Annotated[str | None, typer.Option(help="Base by id or path. Default: the embedded SmolLM2.")] = None,
    home: Annotated[Path | None, typer.Option(help="Default: $ONEBASE_HOME, else ~/.onebase.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16 or float32.")] = None,
    max_context: Annotated[int | None, typer.Option(help="Tokens of prompt and answer together.")] = None,
    adapter_slots: Annotated[int | None, typer.Option(help="Adapter versions on the device at a time.")] = None,
    allow_no_keys: Annotated[
        bool | None, typer.Option("--allow-no-keys", help="Listen beyond loopback without any key.")
    ] = None,
    train_policy: Annotated[
        str | None, typer.Option(help="How training jobs make way: serve-first, fair, train-first, or a share as 0.7.")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
) -> None:
    """Serve the base and every adapter in the home folder behind OpenAI's API.

    Each flag has an environment variable `ONEBASE_<FLAG>`; keys are set by ONEBASE_API_KEYS and ONEBASE_ADMIN_KEY only.
    """
    flags = {
        "host": host,
        "port": port,
        "base": base,
        "home": home,
        "device": device,
        "dtype": dtype,
        "max_context": max_context,
        "adapter_slots": adapter_slots,
        "allow_no_keys": allow_no_keys,
        "train_policy": train_policy,
        "log_level": log_level,
    }
    settings = load_settings(os.environ, flags)
    from onebase_server.compose import serve as run  # torch stands behind it: not for `onebase --help`

    raise typer.Exit(run(settings))
