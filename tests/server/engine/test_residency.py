"""Where versions are: single flight, budgets, leases, drains, failures, and memory that comes back."""

from concurrent.futures import Future

import pytest

from fakes import FakeRunner, fake_adapter
from fakes_world import World
from onebase.errors import AdapterInvalid, Conflict, EngineError
from onebase_server.engine.config import EngineConfig
from onebase_server.engine.residence import AdapterStatus, Place
from onebase_server.engine.runner import HostAdapter
from onebase_server.engine.types import AdapterRef, FinishReason


def status(world: World, ref: AdapterRef) -> AdapterStatus:
    listed = world.engine.adapters()
    world.core.serve()
    return next(line for line in listed.result(0) if line.ref == ref)


def load_all(world: World) -> None:
    world.core.serve()
    world.executor.run_all()
    world.tick()
    world.tick()


def test_requests_for_one_version_read_its_files_once() -> None:
    world = World(FakeRunner())
    for index in range(5):
        world.ask([index], fake_adapter("a"))
    world.settle()
    assert world.runner.reads == ["a@1"]
    world.check_end()


def test_an_adapter_in_memory_is_not_read_again_and_counts_as_a_hit() -> None:
    world = World(FakeRunner())
    for index in range(3):
        world.ask([index], fake_adapter("a"))
        world.settle()
    line = status(world, fake_adapter("a"))
    assert (line.place, line.loads, line.hits, line.misses, line.leases) == (Place.SLOT, 1, 2, 1, 0)
    assert line.last_used is not None
    assert line.load_s is not None


def test_slots_are_taken_from_the_version_used_longest_ago() -> None:
    world = World(FakeRunner(num_slots=2))
    for name in ("a", "b", "a", "c"):
        world.ask([1], fake_adapter(name))
        world.settle()
    assert sorted(world.runner.loaded.values()) == ["a@1", "c@1"]
    assert status(world, fake_adapter("b")).place is Place.HOST


def test_host_memory_stays_in_its_budget_and_drops_the_oldest() -> None:
    world = World(FakeRunner(num_slots=2), EngineConfig(host_budget_bytes=2500))
    for index in range(10):
        world.ask([1], fake_adapter(f"a{index}"))
        world.settle()
        assert world.core.residency.hosts.bytes <= 2500
    assert world.core.residency.hosts.bytes == 2400
    world.check_end()


def test_many_versions_wanted_at_once_overdraw_the_budget_by_little() -> None:
    world = World(FakeRunner(num_slots=2, max_batch_sequences=4), EngineConfig(host_budget_bytes=2500))
    for index in range(40):
        world.ask([1], fake_adapter(f"a{index}"), max_tokens=3)
    most = 0
    for _ in range(600):
        world.executor.run_all()
        world.clock.now += 0.02
        world.tick()
        most = max(most, world.core.residency.hosts.bytes)
    assert most <= 2500 + 4 * 800
    world.settle()
    world.check_end()


def test_a_thousand_swaps_leave_no_byte_behind() -> None:
    world = World(FakeRunner(num_slots=2), EngineConfig(host_budget_bytes=10**9, max_known_adapters=16))
    world.checks_ticks = False
    old: AdapterRef | None = None
    for version in range(1, 1001):
        ref = fake_adapter("a", version, rank=8 + version % 3)
        world.engine.publish(ref, replaces=old)
        world.ask([version % 250, 2], ref, max_tokens=2)
        world.settle()
        world.check_choice(world.asked.pop(), 0)
        assert world.core.residency.hosts.bytes <= 1000
        assert world.runner.used_rows <= 10
        old = ref
    assert old is not None
    done = world.engine.unload(old)
    world.tick()
    assert done.done()
    assert world.core.residency.hosts.bytes == 0
    assert world.runner.loaded == {}
    assert len(world.core.residency._known) <= 16
    world.check_end()


