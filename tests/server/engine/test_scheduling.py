"""Who runs when: budgets, chunks, turns, priorities, starvation, preemption, sharing."""

import gc

import pytest

from fakes import EOS, FakeRunner, fake_adapter
from fakes_world import Asked, World
from onebase.errors import ContextLengthExceeded, DeadlineExceeded, InvalidInput, Overloaded
from onebase_server.engine.config import EngineConfig
from onebase_server.engine.sequence import Sequence, SequenceStatus, resolve_seed
from onebase_server.engine.types import AdapterRef, FinishReason


def make_world(config: EngineConfig | None = None, **sizes: int) -> World:
    runner = FakeRunner(**sizes)  # type: ignore[arg-type]
    runner.keep_batches = True
    return World(runner, config)


def computed_tokens(world: World) -> int:
    return sum(len(batch.token_ids) for batch in world.runner.batches)


def started(world: World, asked: Asked) -> bool:
    return bool(asked.events)


def warm(world: World, *adapters: AdapterRef) -> None:
    """Each adapter in a slot."""
    for adapter in adapters:
        world.engine.preload(adapter)
    for _ in range(3):
        world.tick()
        world.executor.run_all()
    world.tick()


def test_a_long_prompt_is_computed_in_chunks_while_others_decode() -> None:
    world = make_world(max_batch_tokens=32)
    world.runner.reply = lambda digest, prompt: [65] * 50
    short = world.ask([1, 2, 3], max_tokens=12)
    world.tick()
    world.ask(list(range(200)), max_tokens=2)
    before = len(short.events)
    for _ in range(5):
        world.tick()
    assert len(short.events) == before + 5
    assert all(len(batch.token_ids) == 32 for batch in world.runner.batches[1:6])
    assert all(batch.query_starts.tolist()[:2] == [0, 1] for batch in world.runner.batches[1:6])
    world.settle()


def test_one_adapter_s_requests_are_first_come_first_served() -> None:
    world = make_world(max_batch_sequences=1)
    asked = [world.ask([index], max_tokens=2, ignore_eos=True) for index in range(6)]
    finished: list[str] = []
    for _ in range(40):
        world.tick()
        for one in asked:
            if one.handle.is_finished and one.request.id not in finished:
                finished.append(one.request.id)
    assert finished == [one.request.id for one in asked]


def test_a_newcomer_does_not_wait_behind_a_hot_adapter_s_queue() -> None:
    hot, cool = fake_adapter("hot"), fake_adapter("cool")
    world = make_world(max_batch_sequences=2)
    warm(world, hot, cool)
    crowd = [world.ask([index], hot, max_tokens=3, ignore_eos=True) for index in range(50)]
    for _ in range(4):
        world.tick()
    newcomer = world.ask([1], cool, max_tokens=3, ignore_eos=True)
    for _ in range(7):
        world.tick()
    assert newcomer.handle.is_finished
    assert sum(one.handle.is_finished for one in crowd) < 10


def places(world: World, count: int) -> list[str]:
    """Whose requests get a place in the batch, one after the other, one at a time."""
    owners: list[str] = []
    while len(owners) < count:
        world.core.serve()
        waiting = list(world.core.scheduler.waiting)
        world.tick()
        owners += [s.group.request.owner or "" for s in waiting if s.status is not SequenceStatus.WAITING]
    return owners


def test_a_newcomer_s_request_does_not_wait_behind_another_owner_s_crowd_of_adapters() -> None:
    bots = [fake_adapter(f"bot{index}") for index in range(3)]
    world = make_world(max_batch_sequences=1)
    warm(world, *bots)
    for index in range(60):
        world.ask([index], bots[index % 3], max_tokens=1, ignore_eos=True, owner="crowd")
    assert places(world, 5) == ["crowd"] * 5
    for index in range(3):
        world.ask([index], bots[0], max_tokens=1, ignore_eos=True, owner="ann")
    assert places(world, 6).count("ann") == 3, "they take turns"
    world.settle()
    world.check_end()


def test_who_was_away_has_saved_up_no_turns() -> None:
    world = make_world(max_batch_sequences=1)
    for index in range(30):
        world.ask([index], max_tokens=1, ignore_eos=True, owner="bob")
        world.ask([index], max_tokens=1, ignore_eos=True, owner="cat")
    places(world, 20)
    for index in range(30):
        world.ask([index], max_tokens=1, ignore_eos=True, owner="ann")
    turns = places(world, 12)
    assert all(turns.count(owner) == 4 for owner in ("ann", "bob", "cat")), turns


