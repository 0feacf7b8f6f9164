"""Steps started ahead: which batches may follow, which are taken for the started one, and which are not."""

from dataclasses import replace

import numpy as np

from onebase_server.engine.run_ahead import RunAhead
from onebase_server.engine.runner import SampleRow, StepBatch
from onebase_server.engine.types import SamplingParams

PAGE = 16


def step(states: list[int], position: int, tokens: list[int]) -> StepBatch:
    """Each sequence at `position`, its pages numbered after its state."""
    count = len(states)

    def ints(values: list[int]) -> np.ndarray:
        return np.array(values, dtype=np.int32)

    tables = np.array([[10 * s + p for p in range(position // PAGE + 1)] for s in states], dtype=np.int32)
    rows = [SampleRow(s, SamplingParams(max_tokens=99, temperature=0.0), 0, (1,)) for s in states]
    every = ints(list(range(count)))
    positions = ints([position] * count)
    return StepBatch(
        ints(tokens), positions, ints(list(range(count + 1))), positions + 1, tables, ints([-1] * count), every, rows
    )


def started(states: list[int], position: int, chosen: list[int]) -> RunAhead:
    ahead = RunAhead(PAGE, 512)
    batch = step(states, position, [0] * len(states))
    ahead.put(batch, "fetched", "done")
    ahead.note(batch, np.array(chosen, dtype=np.int32))
    return ahead


def test_the_foreseen_batch_is_taken() -> None:
    taken = started([3, 4, 5], 20, [7, 8, 9]).take(step([3, 4, 5], 21, [7, 8, 9]))
    assert taken is not None
    assert taken.places is not None
    assert taken.places.tolist() == [0, 1, 2]


def test_a_sequence_that_ended_is_left_out() -> None:
    taken = started([3, 4, 5], 20, [7, 8, 9]).take(step([3, 5], 21, [7, 9]))
    assert taken is not None
    assert taken.places is not None
    assert taken.places.tolist() == [0, 2]


def test_anything_new_is_refused() -> None:
    good = step([3, 4], 21, [7, 8])
    others = [
        step([3, 6], 21, [7, 8]),
        step([3, 4], 22, [7, 8]),
        step([3, 4], 21, [7, 1]),
        replace(good, slots=np.array([-1, 0], dtype=np.int32)),
        replace(good, block_tables=good.block_tables + 1),
        replace(good, sample_seqs=np.array([0, 0], dtype=np.int32)),
    ]
    for other in others:
        assert started([3, 4], 20, [7, 8]).take(other) is None
    assert started([3, 4], 20, [7, 8]).take(good) is not None


def test_a_step_whose_tokens_nobody_collected_is_not_taken() -> None:
    ahead = RunAhead(PAGE, 512)
    ahead.put(step([3], 20, [0]), "fetched", "done")
    assert ahead.take(step([3], 21, [0])) is None


def may_start_after(ahead: RunAhead, positions: range, states: list[int]) -> list[bool]:
    return [ahead.may_start(step(states, p, [0] * len(states)), True, None) for p in positions]


def test_it_starts_only_when_steady_and_never_across_a_page() -> None:
    ahead = RunAhead(PAGE, 512)
    assert may_start_after(ahead, range(16, 20), [1, 2]) == [False, False, False, True]
    assert may_start_after(ahead, range(30, 32), [1, 2]) == [True, False]
    assert may_start_after(ahead, range(33, 34), [1, 2, 3]) == [False]


def test_it_does_not_go_on_from_a_step_that_lost_a_sequence() -> None:
    ahead = started([3, 4], 20, [7, 8])
    ahead.may_start(step([4], 20, [8]), True, None)
    batch = step([4], 21, [8])
    taken = ahead.take(batch)
    assert taken is not None
    for _ in range(5):
        allowed = ahead.may_start(batch, True, taken)
    assert not allowed


def test_a_new_sequence_under_an_ended_ones_number_is_not_taken_for_it() -> None:
    """The number comes back at once, and with one page, one length and one token it would look the same."""
    ahead = started([3, 4], 20, [7, 8])
    ahead.release(3)
    assert ahead.take(step([3, 4], 21, [7, 8])) is None
    ahead = started([3, 4], 20, [7, 8])
    ahead.release(3)
    taken = ahead.take(step([4], 21, [8]))
    assert taken is not None
    assert taken.places is not None
    assert taken.places.tolist() == [1]


def test_nothing_of_ended_sequences_is_kept_when_all_have_ended() -> None:
    ahead = started([3, 4], 20, [7, 8])
    ahead.release(3)
    assert ahead._started is not None
    ahead.release(4)
    assert ahead._started is None


def test_steadiness_is_counted_anew_after_an_end() -> None:
    ahead = RunAhead(PAGE, 512)
    assert may_start_after(ahead, range(16, 20), [1, 2]) == [False, False, False, True]
    ahead.release(2)
    assert may_start_after(ahead, range(20, 24), [1, 2]) == [False, False, False, True]