def test_a_deleted_version_is_forgotten_once_its_last_request_has_ended() -> None:
    ref, other = fake_adapter("a"), fake_adapter("b")
    world = World(FakeRunner())
    world.ask([1], ref, max_tokens=4, ignore_eos=True)
    world.ask([1], other, max_tokens=4, ignore_eos=True)
    load_all(world)
    deleted, unloaded = world.engine.unload(ref, forget=True), world.engine.unload(other)
    world.tick()
    assert status(world, ref).leases == 1
    world.settle()
    assert deleted.done()
    assert unloaded.done()
    assert [each.ref for each in world.core.residency.status()] == [other]
    assert world.runner.loaded == {}
    world.ask([1], ref, max_tokens=1)  # its content came back under another name
    world.settle()
    assert status(world, ref).misses == 1
    world.check_end()


def test_unloading_waits_for_running_and_waiting_requests_and_then_frees() -> None:
    ref = fake_adapter("a")
    world = World(FakeRunner(max_batch_sequences=1))
    asked = [world.ask([index], ref, max_tokens=4, ignore_eos=True) for index in range(2)]
    load_all(world)
    done = world.engine.unload(ref)
    world.tick()
    assert not done.done()
    assert status(world, ref).leases == 2
    world.settle()
    assert done.done()
    assert [one.events[-1].finish_reason for one in asked] == [FinishReason.LENGTH] * 2
    assert status(world, ref).place is Place.DISK
    world.check_end()


def test_running_requests_finish_on_their_version_while_the_next_one_serves() -> None:
    first, second = fake_adapter("a", 1), fake_adapter("a", 2)
    world = World(FakeRunner())
    world.ask([1, 2], first, max_tokens=30, ignore_eos=True)
    load_all(world)
    world.engine.publish(second, replaces=first)
    world.ask([1, 2], second, max_tokens=5, ignore_eos=True)
    load_all(world)
    world.tick()
    assert sorted(world.runner.loaded.values()) == ["a@1", "a@2"]
    world.settle()
    assert list(world.runner.loaded.values()) == ["a@2"]
    world.check_end()


def test_broken_files_fail_their_requests_with_the_reason_and_nobody_else() -> None:
    world = World(FakeRunner())
    world.runner.broken.add("bad@1")
    bad = [world.ask([index], fake_adapter("bad"), n=2) for index in range(2)]
    good = world.ask([1], fake_adapter("good"))
    world.settle()
    for asked in bad:
        for index in range(2):
            assert isinstance(asked.of(index)[-1].error, AdapterInvalid)
    assert good.events[-1].finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
    assert status(world, fake_adapter("bad")).error is not None
    world.check_end()


def test_a_failed_load_is_remembered_for_a_moment_and_then_tried_again() -> None:
    world = World(FakeRunner(), EngineConfig(failed_load_ttl_s=2.0))
    ref = fake_adapter("bad")
    world.runner.broken.add("bad@1")
    world.ask([1], ref)
    world.settle()
    world.ask([1], ref)
    world.tick()
    assert world.asked[-1].handle.is_finished
    assert world.runner.reads == ["bad@1"]
    world.runner.broken.clear()
    world.clock.now += 3
    mended = world.ask([1], ref)
    world.settle()
    assert mended.events[-1].error is None
    assert status(world, ref).error is None
    world.check_end()


def test_preload_brings_a_version_to_a_slot_before_anyone_asks() -> None:
    world = World(FakeRunner())
    done = world.engine.preload(fake_adapter("a"))
    load_all(world)
    assert done.result(0) is None
    assert status(world, fake_adapter("a")).place is Place.SLOT


def test_preload_of_broken_files_says_why() -> None:
    world = World(FakeRunner())
    world.runner.broken.add("bad@1")
    done = world.engine.preload(fake_adapter("bad"))
    load_all(world)
    with pytest.raises(AdapterInvalid, match="broken"):
        done.result(0)


def test_pinned_versions_stay_and_one_slot_must_stay_free_of_pins() -> None:
    world = World(FakeRunner(num_slots=2), EngineConfig(host_budget_bytes=0))
    world.engine.preload(fake_adapter("pinned"), pin=True)
    load_all(world)
    for index in range(5):
        world.ask([1], fake_adapter(f"a{index}"))
        world.settle()
    line = status(world, fake_adapter("pinned"))
    assert (line.place, line.pinned, line.loads) == (Place.SLOT, True, 1)
    refused: Future[None] = world.engine.preload(fake_adapter("another"), pin=True)
    world.tick()
    with pytest.raises(Conflict):
        refused.result(0)
    world.engine.unpin(fake_adapter("pinned"))
    for index in range(5):
        world.ask([1], fake_adapter(f"b{index}"))
        world.settle()
    assert status(world, fake_adapter("pinned")).place is Place.DISK