def test_a_request_for_many_answers_takes_as_many_turns() -> None:
    world = make_world(max_batch_sequences=4)
    for index in range(6):
        world.ask([index], n=4, max_tokens=1, ignore_eos=True, owner="crowd")
        world.ask([index], n=4, max_tokens=1, ignore_eos=True, owner="crowd2")
    world.tick()
    small = [world.ask([index], max_tokens=1, ignore_eos=True, owner="ann") for index in range(8)]
    for _ in range(6):
        world.tick()
    assert sum(one.handle.is_finished for one in small) >= 7
    world.settle()
    world.check_end()


def test_owners_come_and_go_and_leave_nothing_in_the_queue() -> None:
    world = make_world(max_batch_sequences=1)
    world.checks_ticks = world.runner.keep_batches = False
    waiting = world.core.scheduler.waiting
    for index in range(600):
        world.asked = [world.ask([1], max_tokens=1, owner=f"owner{index}") for _ in range(2)]
        world.tick()
        while len(waiting) > 2:
            world.tick()
        assert len(waiting) > 0, "or this says nothing"
    assert len(waiting._lines) < 270


def test_lower_priority_numbers_run_first() -> None:
    world = make_world(max_batch_sequences=1)
    world.ask([1], max_tokens=4, ignore_eos=True)
    world.tick()
    late = world.ask([2], priority=5, max_tokens=2, ignore_eos=True)
    urgent = world.ask([3], priority=-1, max_tokens=2, ignore_eos=True)
    for _ in range(5):
        world.tick()
    assert started(world, urgent)
    assert not started(world, late)


def test_an_urgent_request_takes_the_place_of_a_less_urgent_one_which_finishes_later_unchanged() -> None:
    world = make_world(max_batch_sequences=2)
    patient = [world.ask([index], priority=1, max_tokens=40, ignore_eos=True) for index in range(2)]
    for _ in range(3):
        world.tick()
    urgent = world.ask([3], priority=0, max_tokens=3, ignore_eos=True)
    for _ in range(5):
        world.tick()
    assert urgent.handle.is_finished
    assert not any(one.handle.is_finished for one in patient)
    assert world.core.scheduler.num_preempted == 1
    world.settle()
    world.check_end()


def test_an_urgent_request_takes_the_pages_of_a_less_urgent_one() -> None:
    world = make_world(page_size=4, num_pages=10, max_context=40)
    world.ask([1] * 8, priority=1, max_tokens=32, ignore_eos=True)
    for _ in range(16):
        world.tick()
    urgent = world.ask([2] * 20, priority=0, max_tokens=3, ignore_eos=True)
    for _ in range(6):
        world.tick()
    assert urgent.handle.is_finished
    world.settle()
    world.check_end()


def test_an_adapter_without_a_slot_gets_in_past_the_wait_threshold_although_others_never_pause() -> None:
    config = EngineConfig(fairness_wait_s=1.0, drain_limit_s=2.0)
    hot, starved = fake_adapter("hot"), fake_adapter("starved")
    world = make_world(config, num_slots=1, max_batch_sequences=4)
    warm(world, hot)
    waiting: Asked | None = None
    begin = world.clock.now
    for index in range(400):
        if len(world.core.requests.groups) < 6:
            world.ask([index % 200], hot, max_tokens=20, ignore_eos=True)
        if index == 10:
            waiting = world.ask([7], starved, max_tokens=2)
        world.clock.now += 0.05
        world.executor.run_all()
        world.tick()
        if waiting is not None and waiting.handle.is_finished:
            break
    assert waiting is not None
    assert waiting.handle.is_finished
    # 0.5 s to its arrival, 1 s of patience, at most 20 tokens of drain (1 s), and its own two tokens.
    assert world.clock.now - begin < 3.2
    world.settle()
    world.check_end()


def test_a_drain_that_takes_too_long_preempts_and_the_preempted_finish_with_the_same_tokens() -> None:
    config = EngineConfig(fairness_wait_s=0.1, drain_limit_s=0.3)
    hot, starved = fake_adapter("hot"), fake_adapter("starved")
    world = make_world(config, num_slots=1)
    warm(world, hot)
    long = world.ask([1, 2, 3], hot, max_tokens=300, ignore_eos=True)
    world.tick()
    waiting = world.ask([7], starved, max_tokens=2)
    for _ in range(30):
        world.clock.now += 0.05
        world.executor.run_all()
        world.tick()
    assert waiting.handle.is_finished
    assert not long.handle.is_finished
    world.settle()
    world.check_end()


