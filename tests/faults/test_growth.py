"""A server that publishes for years: what it remembers of old versions has bounds, and nothing else stays."""

import gc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from api_world import World, lora_folder, open_world
from onebase.store import AdapterStore
from scripted_base import IDENTITY

pytestmark = pytest.mark.slow

REMEMBERED = {"Version", "AdapterRef", "Residence"}
"""One of each a version, at most 4096 (store_read.py, engine/config.py)."""
STILL_IN_A_HEAP = 30
"""Of the requests whose deadlines are swept out by the hundred (engine/core.py); there were twice as many requests."""


def live_objects() -> Counter[str]:
    """How many objects of our own classes there are."""
    gc.collect()
    ours = [type(each) for each in gc.get_objects() if str(type(each).__module__).startswith("onebase")]
    return Counter(kind.__name__ for kind in ours)


def publish_and_serve(world: World, source: Path) -> None:
    training = {"train": {f"setting_{index}": index / 7 for index in range(30)}}
    version = world.store.publish(source, "pirate", base=IDENTITY, training=training, metrics={"eval_loss": 0.5})
    assert world.chat(model="pirate").status_code == 200
    assert world.chat(model=version.id, stream=True).status_code == 200
    if version.version % 10 == 0:
        assert world.get("/metrics").status_code == 200


def test_each_version_leaves_a_small_record_and_nothing_else(tmp_path: Path, loop: Any) -> None:
    source = tmp_path / "peft"
    with open_world(tmp_path, loop, runner={"rows": 10**6}) as world:
        world.runner.reply = lambda digest, prompt: [ord("x")]
        for _ in range(55):  # past the versions that have metrics of their own
            publish_and_serve(world, lora_folder(source))
        before = live_objects()
        for _ in range(60):
            publish_and_serve(world, lora_folder(source))
        assert world.get("/admin/adapters").status_code == 200
        grown = live_objects() - before
        series = len(world.get("/metrics").text.splitlines())
        for _ in range(5):
            publish_and_serve(world, lora_folder(source))
        assert len(world.get("/metrics").text.splitlines()) <= series + 5, "old versions give up their labels"
    assert {name: count for name, count in grown.items() if name not in REMEMBERED and count > STILL_IN_A_HEAP} == {}
    assert {name: count for name, count in grown.items() if name in REMEMBERED and count > 70} == {}


def test_a_reader_remembers_no_more_than_its_bound_and_still_knows_every_version(tmp_path: Path) -> None:
    root = tmp_path / "adapters"
    publisher, reader = AdapterStore(root), AdapterStore(root, remembered=8)
    for number in range(1, 41):
        aliases = [f"ft:tiny:acme:{number}"]
        publisher.publish(lora_folder(tmp_path / "peft"), f"bot-{number % 20}", base=IDENTITY, aliases=aliases)
        assert reader.resolve(aliases[0]).version == (number + 19) // 20
    assert len(reader.list()) == 20
    held = [reader._versions, reader._pointers._known, reader._alias_names]
    assert all(len(memory) <= 8 for memory in held)  # type: ignore[arg-type]
    assert [len(entry.versions) for entry in reader.list()] == [2] * 20
    assert reader.resolve("bot-7@1").aliases == ("ft:tiny:acme:7",)
