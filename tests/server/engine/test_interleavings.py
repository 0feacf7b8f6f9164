"""Any order of arrivals, cancels, loads, unloads, faults and time: one last event each, nothing lost, nothing mixed."""

from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from fakes import FakeRunner, OverlappingFakeRunner, fake_adapter
from fakes_world import World
from onebase.errors import Overloaded
from onebase_server.engine.config import EngineConfig

ADAPTERS = [fake_adapter(f"adapter{index}", rank=rank) for index, rank in enumerate((8, 8, 16, 16, 32, 64))]

which = st.integers(0, 31)
asks = st.fixed_dictionaries(
    {
        "adapter": st.sampled_from([None, *ADAPTERS]),
        "family": st.integers(0, 1),
        "length": st.integers(1, 10).map(lambda quarter: 4 * quarter) | st.integers(1, 40),
        "n": st.sampled_from([1, 1, 2, 3, 5]),
        "priority": st.integers(0, 2),
        "max_tokens": st.integers(1, 24),
        "temperature": st.sampled_from([0.0, 1.0]),
        "seed": st.integers(0, 3),
        "stop": st.sampled_from([(), (), ("a",), ("\n", "ab"), ("x\n", "\t "), ("1", "2", "3", "4")]),
        "owner": st.sampled_from([None, "ann", "bob"]),
        "patience_s": st.sampled_from([None, None, None, 0.3, 3.0]),
        "min_tokens": st.sampled_from([0, 0, 3]),
    }
)
bursts = st.lists(asks, min_size=1, max_size=4)
moves = st.one_of(
    *[st.tuples(st.just("ask"), bursts)] * 3,
    *[st.tuples(st.just("tick"), st.integers(1, 4))] * 3,
    st.tuples(st.just("run"), st.integers(5, 30)),
    st.tuples(st.just("load"), which),
    st.tuples(st.sampled_from(["cancel", "fail_step", "unload", "preload", "pin", "publish", "break", "mend"]), which),
    st.tuples(st.just("wait"), st.sampled_from([0.01, 0.2, 0.6, 2.5])),
)
worlds = st.fixed_dictionaries(
    {
        "overlapping": st.booleans(),
        "page_size": st.sampled_from([4, 8]),
        "num_pages": st.sampled_from([16, 24, 100]),
        "num_slots": st.integers(1, 3),
        "max_batch_sequences": st.sampled_from([2, 4, 16]),
        "max_batch_tokens": st.sampled_from([16, 40]),
        "rows": st.sampled_from([64, 96, 200]),
        "copy_polls": st.sampled_from([0, 0, 2]),
        "host_budget_bytes": st.sampled_from([0, 2000, 10**9]),
        "prefix_cache": st.sampled_from([True, True, False]),
    }
)


def make_world(overlapping: bool, host_budget_bytes: int = 10**9, prefix_cache: bool = True, **sizes: Any) -> World:
    make = OverlappingFakeRunner if overlapping else FakeRunner
    config = EngineConfig(
        max_queued=24, host_budget_bytes=host_budget_bytes, prefix_cache=prefix_cache, max_failed_steps=1000
    )
    return World(make(max_context=64, **sizes), config)


def ask_for(world: World, patience_s: float | None, family: int, length: int, **how: Any) -> None:
    prompt = [(family * 7 + index * 3) % 250 for index in range(length)]
    deadline = None if patience_s is None else world.clock.now + patience_s
    try:
        world.ask(prompt, deadline=deadline, **how)
    except Overloaded:
        event("overloaded")


def play(world: World, what: str, how: Any) -> None:
    """One move."""
    engine, runner = world.engine, world.runner
    match what:
        case "ask":
            for ask in how:
                ask_for(world, **ask)
        case "tick" | "run":
            for _ in range(how):
                world.clock.now += 0.005
                if what == "run":
                    world.executor.run_all()
                world.tick()
        case "load":
            world.executor.run_one(how)
        case "cancel" if world.asked:
            world.asked[how % len(world.asked)].handle.cancel()
        case "unload":
            engine.unload(ADAPTERS[how % len(ADAPTERS)])
        case "preload" | "pin":
            engine.preload(ADAPTERS[how % len(ADAPTERS)], pin=what == "pin")
        case "publish":
            engine.publish(ADAPTERS[how % len(ADAPTERS)], replaces=ADAPTERS[(how + 1) % len(ADAPTERS)])
        case "break":
            runner.broken.add(ADAPTERS[how % len(ADAPTERS)].digest)
        case "mend":
            runner.broken.discard(ADAPTERS[how % len(ADAPTERS)].digest)
        case "fail_step":
            runner.fail_next = RuntimeError("the device hiccuped")
        case "wait":
            world.clock.now += how


def run_moves(world: World, script: list[tuple[str, Any]]) -> None:
    for what, how in script:
        play(world, what, how)
        world.check()
    world.settle()
    world.check_end()


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(sizes=worlds, script=st.lists(moves, min_size=4, max_size=30))
def test_every_request_ends_once_with_its_own_answer_whatever_happens_around_it(
    sizes: dict[str, Any], script: list[tuple[str, Any]]
) -> None:
    run_moves(make_world(**sizes), script)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(sizes=worlds, script=st.lists(moves, min_size=10, max_size=60))
def test_every_request_ends_once_in_thousands_of_longer_interleavings(
    sizes: dict[str, Any], script: list[tuple[str, Any]]
) -> None:
    run_moves(make_world(**sizes), script)
