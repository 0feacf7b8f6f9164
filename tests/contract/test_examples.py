"""Each example of openapi.yaml is sent to the server and taken; each reply fits the schema it is declared with."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from api_world import BASE, World, obey_masks, open_world

# by libyaml where it is there: the plain loader takes longer than all the tests
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
DOCUMENT = yaml.load((Path(__file__).parents[2] / "openapi.yaml").read_text("utf-8"), Loader=LOADER)
EXAMPLES = [
    pytest.param(path, example["value"], id=f"{path} {title}")
    for path, item in DOCUMENT["paths"].items()
    for operation in item.values()
    if isinstance(operation, dict)
    for title, example in operation.get("requestBody", {})
    .get("content", {})
    .get("application/json", {})
    .get("examples", {})
    .items()
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    loop = asyncio.new_event_loop()
    with open_world(tmp_path_factory.mktemp("examples"), loop) as world:
        obey_masks(world.runner)
        for _ in range(4):
            world.publish("pirate")
        (world.home.root / "datasets").mkdir()
        (world.home.root / "datasets/pirate.jsonl").write_text("{}\n")
        yield world
    loop.run_until_complete(end(loop))
    loop.close()


async def end(loop: asyncio.AbstractEventLoop) -> None:
    tasks = asyncio.all_tasks(loop) - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 8


# Examples that name a file, a chat or a base of their own: here there is none, and the answer must say just that.
MISSING = {"/v1/fine_tuning/jobs": "training_file", "/v1/feedback": "completion_id", "/admin/retrain": "stored_chats"}


@pytest.mark.parametrize(("path", "body"), EXAMPLES)
def test_an_example_is_taken(server: World, path: str, body: dict[str, Any]) -> None:
    if path == "/v1/fine_tuning/jobs":
        body = {**body, "model": BASE}
    reply = server.post(path.replace("{name}", "pirate"), body)
    if MISSING.get(path) in body:
        assert reply.json()["error"]["param"] == MISSING[path], reply.text
    else:
        assert reply.status_code == 200, reply.text