def test_an_adapter_too_large_for_the_rows_fails_and_the_others_go_on() -> None:
    world = World(FakeRunner(rows=32))
    large = world.ask([1], fake_adapter("large", rank=64))
    small = world.ask([1], fake_adapter("small", rank=8))
    world.settle()
    assert isinstance(large.events[-1].error, EngineError)
    assert "rows" in str(large.events[-1].error)
    assert small.events[-1].error is None
    world.check_end()


def test_an_adapter_that_never_fits_and_is_asked_for_all_the_time_holds_up_nobody() -> None:
    world = World(FakeRunner(num_slots=2, rows=64), EngineConfig(fairness_wait_s=0.02, drain_limit_s=0.02))
    others = []
    for round_ in range(40):
        world.ask([1, round_], fake_adapter("huge", rank=65), max_tokens=4)
        others += [world.ask([2, round_], fake_adapter(name), max_tokens=4) for name in ("a", "b")]
        for _ in range(3):
            world.executor.run_all()
            world.clock.now += 0.02
            world.tick()
    world.settle()
    reasons = {event.finish_reason for asked in others for event in asked.events if event.finish_reason}
    assert reasons <= {FinishReason.STOP, FinishReason.LENGTH}
    world.check_end()


def test_a_copy_that_fails_ends_its_own_requests_and_gives_the_slot_back() -> None:
    class Refusing(FakeRunner):
        def load_slot(self, slot: int, adapter: HostAdapter) -> None:
            raise RuntimeError("no memory left")

    world = World(Refusing(num_slots=1))
    asked = world.ask([1], fake_adapter("a"))
    base = world.ask([1])
    world.settle()
    assert "no memory left" in str(asked.events[-1].error)
    assert base.events[-1].error is None
    world.check_end()


def test_a_version_is_not_used_before_its_copy_has_finished() -> None:
    world = World(FakeRunner(copy_polls=3))
    asked = world.ask([1], fake_adapter("a"))
    load_all(world)
    assert status(world, fake_adapter("a")).place is Place.COPYING
    assert not asked.events
    world.settle()
    world.check_end()


@pytest.mark.parametrize("copy_polls", [0, 3])
def test_a_version_that_the_device_finds_not_finite_is_refused_and_its_slot_serves_the_next(copy_polls: int) -> None:
    world = World(FakeRunner(num_slots=1, copy_polls=copy_polls))
    world.runner.not_finite.add("bad@1")
    bad = [world.ask([index], fake_adapter("bad"), n=2) for index in range(2)]
    good = world.ask([1], fake_adapter("good"))
    world.settle()
    for asked in bad:
        for index in range(2):
            assert isinstance(asked.of(index)[-1].error, AdapterInvalid)
    assert good.events[-1].error is None
    line = status(world, fake_adapter("bad"))
    assert (line.place, line.host_bytes) == (Place.DISK, 0)
    assert "not finite" in str(line.error)
    world.check_end()


@pytest.mark.parametrize("copy_polls", [0, 3])
def test_preload_waits_for_what_the_device_says_of_the_values(copy_polls: int) -> None:
    world = World(FakeRunner(copy_polls=copy_polls))
    world.runner.not_finite.add("bad@1")
    first = world.engine.preload(fake_adapter("bad"))
    world.core.serve()
    world.executor.run_all()
    world.core.serve()
    second = world.engine.preload(fake_adapter("good"))
    load_all(world)
    for _ in range(4):
        world.tick()
    with pytest.raises(AdapterInvalid, match="not finite"):
        first.result(0)
    assert second.result(0) is None


def test_known_versions_are_bounded() -> None:
    world = World(FakeRunner(num_slots=2), EngineConfig(host_budget_bytes=0, max_known_adapters=8))
    for index in range(30):
        world.ask([1], fake_adapter(f"a{index}"), max_tokens=1)
        world.settle()
    assert len(world.core.residency._known) <= 8
    world.check_end()
