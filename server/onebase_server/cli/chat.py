"""`onebase chat`: talk to a running server from the terminal, streaming. Knows HTTP only, no engine, no store."""

import json
import os
from collections.abc import Iterator
from typing import Annotated

import httpx
import typer
from rich.console import Console

from onebase.errors import InvalidInput, OnebaseError

console = Console()


def chat(
    message: Annotated[str | None, typer.Argument(help="One message; without it a conversation starts.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Base, adapter, or adapter@version.")] = None,
    url: Annotated[str, typer.Option(help="The server's API root.")] = "http://127.0.0.1:8000/v1",
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
) -> None:
    """Talk to a running server. The key is read from $OPENAI_API_KEY, if the server wants one."""
    headers = {"Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"}
    with httpx.Client(base_url=url, headers=headers, timeout=httpx.Timeout(10, read=None)) as client:
        try:
            model = model or first_model(client)
            messages = [{"role": "system", "content": system}] if system else []
            settings = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
            for text in turns(message, model):
                messages.append({"role": "user", "content": text})
                answer = show(stream(client, {**settings, "messages": messages, "stream": True}))
                messages.append({"role": "assistant", "content": answer})
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise InvalidInput(f"no server at {url}: start one with `onebase serve`, or name it by --url") from error
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise typer.BadParameter(
                f"{url} is no URL such as http://127.0.0.1:8000/v1", param_hint="'--url'"
            ) from error
        except httpx.HTTPError as error:
            raise OnebaseError(f"the server at {url} went away: {type(error).__name__} {error}") from error


def turns(message: str | None, model: str) -> Iterator[str]:
    if message is not None:
        yield message
        return
    console.print(f"[dim]{model}; an empty line or Ctrl-D ends[/]")
    while True:
        try:
            text = console.input("[bold]> [/]")
        except (EOFError, KeyboardInterrupt):
            return
        if not text.strip():
            return
        yield text


def first_model(client: httpx.Client) -> str:
    reply = client.get("/models")
    fail_on_error(reply)
    try:
        return str(reply.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError) as error:
        raise OnebaseError(f"{reply.url} is no list of models: name the API's root by --url, such as .../v1") from error


def stream(client: httpx.Client, body: dict[str, object]) -> Iterator[str]:
    """The answer's pieces of text, from the server's event stream."""
    with client.stream("POST", "/chat/completions", json=body) as reply:
        if reply.is_error:
            reply.read()
            fail_on_error(reply)
        for line in reply.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise OnebaseError(event["error"]["message"])
            for choice in event["choices"]:
                yield choice["delta"].get("content") or ""


def show(pieces: Iterator[str]) -> str:
    answer = ""
    for piece in pieces:
        console.out(piece, end="", highlight=False)
        answer += piece
    console.out("")
    return answer


def fail_on_error(reply: httpx.Response) -> None:
    if reply.is_error:
        try:
            text = reply.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            text = f"the server answered {reply.status_code}: {reply.text[:200]}"
        raise OnebaseError(text)