def test_the_slot_that_was_drained_for_a_starved_adapter_goes_to_it_and_to_nobody_before_it() -> None:
    config = EngineConfig(fairness_wait_s=0.1, drain_limit_s=60.0)
    hot, starved, urgent = (fake_adapter(name) for name in ("hot", "starved", "urgent"))
    world = make_world(config, num_slots=1)
    warm(world, hot)
    world.ask([1], hot, max_tokens=10, ignore_eos=True)
    world.tick()
    waiting = world.ask([2], starved, max_tokens=20, ignore_eos=True)
    for _ in range(4):
        world.clock.now += 0.05
        world.executor.run_all()
        world.tick()
    late = world.ask([3], urgent, priority=-1, max_tokens=1)
    for _ in range(12):
        world.clock.now += 0.001
        world.executor.run_all()
        world.tick()
    assert started(world, waiting)
    assert not started(world, late)
    world.settle()
    world.check_end()


def test_an_adapter_that_needs_the_rows_of_two_gets_in_although_small_ones_keep_coming() -> None:
    """Rows freed for one must not be taken by others again and again (found by the interleavings)."""
    config = EngineConfig(fairness_wait_s=0.1, drain_limit_s=60.0)
    small = [fake_adapter(f"small{index}", rank=32) for index in range(6)]
    large = fake_adapter("large", rank=64)
    world = make_world(config, num_slots=2, rows=64, max_batch_sequences=8)
    waiting: Asked | None = None
    for index in range(300):
        if len(world.core.requests.groups) < 6:
            world.ask([index % 200], small[index % 6], max_tokens=10, ignore_eos=True)
        if index == 10:
            waiting = world.ask([7], large, max_tokens=2)
        world.clock.now += 0.05
        world.executor.run_all()
        world.tick()
        if waiting is not None and waiting.handle.is_finished:
            break
    assert waiting is not None
    assert waiting.handle.is_finished
    assert index < 60
    world.settle()
    world.check_end()


def test_requests_go_on_while_another_s_adapter_loads() -> None:
    world = make_world()
    loading = world.ask([1], fake_adapter("slow"), max_tokens=2)
    other = world.ask([2], max_tokens=2, ignore_eos=True)
    for _ in range(3):
        world.tick()
    assert other.handle.is_finished
    assert not started(world, loading)
    world.settle()
    world.check_end()


def test_n_answers_share_one_prefill_and_differ_by_their_seeds() -> None:
    world = make_world(page_size=16)
    asked = world.ask(list(range(100)), n=4, temperature=1.0, max_tokens=6, ignore_eos=True)
    world.tick()
    assert computed_tokens(world) == 100
    assert world.runner.batches[0].sample_seqs.tolist() == [0, 0, 0, 0]
    world.settle()
    world.check_end()
    assert computed_tokens(world) == 100 + 4 * 5
    assert len({tuple(t for e in asked.of(index) for t in e.token_ids) for index in range(4)}) == 4


def test_n_answers_hold_the_prompt_s_pages_once_and_copy_only_the_last_one() -> None:
    world = make_world(page_size=16)
    world.ask(list(range(100)), n=4, temperature=1.0, max_tokens=2, ignore_eos=True)
    world.tick()
    assert world.core.scheduler.pages.num_held == 6 + 4


def test_more_answers_than_places_come_one_after_the_other() -> None:
    world = make_world(max_batch_sequences=2)
    world.ask(list(range(50)), n=7, temperature=1.0, max_tokens=5)
    world.settle()
    world.check_end()


def test_the_second_request_computes_only_what_the_first_did_not_share() -> None:
    world = make_world(page_size=16)
    world.ask(list(range(200)), max_tokens=1)
    world.settle()
    before = computed_tokens(world)
    second = world.ask([*range(180), 7, 7], max_tokens=1)
    world.settle()
    usage = second.events[-1].usage
    assert usage is not None
    assert usage.cached_tokens == 176
    assert computed_tokens(world) - before == 182 - 176
    world.check_end()


def test_the_next_turn_of_a_conversation_finds_the_answer_cached_too() -> None:
    world = make_world(page_size=4)
    first = world.ask([1, 2, 3, 4, 5], max_tokens=12, ignore_eos=True)
    world.settle()
    answer = [token for event in first.events for token in event.token_ids]
    second = world.ask([1, 2, 3, 4, 5, *answer, 9, 9], max_tokens=1)
    world.settle()
    usage = second.events[-1].usage
    assert usage is not None
    assert usage.cached_tokens == 16
    world.check_end()


