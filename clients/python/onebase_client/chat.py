"""`onebase-chat`: talk to a model from the terminal, streaming. `onebase-chat pirate "Where is the treasure?"`."""

import argparse
import sys
from collections.abc import Iterator

import openai
from openai.types.chat import ChatCompletionMessageParam

from onebase_client.client import Onebase


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="onebase-chat", description="Talk to a onebase server, streaming.")
    parser.add_argument("model", nargs="?", help="base, adapter or adapter@version; without it the models are listed")
    parser.add_argument("message", nargs="?", help="one message; without it a conversation starts")
    parser.add_argument("--url", help="the server's /v1; default $ONEBASE_URL, else this machine")
    parser.add_argument("--system", help="a system message")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-tokens", type=int, default=512)
    given = parser.parse_args(arguments)
    client = Onebase(base_url=given.url)
    try:
        if given.model is None:
            sys.stdout.write("".join(f"{model.id}\n" for model in client.models.list()))
        else:
            talk(client, given)
    except openai.OpenAIError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def talk(client: Onebase, given: argparse.Namespace) -> None:
    messages: list[ChatCompletionMessageParam] = []
    if given.system:
        messages.append({"role": "system", "content": given.system})
    for text in turns(given.message):
        messages.append({"role": "user", "content": text})
        stream = client.chat.completions.create(
            model=given.model,
            messages=messages,
            temperature=given.temperature,
            max_tokens=given.max_tokens,
            stream=True,
        )
        answer = ""
        for chunk in stream:
            piece = chunk.choices[0].delta.content or "" if chunk.choices else ""
            sys.stdout.write(piece)
            sys.stdout.flush()
            answer += piece
        sys.stdout.write("\n")
        messages.append({"role": "assistant", "content": answer})


def turns(message: str | None) -> Iterator[str]:
    if message is not None:
        yield message
        return
    while True:
        sys.stderr.write("> ")
        sys.stderr.flush()
        text = sys.stdin.readline().strip()
        if not text:
            return
        yield text


if __name__ == "__main__":
    sys.exit(main())