def test_a_prompt_that_is_cached_to_its_last_page_still_computes_a_token() -> None:
    world = make_world(page_size=4)
    for _ in range(2):
        asked = world.ask(list(range(16)), max_tokens=3)
        world.settle()
    usage = asked.events[-1].usage
    assert usage is not None
    assert usage.cached_tokens == 12
    world.check_end()


def test_another_version_shares_nothing() -> None:
    world = make_world(page_size=4)
    for version in (1, 2):
        asked = world.ask(list(range(40)), fake_adapter("name", version), max_tokens=2)
        world.settle()
        usage = asked.events[-1].usage
        assert usage is not None
        assert usage.cached_tokens == 0
    world.check_end()


@pytest.mark.parametrize("shares", [False, True])
def test_what_one_owner_asked_is_cached_for_another_only_if_they_share(shares: bool) -> None:
    world = make_world(EngineConfig(share_prefixes=shares), page_size=4)
    cached = []
    for owner in ("ann", "bob", "ann", None):
        asked = world.ask(list(range(40)), max_tokens=1, owner=owner)
        world.settle()
        usage = asked.events[-1].usage
        assert usage is not None
        cached.append(usage.cached_tokens)
    assert cached == ([0, 36, 36, 36] if shares else [0, 0, 36, 0])
    world.check_end()


def test_two_owners_who_ask_the_same_at_once_do_not_wait_for_each_other() -> None:
    world = make_world(page_size=16, max_batch_tokens=64)
    for owner in ("ann", "bob"):
        world.ask(list(range(161)), max_tokens=1, owner=owner)
    world.settle()
    assert computed_tokens(world) == 2 * 161


def test_a_prefix_that_several_ask_for_at_once_is_computed_once() -> None:
    world = make_world(page_size=16, max_batch_tokens=64)
    for index in range(8):
        world.ask([*range(160), index], max_tokens=1)
    world.settle()
    assert computed_tokens(world) == 161 + 7
    world.check_end()


def test_when_pages_run_out_the_last_comer_is_preempted_and_all_finish() -> None:
    world = make_world(page_size=4, num_pages=12, max_context=48)
    for index in range(3):
        world.ask([index] * 8, max_tokens=30, ignore_eos=True)
    world.settle()
    assert 0 < world.core.scheduler.num_preempted <= 4
    world.check_end()


def test_answers_of_one_request_that_were_preempted_leave_the_queue_each_by_itself() -> None:
    """They once had the same turn, and the wrong one was taken out (found by the interleavings)."""
    world = make_world(page_size=4, num_pages=16, max_context=64, max_batch_sequences=4, max_batch_tokens=16)
    for _ in range(3):
        world.ask([0], max_tokens=1)
    for _ in range(12):
        asked = world.ask([index * 3 for index in range(35)], n=5, max_tokens=17, deadline=world.clock.now + 0.3)
        for _ in range(8):
            world.clock.now += 0.02
            world.tick()
        asked.handle.cancel()
    world.settle()
    assert world.core.scheduler.num_preempted > 0
    world.check_end()


def test_a_prompt_too_long_for_context_or_pages_is_refused_before_it_is_queued() -> None:
    world = make_world(max_context=64, page_size=4, num_pages=8)
    world.ask(list(range(31)), max_tokens=1)
    with pytest.raises(ContextLengthExceeded, match="32 tokens"):
        world.ask(list(range(32)), max_tokens=1)
    assert world.engine.stats().num_queued == 1
    world.settle()


def test_max_tokens_is_clipped_to_the_context() -> None:
    world = make_world(max_context=40)
    asked = world.ask(list(range(30)), max_tokens=10_000, ignore_eos=True)
    world.settle()
    last = asked.events[-1]
    assert last.finish_reason is FinishReason.LENGTH
    assert last.usage is not None
    assert last.usage.completion_tokens == 10


@pytest.mark.parametrize(
    ("prompt", "n", "max_tokens", "param"),
    [([], 1, 1, "prompt"), ([300], 1, 1, "prompt"), ([1], 0, 1, "n"), ([1], 1, 0, "max_tokens")],
)
def test_a_request_that_makes_no_sense_is_refused_by_the_field(
    prompt: list[int], n: int, max_tokens: int, param: str
) -> None:
    world = make_world()
    with pytest.raises(InvalidInput) as caught:
        world.ask(prompt, n=n, max_tokens=max_tokens)
    assert caught.value.param == param


def test_a_full_queue_refuses_with_a_time_to_retry_and_takes_requests_again_later() -> None:
    world = make_world(EngineConfig(max_queued=4))
    world.ask([1], n=3)
    with pytest.raises(Overloaded) as caught:
        world.ask([1], n=2)
    assert 1.0 <= caught.value.retry_after_s <= 60.0
    world.ask([1])
    world.tick()
    world.ask([1], n=4)
    world.settle()
    world.check_end()


def test_who_fills_the_queue_shuts_out_only_himself() -> None:
    world = make_world(EngineConfig(max_queued=32))
    for index in range(32):
        world.ask([index], owner="crowd")
    with pytest.raises(Overloaded):
        world.ask([1], owner="crowd")
    world.ask([1], owner="ann")
    with pytest.raises(Overloaded):
        world.ask([1], owner="ann")
    world.ask([1], owner="bob")
    with pytest.raises(Overloaded):
        world.ask([1], owner="cat")  # what was kept is taken
    world.settle()
    world.check_end()
    assert world.engine.room.queued_of == {}


def test_a_deadline_ends_waiting_and_running_requests_with_its_own_error() -> None:
    world = make_world(max_batch_sequences=1)
    running = world.ask([1], max_tokens=400, ignore_eos=True, deadline=world.clock.now + 1)
    waiting = world.ask([2], deadline=world.clock.now + 1)
    for _ in range(5):
        world.tick()
    world.clock.now += 2
    world.tick()
    for asked in (running, waiting):
        assert asked.events[-1].finish_reason is FinishReason.ERROR
        assert isinstance(asked.events[-1].error, DeadlineExceeded)
    world.check_end()


def test_eos_before_min_tokens_does_not_end_a_sequence_and_after_it_does() -> None:
    runner = FakeRunner(reply=lambda digest, prompt: [65, EOS, 66, EOS, 67])
    world = World(runner)
    asked = world.ask([1], max_tokens=9, min_tokens=2)
    world.settle()
    assert "".join(event.text for event in asked.events) == "AB"
    assert asked.events[-1].finish_reason is FinishReason.STOP


def test_a_failed_step_ends_what_was_in_it_and_nothing_else() -> None:
    world = make_world(max_batch_sequences=2)
    broken = [world.ask([index], max_tokens=9, ignore_eos=True, n=2) for index in range(1)]
    spared = world.ask([9], max_tokens=3, ignore_eos=True)
    world.tick()
    world.runner.fail_next = RuntimeError("boom")
    world.tick()
    for index in range(2):
        last = broken[0].of(index)[-1]
        assert last.finish_reason is FinishReason.ERROR
        assert "boom" in str(last.error)
    world.settle()
    assert spared.events[-1].finish_reason is FinishReason.LENGTH
    world.check_end()


def test_a_failed_prefill_ends_the_answers_that_waited_for_it_too() -> None:
    world = make_world(max_batch_tokens=32)
    asked = world.ask(list(range(100)), n=3)
    world.runner.fail_next = RuntimeError("boom")
    world.tick()
    assert [asked.of(index)[-1].finish_reason for index in range(3)] == [FinishReason.ERROR] * 3
    world.check_end()


def test_a_choice_s_seed_is_a_fixed_function_of_the_request_s_seed_and_its_index() -> None:
    assert resolve_seed(42, 0) == 11333418131707688997
    assert resolve_seed(42, 1) == 2857453745511944150


def test_a_queue_that_is_never_empty_forgets_the_adapters_that_are_through() -> None:
    world = make_world(max_batch_sequences=1, num_slots=2)
    world.checks_ticks = world.runner.keep_batches = False
    waiting = world.core.scheduler.waiting
    for index in range(400):
        world.asked = [world.ask([1], fake_adapter("bot", index), max_tokens=1), world.ask([1], max_tokens=1)]
        world.executor.run_all()
        world.tick()
        while len(waiting) > 2:
            world.clock.now += 0.02
            world.tick()
        assert len(waiting) > 0, "or this says nothing"
    assert len(waiting._lines[None]._next_tag) < 270


def test_a_request_that_has_ended_is_freed_without_the_garbage_collector() -> None:
    world = make_world()
    gc.collect()
    gc.disable()
    try:
        for index in range(20):
            world.ask([index], n=3, max_tokens=4, deadline=2000.0)
        cancelled = world.ask([99], n=2, max_tokens=50)
        world.tick()
        cancelled.handle.cancel()
        world.settle()
        world.asked.clear()
        world.runner.batches.clear()
        left = sum(isinstance(each, Sequence) for each in gc.get_objects())
    finally:
        gc.enable()
    assert left == 0
